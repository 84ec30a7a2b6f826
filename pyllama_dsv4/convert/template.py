"""Finds the chat template that a converted file gets: upstream's, by generation of the checkpoint.

The templates are upstream's files. The build installs them as package data; a source checkout has them in the
prepared upstream tree. A template of the checkpoint's own is not used: released V4 checkpoints carry none.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from pyllama_dsv4.errors import ModelNotFoundError

__all__ = ["Generation", "chat_template", "generation_of"]

Generation = Literal["preview", "0731"]

# generation: installed name, upstream's name
_FILES: Final[dict[Generation, tuple[str, str]]] = {
    "preview": ("chat_template_v4.jinja", "deepseek-ai-DeepSeek-V4.jinja"),
    "0731": ("chat_template_v4_0731.jinja", "deepseek-ai-DeepSeek-V4-Flash-0731.jinja"),
}
_PACKAGE: Final = __package__.partition(".")[0]


def generation_of(tensor_names: Iterable[str]) -> Generation:
    """Tell the generation of a checkpoint from its draft tensors: 0731 replaced the MTP block by DSpark.

    Source: spec v4-flash-graph section 10; upstream ``conversion/deepseek.py:DeepseekV4DSparkModel``.
    """
    is_dspark = any(
        name.startswith("mtp.") and name.split(".", 2)[-1] == "main_proj.weight" for name in tensor_names
    )
    return "0731" if is_dspark else "preview"


def chat_template(generation: Generation) -> str:
    """Return upstream's chat template for a generation.

    Raises:
        ModelNotFoundError: Neither the package data nor a prepared upstream tree holds it.
    """
    installed_name, upstream_name = _FILES[generation]
    installed = resources.files(_PACKAGE) / "data" / installed_name
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    checkout = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "models" / "templates" / upstream_name
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    raise ModelNotFoundError(
        "the chat template is not installed",
        path=str(installed),
        expected="the file, placed there when the package is built",
        hint="Install the package again, or give a template of your own",
    )
