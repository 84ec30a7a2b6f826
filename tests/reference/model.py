"""The trunk: embedding, layers, logits, the state carried between calls and the selection margins.

Prefill, decode and any split of a prompt are the same call with different numbers of tokens. MTP blocks are
not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .attention import Attention, AttentionState
from .config import Config
from .elementary import rms
from .hyper import HyperConnection, collapse
from .moe import MoE
from .quant import Rounding
from .weights import part

__all__ = ["LayerResult", "Model", "Result", "State"]

Array = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]


@dataclass
class State:
    """Everything that earlier tokens leave behind, one entry per layer."""

    layers: list[AttentionState]

    @property
    def n_tokens(self) -> int:
        return self.layers[0].n_tokens


@dataclass
class LayerResult:
    """One layer over the n tokens of a call; what a block-by-block comparison needs.

    A margin is the last score chosen minus the first one left out, inf where nothing was left out: a
    comparison with other arithmetic is safe only where margins are far above its rounding errors.
    """

    streams: Array  # (n, S, d)  output
    rows: npt.NDArray[np.bool_]  # (n, R)  compressed rows read
    row_margin: Array  # (n,)  of the indexer
    experts: Ids  # (n, k)
    expert_margin: Array  # (n,)  of biased routing


@dataclass
class Result:
    """Outcome of one call over n tokens."""

    logits: Array  # (n, V)
    layers: list[LayerResult]

    @property
    def row_margin(self) -> Array:
        """Smallest indexer margin of each token over all layers, (n,)."""
        return np.min([layer.row_margin for layer in self.layers], axis=0)

    @property
    def expert_margin(self) -> Array:
        """Smallest routing margin of each token over all layers, (n,)."""
        return np.min([layer.expert_margin for layer in self.layers], axis=0)


class Layer:
    """One transformer block."""

    def __init__(
        self, config: Config, weights: Mapping[str, Array], i_layer: int, rounding: Rounding
    ) -> None:
        own = part(weights, f"layers.{i_layer}.")
        self.eps = config.rms_norm_eps
        self.hc_attn = HyperConnection(config, own, "hc_attn")
        self.hc_ffn = HyperConnection(config, own, "hc_ffn")
        self.attn_norm, self.ffn_norm = own["attn_norm.weight"], own["ffn_norm.weight"]
        self.attn = Attention(config, part(own, "attn."), config.compress_ratios[i_layer], rounding)
        self.ffn = MoE(config, part(own, "ffn."), rounding, is_hash=i_layer < config.num_hash_layers)

    def forward(self, streams: Array, tokens: Ids, state: AttentionState) -> LayerResult:
        u, post, mix = self.hc_attn.enter(streams)
        y, rows, row_margin = self.attn.forward(rms(u, self.attn_norm, self.eps), state)
        streams = self.hc_attn.leave(y, streams, post, mix)

        u, post, mix = self.hc_ffn.enter(streams)
        y, experts, expert_margin = self.ffn.forward(rms(u, self.ffn_norm, self.eps), tokens)
        streams = self.hc_ffn.leave(y, streams, post, mix)
        return LayerResult(streams, rows, row_margin, experts, expert_margin)


class Model:
    """The forward pass over exact weights.

    Args:
        config: Sizes and constants.
        weights: Float arrays by official tensor names (dequantised; ``gate.tid2eid`` stays integer).
        dtype: Compute type, ``np.float32`` or ``np.float64``; weights are converted once.
        level: ``"none"``, ``"cache"`` or ``"full"``, see ``quant.LEVELS``.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Array],
        dtype: npt.DTypeLike = np.float64,
        level: str = "none",
    ) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self.weights = {
            name: w if w.dtype.kind in "iu" else w.astype(self.dtype, copy=False)
            for name, w in weights.items()
        }
        rounding = Rounding(level)
        self.layers = [Layer(config, self.weights, i, rounding) for i in range(config.num_hidden_layers)]

    def new_state(self) -> State:
        return State([layer.attn.new_state() for layer in self.layers])

    def embed(self, tokens: Ids) -> Array:
        """Token ids (n,) -> streams (n, S, d), all equal."""
        x = self.weights["embed.weight"][tokens]  # (n, d)
        return np.repeat(x[:, None, :], self.config.hc_mult, axis=1)

    def head(self, streams: Array) -> Array:
        """Streams (n, S, d) -> logits (n, V)."""
        x = collapse(self.config, self.weights, streams)
        return rms(x, self.weights["norm.weight"], self.config.rms_norm_eps) @ self.weights["head.weight"].T

    def forward(self, tokens: Sequence[int] | Ids, state: State | None = None) -> Result:
        """Run the next tokens.

        Args:
            tokens: (n,) ids, n >= 1.
            state: Where they continue, updated in place; None starts a new sequence.

        Raises:
            ValueError: no token, or an id outside the vocabulary.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"token ids must be a non-empty list below {self.config.vocab_size}")
        if state is None:
            state = self.new_state()
        streams = self.embed(ids)
        results = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            result = layer.forward(streams, ids, layer_state)
            streams = result.streams
            results.append(result)
        return Result(self.head(streams), results)
