"""Rotary positions on the last channels of a vector: adjacent pairs, two tables (spec section 2)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .config import Config

__all__ = ["frequencies", "rope", "rotate"]

Array = npt.NDArray[np.floating]


def frequencies(config: Config, ratio: int, dtype: npt.DTypeLike) -> Array:
    """Angle per position of each pair, (qk_rope_head_dim / 2,), for a layer of compression ``ratio``.

    Layers without compression use the plain base. All others, for everything in them, use the larger base and
    YaRN: fast pairs as they are, slow pairs divided by the factor, a linear blend between. YaRN's magnitude
    factor is not used anywhere.
    """
    R = config.qk_rope_head_dim
    i = np.arange(R // 2)
    if ratio == 0:
        return (config.rope_theta ** (-2.0 * i / R)).astype(dtype)
    base = config.compress_rope_theta
    f = base ** (-2.0 * i / R)

    def pair_with_turns(n_turns: float) -> float:
        """Index of the pair that turns this often over the original context."""
        return R * math.log(config.yarn_original / (2 * math.pi * n_turns)) / (2 * math.log(base))

    lo = max(math.floor(pair_with_turns(config.yarn_beta_fast)), 0)
    hi = min(math.ceil(pair_with_turns(config.yarn_beta_slow)), R - 1)
    keep = 1 - np.clip((i - lo) / (hi - lo), 0, 1)  # 1: fast pair, unscaled
    return (f / config.yarn_factor * (1 - keep) + f * keep).astype(dtype)


def rope(x: Array, positions: npt.NDArray[np.integer], freqs: Array, *, inverse: bool = False) -> Array:
    """Rotate the last ``2 * len(freqs)`` channels of each vector; the others pass.

    Args:
        x: (n, ..., channels), one position per index of the first axis.
        positions: (n,).
        inverse: turn by the opposite angle.
    """
    # in the compute type, like the official code's
    return rotate(x, positions.astype(x.dtype)[:, None] * freqs, inverse=inverse)


def rotate(x: Array, angle: Array, *, inverse: bool = False) -> Array:
    """``rope`` by angles (n, pairs)."""
    cos, sin = np.cos(angle), np.sin(angle)
    if inverse:
        sin = -sin
    middle = (1,) * (x.ndim - 2)
    cos, sin = (a.reshape(a.shape[0], *middle, a.shape[1]) for a in (cos, sin))
    n_rope = 2 * angle.shape[1]
    even, odd = x[..., -n_rope::2], x[..., -n_rope + 1 :: 2]
    y = x.copy()
    y[..., -n_rope::2] = even * cos - odd * sin
    y[..., -n_rope + 1 :: 2] = even * sin + odd * cos
    return y
