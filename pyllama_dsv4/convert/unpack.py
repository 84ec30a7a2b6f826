"""Makes the bytes of checkpoint tensors out of output tensors: the inverse of ``repack``, just as exact.

Where the output could not have come from a checkpoint (rows of one tile with different scales, an F32 number that no
BF16 number widens to), it says so instead of choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import _codec
from pyllama_dsv4.checkpoint import DTYPES
from pyllama_dsv4.tensors import TensorSpec

from .plan import GROUP, SCALE_DTYPES, SOURCE_DTYPES, TILE
from .repack import PIECE_BYTES, rows_per_piece
from .writer import Job

__all__ = [
    "Role",
    "UnpackError",
    "source_jobs",
    "source_shape",
    "unpack_blocks",
    "unpack_scales",
    "unpack_values",
]

Bytes = npt.NDArray[np.uint8]

Role = Literal["weight", "scale"]
"""Which of a tensor's checkpoint names is meant; plain tensors have only a weight."""

Read = Callable[[int, int], Bytes]
"""Reads bytes of an output tensor: offset within it, number of bytes."""


class UnpackError(ValueError):
    """The data cannot have come from a checkpoint; the text says what was found. Callers name file and tensor."""


def source_shape(spec: TensorSpec, role: Role) -> tuple[int, ...]:
    """Return the shape of a checkpoint tensor, of one expert in a stack."""
    if spec.kind not in ("f8", "mxfp4"):
        return tuple(reversed(spec.dims))
    cols, rows = spec.dims[:2]
    if role == "weight":
        return (rows, cols if spec.kind == "f8" else cols // 2)
    return (rows // TILE, cols // TILE) if spec.kind == "f8" else (rows, cols // GROUP)


def source_dtypes(spec: TensorSpec, role: Role) -> tuple[str, ...]:
    """Return the dtypes that a checkpoint tensor may have."""
    return SOURCE_DTYPES[spec.kind] if role == "weight" else SCALE_DTYPES


def source_jobs(read: Read, spec: TensorSpec, role: Role, dtype: str, expert: int) -> Iterator[Job]:
    """Yield the jobs whose results, one after the other, are the data of a checkpoint tensor.

    Args:
        read: Reads the output tensor.
        spec: The output tensor.
        role: Which checkpoint tensor of it.
        dtype: Its safetensors dtype.
        expert: Index in the stack; 0 for other tensors.

    Raises (from the jobs):
        UnpackError: The data cannot have come from such a tensor.
    """
    if spec.kind in ("f8", "mxfp4"):
        rows, step = spec.dims[1], rows_per_piece(spec)
        row_bytes = spec.file_type.n_bytes(spec.dims[0])
        for row in range(0, rows, step):
            n = min(step, rows - row)
            yield partial(_blocks, read, spec, role, dtype, (expert * rows + row) * row_bytes, n, row_bytes)
        return
    item = _ITEM_BYTES[spec.kind]
    step = PIECE_BYTES // 8
    for start in range(0, spec.n_elements, step):
        n = min(step, spec.n_elements - start)
        yield partial(_values, read, spec, dtype, start * item, n * item)


_ITEM_BYTES: Final = {"f32": 4, "i32": 4, "bf16": 2}


def _blocks(
    read: Read, spec: TensorSpec, role: Role, dtype: str, start: int, rows: int, row_bytes: int
) -> Bytes:
    blocks = read(start, rows * row_bytes).reshape(rows, row_bytes)
    if role == "weight":
        return unpack_blocks(spec, blocks)[0].reshape(-1)
    # the codes are not wanted: the first byte of each block, of the first row of each tile
    step = TILE if spec.kind == "f8" else 1
    return unpack_scales(blocks[::step, :: spec.file_type.block_bytes], dtype)


def _values(read: Read, spec: TensorSpec, dtype: str, start: int, n_bytes: int) -> Bytes:
    return unpack_values(spec, read(start, n_bytes), dtype)


def unpack_blocks(spec: TensorSpec, blocks: Bytes) -> tuple[Bytes, Bytes]:
    """Undo the packing of rows of a quantised tensor.

    Args:
        spec: The tensor.
        blocks: ``(rows, bytes per row)``; whole tiles of rows for FP8.

    Returns:
        Codes ``(rows, cols)``, or ``(rows, cols / 2)`` for FP4, and E8M0 scales, one per tile or group.

    Raises:
        UnpackError: Rows of one FP8 tile have different scales.
    """
    if spec.kind == "mxfp4":
        return _codec.mxfp4_unpack(blocks, n_threads=1)
    try:
        return _codec.f8_e4m3_b128_unpack(blocks, n_threads=1)
    except ValueError as e:
        raise UnpackError(str(e)) from e


def unpack_scales(scales: Bytes, dtype: str) -> Bytes:
    """Return scales, given as E8M0 bytes, as the bytes of a checkpoint tensor of ``dtype``."""
    scales = np.ascontiguousarray(scales)
    if dtype == "F8_E8M0":
        return scales.reshape(-1)
    bits = scales.reshape(-1).astype("<u4") << 23
    bits[bits == 0] = 0x00400000  # 2^-127 is subnormal in F32
    return bits.view(np.uint8)


def unpack_values(spec: TensorSpec, data: Bytes, dtype: str) -> Bytes:
    """Return values of a plain tensor as the bytes of a checkpoint tensor of ``dtype``.

    Raises:
        UnpackError: They are not values of that type.
    """
    if spec.kind == "f32" and dtype == "BF16":
        bits = data.view("<u4")
        bad = np.flatnonzero(bits & 0xFFFF)
        if bad.size:
            raise UnpackError(f"the F32 number with bits {int(bits[bad[0]]):#010x}, which BF16 does not have")
        return (bits >> 16).astype("<u2").view(np.uint8)
    if spec.kind == "i32" and dtype == "I64":
        return data.view("<i4").astype(DTYPES[dtype]).view(np.uint8)
    return data
