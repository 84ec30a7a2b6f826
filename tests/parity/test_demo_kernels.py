"""The fused operations of the demonstration model's training, and their gradients, against plain PyTorch."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra demo-train is not installed")
if shutil.which(os.environ.get("CXX", "c++")) is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from demo_model import fused, rounding  # noqa: E402

torch.set_num_threads(1)

Tensor = Any
EPS, HC_EPS, N_ITERATIONS = 1e-6, 1e-6, 20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(got: Callable[..., Any], want: Callable[..., Any], args: list[Tensor]) -> None:
    """Outputs and the gradients of all arguments agree; gradients of outputs are random."""
    results = []
    for function in (got, want):
        leaves = [a.clone().requires_grad_() for a in args]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [random(*o.shape, seed=7) for o in out])
        results.append([*(o.detach() for o in out), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < 2e-5 * b.norm()


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def plain_enter(
    s: Tensor, fn: Tensor, scale: Tensor, base: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z = unit(s.flatten(1)) @ fn.t()
    pre = torch.sigmoid(z[:, :4] * scale[0] + base[:4]) + HC_EPS
    post = 2 * torch.sigmoid(z[:, 4:8] * scale[1] + base[4:8])
    mix = (z[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(2) + HC_EPS
    mix = mix / (mix.sum(1, keepdim=True) + HC_EPS)
    for _ in range(N_ITERATIONS - 1):
        mix = mix / (mix.sum(2, keepdim=True) + HC_EPS)
        mix = mix / (mix.sum(1, keepdim=True) + HC_EPS)
    return unit((pre[..., None] * s).sum(1)) * w, post, mix


def test_streams_are_read() -> None:
    args = [random(48, 4, 128), random(24, 512) / 22, random(3), random(24), random(128)]
    compare(lambda *a: fused.enter(*a, N_ITERATIONS, EPS, HC_EPS), plain_enter, args)


def test_streams_are_written() -> None:
    def plain(y: Tensor, s: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        return post[..., None] * y[:, None] + torch.einsum("nij,nid->njd", mix, s)

    compare(fused.leave, plain, [random(48, 128), random(48, 4, 128), random(48, 4), random(48, 4, 4)])


def turn(n: int, n_rot: int) -> tuple[fused.Turn, Tensor]:
    """Cosines and signed sines, and the same as complex numbers (n, n_rot / 2)."""
    angle = torch.rand(n, n_rot // 2, generator=torch.Generator().manual_seed(1)) * 6
    sign = torch.tensor([-1.0, 1.0]).repeat(n_rot // 2)
    return (angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1) * sign), torch.polar(
        torch.ones_like(angle), angle
    )


def plain_rotate(x: Tensor, by: Tensor) -> Tensor:
    n_rot = 2 * by.shape[1]
    by = by.repeat(len(x) // len(by), 1)[:, None]
    pairs = torch.view_as_complex(x[..., -n_rot:].unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x[..., :-n_rot], torch.view_as_real(pairs * by).flatten(-2)], -1)


@pytest.mark.parametrize("n_heads", [1, 4])
def test_heads_are_normalised_and_rotated(n_heads: int) -> None:
    real, complex_ = turn(10, 64)
    x = random(30, n_heads, 128)
    compare(
        lambda x: fused.head(x, None, real, EPS, 0.1), lambda x: plain_rotate(unit(x), complex_) * 0.1, [x]
    )
    compare(
        lambda x, w: fused.head(x, w, real, EPS),
        lambda x, w: plain_rotate(unit(x) * w, complex_),
        [x, random(128)],
    )
    compare(lambda x: fused.rotate(x, real), lambda x: plain_rotate(x, complex_), [x])
    compare(lambda x: fused.rotate(x, real, -1.0), lambda x: plain_rotate(x, complex_.conj()), [x])


def test_rounding_is_bit_for_bit_that_of_weights() -> None:
    x = random(256, 256) * torch.exp(4 * random(256, 1))
    x[0], x[1], x[2] = 0, x[1] * 1e-9, x[2] * 1e9
    x[3:100] = (x[3:100].view(torch.int32) & -(1 << 19)).view(torch.float32)  # few bits: meets halves
    for block in (64, 128):
        assert torch.equal(fused.round_e4m3(x, block), rounding.e4m3(x, block))
    assert torch.equal(fused.round_e2m1(x), rounding.e2m1(x))
    some = fused.round_e4m3(x, 64, 128)
    assert torch.equal(some[:, 128:], x[:, 128:])
    assert torch.equal(some[:, :128], rounding.e4m3(x[:, :128], 64))


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_gated_unit(is_weighted: bool) -> None:
    def plain(ab: Tensor, weight: Tensor | None = None) -> Tensor:
        a, b = ab.chunk(2, 1)
        h = torch.nn.functional.silu(a.clamp(max=3)) * b.clamp(-3, 3)
        return h if weight is None else h * weight[:, None]

    args = [3 * random(48, 256), *([random(48)] if is_weighted else [])]
    compare(lambda ab, weight=None: fused.gate(ab, weight, 3.0, False), plain, args)
    rounded = fused.gate(args[0], None, 3.0, True)
    assert torch.equal(rounded, rounding.e4m3(fused.gate(args[0], None, 3.0, False), 128))


@pytest.mark.parametrize("n", [128, 384])
def test_the_window(n: int) -> None:
    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        age = torch.arange(n)[:, None] - torch.arange(n)
        scores = torch.einsum("bnhd,bmd->bnhm", q, k)
        e = scores.masked_fill(((age < 0) | (age >= 128))[:, None], -torch.inf).exp()
        return e.sum(-1), torch.einsum("bnhm,bmd->bnhd", e, k)

    compare(fused.window, plain, [random(2, n, 4, 64) / 8, random(2, n, 64)])


@pytest.mark.parametrize("n_rows", [5, 40])
def test_rows_that_are_seen(n_rows: int) -> None:
    n = 32
    high = torch.arange(n, dtype=torch.int32) // 2
    hidden = torch.arange(n_rows) >= high[:, None]

    def got(q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            e = torch.bmm(q, rows.mT)
            total = fused.exp_seen(e, torch.zeros_like(high), high)
        weight, value = fused.attend(q, rows, e)
        assert torch.allclose(weight, total, rtol=1e-6)
        return weight, value

    def plain(q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.bmm(q, rows.mT).masked_fill(hidden, -torch.inf).exp()
        return e.sum(-1), torch.bmm(e, rows)

    compare(got, plain, [random(2, n, 64) / 8, random(2, n_rows, 64)])


def test_exponentials_over_the_whole_range() -> None:
    x = torch.linspace(-80, 80, 16000)
    got = x.clone()[None]
    bounds = torch.tensor([0], dtype=torch.int32), torch.tensor([16000], dtype=torch.int32)
    fused.exp_seen(got, *bounds)
    want = x.double().exp()
    assert ((got[0].double() - want).abs() / want).max() < 1e-6
    assert math.isfinite(float(got.sum()))
