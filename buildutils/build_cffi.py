"""Write the C source of the cffi extension from the committed declarations: build_cffi.py CDEF_H OUTPUT_C."""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI

SOURCE = """
#include "llama.h"
#include "pyllama.h"
"""


def main(cdef_path: str, output_path: str) -> None:
    ffi = FFI()
    ffi.cdef(Path(cdef_path).read_text(encoding="utf-8"))
    ffi.set_source("pyllama_dsv4._llama", SOURCE)
    ffi.emit_c_code(output_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
