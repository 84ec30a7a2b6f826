"""Muon for the matrices, Adam for everything else, with a state that can be saved and continued exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyllama_dsv4.tensors import TensorSpec

__all__ = ["Optimizer"]

MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-10
DECAY = 0.02  # of matrices, per unit of learning rate
RMS = 0.2  # of a matrix update before the learning rate: as large as Adam's, so both share one rate


def orthogonal(g: Tensor) -> Tensor:
    """Return (..., out, in) with all singular values near 1, by five steps of a Newton-Schulz iteration."""
    is_tall = g.shape[-2] > g.shape[-1]
    x = g.mT if is_tall else g
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-20)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if is_tall else x


class Optimizer:
    """Updates parameters in place.

    Args:
        params: Those that require a gradient are trained.
        specs: Of the parameters; decides which are matrices of products.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
        self.params = {name: w for name, w in params.items() if w.requires_grad}
        self.n_steps = 0
        self.is_matrix = {
            name: specs[name].kind in ("f8", "mxfp4")
            or (".compressor.w" in name and specs[name].kind == "bf16")
            for name in self.params
        }
        self.first = {name: torch.zeros_like(w) for name, w in self.params.items()}
        self.second = {
            name: torch.zeros_like(w) for name, w in self.params.items() if not self.is_matrix[name]
        }

    def step(self, rate: float) -> None:
        """Apply the gradients once and drop them."""
        self.n_steps += 1
        with torch.no_grad():
            for name, w in self.params.items():
                if w.grad is None:  # an expert's stack always has one; an indexer without rows has none
                    continue
                if self.is_matrix[name]:
                    m = self.first[name].mul_(MOMENTUM).add_(w.grad)
                    update = orthogonal(w.grad + MOMENTUM * m)
                    scale = RMS * max(w.shape[-2:]) ** 0.5
                    w.mul_(1 - rate * DECAY).add_(update, alpha=-rate * scale)
                else:
                    b1, b2 = ADAM_BETAS
                    m = self.first[name].lerp_(w.grad, 1 - b1)
                    v = self.second[name].lerp_(w.grad.square(), 1 - b2)
                    size = (v / (1 - b2**self.n_steps)).sqrt_().add_(ADAM_EPS)
                    w.addcdiv_(m, size, value=-rate / (1 - b1**self.n_steps))
                w.grad = None

    def state(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps, "first": self.first, "second": self.second}

    def load(self, state: Mapping[str, Any]) -> None:
        self.n_steps, self.first, self.second = state["n_steps"], state["first"], state["second"]
