"""Whose turn it is: generations of several threads on one ``Llama`` come one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from .watch import Watch

__all__ = ["Turns"]

POLL_S = 0.05


class _Turn:
    def __init__(self, thread: int) -> None:
        self.thread = thread


class Turns:
    """A queue of threads, first come, first served.

    A generation keeps its turn from its first token to its last, or until it is closed. A thread that starts another
    one while its own waits half-way takes the turn from itself: waiting would be for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[_Turn] = deque()
        self._holder: _Turn | None = None

    @contextmanager
    def take(self, watch: Watch | None = None) -> Iterator[None]:
        """Wait for the turn and keep it.

        Raises:
            CancelledError: by `watch`, while waiting.
        """
        turn = _Turn(threading.get_ident())
        with self._changed:
            if self._holder is not None and self._holder.thread == turn.thread:
                self._holder = turn
            else:
                self._waiting.append(turn)
                try:
                    while self._holder is not None or self._waiting[0] is not turn:
                        self._changed.wait(POLL_S)
                        if watch is not None:
                            watch.check()
                    self._holder = turn
                finally:
                    self._waiting.remove(turn)
        try:
            yield
        finally:
            with self._changed:
                if self._holder is turn:
                    self._holder = None
                    self._changed.notify_all()
