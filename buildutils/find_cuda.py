"""Print the folder of pip's CUDA libraries of a major version: ``find_cuda.py 13``; exit code 1 if there is none.

Build time only, called by cmake/cuda.cmake. The packages (``nvidia-cublas`` and others) share one folder,
``nvidia/cu<major>``, with ``include`` and ``lib``. Where the library is found at run time is told by
``pyllama_dsv4/_native.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find(major: str) -> Path | None:
    """Return the folder that holds ``include`` and ``lib``, None if cuBLAS of this version is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / f"cu{major}"
        if (folder / "lib" / f"libcublas.so.{major}").is_file() and (
            folder / "include" / "cublas_v2.h"
        ).is_file():
            return folder
    return None


if __name__ == "__main__":
    found = find(sys.argv[1])
    if found is None:
        sys.exit(1)
    print(found)
