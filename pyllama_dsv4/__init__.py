"""DeepSeek-V4 from its native FP4/FP8 GGUF, exactly as released: llama.cpp with FP8 weights, from Python.

``Llama`` and the classes beside it load the engine on first use; importing this package, its errors, and everything
that only looks at files (``header``, ``convert``) does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .errors import PyllamaError

if TYPE_CHECKING:
    from .aio import AsyncLlama
    from .generate import GenerationOptions
    from .grammar import Grammar
    from .llama import Llama, SamplingOptions, Stats
    from .sampler import SamplingParams
    from .warmup import Progress

__all__ = [
    "AsyncLlama",
    "GenerationOptions",
    "Grammar",
    "Llama",
    "Progress",
    "PyllamaError",
    "SamplingOptions",
    "SamplingParams",
    "Stats",
    "__version__",
    "errors",
]

_LAZY = {
    "AsyncLlama": "aio",
    "GenerationOptions": "generate",
    "Grammar": "grammar",
    "Llama": "llama",
    "Progress": "warmup",
    "SamplingOptions": "llama",
    "SamplingParams": "sampler",
    "Stats": "llama",
}

__version__: (
    str  # read when asked for: the standard library's reader costs more than all the rest of an import
)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pyllama-dsv4")
    except metadata.PackageNotFoundError:  # imported from a source folder without an install
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("__"):
        from .options import moved

        hint = moved(name)
        if hint is not None:  # an AttributeError would be replaced by a bare "cannot import name"
            raise ImportError(f"pyllama_dsv4 has no {name}, a name of llama-cpp-python. Use {hint}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
