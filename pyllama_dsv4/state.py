"""Saved states: the cache of a sequence with its token ids and logits, as bytes that only the same model can load.

Owns the container: identity of model, build and settings, lengths, a checksum. The engine's own bytes inside are what
``Context.save_state`` gives; they carry no identity, and loading those of another model gives fluent, wrong text.
Layout: magic, length of the JSON head (u32, little-endian), head, then ids (int32), logits (float32), engine bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StateError

__all__ = ["State", "model_fingerprint", "read_state", "write_state"]

MAGIC = b"PYLDSV4\x01"
HEAD_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class State:
    """One saved sequence.

    Attributes:
        identity: What must be equal where it is loaded, by name: model, build, settings.
        ids: Token ids in the cache.
        logits: ``(n_vocab,) float32`` after the last token; None if there were none.
        engine: The engine's bytes.
    """

    identity: Mapping[str, str]
    ids: list[int]
    logits: npt.NDArray[np.float32] | None
    engine: bytes | memoryview

    def to_bytes(self) -> bytes:
        """Return the state as bytes."""
        parts = (
            np.asarray(self.ids, "<i4").tobytes(),
            b"" if self.logits is None else self.logits.astype("<f4").tobytes(),
            bytes(self.engine),
        )
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        head = {
            "identity": dict(self.identity),
            "n_bytes": [len(part) for part in parts],
            "sha256": digest.hexdigest(),
        }
        text = json.dumps(head, sort_keys=True).encode("utf-8")
        return b"".join((MAGIC, struct.pack("<I", len(text)), text, *parts))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, path: str | os.PathLike[str] | None = None) -> State:
        """Read what ``to_bytes`` wrote.

        Raises:
            StateError: Not a state, cut off, or damaged.
        """

        def refuse(found: str, expected: str) -> StateError:
            return StateError("loading a state", path=path, found=found, expected=expected)

        view = memoryview(data).cast("B")
        start = len(MAGIC) + 4
        if bytes(view[: len(MAGIC)]) != MAGIC:
            raise refuse("other bytes at the start", "a state saved by this version of pyllama-dsv4")
        n_head = int.from_bytes(view[len(MAGIC) : start], "little")
        if n_head > HEAD_BYTES_MAX or start + n_head > len(view):
            raise refuse(f"{len(view)} bytes", "a complete state")
        try:
            head: Any = json.loads(bytes(view[start : start + n_head]))
            identity = {str(k): str(v) for k, v in head["identity"].items()}
            n_ids, n_logits, n_engine = (int(n) for n in head["n_bytes"])
            sha256 = str(head["sha256"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise refuse(f"a damaged head ({error})", "an unchanged state") from error
        sizes_ok = min(n_ids, n_logits, n_engine) >= 0 and n_ids % 4 == n_logits % 4 == 0
        payload = view[start + n_head :]
        if not sizes_ok or len(payload) != n_ids + n_logits + n_engine:
            raise refuse(f"{len(payload)} bytes of contents", f"{n_ids + n_logits + n_engine} bytes")
        if hashlib.sha256(payload).hexdigest() != sha256:
            raise refuse("another checksum", "an unchanged state")
        ids = np.frombuffer(payload[:n_ids], "<i4").tolist()
        logits = np.frombuffer(payload[n_ids : n_ids + n_logits], "<f4").astype(np.float32)
        return cls(identity, ids, logits if n_logits else None, payload[n_ids + n_logits :])

    def check_identity(
        self, identity: Mapping[str, str], *, path: str | os.PathLike[str] | None = None
    ) -> None:
        """Compare with the identity of the place where the state is to be loaded.

        Raises:
            StateError: naming the first difference.
        """
        for name in (*identity, *(k for k in self.identity if k not in identity)):
            found, expected = self.identity.get(name, "nothing"), identity.get(name, "nothing")
            if found != expected:
                raise StateError(
                    f"loading a state: its {name} differs",
                    path=path,
                    found=found,
                    expected=expected,
                    hint="A state belongs to the model file, build and settings it was saved with.",
                )


def model_fingerprint(files: Iterable[tuple[str | os.PathLike[str], int]]) -> str:
    """Return a digest of a model's header and tensor table, 16 hex digits; never reads the weights.

    Args:
        files: For every shard, its path and the offset of its data section.
    """
    digest = hashlib.sha256()
    for path, data_start in files:
        with open(path, "rb") as file:
            digest.update(file.read(data_start))
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def write_state(path: str | os.PathLike[str], state: State) -> None:
    """Write a state to a file, which appears complete or not at all.

    Raises:
        OSError: The file cannot be written; one that was there before is unchanged.
    """
    target = Path(path)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(state.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def read_state(path: str | os.PathLike[str]) -> State:
    """Read a file that ``write_state`` wrote.

    Raises:
        OSError: The file cannot be read.
        StateError: Not a state, cut off, or damaged.
    """
    return State.from_bytes(Path(path).read_bytes(), path=path)
