"""Bringing a mapped model file into the page cache from a background thread.

The engine maps the file without reading it (145 GiB would take minutes in one system call that nothing can
interrupt). This reads it in chunks, dense tensors before routed experts, reports progress, stops when asked, and
never reads more than fits into memory that is free or reclaimable: beyond that every chunk would push out another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._native import check, ffi, lib
from .machine import available_bytes

__all__ = ["Progress", "Warmup"]

CHUNK_BYTES = 64 << 20  # at most 256 MiB: one chunk cannot be interrupted
RESERVE_BYTES = 1 << 30  # left to everything else on the machine


@dataclass(frozen=True)
class Progress:
    """How far a load or warm-up is.

    Attributes:
        stage: ``"load"`` or ``"warmup"``; of ``Llama.from_pretrained`` also ``"download"``.
        fraction: 0 to 1.
        n_bytes: Bytes done (warm-up only).
        n_bytes_total: Bytes planned (warm-up only).
        eta_s: Seconds left at the present rate; None until there is a rate.
    """

    stage: str
    fraction: float
    n_bytes: int = 0
    n_bytes_total: int = 0
    eta_s: float | None = None


class Warmup:
    """A background thread that reads ranges of files.

    Args:
        ranges: ``(path, offset, n_bytes)`` in the order of reading.
        on_progress: Called from the thread after every chunk; returning False stops.
        budget: Bytes to have in memory at most; None asks the machine.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[Path, int, int]],
        on_progress: Callable[[Progress], bool | None] | None = None,
        budget: int | None = None,
    ) -> None:
        self._ranges = ranges
        self._on_progress = on_progress
        if budget is None:
            available = available_bytes()
            budget = None if available is None else max(available - RESERVE_BYTES, 0)
        n_total = sum(n for _, _, n in ranges)
        self.n_bytes_total = n_total if budget is None else min(n_total, budget)
        self.n_bytes = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pyllama-dsv4-warmup", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop after the present chunk and wait for the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; return whether it has been reached."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._read_all()
        except BaseException as error:  # the model works without a warm-up
            self.error = error

    def _read_all(self) -> None:
        start_s = time.monotonic()
        n_resident = ffi.new("int64_t *")
        for path, offset, n_bytes in self._ranges:
            with open(path, "rb") as file:
                for at in range(offset, offset + n_bytes, CHUNK_BYTES):
                    n = min(CHUNK_BYTES, offset + n_bytes - at, self.n_bytes_total - self.n_bytes)
                    if n <= 0 or self._stop.is_set():
                        return
                    check(lib.pyl_warm_range(file.fileno(), at, n, n_resident), "warming pages", path=path)
                    self.n_bytes += n
                    if not self._report(time.monotonic() - start_s):
                        return

    def _report(self, elapsed_s: float) -> bool:
        if self._on_progress is None:
            return True
        left = self.n_bytes_total - self.n_bytes
        eta_s = elapsed_s / self.n_bytes * left if self.n_bytes else None
        fraction = self.n_bytes / self.n_bytes_total if self.n_bytes_total else 1.0
        event = Progress("warmup", fraction, self.n_bytes, self.n_bytes_total, eta_s)
        return self._on_progress(event) is not False
