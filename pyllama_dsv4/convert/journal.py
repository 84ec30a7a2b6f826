"""The journal of a conversion: which tensors of the output are on the disk, and what they were made from.

It lies beside the partial output and is only ever appended to: first a line that identifies the conversion, then
a line per claim. The caller flushes data to the disk before it claims it, so a line never says more than the
disk holds, whatever ends the process. A line cut short counts as not written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import ArgumentError, CheckpointError, ConvertError, ModelFileError

from .plan import Plan
from .writer import lock_file, partial_path, sync_folder, write_error

__all__ = ["Identity", "Journal", "identify"]

FORMAT: Final = 1

INPUTS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
)
"""Files of a checkpoint, apart from its shards, that the output depends on."""

_START_OVER: Final = "Leave out --resume to start over"


@dataclass(frozen=True)
class Identity:
    """What a conversion's output depends on; two equal ones give the same bytes.

    Attributes:
        version: Of this package.
        folder: The checkpoint, for messages.
        options: Options that change the output, by the command line's name.
        inputs: SHA-256 of each file that goes into the metadata; None for one that does not exist.
        shards: By file name: size in bytes, time of last change in ns, SHA-256 of the header.
        files: Names of the output files.
        output: SHA-256 over their headers.
    """

    version: str
    folder: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    shards: Mapping[str, Sequence[Any]]
    files: Sequence[str]
    output: str


def identify(
    checkpoint: Checkpoint, plan: Plan, paths: Sequence[Path], options: Mapping[str, Any]
) -> Identity:
    """Describe a conversion.

    Args:
        checkpoint: What is converted.
        plan: What is written.
        paths: Where to.
        options: Options that change the output, by the command line's name; JSON values.

    Raises:
        ModelFileError: A file of the checkpoint cannot be read.
    """
    from pyllama_dsv4 import __version__

    inputs = {}
    for name in INPUTS:
        path = checkpoint.folder / name
        try:
            inputs[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
        except OSError as e:
            raise ModelFileError("cannot read", path=path, found=e.strerror or e) from e
    return Identity(
        version=__version__,
        folder=str(checkpoint.folder),
        options=dict(options),
        inputs=inputs,
        shards={
            shard.name: [*checkpoint.stamp(shard), hashlib.sha256(checkpoint.header(shard)).hexdigest()]
            for shard in checkpoint.shards
        },
        files=[path.name for path in paths],
        output=hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest(),
    )


class Journal:
    """A journal file, locked against other processes while it is open; a context manager.

    Args:
        path: The file; created if need be.

    Attributes:
        n_done: Tensors that are on the disk, counted in file order.

    Raises:
        ConvertError: Another process has it open.
        DiskFullError, ModelFileError: It cannot be opened or created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_done = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as e:
            raise write_error(path, e) from e
        try:
            lock_file(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, identity: Identity) -> bool:
        """Read what is there; return whether it is of a conversion that can go on.

        Raises:
            CheckpointError: The checkpoint is not what it was when the conversion began.
            ArgumentError: The options are others.
            ConvertError: Another version of this package wrote the beginning.
        """
        lines = self._lines()
        if not lines:
            return False
        first, *claims = lines
        if first.get("format") != FORMAT:
            raise ConvertError(
                "cannot go on with a conversion that another version began",
                path=self.path,
                found=f"journal format {first.get('format')!r}",
                expected=FORMAT,
                hint=_START_OVER,
            )
        _compare(first, identity, self.path)
        counts = [claim["n_done"] for claim in claims if isinstance(claim.get("n_done"), int)]
        self.n_done = max(counts, default=0)
        return True

    def begin(self, identity: Identity) -> None:
        """Write the first line; nothing is claimed. What an earlier conversion left under other names is removed.

        Raises:
            DiskFullError, ModelFileError: It cannot be written.
        """
        self.n_done = 0
        self._remove_leftovers(identity.files)
        try:
            os.ftruncate(self._fd, 0)
        except OSError as e:
            raise write_error(self.path, e) from e
        try:
            self._append({"format": FORMAT, **asdict(identity)})
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
            raise
        sync_folder(self.path.parent)

    def _remove_leftovers(self, names: Sequence[str]) -> None:
        """Remove the partial files of an earlier conversion that was split otherwise."""
        try:
            first = next(iter(self._lines()), {})
        except ConvertError:
            return
        for name in first.get("files") or ():
            if isinstance(name, str) and name == Path(name).name and name not in names:
                with suppress(OSError):
                    os.unlink(partial_path(self.path.with_name(name)))

    def claim(self, n_done: int) -> None:
        """Note that the data of the first `n_done` tensors is on the disk.

        Raises:
            DiskFullError, ModelFileError: It cannot be written.
        """
        self._append({"n_done": n_done})
        self.n_done = n_done

    def remove(self) -> None:
        """Remove the file: the output is complete, or nothing is left of it."""
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
        self.close()

    def close(self) -> None:
        """Close the file and give up the lock; an empty file is removed. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if os.fstat(fd).st_size == 0:
            with suppress(OSError):
                os.unlink(self.path)
        os.close(fd)

    def _append(self, value: Mapping[str, Any]) -> None:
        raw = memoryview(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        try:
            os.lseek(self._fd, 0, os.SEEK_END)
            while raw:
                raw = raw[os.write(self._fd, raw) :]
            os.fsync(self._fd)
        except OSError as e:
            raise write_error(self.path, e) from e

    def _lines(self) -> list[dict[str, Any]]:
        raw = b""
        try:
            os.lseek(self._fd, 0, os.SEEK_SET)
            while piece := os.read(self._fd, 1 << 20):
                raw += piece
            # the next claim must not continue a line that was cut short
            end = raw.rfind(b"\n") + 1
            os.ftruncate(self._fd, end)
        except OSError as e:
            raise write_error(self.path, e) from e
        lines = []
        for line in raw[:end].splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise ConvertError(
                    "the journal of the interrupted conversion is damaged",
                    path=self.path,
                    found=ascii(line[:40]),
                    expected="one JSON object per line",
                    hint=_START_OVER,
                )
            lines.append(value)
        return lines


def _compare(old: Mapping[str, Any], new: Identity, path: Path) -> None:
    """Raise the error that names the first difference between a journal's identity and the present one."""
    if old.get("version") != new.version:
        raise ConvertError(
            "cannot go on with a conversion that another version began",
            path=path,
            found=f"version {old.get('version')}",
            expected=new.version,
            hint=_START_OVER,
        )
    for name, expected in (old.get("shards") or {}).items():
        found = new.shards.get(name)
        if found is None or list(found) != list(expected):
            raise CheckpointError(
                "the checkpoint changed since the conversion began",
                path=Path(new.folder) / name,
                found="no such shard" if found is None else _shard_difference(expected, found),
                expected="the same shard",
                hint=_START_OVER,
            )
    for name in new.shards:
        if name not in (old.get("shards") or {}):
            raise CheckpointError(
                "the checkpoint changed since the conversion began",
                path=Path(new.folder) / name,
                found="a shard that was not there",
                expected="the same shards",
                hint=_START_OVER,
            )
    for name, digest in new.inputs.items():
        if (old.get("inputs") or {}).get(name) != digest:
            raise CheckpointError(
                "the checkpoint changed since the conversion began",
                path=Path(new.folder) / name,
                found="another content",
                expected="the same file",
                hint=_START_OVER,
            )
    for name, value in new.options.items():
        before = (old.get("options") or {}).get(name)
        if before != value:
            raise ArgumentError(
                "cannot go on with other options than the conversion began with",
                key=name,
                found=value,
                expected=before,
                hint=f"Give the same options again. {_START_OVER}",
            )
    if old.get("output") != new.output:
        raise ConvertError(
            "the file to be written is not the one that was begun",
            path=path,
            found="another header",
            expected="the same",
            hint=_START_OVER,
        )


def _shard_difference(old: Sequence[Any], new: Sequence[Any]) -> str:
    if old[0] != new[0]:
        return f"{new[0]:,} bytes, {old[0]:,} before"
    if old[2] != new[2]:
        return "another header"
    return "a file that was written later"
