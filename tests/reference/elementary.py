"""The operations everything else is made of (spec section 2); rope has its own file."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["hadamard", "rms", "sigmoid", "softmax", "softplus", "top_k", "unit"]

Array = npt.NDArray[np.floating]


def unit(x: Array, eps: float) -> Array:
    """Scale (..., n) to a mean square of one."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm of (..., n) with a weight (n,)."""
    return weight * unit(x, eps)


def sigmoid(x: Array) -> Array:
    """Logistic function, accurate on both tails and without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), accurate where exp(x) is far below one: routing scores there must not become zero."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def softmax(x: Array, axis: int) -> Array:
    """Softmax along ``axis``; -inf entries get weight zero (not all of them may be -inf)."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@cache
def _sylvester(n: int) -> npt.NDArray[np.float64]:
    """The matrix of signs (n, n), by Sylvester's doubling; symmetric."""
    if n == 1:
        return np.ones((1, 1))
    h = _sylvester(n // 2)
    return np.block([[h, h], [h, -h]])


def hadamard(x: Array) -> Array:
    """Orthonormal Walsh-Hadamard transform of (..., n), n a power of two; its own inverse."""
    n = x.shape[-1]
    return (x @ _sylvester(n).astype(x.dtype)) / math.sqrt(n)


def top_k(scores: Array, k: int) -> tuple[npt.NDArray[np.intp], Array]:
    """Indexes of the k largest of the last axis, and the margin: k-th minus (k+1)-th score.

    Args:
        scores: (n, m); -inf marks what may not be chosen.

    Returns:
        (n, min(k, m)) indexes, equal scores in ascending index order, and (n,) margins, inf where k or fewer
        could be chosen.
    """
    n, m = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    if m <= k:
        return order, np.full(n, np.inf, scores.dtype)
    last_chosen, left_out = np.take_along_axis(scores, order[:, k - 1 : k + 1], axis=-1).T  # (n,) each
    no_choice = left_out == -np.inf
    margin = np.where(no_choice, np.inf, last_chosen) - np.where(no_choice, 0, left_out)
    return order[:, :k], margin
