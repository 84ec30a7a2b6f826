"""Writes one GGUF file: the bytes of its header, and a file that gets its name only when it is complete.

It knows the container, not the model: which keys and tensors go in is decided in ``plan``. The gguf package
writes headers too, but knows no type 42, and every byte of ours is compared with a specification.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    ConvertError,
    DiskFullError,
    ModelFileError,
    ModelNotFoundError,
)
from pyllama_dsv4.gguf_file import ValueType as GGUFType

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ALIGNMENT",
    "Job",
    "MetadataEntry",
    "OutputFile",
    "OutputTensor",
    "Pool",
    "Progress",
    "Sink",
    "check_output_path",
    "header_bytes",
    "lay_out",
    "lock_file",
    "padded",
    "partial_path",
    "sync_folder",
    "write_error",
    "write_tensors",
]

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32
"""The format's default, so that no ``general.alignment`` key is needed."""

PARTIAL_SUFFIX: Final = ".partial"

ValueType = Literal["u16", "u32", "i32", "f32", "bool", "str", "i32[]", "f32[]", "str[]"]

_IDS: Final[dict[str, GGUFType]] = {
    "u16": GGUFType.U16,
    "u32": GGUFType.U32,
    "i32": GGUFType.I32,
    "f32": GGUFType.F32,
    "bool": GGUFType.BOOL,
    "str": GGUFType.STR,
}
_STRUCTS: Final = {"u16": "H", "u32": "I", "i32": "i", "f32": "f", "bool": "?"}


@dataclass(frozen=True)
class MetadataEntry:
    """One metadata entry."""

    key: str
    type: ValueType
    value: object


@dataclass(frozen=True)
class OutputTensor:
    """One tensor as the header describes it.

    Attributes:
        name: Name in the file.
        dims: ne0 first.
        type_id: File type id.
        offset: Bytes from the start of the data section, a multiple of ``ALIGNMENT``.
        n_bytes: Size without padding.
    """

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int


Job = Callable[[], npt.NDArray[np.uint8]]
"""Produces the next bytes of a tensor as an ``(n,) uint8`` array; runs on a worker thread."""

Progress = Callable[[int, int, str], object]
"""Called with bytes written, bytes in all, and the tensor in work; returning False cancels."""


