"""How a running call is stopped from outside, and how it says how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .errors import ArgumentError, CancelledError

__all__ = ["Watch"]


class Watch:
    """Deadline, stop event and progress of one call.

    Args:
        timeout: Seconds from now; None means no limit.
        stop_event: Set it from anywhere to stop the call.
        on_prefill: Called with the fraction of the prompt that is evaluated; returning False stops the call.

    Raises:
        ArgumentError: A timeout that is not a positive number.
    """

    def __init__(
        self,
        timeout: float | None = None,
        stop_event: threading.Event | None = None,
        on_prefill: Callable[[float], bool | None] | None = None,
    ) -> None:
        if timeout is not None and (not isinstance(timeout, (int, float)) or not timeout > 0):
            raise ArgumentError("generating", key="timeout", found=repr(timeout), expected="seconds above 0")
        if stop_event is not None and not hasattr(stop_event, "is_set"):
            raise ArgumentError(
                "generating",
                key="stop_event",
                found=type(stop_event).__name__,
                expected="an event with is_set()",
            )
        self._timeout = timeout
        self._end_s = None if timeout is None else time.monotonic() + timeout
        self._event = stop_event
        self._on_prefill = on_prefill
        self._is_refused = False

    def reason(self) -> str | None:
        """Return why the call is to stop, or None."""
        if self._event is not None and self._event.is_set():
            return "stop_event was set"
        if self._end_s is not None and time.monotonic() >= self._end_s:
            return f"timeout={self._timeout:g} seconds passed"
        return "the progress callback returned False" if self._is_refused else None

    def go_on(self) -> bool:
        """Tell whether the call may go on."""
        return self.reason() is None

    def check(self) -> None:
        """Stop the call if it is to stop.

        Raises:
            CancelledError: saying why.
        """
        reason = self.reason()
        if reason is not None:
            raise CancelledError(f"the generation was stopped: {reason}")

    def prefilled(self, fraction: float) -> None:
        """Say how much of the prompt is evaluated; errors as ``check``."""
        if self._on_prefill is not None and self._on_prefill(fraction) is False:
            self._is_refused = True
        self.check()
