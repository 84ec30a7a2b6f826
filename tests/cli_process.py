"""Runs the command line as a user would: helpers of ``tests/cli``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pexpect
import pyte

TIMEOUT_S = 120
N_ROWS = 300  # taller than any test's output: nothing scrolls away
PROMPT = ">"


def command(*args: object) -> list[str]:
    """Return the command line for arguments of ``pyllama-dsv4``.

    The installed script, because ``python -m`` puts the working folder first on the path, and in a source folder that
    is the package without its compiled modules.
    """
    script = Path(sys.executable).with_name("pyllama-dsv4")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "pyllama_dsv4"]
    return [*start, *map(str, args)]


class Terminal:
    """The command on a pseudo-terminal with a screen that shows what a user would see.

    Attributes:
        raw: Everything the command wrote, escape sequences included.
    """

    def __init__(self, args: Sequence[object], env: dict[str, str], columns: int) -> None:
        program, *rest = command(*args)
        self.child = pexpect.spawn(program, rest, env=env, dimensions=(N_ROWS, columns), timeout=TIMEOUT_S)
        self.child.delaybeforesend = None
        self.raw = b""
        self._screen = pyte.Screen(columns, N_ROWS)
        self._stream = pyte.ByteStream(self._screen)

    def _read(self, timeout_s: float) -> None:
        data = self.child.read_nonblocking(4096, timeout_s)
        self.raw += data
        self._stream.feed(data)

    @property
    def row(self) -> int:
        """The cursor's row."""
        return int(self._screen.cursor.y)

    def lines(self, start: int = 0) -> list[str]:
        """Return the screen's rows from `start` to the cursor's."""
        return [line.rstrip() for line in self._screen.display[start : self.row + 1]]

    def wait(self, is_there: Callable[[], bool], what: str) -> None:
        """Read until a condition holds."""
        end_s = time.monotonic() + TIMEOUT_S
        while not is_there():
            if time.monotonic() > end_s:
                raise TimeoutError(f"no {what} on the screen:\n" + "\n".join(self.lines()))
            try:
                self._read(1)
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                raise EOFError(f"no {what} before the end:\n" + "\n".join(self.lines())) from None

    def wait_for(self, text: str, start: int = 0) -> None:
        """Read until a text is on the screen, in row `start` or below."""
        self.wait(lambda: text in "\n".join(self.lines(start)), repr(text))

    def prompt(self, start: int = 0) -> str:
        """Read until the prompt is at the cursor, below row `start`; return what is between."""
        self.wait(
            lambda: self.row >= start and self.lines(self.row) == [PROMPT] and self._screen.cursor.x == 2,
            "prompt",
        )
        return "\n".join(self.lines(start)[:-1])

    def keys(self, keys: str) -> None:
        """Press keys."""
        self.child.send(keys)

    def ask(self, text: str) -> str:
        """Send a message of one row; return what is shown until the next prompt."""
        start = self.row + 1
        self.keys(text + "\r")
        return self.prompt(start)

    def end(self) -> tuple[str, int]:
        """Wait for the end; return the screen's text, and the exit code as a shell shows it."""
        try:
            while True:
                self._read(TIMEOUT_S)
        except pexpect.EOF:
            pass
        self.child.close()
        status = self.child.exitstatus
        return "\n".join(self.lines()), 128 + self.child.signalstatus if status is None else status