def padded(n_bytes: int) -> int:
    """Round up to a multiple of ``ALIGNMENT``."""
    return (n_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def lay_out(tensors: Iterable[tuple[str, tuple[int, ...], int, int]]) -> list[OutputTensor]:
    """Place tensors, given as name, dims, type id and size, one behind the other."""
    infos = []
    offset = 0
    for name, dims, type_id, n_bytes in tensors:
        infos.append(OutputTensor(name, dims, type_id, offset, n_bytes))
        offset += padded(n_bytes)
    return infos


def header_bytes(metadata: Sequence[MetadataEntry | bytes], tensors: Sequence[OutputTensor]) -> bytes:
    """Return the header of a GGUF v3 file, little endian, zero-padded up to the start of the data section.

    Entries given as bytes are written as they are: key, type and value, out of another file.

    Source: ggml ``docs/gguf.md``; spec section 0.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for kv in metadata:
        parts += (kv,) if isinstance(kv, bytes) else (_string(kv.key), _value(kv.type, kv.value))
    for t in tensors:
        n_dims = len(t.dims)
        parts += (
            _string(t.name),
            struct.pack(f"<I{n_dims}QIQ", n_dims, *t.dims, t.type_id, t.offset),
        )
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: ValueType, value: object) -> bytes:
    item = kind.removesuffix("[]")
    type_id = _IDS[item]
    if item == kind:
        return struct.pack("<I", type_id) + _items(item, [value])
    assert isinstance(value, Sequence)
    return struct.pack("<IIQ", GGUFType.ARR, type_id, len(value)) + _items(item, value)


def _items(item: str, values: Sequence[object]) -> bytes:
    if item == "str":
        return b"".join(_string(v) for v in values if isinstance(v, str))
    return struct.pack(f"<{len(values)}{_STRUCTS[item]}", *values)


class OutputFile:
    """A file written front to back as ``NAME.partial`` and renamed when it is complete; a context manager.

    Leaving the ``with`` block without ``commit`` removes the partial file, unless it is to be kept. Should the
    process be killed, the partial file stays, but it begins with zeros, so nothing takes it for a GGUF file: the
    header comes last.

    Args:
        path: Final name. An existing regular file is replaced at ``commit``, not before.
        header: Bytes that go to the front at ``commit``; data is written behind them.
        position: Go on with the partial file that is there, after so many bytes; by default begin a new one.

    Attributes:
        path: Final name, links resolved.
        partial: Name until ``commit``.
        is_kept: Whether the partial file stays when it is not committed.

    Raises:
        ModelNotFoundError: The folder does not exist.
        ArgumentError: The path is not that of a regular file.
        ConvertError: Another process is writing the same file, or the partial file is shorter than ``position``.
        DiskFullError, ModelFileError: The file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], header: bytes, *, position: int | None = None) -> None:
        self.path = check_output_path(path)
        self.partial = partial_path(self.path)
        self.is_kept = False
        self._header = header
        self._position = len(header) if position is None else position
        self._is_committed = False
        flags = os.O_RDWR | (os.O_CREAT if position is None else 0) | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(self.partial, flags, 0o666)
        except OSError as e:
            self._fail(e)
        try:
            lock_file(self._fd, self.partial)
            if position is not None:
                self._check_size(position)
            os.ftruncate(self._fd, 0 if position is None else position)
            os.lseek(self._fd, self._position, os.SEEK_SET)
        except OSError as e:
            os.close(self._fd)
            self._fail(e)
        except ConvertError:
            os.close(self._fd)
            raise

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; unless it was committed or is kept, remove it. Idempotent."""
        is_open = self._fd >= 0
        self._close()
        if is_open and not (self._is_committed or self.is_kept):
            with suppress(OSError):
                os.unlink(self.partial)

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self._position

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes.

        Raises:
            DiskFullError: The disk, a quota or a file size limit is exhausted.
            ModelFileError: Another I/O error.
        """
        view = memoryview(data).cast("B")
        try:
            while view.nbytes:
                n = os.write(self._fd, view)
                self._position += n
                view = view[n:]
        except OSError as e:
            self._fail(e)

    def pad(self) -> None:
        """Append zeros up to a multiple of ``ALIGNMENT``."""
        self.write(bytes(padded(self._position) - self._position))

    def skip(self, n_bytes: int) -> None:
        """Leave a hole, which reads as zeros and takes no disk space."""
        self._position += n_bytes
        try:
            os.lseek(self._fd, self._position, os.SEEK_SET)
        except OSError as e:
            self._fail(e)

    def sync(self) -> None:
        """Flush what was written to the disk; another thread may write on meanwhile.

        Raises:
            DiskFullError, ModelFileError: As in ``write``.
        """
        try:
            _fdatasync(self._fd)
        except OSError as e:
            self._fail(e)

    def commit(self) -> None:
        """Write the header, flush to the disk and give the file its name.

        Raises:
            DiskFullError: As in ``write``.
            ModelFileError: Another I/O error.
        """
        end = self._position
        try:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self.write(self._header)
            os.ftruncate(self._fd, end)  # covers a hole at the end
            os.fsync(self._fd)
            if fcntl is None:
                self._close()  # Windows renames closed files only; elsewhere the lock holds until the end
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        except OSError as e:
            self._fail(e)
        self._is_committed = True
        self._close()

    def _check_size(self, position: int) -> None:
        n_bytes = os.fstat(self._fd).st_size
        if n_bytes < position:
            raise ConvertError(
                "the partial file is not what the interrupted conversion left",
                path=self.partial,
                found=f"{n_bytes:,} bytes",
                expected=f"at least {position:,}",
                hint="Start over, without resuming",
            )

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # everything was flushed before
                os.close(fd)

    def _fail(self, e: OSError) -> NoReturn:
        state = f"what there is of it is in {self.partial.name}" if self.is_kept else "nothing of it is left"
        raise write_error(
            self.path, e, hint=f"The file was not completed and {state}", position=self._position
        ) from e


