"""The indexer of ratio-4 layers: picks the compressed rows a token reads (spec section 6)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .compressor import Compressor, CompressorState
from .config import Config
from .elementary import hadamard, top_k
from .quant import Rounding
from .rope import frequencies, rope
from .weights import part

__all__ = ["Indexer"]

Array = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


class Indexer:
    """One indexer. Its rows are kept by the caller, next to the attention's compressed rows."""

    def __init__(self, config: Config, weights: Mapping[str, Array], ratio: int, rounding: Rounding) -> None:
        self.n_heads, self.width, self.k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio = ratio
        self.rounding = rounding
        self.wq_b = weights["wq_b.weight"]  # (H_i*D_i, r_q)  FP8
        self.weights_proj = weights["weights_proj.weight"]  # (H_i, d)
        self.compressor = Compressor(config, part(weights, "compressor."), ratio, self.width)
        self.freqs = frequencies(config, ratio, self.wq_b.dtype)

    def new_rows(self, x: Array, state: CompressorState) -> Array:
        """Feed the next tokens (n, d); return the indexer rows they complete, (n_new, D_i)."""
        return self.rounding.index(hadamard(self.compressor.extend(x, state)))

    def scores(self, x: Array, a: Array, rows: Array, positions: npt.NDArray[np.integer]) -> Array:
        """Index scores (n, R) of rows (R, D_i), for tokens of input x (n, d) and query latent a (n, r_q)."""
        n = len(x)
        q = self.rounding.linear(a, self.wq_b).reshape(n, self.n_heads, self.width)
        q = self.rounding.index(hadamard(rope(q, positions, self.freqs)))  # (n, H_i, D_i)
        g = (x @ self.weights_proj.T) * (self.width**-0.5 * self.n_heads**-0.5)  # (n, H_i), of either sign
        dots = (q.reshape(-1, self.width) @ rows.T).reshape(n, self.n_heads, -1)  # (n, H_i, R)
        return np.einsum("nh,nhr->nr", g, np.maximum(dots, 0))

    def select(
        self, x: Array, a: Array, rows: Array, positions: npt.NDArray[np.integer]
    ) -> tuple[Mask, Array]:
        """Which of the rows (R, D_i) each token reads, (n, R), and the selection margin (n,)."""
        visible = np.arange(len(rows)) < ((positions + 1) // self.ratio)[:, None]  # (n, R)
        if len(rows) <= self.k:
            return visible, np.full(len(x), np.inf, x.dtype)
        scores = np.where(visible, self.scores(x, a, rows, positions), -np.inf)
        chosen, margin = top_k(scores, self.k)
        mask = np.zeros_like(visible)
        np.put_along_axis(mask, chosen, True, axis=-1)
        return mask & visible, margin
