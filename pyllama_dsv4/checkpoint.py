"""Hub-form checkpoints: which tensors a folder holds, where their bytes lie, and the JSON files beside them.

It owns the shard index and reads of tensor bytes by name; the format of a shard is ``safetensors``'. What the tensors
mean, and whether they are the right ones for a model, is left to ``convert``. Pure Python and numpy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, ClosedError, MissingShardError, ModelFileError, ModelNotFoundError
from .safetensors import DTYPES, DataFile, SourceTensor, is_plain_shard_name, parse_json, read_header, short

__all__ = ["DTYPES", "Checkpoint", "SourceTensor"]

CONFIG_NAME: Final = "config.json"
SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

MAX_JSON_BYTES: Final = 100_000_000
"""Room for a tokenizer ten times the size of V4's."""


class Checkpoint:
    """A checkpoint folder, opened for reading; a context manager.

    All headers are read and checked when it is opened, tensor data only when asked for. Reads may come from
    several threads at once.

    Args:
        folder: Folder with ``config.json`` and either ``model.safetensors``, or
            ``model.safetensors.index.json`` with the shards it names.

    Attributes:
        folder: The folder.
        config: ``config.json``.
        tensors: Every tensor by name, in the order of the shards' names and then of the data.

    Raises:
        ModelNotFoundError: The folder does not exist.
        MissingShardError: ``config.json``, the weights, or a shard named by the index is absent.
        CheckpointError: A file is malformed, truncated or contradicts another.
        ModelFileError: A file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            if self.folder.exists():
                raise ModelFileError(
                    "a checkpoint is a folder",
                    path=self.folder,
                    found="a file",
                    expected=f"a folder with {CONFIG_NAME} and {SINGLE_NAME} or shards",
                    hint=f"If this is {CONFIG_NAME} or a shard, give the folder it lies in",
                )
            raise ModelNotFoundError("no such checkpoint folder", path=self.folder)
        self.config: dict[str, Any] = self._required_json(CONFIG_NAME)
        self._files: dict[Path, DataFile] = {}
        self._is_closed = False
        with ExitStack() as undo:
            undo.callback(self.close)
            self.tensors: Mapping[str, SourceTensor] = self._open_shards()
            undo.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.folder)!r}: {len(self.tensors)} tensors in {len(self.shards)} shards>"

    def close(self) -> None:
        """Close the shards; reading afterwards raises ``ClosedError``."""
        self._is_closed = True
        for file in self._files.values():
            file.close()

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return list(self._files)

    def json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the folder, such as ``tokenizer.json``; None if there is no such file.

        Raises:
            CheckpointError: The file is not a JSON object in UTF-8.
        """
        path = self.folder / name
        return _read_json(path) if path.exists() else None

    def text(self, name: str) -> str | None:
        """Read a UTF-8 text file of the folder; None if there is no such file.

        Raises:
            CheckpointError: The file is not UTF-8, or unreasonably large.
        """
        path = self.folder / name
        return _read_text(path) if path.exists() else None

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one whole tensor into memory.

        Returns:
            A new array of the tensor's shape; dtype as in ``DTYPES``.

        Raises:
            LookupError: No tensor has that name.
            CheckpointError: The shard became shorter since it was opened.
            ModelFileError: The read failed.
        """
        t = self.tensors[name]
        out = np.empty(t.shape, DTYPES[t.dtype])
        self.read_into(name, 0, out.reshape(-1).view(np.uint8))
        return out

    def read_into(self, name: str, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Read ``out.size`` bytes of a tensor, from byte ``start`` of its data on.

        Args:
            name: Tensor name.
            start: Byte offset within the tensor.
            out: Contiguous ``(n,) uint8`` buffer to fill.

        Raises:
            CheckpointError: The shard became shorter since it was opened.
            ModelFileError: The read failed.
        """
        t = self.tensors[name]
        if self._is_closed:
            raise ClosedError("the checkpoint is closed", path=self.folder, tensor=name)
        if start < 0 or start + out.size > t.n_bytes:
            raise ValueError(f"bytes {start} to {start + out.size} of {name}, which has {t.n_bytes}")
        self._files[t.path].read_into(name, t.offset + start, out.data)

    def header(self, shard: Path) -> bytes:
        """Read a shard's header verbatim: its length in 8 bytes, then the JSON text, up to the first tensor.

        Raises:
            CheckpointError: The shard became shorter since it was opened.
            ModelFileError: The read failed.
        """
        file = self._open_file(shard)
        raw = bytearray(8)
        file.read_into("(header)", 0, memoryview(raw))
        raw += bytearray(int.from_bytes(raw, "little"))
        file.read_into("(header)", 8, memoryview(raw)[8:])
        return bytes(raw)

    def stamp(self, shard: Path) -> tuple[int, int]:
        """Return a shard's size in bytes and the time of its last change in ns, as they are now.

        Raises:
            ModelFileError: They cannot be had.
        """
        try:
            found = os.fstat(self._open_file(shard).fileno())
        except OSError as e:
            raise ModelFileError("cannot read", path=shard, found=e.strerror or e) from e
        return found.st_size, found.st_mtime_ns

    def _open_file(self, shard: Path) -> DataFile:
        if self._is_closed:
            raise ClosedError("the checkpoint is closed", path=self.folder)
        return self._files[shard]

    def _required_json(self, name: str) -> dict[str, Any]:
        value = self.json(name)
        if value is None:
            raise MissingShardError(
                "not a complete checkpoint",
                path=self.folder,
                found=f"no {name}",
                expected=f"{name} beside the weights",
                hint="Give the folder of a checkpoint as downloaded from the hub, or download the file",
            )
        return value

    def _open_shards(self) -> dict[str, SourceTensor]:
        index_path, single_path = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        has_index, has_single = index_path.exists(), single_path.exists()
        if has_index and has_single:
            raise CheckpointError(
                "cannot tell which weights to use",
                path=self.folder,
                found=f"both {SINGLE_NAME} and {INDEX_NAME}",
                expected="one of them",
                hint="Move the one that does not belong to this checkpoint away",
            )
        if has_single:
            return {t.name: t for t in self._open_shard(single_path)}
        if not has_index:
            others = sorted(p.name for p in self.folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
            raise MissingShardError(
                "the checkpoint has no weights",
                path=self.folder,
                found=", ".join(others[:3]) + (", ..." if len(others) > 3 else "") if others else "none",
                expected=f"{SINGLE_NAME}, or {INDEX_NAME} with the shards it names",
                hint="Download the missing file",
            )
        return self._open_indexed(index_path)

    def _open_indexed(self, index_path: Path) -> dict[str, SourceTensor]:
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                "malformed shard index",
                path=index_path,
                key="weight_map",
                found=short(weight_map),
                expected="an object that maps tensor names to shard names",
            )
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not is_plain_shard_name(shard):
                raise CheckpointError(
                    "the shard index names a file outside the checkpoint folder",
                    path=index_path,
                    tensor=short(name),
                    found=short(shard),
                    expected="the name of a .safetensors file in the same folder",
                )
        shards = sorted(set(weight_map.values()))
        # all missing shards at once: a user completes the download once, not once per shard
        missing = [shard for shard in shards if not (self.folder / shard).exists()]
        if missing:
            first = next(name for name, shard in weight_map.items() if shard == missing[0])
            raise MissingShardError(
                "the checkpoint is incomplete",
                path=self.folder / missing[0],
                tensor=first,
                found=f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:8])}"
                + (", ..." if len(missing) > 8 else ""),
                expected=f"every shard that {INDEX_NAME} names",
                hint="Download the missing shards",
            )
        tensors: dict[str, SourceTensor] = {}
        for shard in shards:
            for t in self._open_shard(self.folder / shard):
                if t.name in tensors:
                    raise CheckpointError(
                        "two tensors have the same name",
                        path=t.path,
                        tensor=t.name,
                        found=f"it also lies in {tensors[t.name].path.name}",
                        expected="each tensor in one shard",
                    )
                if weight_map.get(t.name) != shard:
                    raise CheckpointError(
                        "a shard and the shard index contradict each other",
                        path=t.path,
                        tensor=t.name,
                        found=f"the tensor in this shard, {short(weight_map.get(t.name))} in the index",
                        expected=f"{shard!r} in {INDEX_NAME}",
                        hint="Download both files again, from one revision",
                    )
                tensors[t.name] = t
        for name, shard in weight_map.items():
            if name not in tensors:
                raise CheckpointError(
                    "a shard lacks a tensor",
                    path=self.folder / shard,
                    tensor=name,
                    found="no such tensor",
                    expected=f"the tensor that {INDEX_NAME} places there",
                    hint="Download both files again, from one revision",
                )
        return tensors

    def _open_shard(self, path: Path) -> list[SourceTensor]:
        file = DataFile(path)
        self._files[path] = file
        return read_header(file)


def _read_bytes(path: Path) -> bytes:
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                "unreasonably large file",
                path=path,
                found=f"{n_bytes} bytes",
                expected=f"at most {MAX_JSON_BYTES}",
            )
        return path.read_bytes()
    except OSError as e:
        raise ModelFileError("cannot read", path=path, found=e.strerror or e) from e


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(_read_bytes(path), path)


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError("not a UTF-8 text file", path=path, found=e) from e