def write_error(
    path: Path, e: OSError, *, hint: str | None = None, position: int | None = None
) -> DiskFullError | ModelFileError:
    """Return the named error for a failed write.

    Args:
        path: The file.
        e: What the system said.
        hint: What there is of the file now, one sentence.
        position: Byte at which it failed.
    """
    state = "" if hint is None else f". {hint}"
    if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return DiskFullError("the disk is full", path=path, found=e.strerror, hint=f"Free some space{state}")
    if e.errno == errno.EFBIG:
        return DiskFullError(
            "the file system or a limit does not allow a file of this size",
            path=path,
            found=f"{e.strerror} at byte {position}",
            hint=f"Write to another file system, or raise the limit (ulimit -f){state}",
        )
    return ModelFileError("cannot write", path=path, found=e.strerror or e, hint=hint)


class Pool:
    """Memory for pieces that is used again: new pages would cost more than filling them. For several threads."""

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque()

    def take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return an ``(n_bytes,) uint8`` array of any content."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(n_bytes, np.uint8)
        if buffer.size < n_bytes:
            buffer = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes]

    def give_back(self, data: npt.NDArray[np.uint8]) -> None:
        """Take an array's memory back; one that is not from here is left alone."""
        buffer = data.base
        if (
            isinstance(buffer, np.ndarray)
            and buffer.dtype == np.uint8
            and buffer.ndim == 1
            and buffer.base is None
        ):
            self._free.append(buffer)


class Sink(Protocol):
    """What ``write_tensors`` writes to."""

    @property
    def path(self) -> Path:
        """For messages."""

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes of a tensor."""

    def pad(self) -> None:
        """End a tensor."""


def write_tensors(
    out: Sink,
    tensors: Iterable[tuple[OutputTensor, Iterable[Job]]],
    *,
    n_threads: int,
    n_bytes_total: int,
    n_bytes_done: int = 0,
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> None:
    """Produce the data of all tensors on worker threads and write it, in order, from this one.

    Only ``n_threads + 2`` pieces exist at any time, which bounds the memory. If the jobs take theirs from ``pool``,
    it is given back once it is written.

    Raises:
        CancelledError: ``progress`` returned False.
        DiskFullError, ModelFileError: As in ``OutputFile.write``.
    """
    n_done = n_bytes_done
    pending: deque[tuple[OutputTensor, Future[npt.NDArray[np.uint8]] | None]] = deque()

    def write_next() -> None:
        nonlocal n_done
        info, future = pending.popleft()
        if future is None:
            out.pad()
            return
        data = future.result()
        out.write(data.data)
        n_done += data.size
        if pool is not None:
            pool.give_back(data)
        if progress is not None and progress(n_done, n_bytes_total, info.name) is False:
            raise CancelledError("the conversion was cancelled", path=out.path)

    workers = ThreadPoolExecutor(n_threads, thread_name_prefix="convert")
    try:
        for info, jobs in tensors:
            for job in jobs:
                pending.append((info, workers.submit(job)))
                if len(pending) > n_threads + 1:
                    write_next()
            pending.append((info, None))  # the tensor's end
        while pending:
            write_next()
    finally:
        workers.shutdown(cancel_futures=True)


def partial_path(path: Path) -> Path:
    """Return the name of a file until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def lock_file(fd: int, path: Path) -> None:
    """Lock an open file against other processes, until it is closed.

    Raises:
        ConvertError: Another process has it locked, or finished with it just now.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # between open and lock the other process may have renamed or removed the file
        is_ours = os.stat(path).st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        raise ConvertError(
            "another process is writing this file",
            path=path,
            hint="Wait until it has finished, or choose another output file",
        )


def sync_folder(folder: Path) -> None:
    """Flush names created, changed or removed in a folder to the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders; some network file systems flush none
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _fdatasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has only the latter


def check_output_path(path: str | os.PathLike[str]) -> Path:
    """Return the path a file will get, links resolved.

    Raises:
        ModelNotFoundError: Its folder does not exist.
        ArgumentError: It exists, but is not a regular file.
    """
    resolved = Path(os.path.realpath(path))
    if not resolved.parent.is_dir():
        raise ModelNotFoundError(
            "the folder of the output file does not exist", path=resolved.parent, hint="Create it first"
        )
    if resolved.exists() and not stat.S_ISREG(resolved.stat().st_mode):
        raise ArgumentError(
            "cannot write the output file",
            path=path,
            found="a folder" if resolved.is_dir() else "a device or pipe",
            expected="the name of a regular file",
        )
    return resolved
