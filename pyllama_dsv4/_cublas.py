"""Finds cuBLAS for builds for NVIDIA GPUs: the one library that they neither contain nor find by themselves.

pip's ``nvidia-cublas`` lies in a folder where the dynamic linker does not look. Used by ``_native`` only, after the
import of the native module has failed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

__all__ = ["advice", "load_for"]


def _major(error: ImportError) -> str | None:
    match = re.search(r"libcublas(?:Lt)?\.so\.(\d+)", str(error))
    return match[1] if match else None


def load_for(error: ImportError) -> bool:
    """Load pip's cuBLAS if `error` says that it is missing; returns whether another try is worth it.

    Raises:
        OSError: The library is there, but cannot be loaded.
    """
    major = _major(error)
    spec = importlib.util.find_spec("nvidia") if major else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / f"cu{major}" / "lib"
        if (folder / f"libcublas.so.{major}").exists():
            for name in ("libcublasLt", "libcublas"):  # the second needs the first
                ctypes.CDLL(str(folder / f"{name}.so.{major}"), mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def advice(error: ImportError) -> str:
    """Return what to do about a missing cuBLAS."""
    major = _major(error)
    return f"pip install 'nvidia-cublas=={major}.*'" if major else "pip install nvidia-cublas"
