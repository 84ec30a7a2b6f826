"""Rebuilds a checkpoint's safetensors shards from a native GGUF file and the checkpoint's recipe.

The proof that a conversion lost nothing: every shard gets its name only if its SHA-256 is the recipe's. Shards with
tensors that no given file holds are reported, never made up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_dsv4.errors import (
    ConvertError,
    FormatError,
    MissingKeyError,
    MissingTensorError,
    ModelFileError,
    TensorShapeError,
    UnsupportedModelError,
)
from pyllama_dsv4.gguf_file import ArrayValue
from pyllama_dsv4.header import Header, Tensor, check_header, read_header
from pyllama_dsv4.safetensors import DataFile, SourceTensor
from pyllama_dsv4.tensors import HParams, TensorSpec, tensor_table

from .draft import DSPARK_ARCHITECTURE, draft_specs
from .plan import DRAFT_PREFIX, sources
from .recipe import Recipe, ShardEntry, read_recipe
from .run import default_n_threads, not_enough_space
from .template import generation_of
from .unpack import Role, UnpackError, source_dtypes, source_jobs, source_shape
from .writer import Job, OutputFile, OutputTensor, Progress, write_tensors

__all__ = ["LeftOut", "RestoreResult", "restore"]


@dataclass(frozen=True)
class LeftOut:
    """A shard that was not rebuilt.

    Attributes:
        name: File name of the shard.
        n_tensors: Tensors in it.
        missing: Those that the GGUF file does not hold.
    """

    name: str
    n_tensors: int
    missing: Sequence[str]


@dataclass(frozen=True)
class RestoreResult:
    """What was rebuilt.

    Attributes:
        folder: Where to.
        paths: The rebuilt shards, each with the SHA-256 that the recipe gives.
        left_out: The other shards.
        n_bytes: Size of the rebuilt shards.
        duration_s: Seconds it took.
        recipe: The recipe.
    """

    folder: Path
    paths: Sequence[Path]
    left_out: Sequence[LeftOut]
    n_bytes: int
    duration_s: float
    recipe: Recipe

    @property
    def is_complete(self) -> bool:
        """Whether every shard was rebuilt."""
        return not self.left_out


def restore(
    file: str | os.PathLike[str],
    recipe: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    draft: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Rebuild the safetensors shards of a checkpoint, bit for bit.

    Args:
        file: The GGUF file made from the checkpoint, or the first of a split one. Either dialect.
        recipe: What ``write_recipe`` wrote for the checkpoint.
        folder: Where the shards go; created if need be. Existing shards are replaced one by one when complete.
        draft: The checkpoint's draft file; without it, shards with draft tensors are left out.
        n_threads: Worker threads; by default one per core this process may use, and at least 4.
        progress: Called as ``progress(bytes_done, bytes_total, tensor_name)``; returning False cancels.

    Raises:
        ModelNotFoundError: The file or the recipe does not exist.
        FormatError: The file or the recipe is malformed, or they do not belong together; or a tensor of the file was
            requantised, so that the checkpoint's codes are gone.
        ConvertError: A rebuilt shard has another SHA-256 than the recipe says; nothing is left of it.
        DiskFullError: There is not enough space.
        CancelledError: ``progress`` returned False.
        ModelFileError: Another I/O error.
    """
    n_threads = default_n_threads() if n_threads is None else n_threads
    plan = read_recipe(recipe)
    report = check_header(file)
    if report.hparams is None:
        raise UnsupportedModelError(
            "not a file of DeepSeek-V4", path=os.fspath(file), found=report.header.architecture
        )
    shard_tensors = [plan.tensors(i) for i in range(len(plan.shards))]
    places = _places(report.header, tensor_table(report.hparams))
    if draft is not None:
        names = {t.name: t for tensors in shard_tensors for t in tensors}
        places = _draft_places(read_header(draft), names, report.hparams) | places
    todo, left_out = [], []
    for i, shard in enumerate(plan.shards):
        tensors = shard_tensors[i]
        missing = [t.name for t in tensors if t.name not in places]
        if missing:
            left_out.append(LeftOut(shard.name, len(tensors), missing))
            continue
        for t in tensors:
            _check_fits(plan, t, places[t.name])
        todo.append((shard, plan.headers[i], tensors))
    folder = Path(folder)
    _make_folder(folder, sum(shard.n_bytes for shard, _, _ in todo))
    start_s = time.monotonic()
    n_total, n_done = sum(t.n_bytes for _, _, tensors in todo for t in tensors), 0
    with ExitStack() as stack:
        files = {}
        for path in {place.path for place in places.values()}:
            files[path] = DataFile(path)
            stack.callback(files[path].close)
        for shard, header, tensors in todo:
            out = _Shard(folder / shard.name, header)
            with out:
                write_tensors(
                    out,
                    ((_info(t), _jobs(files, places[t.name], t.dtype)) for t in tensors),
                    n_threads=n_threads,
                    n_bytes_total=n_total,
                    n_bytes_done=n_done,
                    progress=progress,
                )
                out.commit_as(shard, plan.path)
            n_done += sum(t.n_bytes for t in tensors)
    paths = [folder / shard.name for shard, _, _ in todo]
    n_bytes = sum(shard.n_bytes for shard, _, _ in todo)
    return RestoreResult(folder, paths, left_out, n_bytes, time.monotonic() - start_s, plan)


