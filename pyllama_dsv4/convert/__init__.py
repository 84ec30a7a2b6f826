"""Conversion of hub-form DeepSeek-V4 checkpoints to native-dialect GGUF files, and back, without changing one code.

``convert`` writes the file, ``compare_tensor`` proves one tensor of it. ``write_recipe`` keeps what the file does not
hold of its checkpoint, and ``restore`` rebuilds the checkpoint's shards from both. Inside: ``plan`` checks and lays
out, ``metadata``, ``tokenizer`` and ``template`` make the keys, ``repack`` makes the tensor bytes and ``unpack`` takes
them apart, ``writer`` writes the container, ``output`` and ``journal`` survive interruptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, read_recipe, write_recipe
from .run import OUTTYPES, ConvertResult, convert
from .writer import Progress

if TYPE_CHECKING:
    from .compare import TensorComparison, compare_tensor
    from .rebuild import LeftOut, RestoreResult, restore

__all__ = [
    "OUTTYPES",
    "ConvertResult",
    "LeftOut",
    "Progress",
    "Recipe",
    "RestoreResult",
    "TensorComparison",
    "compare_tensor",
    "convert",
    "read_recipe",
    "restore",
    "write_recipe",
]

# these need the compiled codecs, which planning does without
_LAZY = {
    "LeftOut": "rebuild",
    "RestoreResult": "rebuild",
    "restore": "rebuild",
    "TensorComparison": "compare",
    "compare_tensor": "compare",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
