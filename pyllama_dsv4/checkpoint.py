"""Hub-form checkpoints: which tensors a folder holds, where their bytes lie, and the JSON files beside them.

It owns the safetensors headers, the shard index and bounded reads of tensor bytes. What the tensors mean, and
whether they are the right ones for a model, is left to ``convert``. Pure Python and numpy.

Bytes are read with positioned reads rather than through a memory map: a bad sector, or a shard that shrinks
while it is being read, is then an error that can be named, where touching the map would kill the process.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, ClosedError, MissingShardError, ModelFileError, ModelNotFoundError

__all__ = ["DTYPES", "Checkpoint", "DataFile", "SourceTensor", "is_plain_shard_name", "parse_header"]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
"""safetensors dtypes, each with the numpy dtype that holds its bits (unsigned if numpy lacks the float)."""

CONFIG_NAME: Final = "config.json"
SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

# The safetensors library refuses larger headers too. The limit on other JSON files leaves room for a
# tokenizer ten times the size of V4's.
MAX_HEADER_BYTES: Final = 100_000_000
LENGTH_BYTES: Final = 8
"""A safetensors file starts with the length of its header."""
MAX_JSON_BYTES: Final = 100_000_000


_DOWNLOAD_AGAIN: Final = "The download was interrupted; download the shard again"


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint: where its bytes lie.

    Attributes:
        name: Name as spelled in the shard.
        dtype: safetensors dtype, a key of ``DTYPES``.
        shape: Row-major dimensions, the contiguous one last.
        path: The shard.
        offset: Bytes from the start of the shard.
        n_bytes: Size of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


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
                found=_short(weight_map),
                expected="an object that maps tensor names to shard names",
            )
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not is_plain_shard_name(shard):
                raise CheckpointError(
                    "the shard index names a file outside the checkpoint folder",
                    path=index_path,
                    tensor=_short(name),
                    found=_short(shard),
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
                        found=f"the tensor in this shard, {_short(weight_map.get(t.name))} in the index",
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
        return _read_header(file)


class DataFile:
    """One open file of tensor data, read by position so that threads need no lock.

    Args:
        path: The file.

    Attributes:
        path: The file.
        n_bytes: Its size when it was opened.

    Raises:
        ModelFileError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by Checkpoint.close
            self.n_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as e:
            raise ModelFileError("cannot open", path=path, found=e.strerror or e) from e

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    def read_at(self, offset: int, view: memoryview) -> int:
        """Fill as much of ``view`` as one system call gives."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # no positioned reads on Windows
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def read_into(self, tensor: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from byte ``offset`` of the file on.

        Args:
            tensor: What is read, for messages.
            offset: Bytes from the start of the file.
            view: Where to.

        Raises:
            CheckpointError: The file became shorter since it was opened.
            ModelFileError: The read failed.
        """
        while view.nbytes:
            try:
                n = self.read_at(offset, view)
            except OSError as e:
                raise ModelFileError(
                    "reading a tensor failed", path=self.path, tensor=tensor, found=e.strerror or e
                ) from e
            if n == 0:
                raise CheckpointError(
                    "the file became shorter while it was read",
                    path=self.path,
                    tensor=tensor,
                    found=f"end of file at byte {offset}",
                    expected=f"{self.n_bytes} bytes",
                )
            offset, view = offset + n, view[n:]


def _read_header(file: DataFile) -> list[SourceTensor]:
    """Read and check one safetensors header; the tensors come back in the order of their data."""
    path, n_file = file.path, file.n_bytes

    def fail(found: object, expected: object, *, hint: str) -> NoReturn:
        raise CheckpointError(
            "malformed safetensors file", path=path, found=found, expected=expected, hint=hint
        )

    if n_file < LENGTH_BYTES:
        fail(f"{n_file} bytes", f"at least {LENGTH_BYTES}, the length of the header", hint=_DOWNLOAD_AGAIN)
    prefix = bytearray(LENGTH_BYTES)
    file.read_into("(header)", 0, memoryview(prefix))
    n_header = int.from_bytes(prefix, "little")
    if n_header > MAX_HEADER_BYTES:
        fail(
            f"a header of {n_header} bytes",
            f"at most {MAX_HEADER_BYTES}",
            hint="This is not a safetensors file",
        )
    data_start = LENGTH_BYTES + n_header
    if data_start > n_file:
        fail(f"{n_file} bytes, shorter than its header", f"at least {data_start}", hint=_DOWNLOAD_AGAIN)
    raw = bytearray(n_header)
    file.read_into("(header)", LENGTH_BYTES, memoryview(raw))
    return parse_header(bytes(prefix + raw), path, n_file)