@dataclass(frozen=True)
class _Place:
    """Where the data of a checkpoint tensor is.

    Attributes:
        path: The file.
        tensor: Tensor of the file.
        spec: What it is; of matrices that lie side by side, the one that is meant.
        role: Which checkpoint name of it.
        expert: Index of the expert.
        part: Index among matrices that lie side by side, and their number.
    """

    path: Path
    tensor: Tensor
    spec: TensorSpec
    role: Role
    expert: int
    part: tuple[int, int]


def _places(header: Header, specs: Sequence[TensorSpec]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for spec in specs:
        tensor = header.tensor(spec.upstream)
        if tensor is None:
            raise MissingTensorError("the file lacks a tensor", path=header.path, tensor=spec.native)
        path = Path(header.shards[tensor.shard].path)
        if tensor.type.name != spec.file_type.name:
            raise TensorShapeError(
                "the checkpoint cannot be rebuilt from a tensor that was requantised",
                path=path,
                tensor=tensor.name,
                found=tensor.type.name,
                expected=spec.file_type.name,
                hint="Use the native file as converted",
            )
        if tensor.n_elements != spec.n_elements:
            raise TensorShapeError(
                "a tensor has other dimensions",
                path=path,
                tensor=tensor.name,
                found=tensor.dims,
                expected=spec.dims,
            )
        for i, part in enumerate(spec.parts):
            for expert, (weight, scale) in enumerate(sources(part)):
                where = (i, len(spec.parts))
                places[weight] = _Place(path, tensor, part, "weight", expert, where)
                if scale is not None:
                    places[scale] = _Place(path, tensor, part, "scale", expert, where)
    return places


@dataclass(frozen=True)
class _DraftOf:
    """What a draft file and a recipe say of a checkpoint's draft model."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]


def _draft_places(header: Header, tensors: Mapping[str, SourceTensor], hp: HParams) -> dict[str, _Place]:
    if not any(name.startswith(DRAFT_PREFIX) for name in tensors):
        return {}  # the checkpoint has no draft model: nothing is missing
    config = {}
    if generation_of(tensors) == "0731":
        key = f"{DSPARK_ARCHITECTURE}.target_layers"
        targets = header.kv.get(key)
        if targets is None or not isinstance(targets.value, ArrayValue):
            raise MissingKeyError(
                "not the draft file of this checkpoint",
                path=header.path,
                key=key,
                found="no such list",
                expected="one",
            )
        config["dspark_target_layer_ids"] = [il - 1 for il in targets.value]
    return _places(header, draft_specs(_DraftOf(Path(header.path), config, tensors), hp))


def _check_fits(recipe: Recipe, t: SourceTensor, place: _Place) -> None:
    shape, dtypes = source_shape(place.spec, place.role), source_dtypes(place.spec, place.role)
    if t.shape != shape or t.dtype not in dtypes:
        raise FormatError(
            "the recipe does not belong to the file",
            path=recipe.path,
            tensor=t.name,
            found=f"{t.dtype} {list(t.shape)}",
            expected=f"{' or '.join(dtypes)} {list(shape)}",
        )


def _make_folder(folder: Path, n_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n_free = shutil.disk_usage(folder).free
    except OSError as e:
        raise ModelFileError("cannot create the folder", path=folder, found=e.strerror or e) from e
    if n_bytes > n_free:
        raise not_enough_space(folder, n_bytes, n_free)


def _info(t: SourceTensor) -> OutputTensor:
    return OutputTensor(t.name, t.shape, 0, 0, t.n_bytes)


def _jobs(files: Mapping[Path, DataFile], place: _Place, dtype: str) -> Iterator[Job]:
    """Yield the jobs that make a checkpoint tensor out of a tensor of the file."""
    file, tensor = files[place.path], place.tensor
    i_part, n_parts = place.part
    row_bytes = place.spec.file_type.n_bytes(place.spec.dims[0])

    def read(start: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        data = np.empty(n_bytes * n_parts, np.uint8)
        file.read_into(tensor.name, tensor.start + start * n_parts, data.data)
        if n_parts == 1:
            return data
        # whole rows: of each, the piece that is meant
        return np.ascontiguousarray(data.reshape(-1, n_parts, row_bytes)[:, i_part]).reshape(-1)

    def named(job: Job) -> npt.NDArray[np.uint8]:
        try:
            return job()
        except UnpackError as e:
            raise FormatError(
                "the tensor does not come from a checkpoint",
                path=file.path,
                tensor=tensor.name,
                found=e,
                expected="data as converted",
            ) from e

    for job in source_jobs(read, place.spec, place.role, dtype, place.expert):
        yield partial(named, job)


class _Shard(OutputFile):
    """A safetensors shard, hashed while it is written."""

    def __init__(self, path: Path, header: bytes) -> None:
        super().__init__(path, header)
        self._digest = hashlib.sha256(header)

    def write(self, data: memoryview | bytes) -> None:
        super().write(data)
        self._digest.update(data)

    def pad(self) -> None:
        """Nothing: in this format one tensor follows the other directly."""

    def commit_as(self, entry: ShardEntry, recipe: Path) -> None:
        """Commit if it is the shard that the recipe describes."""
        found = self._digest.hexdigest()
        if found != entry.sha256:
            raise ConvertError(
                "a rebuilt shard is not the original",
                path=self.path,
                found=f"SHA-256 {found}",
                expected=f"{entry.sha256}, as {recipe.name} says",
                hint="The file was made from another checkpoint, or changed since; nothing of the shard is left",
            )
        self.commit()
