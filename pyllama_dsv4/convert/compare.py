"""Proves a conversion on one tensor: converts it in memory, takes it apart again, and compares with the checkpoint.

For trying a checkpoint before hours of writing, and for looking at one tensor of a file afterwards. Comparing whole
files is ``verify``'s.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import ArgumentError, CancelledError, MissingTensorError, TensorShapeError
from pyllama_dsv4.header import read_header
from pyllama_dsv4.safetensors import DataFile
from pyllama_dsv4.tensors import TensorSpec

from .plan import check_source, read_table, sources
from .repack import tensor_jobs
from .unpack import Role, source_jobs
from .writer import Progress

__all__ = ["TensorComparison", "compare_tensor"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorComparison:
    """What a tensor converts to, and whether it comes back.

    Attributes:
        spec: The tensor.
        n_sources: Checkpoint tensors it is made of.
        sha256: Of its data as converted, in hexadecimal.
        source_difference: First byte of a checkpoint tensor that does not come back, in words; None if all do.
        file: The GGUF file it was compared with, None if it was not.
        file_difference: First byte that differs in the file, in words; None if none does.
    """

    spec: TensorSpec
    n_sources: int
    sha256: str
    source_difference: str | None
    file: Path | None
    file_difference: str | None

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return self.source_difference is None and self.file_difference is None


def compare_tensor(
    checkpoint: str | os.PathLike[str],
    name: str,
    *,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TensorComparison:
    """Convert one tensor in memory, back again, and compare with the checkpoint bit for bit.

    Args:
        checkpoint: The checkpoint folder. Only what this tensor needs of it is read and checked.
        name: A tensor of the GGUF file, in either dialect, or a tensor of the checkpoint.
        file: A GGUF file to compare with as well.
        progress: Called as ``progress(bytes_done, bytes_total, name)``; returning False cancels.

    Raises:
        ArgumentError: No tensor has that name.
        CheckpointError: The tensor cannot be converted without loss.
        MissingTensorError: The file lacks the tensor.
        TensorShapeError: The file's tensor has another type or other dimensions.
        CancelledError: ``progress`` returned False.
        ModelFileError: A file cannot be read.
    """
    with ExitStack() as stack:
        source = stack.enter_context(Checkpoint(checkpoint))
        spec = _find(source, name)
        check_source(source, spec)
        there = None
        if file is not None:
            there = _FileTensor(file, spec)
            stack.callback(there.close)
        return _compare(source, spec, there, progress)


def _find(checkpoint: Checkpoint, name: str) -> TensorSpec:
    _, specs = read_table(checkpoint)
    for spec in specs:
        if name in (spec.native, spec.upstream) or any(name in pair for pair in sources(spec)):
            return spec
    near = difflib.get_close_matches(name, [n for s in specs for n in (s.native, s.hf[0])], n=3)
    raise ArgumentError(
        "the model has no such tensor",
        tensor=name,
        expected=f"a name such as {', '.join(near)}" if near else None,
        hint="--dry-run -v lists the tensors",
    )


class _FileTensor:
    """A tensor of a GGUF file that is to be the same."""

    def __init__(self, path: str | os.PathLike[str], spec: TensorSpec) -> None:
        header = read_header(path)
        tensor = header.tensor(spec.upstream)
        if tensor is None:
            raise MissingTensorError("the file lacks the tensor", path=path, tensor=spec.native)
        found, expected = (tensor.type.name, tensor.dims), (spec.file_type.name, spec.dims)
        if found != expected:
            raise TensorShapeError(
                "the file's tensor is another one",
                path=path,
                tensor=tensor.name,
                found=found,
                expected=expected,
            )
        self.path = Path(header.shards[tensor.shard].path)
        self._tensor = tensor
        self._file = DataFile(self.path)

    def close(self) -> None:
        self._file.close()

    def difference(self, start: int, data: Bytes) -> str | None:
        """Return the first byte that differs, in words."""
        found = np.empty_like(data)
        self._file.read_into(self._tensor.name, self._tensor.start + start, found.data)
        return _difference(self._tensor.name, start, found, data)


def _difference(name: str, start: int, found: Bytes, expected: Bytes) -> str | None:
    bad = np.flatnonzero(found != expected)
    if not bad.size:
        return None
    i = int(bad[0])
    return f"byte {start + i:,} of {name}: {found[i]:#04x}, expected {expected[i]:#04x}"


def _compare(
    checkpoint: Checkpoint, spec: TensorSpec, there: _FileTensor | None, progress: Progress | None
) -> TensorComparison:
    digest = hashlib.sha256()
    n_done = 0
    in_source = in_file = None
    made = tensor_jobs(checkpoint, spec)
    piece: Bytes = np.empty(0, np.uint8)

    def read(start: int, n_bytes: int) -> Bytes:
        assert (start, n_bytes) == (n_done, piece.size)  # both directions use the same pieces
        return piece

    for expert, (weight, scale) in enumerate(sources(spec)):
        names: list[tuple[Role, str]] = [("weight", weight)]
        if scale is not None:
            names.append(("scale", scale))
        back = [source_jobs(read, spec, role, checkpoint.tensors[n].dtype, expert) for role, n in names]
        starts = [0] * len(names)
        for jobs in zip(*back, strict=True):
            piece = next(made)()
            digest.update(piece.data)
            for i, ((_, name), job) in enumerate(zip(names, jobs, strict=True)):
                again = job()
                original = np.empty_like(again)
                checkpoint.read_into(name, starts[i], original)
                in_source = in_source or _difference(name, starts[i], again, original)
                starts[i] += again.size
            if there is not None:
                in_file = in_file or there.difference(n_done, piece)
            n_done += piece.size
            if progress is not None and progress(n_done, spec.n_bytes, spec.native) is False:
                raise CancelledError("the comparison was cancelled", tensor=spec.native)
    n_sources = sum(1 if scale is None else 2 for _, scale in sources(spec))
    path = None if there is None else there.path
    return TensorComparison(spec, n_sources, digest.hexdigest(), in_source, path, in_file)
