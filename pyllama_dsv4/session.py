"""What is in the KV cache, and how a new prompt reuses it.

Owns the token ids that a context holds and the checkpoints taken of it. The V4 cache cannot drop a tail of its
tokens (its compressor states are running sums), so going back means restoring a checkpoint. One is taken before
the last token of every prompt: the next prompt of a chat may replace exactly that token (``<think>`` by
``</think>``) and what was generated after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .context import Context
from .errors import StateError
from .prefix_cache import PrefixCache
from .watch import Watch

__all__ = ["Session"]

N_CHECKPOINTS_MAX = 8
CHECKPOINT_BYTES_MAX = 1 << 30  # all checkpoints together


@dataclass(frozen=True)
class _Checkpoint:
    ids: list[int]
    state: bytes


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


class Session:
    """The one sequence of a context, by its token ids.

    Args:
        context: Nothing else may evaluate on it.
        prefix_cache: Where prompts are kept beyond this session.

    Attributes:
        version: Changes with every change of the sequence; lets a running generation notice another one.
    """

    def __init__(self, context: Context, prefix_cache: PrefixCache | None = None) -> None:
        self._context = context
        self._prefix_cache = prefix_cache
        self._ids: list[int] = []
        self._checkpoints: list[_Checkpoint] = []
        self.version = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids in the cache, oldest first."""
        return tuple(self._ids)

    @property
    def n_tokens(self) -> int:
        return len(self._ids)

    def reset(self) -> None:
        """Forget all tokens and checkpoints."""
        self.version += 1
        self._ids = []
        self._checkpoints = []
        self._context.clear()

    def eval(
        self, ids: Sequence[int], *, all_logits: bool = False, watch: Watch | None = None
    ) -> npt.NDArray[np.float32] | None:
        """Append token ids; arguments, result and errors as ``Context.decode``."""
        self.version += 1
        try:
            rows = self._context.decode(ids, all_logits=all_logits, watch=watch)
        except BaseException:
            if self._context.n_tokens != len(self._ids):  # cleared by a failed or cancelled batch
                self._ids = []
            raise
        self._ids.extend(int(i) for i in ids)
        return rows

    def set_identity(self, identity: Mapping[str, str]) -> None:
        """Forget all tokens: what they depend on has changed, and is called so from now on."""
        self.reset()
        if self._prefix_cache is not None:
            self._prefix_cache.set_identity(identity)

    def propose(self, token: int, n_max: int) -> list[int]:
        """Return what a draft model lets follow `token`; see ``Context.propose``."""
        return self._context.propose([(0, token, n_max)])[0]

    def settle(self, n_accepted: int, n_rejected: int, logits: npt.NDArray[np.float32]) -> None:
        """Drop the rejected end of a proposal; see ``Context.settle``."""
        self.version += 1
        if n_rejected:
            del self._ids[-n_rejected:]
        try:
            self._context.settle(n_accepted, n_rejected, logits)
        except BaseException:
            self._ids = []
            raise

    def prefill(self, ids: Sequence[int], *, watch: Watch | None = None) -> int:
        """Make the cache hold exactly `ids`, evaluating as little as possible.

        Args:
            ids: The whole prompt, at least one id.
            watch: May stop the call.

        Returns:
            How many of its tokens were in the cache already.
        """
        n_cached = self._reuse(ids)
        if self._prefix_cache is not None:
            n_cached = self._fetch(self._prefix_cache, ids, n_cached)
        if len(ids) - n_cached > 1:
            self.eval(ids[n_cached:-1], watch=watch)
            self._save_checkpoint()
            if self._prefix_cache is not None:
                self._prefix_cache.store(self._ids, self._checkpoints[-1].state)
        if self.n_tokens < len(ids):
            self.eval(ids[self.n_tokens :], watch=watch)
        return n_cached

    def restore(
        self, ids: Sequence[int], engine: bytes | memoryview, logits: npt.NDArray[np.float32] | None
    ) -> None:
        """Put back a sequence that ``Context.save_state`` gave as `engine` when it held `ids`.

        Raises:
            StateError: The engine refused the state; the sequence was cleared.
        """
        self.reset()
        self._context.restore_state(engine, len(ids), logits=logits)
        self._ids = list(ids)

    def _reuse(self, ids: Sequence[int]) -> int:
        """Make the cache hold a prefix of `ids`, as long as can be had without evaluating; return its length."""
        n_max = len(ids) - 1  # the logits of the last prompt token are needed
        fitting = [c for c in self._checkpoints if len(c.ids) <= n_max and c.ids == list(ids[: len(c.ids)])]
        best = max(fitting, key=lambda c: len(c.ids), default=_Checkpoint([], b""))
        n_common = _n_common(self._ids, ids)
        # the counts differ if an interrupt came between the engine's books and these
        is_prefix = n_common == self.n_tokens == self._context.n_tokens
        if is_prefix and n_common >= len(best.ids) and (n_common < len(ids) or self._context.has_logits):
            return n_common
        self.version += 1
        self._ids = []
        if not best.ids:
            self._context.clear()
            return 0
        self._context.restore_state(best.state, len(best.ids))
        self._ids = list(best.ids)
        return len(best.ids)

    def _fetch(self, cache: PrefixCache, ids: Sequence[int], n_cached: int) -> int:
        """Take a longer prefix from the cache on disk, if it has one; return how many tokens are there now."""
        state = cache.find(ids[:-1], n_cached)
        if state is None:
            return n_cached
        self.version += 1
        try:
            self._ids = []
            self._context.restore_state(state.engine, len(state.ids))
            self._ids = list(state.ids)
        except StateError:
            return 0  # the engine refused it and cleared the cache
        return len(self._ids)

    def _save_checkpoint(self) -> None:
        self._checkpoints = [c for c in self._checkpoints if c.ids != self._ids]
        self._checkpoints.append(_Checkpoint(list(self._ids), self._context.save_state()))
        while len(self._checkpoints) > 1 and (
            len(self._checkpoints) > N_CHECKPOINTS_MAX
            or sum(len(c.state) for c in self._checkpoints) > CHECKPOINT_BYTES_MAX
        ):
            self._checkpoints.pop(0)
