"""Makes the bytes of output tensors out of checkpoint tensors, in pieces: a 1:1 move of codes and scales.

Each piece is a job that reads its sources, converts them and returns the bytes, so that any number of threads
can work while memory stays at a few pieces. Nothing here rounds: what would have to change is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import _codec
from pyllama_dsv4.checkpoint import DTYPES, Checkpoint
from pyllama_dsv4.errors import CheckpointError
from pyllama_dsv4.tensors import TensorSpec

from .plan import GROUP, TILE, sources
from .scales import read_scales
from .writer import Job, Pool

__all__ = ["PIECE_BYTES", "rows_per_piece", "tensor_jobs"]

PIECE_BYTES: Final = 4 << 20
"""Aim for pieces of this size: large enough to hide the overhead of a job, small enough for a cache."""

Bytes = npt.NDArray[np.uint8]


def tensor_jobs(checkpoint: Checkpoint, spec: TensorSpec, pool: Pool | None = None) -> Iterator[Job]:
    """Yield the jobs whose results, one after the other, are the data of a native-dialect tensor.

    Args:
        checkpoint: Where the sources are read from.
        spec: The tensor.
        pool: Memory for the results; by default they are new arrays.

    Raises (from the jobs):
        CheckpointError: A value cannot be represented: a NaN scale, a scale that is no power of two, an
            expert id out of range.
        ModelFileError: Reading failed.
    """
    pool = Pool() if pool is None else pool
    if len(spec.parts) > 1:
        parts = [tensor_jobs(checkpoint, part) for part in spec.parts]
        yield from (partial(_joined, jobs, spec) for jobs in zip(*parts, strict=True))
    elif spec.kind in ("f8", "mxfp4"):
        rows, step = spec.dims[1], rows_per_piece(spec)
        for weight, scale in sources(spec):
            assert scale is not None
            for row in range(0, rows, step):
                yield partial(_blocks, checkpoint, spec, weight, scale, row, min(row + step, rows), pool)
    else:
        name = spec.hf[0]
        n_elements, step = spec.n_elements, PIECE_BYTES // 8
        for start in range(0, n_elements, step):
            yield partial(_values, checkpoint, spec, name, start, min(start + step, n_elements), pool)


def _joined(jobs: Sequence[Job], spec: TensorSpec) -> Bytes:
    """The same rows of matrices that lie side by side."""
    row_bytes = spec.file_type.n_bytes(spec.parts[0].dims[0])
    return np.concatenate([job().reshape(-1, row_bytes) for job in jobs], axis=1).reshape(-1)


class _Scratch(threading.local):
    """Memory of a worker thread for what it reads; new pages would cost more than filling them."""

    def __init__(self) -> None:
        self.codes: Bytes = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> Bytes:
        if self.codes.size < n_bytes:
            self.codes = np.empty(n_bytes, np.uint8)
        return self.codes[:n_bytes]


_scratch = _Scratch()


def rows_per_piece(spec: TensorSpec) -> int:
    """Return how many rows of a quantised tensor make a piece: whole tiles."""
    row_bytes = spec.file_type.n_bytes(spec.dims[0])
    return max(PIECE_BYTES // row_bytes // TILE, 1) * TILE


def _blocks(
    checkpoint: Checkpoint, spec: TensorSpec, weight: str, scale: str, start: int, end: int, pool: Pool
) -> Bytes:
    """Rows ``start`` to ``end`` of a quantised tensor, as blocks of scale and codes."""
    cols, rows = spec.dims[0], end - start
    n_code_cols = cols if spec.kind == "f8" else cols // 2
    codes = _scratch.take(rows * n_code_cols)
    checkpoint.read_into(weight, start * n_code_cols, codes)
    if spec.kind == "f8":
        scale_shape, scale_start, pack = (rows // TILE, cols // TILE), start // TILE, _codec.f8_e4m3_b128_pack
    else:
        scale_shape, scale_start, pack = (rows, cols // GROUP), start, _codec.mxfp4_pack
    scales = read_scales(checkpoint, scale, scale_start * scale_shape[1], scale_shape)
    row_bytes = spec.file_type.n_bytes(cols)
    packed = pool.take(rows * row_bytes)
    pack(codes.reshape(rows, -1), scales, out=packed.reshape(rows, row_bytes), n_threads=1)
    return packed


def _values(checkpoint: Checkpoint, spec: TensorSpec, name: str, start: int, end: int, pool: Pool) -> Bytes:
    """Elements ``start`` to ``end`` of a tensor of plain numbers."""
    dtype = DTYPES[checkpoint.tensors[name].dtype]
    data = pool.take((end - start) * dtype.itemsize)
    checkpoint.read_into(name, start * dtype.itemsize, data)
    values = data.view(dtype)
    if spec.kind == "f32" and checkpoint.tensors[name].dtype == "BF16":
        return (values.astype("<u4") << 16).view(np.uint8)  # the upper half of an F32 is the BF16 number
    if spec.kind == "i32":
        return _expert_ids(checkpoint, spec, name, start, values).view(np.uint8)
    return data


def _expert_ids(
    checkpoint: Checkpoint, spec: TensorSpec, name: str, start: int, values: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    n_expert = int(checkpoint.config["n_routed_experts"])
    bad = np.flatnonzero((values < 0) | (values >= n_expert))
    if bad.size:
        raise CheckpointError(
            "a routing table names an expert that does not exist",
            path=checkpoint.tensors[name].path,
            tensor=name,
            found=f"{values[bad[0]]} for token {(start + int(bad[0])) // spec.dims[0]}",
            expected=f"0 to {n_expert - 1}",
        )
    return values.astype("<i4")
