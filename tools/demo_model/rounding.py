"""Quantise and dequantise in one step, with the gradient passed straight through, in PyTorch.

Owns the three formats of weights (FP8 tiles, FP4 groups, BF16) and of activations. Where they are applied is
``model.py``'s business; how their codes are stored is ``export.py``'s. Source: spec v4-flash-graph section 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["bf16", "e2m1", "e4m3", "fp4_groups", "fp8_tiles"]

TILE = 128
GROUP = 32
E4M3_MAX, E4M3_FLOOR = 448.0, 1e-4
E2M1_MAX, E2M1_FLOOR = 6.0, 6 * 2.0**-126


def scale_bits(amax: Tensor, qmax: float, floor: float) -> Tensor:
    """Return the E8M0 byte, as int32, of ``ceil(log2(max(amax, floor) / qmax))``, from the quotient's bits."""
    bits = (amax.clamp_min(floor) * (1 / qmax)).view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0)


def power(byte: Tensor) -> Tensor:
    """Return 2^(byte - 127) of E8M0 bytes from 1 to 254."""
    return (byte << 23).view(torch.float32)


def _round_e4m3(y: Tensor) -> Tensor:
    return y.to(torch.float8_e4m3fn).to(torch.float32)


def _round_e2m1(y: Tensor) -> Tensor:
    a = y.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.round(y / step).mul_(step)  # halves to even, which here is the even code


class _Blocks(torch.autograd.Function):
    """Blocks along the axes ``dims`` of ``x`` share one power-of-two scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], is_f8: bool) -> Tensor:
        qmax, floor = (E4M3_MAX, E4M3_FLOOR) if is_f8 else (E2M1_MAX, E2M1_FLOOR)
        byte = scale_bits(x.abs().amax(dims, keepdim=True), qmax, floor)
        y = x * power(254 - byte)  # exact: a power of two
        return (_round_e4m3(y) if is_f8 else _round_e2m1(y)).mul_(power(byte))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class _Bf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def _blocks(x: Tensor, dims: tuple[int, ...], *, is_f8: bool) -> Tensor:
    out: Tensor = _Blocks.apply(x, dims, is_f8)
    return out


def e4m3(x: Tensor, block: int) -> Tensor:
    """Round (..., n) to E4M3 with one scale per `block` channels."""
    return _blocks(x.unflatten(-1, (-1, block)), (-1,), is_f8=True).flatten(-2)


def e2m1(x: Tensor, block: int = GROUP) -> Tensor:
    """Round (..., n) to E2M1 with one scale per `block` channels."""
    return _blocks(x.unflatten(-1, (-1, block)), (-1,), is_f8=False).flatten(-2)


def fp8_tiles(w: Tensor) -> Tensor:
    """Round a matrix (out, in) to E4M3 with one scale per 128x128 tile; both are multiples of 128."""
    n_out, n_in = w.shape
    tiles = w.view(n_out // TILE, TILE, n_in // TILE, TILE)
    return _blocks(tiles, (1, 3), is_f8=True).view(n_out, n_in)


def fp4_groups(w: Tensor) -> Tensor:
    """Round weights (..., in) to E2M1 with one scale per 32 inputs."""
    return e2m1(w, GROUP)


def bf16(w: Tensor) -> Tensor:
    """Round to BF16."""
    out: Tensor = _Bf16.apply(w)
    return out
