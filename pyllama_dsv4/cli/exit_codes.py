"""The exit codes of ``pyllama-dsv4`` and the one table that gives each error its own."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from pyllama_dsv4 import errors

__all__ = ["ExitCode", "exit_code"]


class ExitCode(IntEnum):
    """What the process reports; the signals' codes are those that a shell shows for them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INPUT = 3
    MEMORY = 4
    INTERRUPTED = 130  # SIGINT
    BROKEN_PIPE = 141  # SIGPIPE
    TERMINATED = 143  # SIGTERM


_BY_CLASS: Final[dict[type[BaseException], ExitCode]] = {
    errors.ModelFileError: ExitCode.INPUT,
    errors.FormatError: ExitCode.INPUT,
    errors.ModelLoadError: ExitCode.INPUT,
    errors.ChatError: ExitCode.INPUT,  # the file's template or messages
    errors.StateError: ExitCode.INPUT,
    errors.TokenizeError: ExitCode.INPUT,  # a file without a vocabulary
    errors.ArgumentError: ExitCode.USAGE,
    errors.UnknownOptionError: ExitCode.USAGE,
    errors.MemoryLimitError: ExitCode.MEMORY,
    MemoryError: ExitCode.MEMORY,
    errors.PyllamaError: ExitCode.FAILED,
    # of the system, where no module had more to say: a prompt file that is not there
    FileNotFoundError: ExitCode.INPUT,
    IsADirectoryError: ExitCode.INPUT,
    NotADirectoryError: ExitCode.INPUT,
    PermissionError: ExitCode.INPUT,
}


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code for an error, by the nearest of its classes that the table knows."""
    for cls in type(error).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls]
    return ExitCode.FAILED
