"""What a terminal needs: text without control characters, colours where they are wanted, notes apart from answers.

Answers go to stdout through ``AnswerWriter``; everything else that people read goes to stderr through ``Ui``. Imports
rich only to animate or to lay out.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["AnswerWriter", "Ui", "clean", "folded_row", "stop_bar", "use_color"]

ANIMATE_AFTER_S: Final = 0.5
"""Work that is done sooner shows no progress."""

_DIM, _RED, _YELLOW, _RESET = "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"

_VISIBLE: Final[dict[int, int | None]] = {
    **{c: 0x2400 + c for c in range(32) if c not in (9, 10)},  # control pictures
    0x0D: None,  # CRLF is a line end; a lone CR would overwrite the line
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def clean(text: str) -> str:
    """Return text that cannot command a terminal: control characters but newline and tab become visible signs."""
    return text.translate(_VISIBLE)


def use_color(mode: str, stream: TextIO) -> bool:
    """Tell whether to colour what is written to `stream`.

    Args:
        mode: ``always``, ``never``, or ``auto``: on a terminal, unless NO_COLOR is set or TERM is ``dumb``.
        stream: Where the text goes.
    """
    if mode != "auto":
        return mode == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _folded(text: str, stream: TextIO) -> str:
    """Return text broken between words, line by line, to the width of the terminal that `stream` is."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:  # not a terminal
        return text
    wrap = textwrap.TextWrapper(max(width, 20), break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.split("\n"))


def folded_row(head: str, text: str, stream: TextIO, *, indent: int | None = None) -> str:
    """Return a row of a term and its text; on a terminal the text is broken between words and stays in its column.

    Args:
        head: The term, padded to its column; may hold colours.
        text: What is said of it.
        stream: Where the row goes.
        indent: Columns that `head` takes; by default its length.
    """
    indent = len(head) if indent is None else indent
    try:
        width = os.get_terminal_size(stream.fileno()).columns - indent
    except OSError:  # not a terminal
        return head + text
    if width < 12:  # no room for a column: the terminal breaks it
        return head + text
    rows = textwrap.wrap(text, width, break_on_hyphens=False)
    return head + f"\n{'':{indent}}".join(rows)


def stop_bar(bar: Progress) -> None:
    """Take rich's bar away, also one that Ctrl-C met in the middle of its start."""
    try:
        bar.stop()
    except IndexError:  # rich undoes more than it had done
        bar.console.show_cursor(True)


class AnswerWriter:
    """The model's text, piece by piece. A model's text is not trusted: see ``clean``.

    Args:
        color: ``auto``, ``always`` or ``never``.
        stream: Where to; by default stdout.
    """

    def __init__(self, color: str, stream: TextIO | None = None) -> None:
        self.color = color
        self._stream = sys.stdout if stream is None else stream
        self.is_terminal = self._stream.isatty()
        self._is_color = use_color(color, self._stream)
        self._is_cleaned = self._is_color or self.is_terminal
        self._is_line_start = True

    def write(self, text: str, *, is_dim: bool = False) -> None:
        """Write and flush one piece."""
        if self._is_cleaned:
            text = clean(text)
        if not text:
            return
        self._is_line_start = text.endswith("\n")
        self._stream.write(f"{_DIM}{text}{_RESET}" if is_dim and self._is_color else text)
        self._stream.flush()

    def end_line(self) -> None:
        """Start a new line unless at the start of one."""
        if not self._is_line_start:
            self.write("\n")