def parse_header(raw: bytes, path: Path, n_file: int) -> list[SourceTensor]:
    """Parse and check the header of a safetensors file.

    Args:
        raw: Everything before the first tensor: the length in 8 bytes, then that much JSON.
        path: The file it is of.
        n_file: Size of that file in bytes.

    Returns:
        Its tensors, in the order of their data.

    Raises:
        CheckpointError: The header is malformed, or the file has another size than it says.
    """

    def fail(
        found: object, expected: object, *, tensor: str | None = None, hint: str | None = None
    ) -> NoReturn:
        raise CheckpointError(
            "malformed safetensors file", path=path, tensor=tensor, found=found, expected=expected, hint=hint
        )

    header = _parse_json(raw[LENGTH_BYTES:], path)
    data_start = len(raw)
    tensors = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not _is_printable_name(name):
            fail(f"the tensor name {_short(name)}", "a name of printable characters", tensor=None)
        if not isinstance(info, dict):
            fail(_short(info), "an object with dtype, shape and data_offsets", tensor=name)
        dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            fail(f"dtype {_short(dtype)}", f"one of {', '.join(DTYPES)}", tensor=name)
        if not _is_counts(shape):
            fail(f"shape {_short(shape)}", "a list of non-negative integers", tensor=name)
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            fail(f"data_offsets {_short(offsets)}", "a begin and an end", tensor=name)
        begin, end = offsets
        n_bytes = DTYPES[dtype].itemsize
        for dim in shape:
            n_bytes *= dim
        if end - begin != n_bytes:
            fail(f"{end - begin} bytes for {dtype} {shape}", f"{n_bytes} bytes", tensor=name)
        if data_start + end > n_file:
            fail(
                f"data up to byte {data_start + end} in a file of {n_file}",
                f"a file of at least {data_start + end} bytes",
                tensor=name,
                hint=_DOWNLOAD_AGAIN,
            )
        tensors.append(SourceTensor(name, dtype, tuple(shape), path, data_start + begin, n_bytes))

    # the format wants the data gapless: a hole or an overlap is damage, or something hidden
    tensors.sort(key=lambda t: (t.offset, t.n_bytes))
    position = data_start
    for t in tensors:
        if t.offset != position:
            what = "overlaps the tensor before it" if t.offset < position else "leaves a gap before it"
            fail(f"data at byte {t.offset}, which {what}", f"byte {position}", tensor=t.name)
        position += t.n_bytes
    if position != n_file:
        fail(f"{n_file - position} bytes after the last tensor", f"a file of {position} bytes")
    return tensors


def _is_counts(value: object) -> TypeGuard[list[int]]:
    # bounded, so that no arithmetic on them can take long
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**63 for v in value)
    )


def _is_printable_name(name: str) -> bool:
    # also keeps lone surrogates and control characters out of file headers and terminals
    return 0 < len(name) <= 1024 and name.isprintable()


_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def is_plain_shard_name(name: str) -> bool:
    """Tell whether a name found in a file can only be that of a shard in the same folder."""
    return _SHARD_NAME.fullmatch(name) is not None


def _short(value: object) -> str:
    """Show a value from a file in a message: bounded, and safe to print."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {_short(key)} twice")
        result[key] = value
    return result


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:  # includes bad UTF-8 and integers of absurd length
        raise CheckpointError(
            "not valid JSON in UTF-8", path=path, found=e, expected="a JSON object without duplicate keys"
        ) from e
    if not isinstance(value, dict):
        raise CheckpointError("malformed file", path=path, found=_short(value), expected="a JSON object")
    return value


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
    return _parse_json(_read_bytes(path), path)


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError("not a UTF-8 text file", path=path, found=e) from e
