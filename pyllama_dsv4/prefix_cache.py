"""Evaluated prompts on disk, so that a long prefix is computed once and not once per process.

Owns a folder of states (``state.py``'s container: identity, checksum, no pickle), named by engine identity and token
ids; finding the longest that begins a prompt; the folder's size. Several processes may share it: files appear complete
or not at all, and one that another process removed, or that is damaged, is a prefix that is not there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ._native import logger
from .errors import ArgumentError, StateError
from .state import State, read_state, write_state

__all__ = ["PrefixCache"]

SUFFIX = ".prefix"
N_TOKENS_MIN = 256  # shorter prefixes are computed as fast as they are read
BYTES_MAX = 8 << 30


class PrefixCache:
    """A folder of states.

    Args:
        folder: Made if it is not there.
        identity: What must be equal for a state to be used: model, build, settings.
        bytes_max: Size of the folder at most; the files used longest ago go first.

    Raises:
        OSError: The folder cannot be made.
        ArgumentError: A size that is not positive.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Mapping[str, str], bytes_max: int = BYTES_MAX
    ) -> None:
        if bytes_max <= 0:
            raise ArgumentError("prefix cache", key="prefix_cache_bytes", found=bytes_max, expected="above 0")
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bytes_max = bytes_max
        self.set_identity(identity)

    def set_identity(self, identity: Mapping[str, str]) -> None:
        """Keep and find the states of another identity from now on."""
        self._identity = dict(identity)
        self._engine = hashlib.sha256(repr(sorted(identity.items())).encode("utf-8")).hexdigest()[:16]

    def _path(self, ids: Sequence[int]) -> Path:
        digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:32]
        return self._folder / f"{self._engine}-{len(ids)}-{digest}{SUFFIX}"

    def find(self, ids: Sequence[int], n_min: int) -> State | None:
        """Return the state of the longest stored prefix of `ids` with more than `n_min` tokens, if there is one."""
        lengths = set()
        for path in self._folder.glob(f"{self._engine}-*{SUFFIX}"):
            with suppress(ValueError, IndexError):
                lengths.add(int(path.name.split("-")[1]))
        for n in sorted((n for n in lengths if n_min < n <= len(ids)), reverse=True):
            path = self._path(ids[:n])
            try:
                state = read_state(path)
                state.check_identity(self._identity, path=path)
            except FileNotFoundError:
                continue
            except (OSError, StateError) as error:
                logger.warning("prefix cache: %s", error)
                with suppress(OSError):
                    path.unlink()
                continue
            if state.ids != list(ids[:n]):
                continue
            with suppress(OSError):
                os.utime(path)  # used now
            return state
        return None

    def store(self, ids: Sequence[int], engine: bytes) -> None:
        """Keep the engine's state after `ids`; a full disk or a folder without permission is logged, no error."""
        path = self._path(ids)
        if len(ids) < N_TOKENS_MIN or len(engine) > self._bytes_max or path.exists():
            return
        try:
            write_state(path, State(self._identity, list(ids), None, engine))
        except OSError as error:
            logger.warning("prefix cache: %s", error)
        self._shrink()

    def _shrink(self) -> None:
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
        excess = sum(size for _, size, _ in files) - self._bytes_max
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            with suppress(OSError):
                path.unlink()
            excess -= size
