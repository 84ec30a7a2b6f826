"""Hyper-connections: n residual streams instead of one (spec section 3, and the collapse before the head)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .config import Config
from .elementary import sigmoid, softmax, unit

__all__ = ["HyperConnection", "collapse"]

Array = npt.NDArray[np.floating]


class HyperConnection:
    """The three tensors around one sub-layer (``name`` is ``hc_attn`` or ``hc_ffn``)."""

    def __init__(self, config: Config, weights: Mapping[str, Array], name: str) -> None:
        self.n = config.hc_mult
        self.n_iters = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = weights[f"{name}_fn"]  # ((2+S)*S, S*d)
        self.base = weights[f"{name}_base"]  # ((2+S)*S,)
        self.scale = weights[f"{name}_scale"]  # (3,)  pre, post, mix

    def weights(self, streams: Array) -> tuple[Array, Array, Array]:
        """Streams (n, S, d) -> pre (n, S), post (n, S), mix (n, S source, S destination)."""
        n, eps = self.n, self.eps
        # The norm commutes with the product (one factor per token), so normalising first is the same.
        z = unit(streams.reshape(len(streams), -1), self.norm_eps) @ self.fn.T  # (n, (2+S)*S)
        pre = sigmoid(z[:, :n] * self.scale[0] + self.base[:n]) + eps
        post = 2 * sigmoid(z[:, n : 2 * n] * self.scale[1] + self.base[n : 2 * n])
        mix = (z[:, 2 * n :] * self.scale[2] + self.base[2 * n :]).reshape(-1, n, n)
        mix = softmax(mix, axis=2) + eps
        mix = mix / (mix.sum(axis=1, keepdims=True) + eps)
        for _ in range(self.n_iters - 1):  # ends on columns: not symmetric, transposing it is wrong
            mix = mix / (mix.sum(axis=2, keepdims=True) + eps)
            mix = mix / (mix.sum(axis=1, keepdims=True) + eps)
        return pre, post, mix

    def enter(self, streams: Array) -> tuple[Array, Array, Array]:
        """Streams (n, S, d) -> input of the sub-layer (n, d), and what ``leave`` needs."""
        pre, post, mix = self.weights(streams)
        return np.einsum("ns,nsd->nd", pre, streams), post, mix

    @staticmethod
    def leave(y: Array, streams: Array, post: Array, mix: Array) -> Array:
        """Output of the sub-layer (n, d) and the old streams -> new streams (n, S, d)."""
        return post[:, :, None] * y[:, None, :] + np.einsum("nst,nsd->ntd", mix, streams)


def collapse(config: Config, weights: Mapping[str, Array], streams: Array) -> Array:
    """Streams (n, S, d) -> the one vector the head reads, (n, d)."""
    z = unit(streams.reshape(len(streams), -1), config.rms_norm_eps) @ weights["hc_head_fn"].T  # (n, S)
    pre = sigmoid(z * weights["hc_head_scale"] + weights["hc_head_base"]) + config.hc_eps
    return np.einsum("ns,nsd->nd", pre, streams)
