"""The safetensors format: headers, dtypes, and files that are read by position.

Which shards make a checkpoint is ``checkpoint``'s. Headers are not trusted: nothing is allocated for a count or a size
that was not compared with the file. Pure Python and numpy.

Bytes are read with positioned reads rather than through a memory map: a bad sector, or a shard that shrinks
while it is being read, is then an error that can be named, where touching the map would kill the process.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeGuard

import numpy as np

from .errors import CheckpointError, ModelFileError

__all__ = [
    "DTYPES",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "DataFile",
    "SourceTensor",
    "is_plain_shard_name",
    "parse_header",
    "parse_json",
    "read_header",
    "short",
]

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

# the safetensors library refuses larger headers too
MAX_HEADER_BYTES: Final = 100_000_000
LENGTH_BYTES: Final = 8
"""A safetensors file starts with the length of its header."""


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


def read_header(file: DataFile) -> list[SourceTensor]:
    """Read and check the header of a safetensors file.

    Returns:
        Its tensors, in the order of their data.

    Raises:
        CheckpointError: It is malformed or truncated.
        ModelFileError: Reading failed.
    """
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

    header = parse_json(raw[LENGTH_BYTES:], path)
    data_start = len(raw)
    tensors = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not _is_printable_name(name):
            fail(f"the tensor name {short(name)}", "a name of printable characters", tensor=None)
        if not isinstance(info, dict):
            fail(short(info), "an object with dtype, shape and data_offsets", tensor=name)
        dtype, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            fail(f"dtype {short(dtype)}", f"one of {', '.join(DTYPES)}", tensor=name)
        if not _is_counts(shape):
            fail(f"shape {short(shape)}", "a list of non-negative integers", tensor=name)
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            fail(f"data_offsets {short(offsets)}", "a begin and an end", tensor=name)
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


def short(value: object) -> str:
    """Show a value from a file in a message: bounded, and safe to print."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {short(key)} twice")
        result[key] = value
    return result


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint.

    Raises:
        CheckpointError: It is no JSON object in UTF-8, or has a key twice.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:  # includes bad UTF-8 and integers of absurd length
        raise CheckpointError(
            "not valid JSON in UTF-8", path=path, found=e, expected="a JSON object without duplicate keys"
        ) from e
    if not isinstance(value, dict):
        raise CheckpointError("malformed file", path=path, found=short(value), expected="a JSON object")
    return value
