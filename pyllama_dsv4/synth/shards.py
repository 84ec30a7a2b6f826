"""safetensors files from arrays that are made while they are written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_dsv4.checkpoint import DTYPES

__all__ = ["Array", "Source", "write_safetensors", "write_shard"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """A tensor to be written: ``pieces`` yields its data as arrays, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]
) -> None:
    """Write arrays as one safetensors file.

    Args:
        path: The file.
        tensors: By name: dtype as in ``checkpoint.DTYPES``, and the array that holds its bits.
    """
    write_shard(
        Path(path),
        [
            Source(name, dtype, array.shape, lambda array=array: [array])  # type: ignore[misc]
            for name, (dtype, array) in tensors.items()
        ],
        is_sparse=False,
    )


def write_shard(path: Path, tensors: Sequence[Source], *, is_sparse: bool) -> None:
    """Write tensors as one safetensors file, if sparse as a header and a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.n_bytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw = raw.ljust((len(raw) + 7) // 8 * 8)
    with open(path, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        if is_sparse:
            f.truncate(8 + len(raw) + end)
            return
        for t in tensors:
            for piece in t.pieces():
                f.write(np.ascontiguousarray(piece, DTYPES[t.dtype]).data)
