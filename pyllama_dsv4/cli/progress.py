"""Progress of work on bytes: a bar on a terminal, a line now and then elsewhere, both on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from .terminal import Ui, clean

__all__ = ["Report", "byte_progress"]

LINE_INTERVAL_S: Final = 5.0
"""Seconds between progress lines when stderr is not a terminal."""

Report = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is in work."""


@contextmanager
def byte_progress(ui: Ui, *, is_shown: bool) -> Iterator[Report | None]:
    """Give a callback that shows progress; None if there is nothing to show."""
    if not is_shown:
        yield None
    elif ui.is_animated:
        with _bar(ui) as report:
            yield report
    else:
        yield _Lines(ui)


@contextmanager
def _bar(ui: Ui) -> Iterator[Report]:
    from rich import progress as rich

    columns = (
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}", markup=False),
    )
    with rich.Progress(*columns, console=ui.console(), transient=True) as progress:
        task = progress.add_task("")

        def report(n_done: int, n_total: int, what: str) -> None:
            progress.update(task, completed=n_done, total=n_total, description=clean(what))

        yield report


class _Lines:
    """Progress for logs and pipes."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self._start_s = self._last_s = time.monotonic()

    def __call__(self, n_done: int, n_total: int, what: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < LINE_INTERVAL_S and n_done < n_total:
            return
        self._last_s = now_s
        per_s = n_done / max(now_s - self._start_s, 1e-9)
        left_s = round((n_total - n_done) / max(per_s, 1e-9))
        self._ui.note(
            f"{100 * n_done / max(n_total, 1):5.1f} %  {n_done / 1e9:.2f} of {n_total / 1e9:.2f} GB"
            f"  {per_s / 1e9:.2f} GB/s  {left_s // 60}:{left_s % 60:02d} left  {what}"
        )
