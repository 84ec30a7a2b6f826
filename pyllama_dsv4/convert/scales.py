"""Scales of quantised checkpoint tensors, as E8M0 bytes: value 2^(byte - 127).

What is no power of two is refused here. The scales of FP8 weights are few, so a plan checks them before hours of
writing; those of the FP4 experts are checked when they are converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pyllama_dsv4.checkpoint import DTYPES, Checkpoint
from pyllama_dsv4.errors import CheckpointError
from pyllama_dsv4.tensors import TensorSpec

from .plan import sources

__all__ = ["check_fp8_scales", "read_scales"]

E8M0_NAN: Final = 255

Bytes = npt.NDArray[np.uint8]


def check_fp8_scales(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> None:
    """Check the scales of all FP8 weights, in file order.

    Raises:
        CheckpointError: One is NaN or no power of two.
        ModelFileError: Reading failed.
    """
    for spec in specs:
        if spec.kind == "f8":
            for _, scale in sources(spec):
                assert scale is not None
                rows, cols = checkpoint.tensors[scale].shape
                read_scales(checkpoint, scale, 0, (rows, cols))


def read_scales(checkpoint: Checkpoint, name: str, start: int, shape: tuple[int, int]) -> Bytes:
    """Read scales, as many as ``shape`` has, from index ``start`` on.

    Returns:
        E8M0 bytes of that shape.

    Raises:
        CheckpointError: One is NaN or no power of two.
        ModelFileError: Reading failed.
    """
    tensor = checkpoint.tensors[name]
    dtype = DTYPES[tensor.dtype]
    scales = np.empty(shape, dtype)
    checkpoint.read_into(name, start * dtype.itemsize, scales.reshape(-1).view(np.uint8))
    if tensor.dtype == "F32":
        bits = scales.view("<u4")
        # a power of two has an empty mantissa; 2^-127 is subnormal in F32 and byte 0 in E8M0. The upper bound
        # excludes infinity, and negative numbers with it.
        is_power = ((bits & 0x7FFFFF) == 0) & (bits > 0) & (bits < 0x7F800000)
        is_smallest = bits == 0x00400000
        bad = np.argwhere(~(is_power | is_smallest))
        if bad.size:
            raise _bad_scale(checkpoint, name, start, bad[0], shape, repr(float(scales[tuple(bad[0])])))
        return np.where(is_smallest, 0, bits >> 23).astype(np.uint8)
    if scales.max(initial=0) == E8M0_NAN:
        bad = np.argwhere(scales == E8M0_NAN)
        raise _bad_scale(checkpoint, name, start, bad[0], shape, f"{E8M0_NAN}, which is NaN")
    return scales


def _bad_scale(
    checkpoint: Checkpoint, name: str, start: int, at: npt.NDArray[Any], shape: tuple[int, int], found: str
) -> CheckpointError:
    row, col = start // shape[1] + int(at[0]), int(at[1])
    return CheckpointError(
        "a scale cannot be converted without loss",
        path=checkpoint.tensors[name].path,
        tensor=name,
        found=f"{found} at [{row}, {col}]",
        expected="a positive power of two from 2^-127 to 2^127",
    )
