"""How commands that work through gigabytes show it, the options that they share, and the rows of a report.

A bar on a terminal, a line now and then elsewhere; both with GB/s and the time left, on stderr.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .help import option
from .terminal import Ui, clean, stop_bar

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["Report", "byte_progress", "print_rows", "quiet_option", "size", "threads_option"]

F = TypeVar("F", bound=Callable[..., Any])

LINE_INTERVAL_S: Final = 5.0
"""Seconds between progress lines when stderr is not a terminal."""

Report = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is in work."""


def threads_option(
    *more_names: str, section: str, default_text: str = "all cores", is_brief: bool = False
) -> Callable[[F], F]:
    """Add ``-t``, the workers of a command, as ``n_threads``."""
    return option(
        "-t",
        "--threads",
        *more_names,
        "n_threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        default_text=default_text,
        section=section,
        is_brief=is_brief,
        help="Worker threads.",
    )


def quiet_option(function: F) -> F:
    """Add ``-q`` of commands that end with a report."""
    return option(
        "-q", "--quiet", is_flag=True, section="Output", help="No progress and no report, only errors."
    )(function)


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read an option's value as bytes, such as ``50G``: K, M and G are powers of 1000, as in llama.cpp's tools."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size such as 50G, 500M or 1000000.", ctx, param)
    factor: int = 1000 ** " KMG".index(match[2] or " ")
    return int(match[1]) * factor


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print the rows of a report on stdout: a label and its text each."""
    for label, text in rows:
        click.echo(f"  {label:<16}{clean(text)}")


@contextmanager
def byte_progress(ui: Ui, *, is_shown: bool) -> Iterator[Report | None]:
    """Give a callback that shows progress on stderr; None if it is not to be shown."""
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
    bar = rich.Progress(*columns, console=ui.console())
    task: TaskID | None = None

    def report(n_done: int, n_total: int, what: str) -> None:
        nonlocal task
        if task is None:  # begins where an interrupted run stopped: what that did is not this one's speed
            task = bar.add_task(clean(what), total=n_total, completed=n_done)
        bar.update(task, completed=n_done, total=n_total, description=clean(what))

    try:
        bar.start()
        yield report
    finally:
        stop_bar(bar)


class _Lines:
    """Progress for logs and pipes."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self._start_s = self._last_s = time.monotonic()
        self._n_start: int | None = None

    def __call__(self, n_done: int, n_total: int, what: str) -> None:
        now_s = time.monotonic()
        if self._n_start is None:
            self._n_start = n_done
        if now_s - self._last_s < LINE_INTERVAL_S and n_done < n_total:
            return
        self._last_s = now_s
        per_s = max(n_done - self._n_start, 1) / max(now_s - self._start_s, 1e-9)
        left_s = round((n_total - n_done) / per_s)
        self._ui.note(
            f"{100 * n_done / max(n_total, 1):5.1f} %  {n_done / 1e9:.2f} of {n_total / 1e9:.2f} GB"
            f"  {per_s / 1e9:.2f} GB/s  {left_s // 60}:{left_s % 60:02d} left  {what}"
        )
