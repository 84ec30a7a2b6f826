"""Attention of one layer: queries, window, compressed rows, sink, grouped output (spec section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .compressor import Compressor, CompressorState
from .config import Config
from .elementary import rms, unit
from .indexer import Indexer
from .quant import Rounding
from .rope import frequencies, rope
from .weights import part

__all__ = ["Attention", "AttentionState"]

Array = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


@dataclass
class AttentionState:
    """What one layer keeps between calls. All rows are final: rotated and rounded."""

    n_tokens: int
    window: Array  # (<= W-1, D)  KV rows of the last tokens; one row is both key and value
    rows: Array  # (R, D)  compressed rows, row t covers tokens [ratio*t, ratio*(t+1))
    index_rows: Array  # (R, D_i)  ratio 4 only, else empty
    compressor: CompressorState | None
    index_compressor: CompressorState | None


class Attention:
    """One attention sub-layer."""

    def __init__(self, config: Config, weights: Mapping[str, Array], ratio: int, rounding: Rounding) -> None:
        self.config, self.ratio, self.rounding = config, ratio, rounding
        self.wq_a = weights["wq_a.weight"]  # (r_q, d)  FP8
        self.wq_b = weights["wq_b.weight"]  # (H*D, r_q)  FP8
        self.wkv = weights["wkv.weight"]  # (D, d)  FP8
        self.wo_b = weights["wo_b.weight"]  # (d, G*r_o)  FP8
        G, r_o = config.o_groups, config.o_lora_rank
        self.wo_a = weights["wo_a.weight"].reshape(G, r_o, -1)  # (G, r_o, H*D/G)  FP8, used as BF16
        self.q_norm, self.kv_norm = weights["q_norm.weight"], weights["kv_norm.weight"]
        self.sink = weights["attn_sink"]  # (H,)
        self.freqs = frequencies(config, ratio, self.wq_a.dtype)
        self.compressor = (
            Compressor(config, part(weights, "compressor."), ratio, config.head_dim) if ratio else None
        )
        self.indexer = Indexer(config, part(weights, "indexer."), ratio, rounding) if ratio == 4 else None

    def new_state(self) -> AttentionState:
        dtype = self.wkv.dtype
        D, D_i = self.config.head_dim, self.config.index_head_dim
        return AttentionState(
            n_tokens=0,
            window=np.empty((0, D), dtype),
            rows=np.empty((0, D), dtype),
            index_rows=np.empty((0, D_i), dtype),
            compressor=self.compressor.new_state() if self.compressor else None,
            index_compressor=self.indexer.compressor.new_state() if self.indexer else None,
        )

    def forward(self, x: Array, state: AttentionState) -> tuple[Array, Mask, Array]:
        """Run the next tokens.

        Args:
            x: (n, d) normalised input.
            state: updated in place.

        Returns:
            (n, d) output, (n, R) compressed rows read by each token, (n,) margin of the row selection.
        """
        c, n, round_ = self.config, len(x), self.rounding
        H, D, R_rope = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim
        positions = state.n_tokens + np.arange(n)
        state.n_tokens += n

        a = rms(round_.linear(x, self.wq_a), self.q_norm, c.rms_norm_eps)  # (n, r_q)
        q = unit(round_.linear(a, self.wq_b).reshape(n, H, D), c.rms_norm_eps)
        q = rope(q, positions, self.freqs)  # (n, H, D)
        kv = rope(rms(round_.linear(x, self.wkv), self.kv_norm, c.rms_norm_eps), positions, self.freqs)
        kv = np.concatenate([state.window, round_.kv_row(kv, R_rope)])  # (n_past + n, D)

        # The window: the token itself and the W-1 before it.
        kv_positions = positions[-1] + 1 - len(kv) + np.arange(len(kv))
        age = positions[:, None] - kv_positions  # (n, n_past + n)
        in_window = (age >= 0) & (age < c.sliding_window)
        state.window = kv[max(len(kv) - (c.sliding_window - 1), 0) :]

        rows_read, margin = self._compressed(x, a, positions, state)
        keys = np.concatenate([kv, state.rows])  # (n_keys, D)
        readable = np.concatenate([in_window, rows_read], axis=1)  # (n, n_keys)

        o = self._attend(q, keys, readable)  # (n, H, D)
        o = rope(o, positions, self.freqs, inverse=True)
        groups = o.reshape(n, c.o_groups, -1).transpose(1, 0, 2)  # (G, n, H*D/G)
        low = groups @ self.wo_a.transpose(0, 2, 1)  # (G, n, r_o), input not quantised at any level
        low = low.transpose(1, 0, 2).reshape(n, -1)  # (n, G*r_o)
        return round_.linear(low, self.wo_b), rows_read, margin

    def _compressed(
        self, x: Array, a: Array, positions: npt.NDArray[np.integer], state: AttentionState
    ) -> tuple[Mask, Array]:
        """Append the rows these tokens complete to the state; say which rows each token reads."""
        if self.compressor is not None and state.compressor is not None:
            new = self.rounding.kv_row(
                self.compressor.extend(x, state.compressor), self.config.qk_rope_head_dim
            )
            state.rows = np.concatenate([state.rows, new])
        if self.indexer is not None and state.index_compressor is not None:
            new = self.indexer.new_rows(x, state.index_compressor)
            state.index_rows = np.concatenate([state.index_rows, new])
            return self.indexer.select(x, a, state.index_rows, positions)
        n_visible = (positions + 1) // self.ratio if self.ratio else np.zeros_like(positions)
        return np.arange(len(state.rows)) < n_visible[:, None], np.full(len(x), np.inf, x.dtype)

    def _attend(self, q: Array, keys: Array, readable: Mask) -> Array:
        """q (n, H, D), keys (n_keys, D), readable (n, n_keys) -> (n, H, D)."""
        n, H, D = q.shape
        s = (q.reshape(n * H, D) @ keys.T).reshape(n, H, -1) / math.sqrt(D)  # (n, H, n_keys)
        s = np.where(readable[:, None, :], s, -np.inf)
        sink = np.broadcast_to(self.sink[:, None], (n, H, 1))
        top = np.maximum(s.max(axis=-1, keepdims=True), sink)  # cancels; keeps exp in range
        p = np.exp(s - top)
        p /= p.sum(axis=-1, keepdims=True) + np.exp(sink - top)  # the sink takes weight but has no value
        return (p.reshape(n * H, -1) @ keys).reshape(n, H, D)