class Ui:
    """Notes, errors and progress on stderr.

    Args:
        color: ``auto``, ``always`` or ``never``.
        is_quiet: Show errors only.
        is_verbose: Other lines may come between: animate nothing.
    """

    def __init__(self, *, color: str = "auto", is_quiet: bool = False, is_verbose: bool = False) -> None:
        self._stream = sys.stderr
        self.is_quiet = is_quiet
        self.is_color = use_color(color, self._stream)
        self.is_animated = (
            not (is_quiet or is_verbose) and color != "never" and use_color("auto", self._stream)
        )

    def _write(self, text: str, style: str = "") -> None:
        sys.stdout.flush()  # stdout and stderr may be the same terminal: keep their order
        text = _folded(clean(text), self._stream)
        self._stream.write(f"{style}{text}{_RESET}\n" if style and self.is_color else f"{text}\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Say something by the way; nothing when quiet."""
        if not self.is_quiet:
            self._write(text, _DIM)

    def say(self, text: str) -> None:
        """Answer what the user asked for."""
        self._write(text)

    def warn(self, text: str) -> None:
        """Report what the user should know before it is too late."""
        self._write(f"Warning: {text}", _YELLOW)

    def error(self, text: str) -> None:
        """Report an error."""
        self._write(f"Error: {text}", _RED)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show rows of a term and its text, folded to the terminal's width."""
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column()
        for term, text in rows:
            grid.add_row(Text(clean(term)), Text(clean(text)))
        sys.stdout.flush()
        self.console().print(grid)

    def console(self) -> Console:
        """Return rich's console on stderr."""
        from rich.console import Console

        return Console(file=self._stream, no_color=not self.is_color, highlight=False, markup=False)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Waiting]:
        """Show `text` beside a spinner while the body runs, if that takes a while and stderr is a terminal."""
        waiting = Waiting(self, text)
        try:
            yield waiting
        finally:
            waiting.stop()


class Waiting:
    """A spinner that appears after ``ANIMATE_AFTER_S``, and a bar once ``advance`` is called; see ``Ui.waiting``."""

    def __init__(self, ui: Ui, text: str) -> None:
        self._ui = ui
        self._text = text
        self._lock = threading.Lock()
        self._is_stopped = False
        self._stop_spinner: Callable[[], None] = lambda: None
        self._fraction: float | None = None  # None: nothing is known, or it is done
        self._update: Callable[[float], None] | None = None
        if ui.is_animated:
            self._timer = threading.Timer(ANIMATE_AFTER_S, self._start)
            self._timer.daemon = True
            self._timer.start()

    def _start(self) -> None:
        with self._lock:
            if not self._is_stopped:
                self._show()

    def _show(self) -> None:
        """Show the spinner, or the bar if there is a fraction, instead of what is shown."""
        from rich import progress as rich

        columns: tuple[rich.ProgressColumn, ...] = (
            rich.SpinnerColumn(),
            rich.TextColumn("{task.description}", markup=False),
        )
        if self._fraction is None:
            columns += (rich.TimeElapsedColumn(),)
        else:
            columns += (rich.BarColumn(), rich.TaskProgressColumn(), rich.TimeRemainingColumn())
        self._stop_spinner()
        progress = rich.Progress(*columns, console=self._ui.console(), transient=True)
        task = progress.add_task(clean(self._text), total=None if self._fraction is None else 1.0)
        self._stop_spinner = lambda: stop_bar(
            progress
        )  # first: an interrupt may come in the middle of the start
        progress.start()
        self._update = None
        if self._fraction is not None:
            self._update = lambda done: progress.update(task, completed=done)
            self._update(self._fraction)

    def advance(self, fraction: float) -> None:
        """Say how far the work is, 0..1; from 1 on it is unknown again how long the rest takes."""
        if not self._ui.is_animated:
            return
        with self._lock:
            is_shown = self._update is not None
            self._fraction = fraction if fraction < 1 else None
            if self._is_stopped or self._timer.is_alive():
                return  # not shown, or not yet
            if self._fraction is None:
                if is_shown:
                    self._show()
            elif self._update is None:
                self._show()
            else:
                self._update(fraction)

    def stop(self) -> None:
        """Take the spinner away. Idempotent."""
        if self._is_stopped:
            return
        if self._ui.is_animated:
            self._timer.cancel()
        with self._lock:
            self._is_stopped = True
            self._stop_spinner()
