"""The compressor: 4 or 128 tokens become one row (spec section 5). Knows nothing of what reads the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .config import Config
from .elementary import rms, softmax
from .rope import frequencies, rope

__all__ = ["Compressor", "CompressorState"]

Array = npt.NDArray[np.floating]


@dataclass
class CompressorState:
    """What later windows need of earlier tokens. Width K is 2 D for ratio 4, D for ratio 128."""

    n_rows: int  # windows completed
    content: Array  # (n_pending, K)  tokens of the window that is still open, fewer than ratio
    score: Array  # (n_pending, K)
    last_content: Array  # (ratio, D)  ratio 4: what the last whole window holds for the next one
    last_score: Array  # (ratio, D)


class Compressor:
    """One compressor, of the attention (width ``head_dim``) or of its indexer (width ``index_head_dim``)."""

    def __init__(self, config: Config, weights: Mapping[str, Array], ratio: int, width: int) -> None:
        self.ratio, self.width = ratio, width
        self.overlap = ratio == 4
        self.eps = config.rms_norm_eps
        self.wkv = weights["wkv.weight"]  # (K, d)
        self.wgate = weights["wgate.weight"]  # (K, d)
        self.ape = weights["ape"]  # (ratio, K)  added by place in the window
        self.norm = weights["norm.weight"]  # (D,)
        self.freqs = frequencies(config, ratio, self.wkv.dtype)

    def new_state(self) -> CompressorState:
        dtype = self.wkv.dtype
        pending = np.empty((0, self.wkv.shape[0]), dtype)
        # Before the first window there is none: score -inf is weight zero.
        nothing = np.zeros((self.ratio, self.width), dtype)
        return CompressorState(0, pending, pending, nothing, np.full_like(nothing, -np.inf))

    def extend(self, x: Array, state: CompressorState) -> Array:
        """Feed the next tokens (n, d); return the rows they complete, (n_new, D), normalised and rotated."""
        ratio = self.ratio
        place = (len(state.content) + np.arange(len(x))) % ratio  # of each token in its window
        content = np.concatenate([state.content, x @ self.wkv.T])  # (n_pending + n, K)
        score = np.concatenate([state.score, x @ self.wgate.T + self.ape[place]])
        n_new = len(content) // ratio
        n_done = n_new * ratio
        state.content, state.score = content[n_done:], score[n_done:]
        content = content[:n_done].reshape(n_new, ratio, content.shape[1])
        score = score[:n_done].reshape(n_new, ratio, score.shape[1])
        if self.overlap:
            # Channels [0:D] are for the window after, [D:2D] for the own one: 8 candidates per row.
            content, state.last_content = self._overlap(content, state.last_content)
            score, state.last_score = self._overlap(score, state.last_score)
        pooled = (softmax(score, axis=1) * content).sum(axis=1)  # (n_new, D), softmax per channel
        first_token = (state.n_rows + np.arange(n_new)) * ratio
        state.n_rows += n_new
        return rope(rms(pooled, self.norm, self.eps), first_token, self.freqs)

    def _overlap(self, windows: Array, last: Array) -> tuple[Array, Array]:
        """(n_new, 4, 2D) and the carried (4, D) -> candidates (n_new, 8, D) and the next carry (4, D)."""
        handed_on, own = windows[..., : self.width], windows[..., self.width :]
        handed_on = np.concatenate([last[None], handed_on])  # (n_new + 1, 4, D)
        return np.concatenate([handed_on[:-1], own], axis=1), handed_on[-1]
