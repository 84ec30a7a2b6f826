"""The output of a conversion: one file or several, that an interrupted conversion can go on with.

It decides which file a tensor's bytes go to, when they are flushed and claimed in the journal, and what stays when
a conversion ends early. Single files are ``writer.OutputFile``, the record of progress is ``journal.Journal``.

While it works there are ``NAME.partial`` for each file begun and one ``NAME.partial.journal``. Every step can be the
last: data is flushed before it is claimed, headers are written after all data is claimed, and of several files the
first, by which readers open the model, gets its name last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from pyllama_dsv4.errors import CheckpointError, ConvertError

from .journal import Journal
from .plan import PlannedFile
from .writer import OutputFile, padded, partial_path, sync_folder

__all__ = ["Output", "journal_path", "output_paths"]

SYNC_BYTES: Final = 256 << 20
"""Claim progress after this much: what a kill costs at most, plus one tensor. Less, and flushes slow writing down."""


def output_paths(path: Path, n_files: int) -> list[Path]:
    """Return the names of the files of a model, as llama.cpp's loader derives them from the first.

    Source: upstream ``src/llama.cpp:llama_split_path``.
    """
    if n_files == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i:05d}-of-{n_files:05d}.gguf") for i in range(1, n_files + 1)]


def journal_path(path: Path) -> Path:
    """Return the name of the journal of a conversion to ``path``."""
    partial = partial_path(path)
    return partial.with_name(partial.name + ".journal")


class Output:
    """Where tensors are written to, in file order; a context manager.

    Leaving the ``with`` block without ``commit`` keeps what the journal claims, for another process to go on with;
    if it claims nothing, or the checkpoint is at fault, nothing is left.

    Args:
        files: What is to be written.
        paths: Final names, one per file.
        journal: Open journal; it says how many tensors are there already.

    Attributes:
        path: Final name of the first file.

    Raises:
        ConvertError: The partial files are not what the journal claims.
        DiskFullError, ModelFileError: A file cannot be opened or created.
    """

    def __init__(self, files: Sequence[PlannedFile], paths: Sequence[Path], journal: Journal) -> None:
        self.path = paths[0]
        self._files = files
        self._paths = paths
        self._journal = journal
        self._n_done = journal.n_done
        self._n_total = sum(len(file.infos) for file in files)
        self._is_committed = False
        self._flush: Future[None] | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._file: OutputFile | None = None
        self._claimed_at = 0
        try:
            self._start()
        except BaseException:
            if journal.n_done == 0:
                journal.remove()
            raise

    def _start(self) -> None:
        if self._n_done > self._n_total:
            raise ConvertError(
                "the journal does not belong to this conversion",
                path=self._journal.path,
                found=f"{self._n_done} tensors",
                expected=f"at most {self._n_total}",
                hint="Start over, without resuming",
            )
        for i in range(self._i_file):
            self._check_complete(i)
        self._open()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(Exception):  # the error that ends the conversion is the one to report
            self._wait()
        self._flusher.shutdown()
        if self._is_committed:
            return
        is_kept = self._journal.n_done > 0 and not isinstance(error, CheckpointError)
        if self._file is not None:
            self._file.is_kept = is_kept
            if is_kept:
                with suppress(Exception):
                    self._file.sync()
                    self._journal.claim(self._n_done)
            self._file.close()
        if not is_kept:
            for path in self._paths:
                with suppress(OSError):
                    os.unlink(partial_path(path))
            with suppress(Exception):
                self._journal.remove()

    @property
    def n_bytes_done(self) -> int:
        """Bytes of the tensors that are there, without padding."""
        infos = [info for file in self._files for info in file.infos]
        return sum(info.n_bytes for info in infos[: self._n_done])

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes of the next tensor.

        Raises:
            DiskFullError, ModelFileError: As in ``OutputFile.write``.
        """
        assert self._file is not None
        self._file.write(data)

    def pad(self) -> None:
        """End a tensor."""
        assert self._file is not None
        self._file.pad()
        i_file = self._i_file
        self._n_done += 1
        if self._i_file != i_file:  # the last tensor of its file
            self._wait()
            self._claim(self._file, self._n_done)
            self._file.close()
            self._open()
        elif self._file.position - self._claimed_at >= SYNC_BYTES and (
            self._flush is None or self._flush.done()
        ):
            self._wait()
            self._claimed_at = self._file.position
            self._flush = self._flusher.submit(self._claim, self._file, self._n_done)

    def commit(self) -> None:
        """Flush everything, write the headers and give the files their names.

        Raises:
            DiskFullError, ModelFileError: As in ``OutputFile.write``.
            ConvertError: A partial file has vanished.
        """
        assert self._n_done == self._n_total
        # what a process that was killed here has renamed already; known only if that is so for certain
        begun = {i for i, path in enumerate(self._paths) if partial_path(path).exists()}
        for i in range(len(self._paths)):
            if i not in begun:
                self._check_named(i)
        for i in sorted(begun, reverse=True):
            with OutputFile(self._paths[i], self._files[i].header, position=self._files[i].n_bytes) as file:
                file.is_kept = True
                file.commit()
        self._is_committed = True
        self._journal.remove()

    @property
    def _i_file(self) -> int:
        """Index of the file that holds the next tensor; the number of files when there is none."""
        n = self._n_done
        for i, file in enumerate(self._files):
            if n < len(file.infos):
                return i
            n -= len(file.infos)
        return len(self._files)

    def _open(self) -> None:
        """Open the file that the next tensor goes to, if any."""
        self._file, i = None, self._i_file
        if i == len(self._files):
            return
        file = self._files[i]
        n_here = self._n_done - sum(len(f.infos) for f in self._files[:i])
        position = None
        if n_here > 0:
            last = file.infos[n_here - 1]
            position = len(file.header) + last.offset + padded(last.n_bytes)
            if not partial_path(self._paths[i]).exists():
                raise _vanished(partial_path(self._paths[i]), -1, position)
        self._file = OutputFile(self._paths[i], file.header, position=position)
        self._file.is_kept = self._journal.n_done > 0
        self._claimed_at = self._file.position

    def _claim(self, file: OutputFile, n_done: int) -> None:
        file.sync()
        sync_folder(file.path.parent)  # the file's name must not be lost either
        self._journal.claim(n_done)
        file.is_kept = True

    def _wait(self) -> None:
        flush, self._flush = self._flush, None
        if flush is not None:
            flush.result()

    def _check_complete(self, i: int) -> None:
        """Require a file whose tensors are all claimed to be there, under either name."""
        partial = partial_path(self._paths[i])
        n_bytes = partial.stat().st_size if partial.exists() else -1
        if n_bytes < 0 and self._n_done == self._n_total:
            self._check_named(i)
        elif n_bytes != self._files[i].n_bytes:
            raise _vanished(partial, n_bytes, self._files[i].n_bytes)

    def _check_named(self, i: int) -> None:
        path, file = self._paths[i], self._files[i]
        n_bytes = path.stat().st_size if path.exists() else -1
        if n_bytes == file.n_bytes:
            with open(path, "rb") as f:
                if f.read(len(file.header)) == file.header:
                    return
        raise _vanished(partial_path(path), -1, file.n_bytes)


def _vanished(path: Path, n_bytes: int, expected: int) -> ConvertError:
    return ConvertError(
        "the partial file is not what the interrupted conversion left",
        path=path,
        found="no such file" if n_bytes < 0 else f"{n_bytes:,} bytes",
        expected=f"{expected:,} bytes",
        hint="Start over, without resuming",
    )
