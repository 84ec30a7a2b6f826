"""Mixture of experts: routing by score or by token id, routed experts, shared expert (spec section 7)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .config import Config
from .elementary import sigmoid, softplus, top_k
from .quant import Rounding

__all__ = ["MoE"]

Array = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]


class MoE:
    """One FFN sub-layer. It routes by token id where the checkpoint gives it a ``tid2eid`` table."""

    def __init__(
        self, config: Config, weights: Mapping[str, Array], rounding: Rounding, *, is_hash: bool
    ) -> None:
        self.config, self.rounding = config, rounding
        self.gate = weights["gate.weight"]  # (E, d)
        self.tid2eid = weights["gate.tid2eid"] if is_hash else None  # (V, k) int
        self.bias = None if is_hash else weights["gate.bias"]  # (E,)
        names = ("w1", "w3", "w2")  # (m, d), (m, d), (d, m); FP4 for routed experts, FP8 for the shared one
        self.experts = [
            tuple(weights[f"experts.{e}.{w}.weight"] for w in names) for e in range(config.n_routed_experts)
        ]
        self.shared = tuple(weights[f"shared_experts.{w}.weight"] for w in names)

    def route(self, x: Array, tokens: Ids) -> tuple[Ids, Array, Array]:
        """Experts (n, k), their weights (n, k) and the selection margin (n,) of each token."""
        score = np.sqrt(softplus(x @ self.gate.T))  # (n, E)
        if self.tid2eid is not None:
            chosen, margin = self.tid2eid[tokens], np.full(len(x), np.inf, x.dtype)
        else:
            chosen, margin = top_k(score + self.bias, self.config.num_experts_per_tok)  # bias: choice only
        picked = np.take_along_axis(score, chosen, axis=1)
        return chosen, self.config.routed_scaling_factor * picked / picked.sum(axis=1, keepdims=True), margin

    def expert(self, x: Array, weight: Array | float, matrices: tuple[Array, ...]) -> Array:
        """One expert on (n, d) with routing weights (n, 1), applied before w2 and so before its rounding."""
        w1, w3, w2 = matrices
        limit = self.config.swiglu_limit
        g = np.minimum(self.rounding.linear(x, w1), limit)  # the gate is bounded above only
        u = np.clip(self.rounding.linear(x, w3), -limit, limit)
        return self.rounding.linear(weight * (g * sigmoid(g)) * u, w2)

    def forward(self, x: Array, tokens: Ids) -> tuple[Array, Ids, Array]:
        """Input (n, d) and token ids (n,) -> output (n, d), experts (n, k), selection margin (n,)."""
        chosen, weights, margin = self.route(x, tokens)
        y = self.expert(x, 1.0, self.shared)
        for e, matrices in enumerate(self.experts):
            i_token, i_slot = np.nonzero(chosen == e)
            if len(i_token):
                out = self.expert(x[i_token], weights[i_token, i_slot][:, None], matrices)
                np.add.at(y, i_token, out)  # not +=: a table may name an expert twice for one token
        return y, chosen, margin
