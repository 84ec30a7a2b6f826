"""PyTorch operations over ``kernels.cpp``: each passes over memory once where plain PyTorch would pass ten times.

Owns the compilation, the calls and the gradients. What is computed is said at each function; where it is used is
``model.py``'s. Tensors are float32 and, where need be, made dense. One thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "Turn",
    "attend",
    "enter",
    "exp_seen",
    "gate",
    "head",
    "leave",
    "round_e2m1",
    "round_e4m3",
    "window",
]

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-shared", "-fPIC")
BLOCK = 64  # tokens whose window is computed together
Turn = tuple[Tensor, Tensor]  # cosines, and sines of alternating sign: (period, n_rot) each


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the kernels once for this source and machine, and load them."""
    compiler = os.environ.get("CXX", "c++")
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if os.path.exists("/proc/cpuinfo") else ""
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((*FLAGS, compiler, flags)).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"demo-model-{os.getuid()}" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-o", str(new), str(SOURCE)], check=True)
        os.replace(new, path)
    return ctypes.CDLL(str(path))


def _call(name: str, *args: Tensor | int | float | None) -> None:
    """Call a kernel: integers are 64 bit, numbers float; tensors must be dense."""
    values: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            assert a.is_contiguous()
            values.append(ctypes.c_void_p(a.data_ptr()))
        elif isinstance(a, float):
            values.append(ctypes.c_float(a))
        else:
            values.append(None if a is None else ctypes.c_int64(a))
    function = getattr(_library(), name)
    function.restype = None
    function(*values)


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        y = y.contiguous()
        ctx.save_for_backward(y, s, post, mix)
        out = torch.empty_like(s)
        _call("leave", *y.shape, y, s, post, mix, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, s, post, mix = ctx.saved_tensors
        out = [torch.empty_like(t) for t in (y, s, post, mix)]
        _call("leave_back", *y.shape, y, s, post, mix, grads[0].contiguous(), *out)
        return tuple(out)


def leave(y: Tensor, s: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """Write an output (N, D) into streams (N, 4, D): ``post[j] y + sum_i mix[i, j] s[i]``."""
    out: Tensor = _Leave.apply(y, s, post, mix)
    return out


class _Enter(Function):
    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        w: Tensor,
        n: int,
        rms_eps: float,
        eps: float,
    ) -> Any:
        N, S, D = s.shape
        if S != 4 or N % 16 or D % 16 or n > 32:
            raise ValueError(f"the kernels take 4 streams and multiples of 16, not {tuple(s.shape)}")
        s = s.contiguous()
        z = s.flatten(1) @ fn.t()
        x, post, pre, mix = s.new_empty(N, D), s.new_empty(N, S), s.new_empty(N, S), s.new_empty(N, S, S)
        r, ru = s.new_empty(N), s.new_empty(N)
        _call("enter", N, D, n, rms_eps, eps, s, z, scale, base, w, x, post, mix, pre, r, ru)
        ctx.save_for_backward(s, fn, z, scale, base, w, pre, r, ru)
        ctx.options = n, rms_eps, eps
        return x, post, mix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        s, fn, z, scale, base, w, pre, r, ru = ctx.saved_tensors
        N, _, D = s.shape
        n, rms_eps, eps = ctx.options
        ds, dz = torch.empty_like(s), torch.empty_like(z)
        small = [torch.zeros_like(t) for t in (scale, base, w)]
        dense = [g.contiguous() for g in grads]
        _call("enter_back", N, D, n, rms_eps, eps, s, z, scale, base, w, pre, r, ru, *dense, ds, dz, *small)
        ds.view(N, -1).addmm_(dz, fn)
        return ds, dz.t() @ s.flatten(1), *small, None, None, None


def enter(
    s: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    w: Tensor,
    n_iterations: int,
    rms_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read streams (N, 4, D): normalised input (N, D), post (N, 4), mix (N, 4 source, 4 destination)."""
    out: tuple[Tensor, Tensor, Tensor] = _Enter.apply(s, fn, scale, base, w, n_iterations, rms_eps, eps)
    return out


class _Head(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, co: Tensor, si: Tensor, eps: float, factor: float
    ) -> Tensor:
        x = x.contiguous()
        N, H, D = x.shape
        out, rs = torch.empty_like(x), x.new_empty(N, H)
        _call("head", N, H, D, co.shape[1], len(co), eps, factor, 1.0, x, w, co, si, out, rs)
        ctx.save_for_backward(x, w, co, si, rs)
        ctx.factor = factor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w, co, si, rs = ctx.saved_tensors
        dx, dw = torch.empty_like(x), None if w is None else torch.zeros_like(w)
        size = (*x.shape, co.shape[1], len(co))
        _call("head_back", *size, ctx.factor, x, w, co, si, rs, grads[0].contiguous(), dx, dw)
        return dx, dw, None, None, None, None


def head(x: Tensor, w: Tensor | None, turn: Turn, eps: float, factor: float = 1.0) -> Tensor:
    """Return ``rotation(x / rms(x) * w) * factor`` of (N, H, D); row n stands at position ``n % period``."""
    out: Tensor = _Head.apply(x, w, *turn, eps, factor)
    return out


def _rotated(x: Tensor, co: Tensor, si: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("head", *x.shape, co.shape[1], len(co), 0.0, 1.0, direction, x, None, co, si, out, None)
    return out


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, co: Tensor, si: Tensor, direction: float) -> Tensor:
        ctx.turn, ctx.direction = (co, si), direction
        return _rotated(x, co, si, direction)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        co, si = ctx.turn
        return _rotated(grads[0], co, si, -ctx.direction), None, None, None


def rotate(x: Tensor, turn: Turn, direction: float = 1.0) -> Tensor:
    """Rotate the last channels of (N, H, D), backwards for a direction of -1."""
    out: Tensor = _Rotate.apply(x, *turn, direction)
    return out


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_rounded: int, block: int, is_f8: bool) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        n = x.shape[-1]
        _call("round_rows", x.numel() // n, n, n_rounded, block, int(is_f8), x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None, None


def round_e4m3(x: Tensor, block: int, n_rounded: int | None = None) -> Tensor:
    """Round the first channels of (..., n) to E4M3, one scale per `block`; the gradient passes."""
    out: Tensor = _Round.apply(x, x.shape[-1] if n_rounded is None else n_rounded, block, True)
    return out


def round_e2m1(x: Tensor, block: int = 32) -> Tensor:
    """Round (..., n) to E2M1, one scale per `block` channels; the gradient passes."""
    out: Tensor = _Round.apply(x, x.shape[-1], block, False)
    return out


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, ab: Tensor, weight: Tensor | None, limit: float, is_rounded: bool) -> Tensor:
        N, F = ab.shape[0], ab.shape[1] // 2
        out = ab.new_empty(N, F)
        _call("gate", N, F, limit, int(is_rounded), ab, weight, out)
        ctx.save_for_backward(ab, weight)
        ctx.limit = limit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ab, weight = ctx.saved_tensors
        dab, dweight = torch.empty_like(ab), None if weight is None else torch.empty_like(weight)
        g = grads[0].contiguous()
        _call("gate_back", *g.shape, ctx.limit, ab, weight, g, dab, dweight)
        return dab, dweight, None, None


def gate(ab: Tensor, weight: Tensor | None, limit: float, is_rounded: bool) -> Tensor:
    """Return ``silu(min(a, limit)) clamp(b) weight`` of (N, 2 F) and (N,), rounded to E4M3 if asked for."""
    out: Tensor = _Gate.apply(ab, weight, limit, is_rounded)
    return out


def exp_seen(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Replace scores (..., R) by their exponentials, 0 outside ``low <= column < high``; return the sums of rows.

    The bounds are int32 by row, repeated as often as need be.
    """
    total = scores.new_empty(scores.shape[:-1])
    _call("exp_seen", total.numel(), scores.shape[-1], len(low), low, high, scores, total)
    return total


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, rows: Tensor, e: Tensor) -> Any:
        ctx.save_for_backward(q, rows, e)
        return e.sum(-1), torch.bmm(e, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, rows, e = ctx.saved_tensors
        gtotal, gvalue = (g.contiguous() for g in grads)
        g = torch.bmm(gvalue, rows.mT)
        _call("exp_back", gtotal.numel(), e.shape[-1], e, gtotal, g)
        grows = torch.bmm(g.mT, q).baddbmm_(e.mT, gvalue)
        return torch.bmm(g, rows), grows, None


def attend(q: Tensor, rows: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums (B, m) and the weighted rows (B, m, D) of ``e``, the exponentials (B, m, R) of ``q rows'``.

    Where e is 0, a row is not seen.
    """
    out: tuple[Tensor, Tensor] = _Attend.apply(q, rows, e)
    return out


@functools.cache
def _window_bounds(n_heads: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """By distance in blocks, 0 to 2: which columns a row of a block (token, head) sees in a window of two blocks."""
    t = torch.arange(BLOCK, dtype=torch.int32).repeat_interleave(n_heads)
    none, full = torch.zeros_like(t), torch.full_like(t, BLOCK)
    return (none, t + 1), (none, full), (t + 1, full)


class _Window(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Any:
        B, n, H, D = q.shape
        nb = n // BLOCK
        qb, kb = q.view(B, nb, BLOCK * H, D), k.view(B, nb, BLOCK, D)
        total, value = q.new_zeros(B, nb, BLOCK * H), torch.zeros_like(qb)
        parts = []
        for distance, bounds in enumerate(_window_bounds(H)[:nb]):
            e = q.new_empty(B, nb - distance, BLOCK * H, BLOCK)
            for b in range(B):
                torch.bmm(qb[b, distance:], kb[b, : nb - distance].mT, out=e[b])
            total[:, distance:] += exp_seen(e, *bounds)
            for b in range(B):
                value[b, distance:].baddbmm_(e[b], kb[b, : nb - distance])
            parts.append(e)
        ctx.save_for_backward(qb, kb, *parts)
        return total.view(B, n, H), value.view(B, n, H, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        qb, kb, *parts = ctx.saved_tensors
        B, nb = qb.shape[:2]
        gtotal, gvalue = grads[0].contiguous().view(qb.shape[:3]), grads[1].contiguous().view(qb.shape)
        gq, gk = torch.zeros_like(qb), torch.zeros_like(kb)
        for distance, e in enumerate(parts):
            g = torch.empty_like(e)
            for b in range(B):
                here, there = slice(distance, None), slice(0, nb - distance)
                torch.bmm(gvalue[b, here], kb[b, there].mT, out=g[b])
                _call("exp_back", g[b].numel() // BLOCK, BLOCK, e[b], gtotal[b, here], g[b])
                gq[b, here].baddbmm_(g[b], kb[b, there])
                gk[b, there].baddbmm_(g[b].mT, qb[b, here]).baddbmm_(e[b].mT, gvalue[b, here])
        n = nb * BLOCK
        return gq.view(B, n, -1, qb.shape[-1]), gk.view(B, n, -1)


def window(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Attend from (B, n, H, D) to the last 128 tokens of (B, n, D): sums of exponentials, weighted rows."""
    out: tuple[Tensor, Tensor] = _Window.apply(q.contiguous(), k.contiguous())
    return out
