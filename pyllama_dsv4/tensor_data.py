"""Bytes of a model file by position: what verifying, translating and plotting read through.

It owns the open shards of a ``Header`` and bounded reads from several threads; what the bytes mean is left to
its users. Positioned reads rather than a memory map: a bad sector, or a file that shrinks meanwhile, is then an
error that can be named, where touching the map would kill the process.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, TruncatedFileError
from .header import Header, Tensor

__all__ = ["Bytes", "DataReader"]

Bytes = npt.NDArray[np.uint8]


class DataReader:
    """The shards of a model, opened for reading; a context manager. Reads may come from several threads.

    Args:
        header: The model.

    Raises:
        ModelFileError: A shard cannot be opened.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._lock = threading.Lock()
        self._files: list[BinaryIO] = []
        try:
            for shard in header.shards:
                self._files.append(open(shard.path, "rb", buffering=0))  # noqa: SIM115 - see close
        except OSError as error:
            self.close()
            raise ModelFileError(
                "cannot open the model file", path=shard.path, found=error.strerror or error
            ) from error

    def __enter__(self) -> DataReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Idempotent."""
        for file in self._files:
            file.close()

    def read(self, shard: int, start: int, n_bytes: int, *, tensor: str | None = None) -> Bytes:
        """Read bytes of a shard.

        Args:
            shard: Index of the shard.
            start: Bytes from the start of the file.
            n_bytes: How many.
            tensor: The tensor they belong to, for messages.

        Returns:
            A new ``(n_bytes,) uint8`` array.

        Raises:
            TruncatedFileError: The file ends before.
            ModelFileError: Reading failed.
        """
        out = np.empty(n_bytes, np.uint8)
        view = out.data.cast("B") if n_bytes else memoryview(b"")
        while view.nbytes:
            try:
                n = self._read_at(shard, start, view)
            except OSError as error:
                raise ModelFileError(
                    "reading the model file failed",
                    path=self.header.shards[shard].path,
                    tensor=tensor,
                    found=f"{error.strerror or error} at byte {start:,}",
                    hint="The disk may be damaged; copy the file elsewhere and try again.",
                ) from error
            if n == 0:
                raise TruncatedFileError(
                    "the file ends where it should have data",
                    path=self.header.shards[shard].path,
                    tensor=tensor,
                    found=f"the end at byte {start:,}",
                    expected=f"{view.nbytes:,} more bytes",
                    hint="It may have become shorter meanwhile.",
                )
            start, view = start + n, view[n:]
        return out

    def read_tensor(self, tensor: Tensor, start: int, n_bytes: int) -> Bytes:
        """Read bytes of a tensor from byte ``start`` of its data on; otherwise as ``read``."""
        return self.read(tensor.shard, tensor.start + start, n_bytes, tensor=tensor.name)

    def _read_at(self, shard: int, start: int, view: memoryview) -> int:
        file = self._files[shard]
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], start)
        with self._lock:  # no positioned reads on Windows
            file.seek(start)
            return file.readinto(view) or 0  # type: ignore[attr-defined]
