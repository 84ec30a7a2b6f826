"""Where the messages of a chat come from: a terminal with line editing and history, or the lines of a pipe.

Both understand text between triple quotes as one message of several lines. Knows nothing about models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from pyllama_dsv4.errors import ArgumentError

__all__ = ["PipeInput", "Source", "TerminalInput", "history_path"]

PROMPT: Final = "> "
QUOTES: Final = '"""'
REFRESH_S: Final = 1.0


class Source(Protocol):
    """Gives messages one by one."""

    def read(self) -> str:
        """Return the next message.

        Raises:
            EOFError: There is none.
            KeyboardInterrupt: The user wants to leave.
        """

    def prefill(self, text: str) -> None:
        """Offer a text to be edited as the next message.

        Raises:
            ArgumentError: Nothing can be edited here.
        """


def _is_open(text: str) -> bool:
    """Tell whether a quoted block has begun and not ended."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def _message(text: str) -> str:
    """Return a message as it was meant: without the quotes of a block, and valid Unicode."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    block = text.strip()
    if block.startswith(QUOTES):
        return block.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


class PipeInput:
    """Lines of standard input."""

    def read(self) -> str:
        text = self._line()
        while _is_open(text):
            try:
                text += self._line()
            except EOFError:
                break
        return _message(text.removesuffix("\n"))

    def prefill(self, text: str) -> None:
        raise ArgumentError("/edit", found="no terminal", expected="/edit TEXT")

    def _line(self) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode("utf-8", "replace")


class TerminalInput:
    """Lines edited on the terminal.

    Args:
        commands: Names completed by the tab key.
        note: Shows a line by the way.
        aside: Text shown at the right of the prompt, asked for every second; ``""`` for none.
        is_color: Whether colours are wanted.
        history: File that keeps earlier messages, made readable to its owner only; None keeps none.
    """

    def __init__(
        self,
        *,
        commands: Sequence[str],
        note: Callable[[str], None],
        aside: Callable[[], str],
        is_color: bool,
        history: Path | None,
    ) -> None:
        self._note = note
        self._aside = aside
        self._session = _session(commands, aside, is_color, _history(history))
        self._is_leaving = False
        self._default = ""

    def prefill(self, text: str) -> None:
        self._default = text

    def read(self) -> str:
        while True:
            try:
                # ask for refreshes only as long as something changes by itself
                default, self._default = self._default, ""
                refresh_s = REFRESH_S if self._aside() else 0
                text = self._session.prompt(refresh_interval=refresh_s, default=default)
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    continue  # it took the line back
                if self._is_leaving:
                    raise
                self._is_leaving = True
                self._note("Ctrl-C again leaves, as does Ctrl-D; /help shows the commands.")
            else:
                self._is_leaving = False
                return _message(text)


def _session(
    commands: Sequence[str], aside: Callable[[], str], is_color: bool, history: History
) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.output import ColorDepth, create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            return [Completion(name, -len(text)) for name in commands if text and name.startswith(text)]

    return PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=" " * len(PROMPT),
        key_bindings=_keys(),
        completer=Commands(),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        rprompt=aside,
        history=history,
        color_depth=None if is_color else ColorDepth.DEPTH_1_BIT,
        output=create_output(always_prefer_tty=True),  # stdout may be a file: then the prompt is on stderr
    )


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        if _is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_path() -> Path:
    """Return the file that keeps the user's messages."""
    from platformdirs import user_state_path

    return user_state_path("pyllama-dsv4") / "chat-history"


def _history(path: Path | None) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateFile(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk costs the history, not the chat
                super().store_string(string.encode("utf-8", "replace").decode("utf-8"))

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError:  # a read-only home
        return InMemoryHistory()
    return PrivateFile(path)
