"""``Llama``: one model, one context, one conversation, as most programs want it.

The top of the layers: opening and evaluation (``llama_base``), completions, chats; saved states are here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .chat_completion import ChatCompletions
from .hub import download
from .llama_base import LlamaBase
from .options import keyword_names, refuse_unknown
from .sampler import SamplingOptions
from .state import State, read_state, write_state
from .stats import Stats
from .warmup import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Llama", "SamplingOptions", "Stats"]


class Llama(ChatCompletions):
    """A model that is ready to run.

    Threads may share it: generations queue, first come, first served. Close it, or use it as a context manager; a
    forked child must open its own. Arguments: see ``__init__``.
    """

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        *,
        additional_files: Sequence[str] = (),
        revision: str | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Fetch a model from the Hugging Face hub, if it is not there yet, and open it.

        Needs the extra ``hub``. The client's environment counts: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``.

        Args:
            repo_id: ``owner/name``.
            filename: Name or pattern (``*native.gguf``) of one file; all shards of a split model are fetched.
            additional_files: Names or patterns of further files to fetch.
            revision: Branch, tag or commit.
            local_dir: Folder to put the files in; None puts them in the client's cache.
            cache_dir: Another cache.
            token: For private repositories.
            options: As ``__init__``; `progress` is told of the stage ``"download"``, too.

        Raises:
            ImportError: huggingface_hub is not installed.
            ModelNotFoundError: No such repository, revision or file.
            ModelFileError: It cannot be fetched.
            CancelledError: `progress` returned False.
        """
        if cls.__init__ is LlamaBase.__init__:  # before a long download
            known = keyword_names(cls.__init__)
            refuse_unknown("from_pretrained", [name for name in options if name not in known], known)
        progress = options.get("progress")
        path = download(
            repo_id,
            filename,
            additional_files=additional_files,
            revision=revision,
            local_dir=local_dir,
            cache_dir=cache_dir,
            token=token,
            on_progress=None
            if progress is None
            else lambda fraction: progress(Progress("download", fraction)) is not False,
        )
        return cls(path, **options)

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
