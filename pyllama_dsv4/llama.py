"""``Llama``: one model, one context, one conversation, as most programs want it.

The top of the layers: opening and evaluation (``llama_base``), completions, chats; saved states are here.
"""

from __future__ import annotations

import os

from .chat_completion import ChatCompletions
from .sampler import SamplingOptions
from .state import State, read_state, write_state
from .stats import Stats

__all__ = ["Llama", "SamplingOptions", "Stats"]


class Llama(ChatCompletions):
    """A model that is ready to run.

    Threads may share it: generations queue, first come, first served. Close it, or use it as a context manager; a
    forked child must open its own. Arguments: see ``__init__``.
    """

    def _state(self) -> State:
        logits = self._context.logits if self._context.has_logits else None
        return State(self._state_identity(), list(self._session.ids), logits, self._context.save_state())

    def save_state(self) -> bytes:
        """Return the evaluated tokens, their cache and the logits, for ``load_state``.

        Flash takes about 7 KB a token, and 24 MB for its windows.
        """
        with self._use():
            return self._state().to_bytes()

    def load_state(self, state: bytes | memoryview) -> None:
        """Put back what ``save_state`` returned, here or in another process with the same model, build and settings.

        Raises:
            StateError: Damaged, or of another model, build or cache type; nothing was changed. If the engine itself
                refuses the state, the tokens are forgotten.
            ContextFullError: It holds more tokens than this context; nothing was changed.
        """
        self._load_state(State.from_bytes(state))

    def save_state_file(self, path: str | os.PathLike[str]) -> None:
        """Write ``save_state`` to a file, which appears complete or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        with self._use():
            state = self._state()
        write_state(path, state)

    def load_state_file(self, path: str | os.PathLike[str]) -> None:
        """Put back what ``save_state_file`` wrote; errors as ``load_state`` and ``open``."""
        self._load_state(read_state(path), path)

    def _load_state(self, state: State, path: str | os.PathLike[str] | None = None) -> None:
        with self._change():
            state.check_identity(self._state_identity(), path=path)
            self._check_fits(len(state.ids))
            self._session.restore(state.ids, state.engine, state.logits)
            self._drop_sampler()
