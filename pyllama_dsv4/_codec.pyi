"""Types and documentation of the extension module `_codec`, which native/codec/module.cpp implements.

FP8 and FP4 codecs over numpy arrays: single codes (E4M3, E8M0, E2M1), the two GGUF block types of the native
file, and the 1:1 repack between them and the checkpoint's tensors. Loads neither ggml nor llama.

Common to all functions:

* Arrays must be C-contiguous, aligned, and of the stated dtype in native byte order. Nothing is converted or
  copied, so a memory-mapped tensor stays one; read-only input is fine, zero-size arrays too. Bytes of another
  one-byte type (int8, a float8 of ml_dtypes) are passed as `array.view(numpy.uint8)`.
* Results are new arrays owned by the caller, except with `out`.
* The GIL is released during the work. `n_threads` is the largest number of threads to use, 0 for one per
  core; small arrays use fewer. The result does not depend on it, nor on the calling thread's rounding mode or
  flush-to-zero flags.
* Raises TypeError for an object that is not an array or has another dtype, ValueError for a wrong shape,
  layout or value. The message names the function, the argument, what was found and what was expected.

Shapes below: `...` stands for any leading dimensions; a *block* is the smallest unit of a block type, always
along the last dimension.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

_U8: TypeAlias = NDArray[np.uint8]
_F32: TypeAlias = NDArray[np.float32]

class BlockStats(NamedTuple):
    """Bytes of a tensor that no sound converter or quantiser writes, or that deserve a look.

    Counts are blocks (`n_scale_*`) and values (`n_code_nan`); `i_*` is the flat index of the first block
    concerned, -1 if there is none. Block i of a tensor with b blocks per row is block i % b of row i // b.
    """

    n_blocks: int
    n_scale_nan: int
    """Scale byte 255: the whole block is NaN. Never valid in a weight."""
    i_scale_nan: int
    n_scale_zero: int
    """Scale byte 0, 2**-127: an all-zero block of a quantiser, or storage that was never written."""
    i_scale_zero: int
    n_code_nan: int
    """E4M3 codes 0x7F and 0xFF. Always 0 for MXFP4, whose codes have no NaN."""
    i_code_nan: int

# --- single codes ------------------------------------------------------------------------------------------

def e4m3_decode(codes: _U8, *, n_threads: int = 0) -> _F32:
    """Decode E4M3FN codes, (...) uint8 to (...) float32.

    Exact. 0x80 gives -0, 0x7F and 0xFF give NaN of either sign; there is no infinity.
    """

def e4m3_encode(x: _F32, *, n_threads: int = 0) -> _U8:
    """Encode as the nearest E4M3FN code, (...) float32 to (...) uint8.

    Ties go to the even code. Saturates: magnitudes above 448, infinity included, give +-448 (0x7E, 0xFE). NaN
    gives 0x7F or 0xFF by its sign. Subnormal codes are used; the sign of zero is kept.
    """

def e8m0_decode(codes: _U8, *, n_threads: int = 0) -> _F32:
    """Decode E8M0 scale bytes, (...) uint8 to (...) float32: e gives 2**(e - 127), 255 gives NaN.

    0 gives the subnormal 2**-127. MXFP4 in ggml multiplies doubled codes by half of this; `mxfp4_decode` sees
    to that.
    """

def e8m0_encode(x: _F32, *, n_threads: int = 0) -> _U8:
    """Encode powers of two as E8M0 scale bytes, (...) float32 to (...) uint8.

    Raises:
        ValueError: A value is not exactly a power of two in 2**-127 .. 2**127 (zero, negative, infinite,
            NaN); the message has the first one and its index.
    """

def e2m1_decode(codes: _U8, *, n_threads: int = 0) -> _F32:
    """Decode E2M1 codes, one per byte, (...) uint8 to (...) float32. Exact; code 8 gives -0.

    Raises:
        ValueError: A byte is above 15; the message has the first one and its index.
    """

def e2m1_encode(x: _F32, *, n_threads: int = 0) -> _U8:
    """Encode as the nearest E2M1 code, one per byte, (...) float32 to (...) uint8.

    Ties go to the even code. Saturates: magnitudes above 6, infinity included, give +-6. The sign is kept, of
    zero too.

    Raises:
        ValueError: A value is NaN, which has no code; the message has the index of the first.
    """

# --- F8_E4M3_B128: 129 bytes (E8M0 scale, 128 E4M3FN codes) for 128 values ---------------------------------

def f8_e4m3_b128_decode(blocks: _U8, *, n_threads: int = 0) -> _F32:
    """Decode rows of blocks, (..., n/128*129) uint8 to (..., n) float32.

    A value is that of its code times 2**(scale byte - 127): exact, except that products above the float32
    range (scale byte 247 and up) become infinite. NaN codes give NaN; scale byte 255 makes its block NaN. The
    sign of zero is kept.
    """

def f8_e4m3_b128_encode(x: _F32, *, n_threads: int = 0) -> _U8:
    """Quantise rows, (..., n) float32 to (..., n/128*129) uint8; n must be a multiple of 128.

    The scale of a block is the smallest power of two, at least 2**-127, with max |x| <= 448 * scale, found
    with integer arithmetic: 448 * 2**k gives scale byte k + 127. Codes round to nearest, ties to even. An
    all-zero block gets scale byte 0. Values of decoded FP8 weights survive exactly; the bytes may differ,
    since one scale per block can be smaller than the checkpoint's tile scale.

    Non-finite values do not take part in choosing the scale: NaN becomes a NaN code with its sign, infinity
    becomes +-448 times the scale. Look for the former with `f8_e4m3_b128_check`.
    """

def f8_e4m3_b128_pack(weight: _U8, scale: _U8, *, out: _U8 | None = None, n_threads: int = 0) -> _U8:
    """Repack a checkpoint's FP8 matrix and its tile scales as blocks, all bytes copied as they are.

    Args:
        weight: (rows, cols) E4M3FN codes; rows and cols are multiples of 128.
        scale: (rows/128, cols/128) E8M0 bytes, one per 128x128 tile; each is repeated in the 128 rows of its
            tile.
        out: (rows, cols/128*129) uint8, writeable, sharing no memory with the inputs; for example a slice of
            a memory map. None allocates.

    Returns:
        (rows, cols/128*129) uint8: `out` itself if given.
    """

def f8_e4m3_b128_unpack(blocks: _U8, *, n_threads: int = 0) -> tuple[_U8, _U8]:
    """Undo `f8_e4m3_b128_pack`: (rows, cols/128*129) to weight (rows, cols) and scale (rows/128, cols/128).

    Raises:
        ValueError: The 128 rows of a tile do not carry the same scale byte, so that the tensor cannot have
            come from 128x128 tiles; the message has the first such row and block (row-major) and both bytes.
    """

def f8_e4m3_b128_check(blocks: _U8, *, n_threads: int = 0) -> BlockStats:
    """Count suspicious bytes in rows of blocks, (..., n/128*129) uint8."""

# --- MXFP4: 17 bytes (E8M0 scale, 32 E2M1 codes in 16 bytes) for 32 values ---------------------------------

def mxfp4_decode(blocks: _U8, *, n_threads: int = 0) -> _F32:
    """Decode rows of blocks, (..., n/32*17) uint8 to (..., n) float32.

    A value is that of its code times 2**(scale byte - 127), as in ggml: code 8 gives +0, and products above
    the float32 range (scale bytes 253 and 254) become infinite. Only scale byte 255 differs: NaN for the
    block here, a factor of 2**127 on the doubled codes in ggml.
    """

def mxfp4_encode(x: _F32, *, n_threads: int = 0) -> _U8:
    """Quantise rows as ggml does, (..., n) float32 to (..., n/32*17) uint8; n must be a multiple of 32.

    Scale byte floor(log2(max |x|)) - 2 + 127 with the C library's float32 log2, nearest codes, ties to the
    smaller magnitude, no code 8. Byte for byte ggml's result for finite input, except that blocks with 0 <
    max |x| < 2**-125, whose scale is undefined behaviour in ggml, get scale byte 0. (Large values, up to 8
    times the scale, are clipped to 6: this is ggml's rule, not the most accurate one.)

    Non-finite values: NaN becomes code 0, as in ggml; infinity takes no part in choosing the scale and
    becomes the largest finite value of its block's scale.

    Source: ggml-quants.c:quantize_row_mxfp4_ref.
    """

def mxfp4_pack(weight: _U8, scale: _U8, *, out: _U8 | None = None, n_threads: int = 0) -> _U8:
    """Repack a checkpoint's FP4 matrix and its scales as blocks: codes reordered, no bit changed.

    Args:
        weight: (rows, cols/2) bytes of two E2M1 codes, the even column in the low nibble; cols is a multiple
            of 32.
        scale: (rows, cols/32) E8M0 bytes, one per 32 consecutive columns.
        out: (rows, cols/32*17) uint8, writeable, sharing no memory with the inputs; for example a slice of a
            memory map. None allocates.

    Returns:
        (rows, cols/32*17) uint8: `out` itself if given.
    """

def mxfp4_unpack(blocks: _U8, *, n_threads: int = 0) -> tuple[_U8, _U8]:
    """Undo `mxfp4_pack`: (rows, cols/32*17) to weight (rows, cols/2) and scale (rows, cols/32)."""

def mxfp4_check(blocks: _U8, *, n_threads: int = 0) -> BlockStats:
    """Count suspicious bytes in rows of blocks, (..., n/32*17) uint8."""

cpu_features: str
"""Instruction sets that the engine's module was built for, separated by spaces."""

def missing_cpu_features() -> tuple[str, ...]:
    """Return those of `cpu_features` that this CPU lacks: loading the engine would end the process."""
