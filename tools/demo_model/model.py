"""The complete forward pass of DeepSeek-V4 over whole sequences, in PyTorch, for training on the CPU.

Owns the vectorised arithmetic, the rounding of weights and activations in the loop, and what the indexer and the
routing bias learn from. A sequence starts at position 0 and is as long as its row: there is no cache, no padding mask.
Checked against ``tests/reference``. Source: spec v4-flash-graph.

The choice of rows has no gradient. So the indexer gets a target of its own, as published for DeepSeek's sparse
attention: the softmax of its scores is drawn to the attention that the heads together would pay to each visible row,
were all of them chosen. Its inputs are cut off from the rest, and only this loss moves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pyllama_dsv4.tensors import HParams

from .config import parameter_specs
from .fused import Turn, attend, enter, exp_seen, gate, head, leave, rotate, round_e2m1, round_e4m3, window
from .rounding import bf16, fp4_groups, fp8_tiles

__all__ = ["LEVELS", "Model", "Output"]

LEVELS = ("none", "cache", "full")
N_QUERIES = (
    1024  # queries that meet the compressed rows at a time: bounds memory, and skips rows of the future
)


@dataclass
class Output:
    """What a call gives.

    Attributes:
        logits: ``(n_selected, n_vocab)``.
        index_loss: Sum over ratio-4 layers of the mean cross entropy, in nats, of the indexer's softmax against
            attention, less the target's own entropy: 0 where both agree.
        loads: By layer with biased routing, ``(n_expert,)`` share of choices that fell on each expert.
        index_hits: Share of the attention to compressed rows that the chosen rows hold, by ratio-4 layer.
    """

    logits: Tensor
    index_loss: Tensor
    loads: dict[int, Tensor] = field(default_factory=dict)
    index_hits: dict[int, float] = field(default_factory=dict)


def unit(x: Tensor, eps: float) -> Tensor:
    """Scale (..., n) to a mean square of one."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def frequencies(hp: HParams, ratio: int) -> Tensor:
    """Return the angle per position of each pair, (n_rot / 2,)."""
    n = hp.n_rot
    i = torch.arange(n // 2, dtype=torch.float64)
    if ratio == 0:
        return (hp.rope_theta ** (-2 * i / n)).float()
    base = hp.compress_rope_theta

    def pair(n_turns: float) -> float:
        return n * math.log(hp.yarn_n_ctx_orig / (2 * math.pi * n_turns)) / (2 * math.log(base))

    low, high = max(math.floor(pair(hp.yarn_beta_fast)), 0), min(math.ceil(pair(hp.yarn_beta_slow)), n - 1)
    slow = ((i - low) / (high - low)).clamp(0, 1)
    f = base ** (-2 * i / n)
    return (f / hp.yarn_factor * slow + f * (1 - slow)).float()


def hadamard(n: int) -> Tensor:
    """Return the orthonormal Walsh-Hadamard matrix (n, n) in Sylvester's order; symmetric."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


class Model:
    """The trunk over given parameters.

    Args:
        hp: Sizes.
        params: By the names of ``config.parameter_specs``; float32, and int64 for the tables.
        level: What is rounded of the activations: ``"none"``, ``"cache"`` or ``"full"``, as in the product.
        round_weights: Round weights to the formats of the file; without it they are used as they are.
    """

    def __init__(
        self, hp: HParams, params: Mapping[str, Tensor], level: str = "full", *, round_weights: bool = True
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"level {level!r} is none of {LEVELS}")
        self.hp, self.params, self.level, self.round_weights = hp, params, level, round_weights
        self.specs = parameter_specs(hp)
        self.freqs = {ratio: frequencies(hp, ratio) for ratio in (0, 4, 128)}
        self.hadamard = hadamard(hp.indexer_head_dim)

    # --- weights and rounding ---

    def stored(self, name: str) -> Tensor:
        """Return a parameter as the file will hold it."""
        w, kind = self.params[name], self.specs[name].kind
        if not self.round_weights or kind == "i32":
            return w
        if kind == "f8":
            return fp8_tiles(w)
        if kind == "mxfp4":
            return fp4_groups(w)
        # in checkpoints what ends in .weight is BF16, the rest F32
        return bf16(w) if name.endswith(".weight") else w

    def _input(self, x: Tensor) -> Tensor:
        """Return the input of a product with an FP8 or FP4 weight."""
        return round_e4m3(x, 128) if self.level == "full" else x

    def _kv(self, rows: Tensor) -> Tensor:
        return rows if self.level == "none" else round_e4m3(rows, 64, rows.shape[-1] - self.hp.n_rot)

    def _index(self, x: Tensor) -> Tensor:
        x = x @ self.hadamard
        return x if self.level == "none" else round_e2m1(x)

    def _turn(self, positions: Tensor, ratio: int) -> Turn:
        angle = (positions.float()[:, None] * self.freqs[ratio]).repeat_interleave(2, 1)
        sign = torch.tensor([-1.0, 1.0]).repeat(angle.shape[1] // 2)
        return angle.cos(), angle.sin() * sign

    def _enter(self, s: Tensor, layer: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """Streams (N, S, d) -> normalised input (N, d), post (N, S), mix (N, S source, S destination)."""
        hp, at = self.hp, f"layers.{layer}"
        fn, scale, base = (self.stored(f"{at}.hc_{part}_{name}") for name in ("fn", "scale", "base"))
        w = self.stored(f"{at}.{part}_norm.weight")
        return enter(s, fn, scale, base, w, hp.hc_sinkhorn_iterations, hp.rms_eps, hp.hc_eps)

    # --- attention ---

    def _compress(self, x: Tensor, name: str, ratio: int) -> Tensor:
        """Input (B, n, d) -> rows (B, n / ratio, width), normalised and rotated."""
        content = functional.linear(x, self.stored(f"{name}.wkv.weight")).unflatten(1, (-1, ratio))
        score = functional.linear(x, self.stored(f"{name}.wgate.weight")).unflatten(1, (-1, ratio))
        score = score + self.stored(f"{name}.ape")
        if ratio == 4:
            content, score = (self._overlap(t, fill) for t, fill in ((content, 0.0), (score, -torch.inf)))
        pooled = (score.softmax(2) * content).sum(2)
        B, R, width = pooled.shape
        turn = self._turn(torch.arange(R) * ratio, ratio)
        norm = self.stored(f"{name}.norm.weight")
        return head(pooled.view(B * R, 1, width), norm, turn, self.hp.rms_eps).view(B, R, width)

    @staticmethod
    def _overlap(windows: Tensor, fill: float) -> Tensor:
        """(B, R, 4, 2D) -> the 8 candidates of each row (B, R, 8, D): the last window's first half, the own second."""
        handed_on, own = windows.chunk(2, -1)
        before = functional.pad(handed_on[:, :-1], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat([before, own], 2)

    def _attention(self, x: Tensor, layer: int, out: Output) -> Tensor:
        hp, at = self.hp, f"layers.{layer}.attn"
        ratio = hp.compress_ratios[layer]
        B, n, _ = x.shape
        H, D = hp.n_head, hp.head_dim
        turn = self._turn(torch.arange(n), ratio)
        xq = self._input(x)
        a = functional.linear(xq, self.stored(f"{at}.wq_a.weight"))
        a = unit(a, hp.rms_eps) * self.stored(f"{at}.q_norm.weight")
        aq = self._input(a)
        q = functional.linear(aq, self.stored(f"{at}.wq_b.weight")).view(B * n, H, D)
        q = head(q, None, turn, hp.rms_eps, D**-0.5).view(B, n, H, D)
        kv = functional.linear(xq, self.stored(f"{at}.wkv.weight")).view(B * n, 1, D)
        kv = self._kv(head(kv, self.stored(f"{at}.kv_norm.weight"), turn, hp.rms_eps).view(B, n, D))

        weight, value = window(q, kv)  # (B, n, H), (B, n, H, D)
        if ratio:
            rows = self._kv(self._compress(x, f"{at}.compressor", ratio))
            parts = self._rows(q, rows, x.detach(), aq.detach(), turn, layer, out)
            weight, value = weight + parts[0], value + parts[1]
        o = value / (weight + self.stored(f"{at}.attn_sink").exp())[..., None]
        o = rotate(o.view(B * n, H, D), turn, -1.0)
        G = hp.o_groups
        wo_a = self.stored(f"{at}.wo_a.weight").view(G, hp.o_lora_rank, -1)
        low = torch.bmm(o.reshape(B * n, G, -1).transpose(0, 1), wo_a.transpose(1, 2))
        low = low.transpose(0, 1).reshape(B, n, -1)
        return functional.linear(self._input(low), self.stored(f"{at}.wo_b.weight"))

    # Queries have an RMS of one and rows that of their norm's weight, so scores stay far below the 88 where exp
    # overflows: no maximum is subtracted, and parts of one softmax are computed apart and added.

    def _rows(
        self, q: Tensor, rows: Tensor, x: Tensor, aq: Tensor, turn: Turn, layer: int, out: Output
    ) -> tuple[Tensor, Tensor]:
        """Attend to compressed rows, all of them or those that the indexer chooses."""
        B, n, H, D = q.shape
        ratio = self.hp.compress_ratios[layer]
        index = self._index_inputs(x, aq, turn, layer) if ratio == 4 else None
        weights, values, losses, hits = [], [], [], []
        for start in range(0, n, N_QUERIES):
            stop = min(start + N_QUERIES, n)
            seen = rows[:, : stop // ratio]
            R = seen.shape[1]
            visible = torch.arange(R) < (torch.arange(start + 1, stop + 1) // ratio)[:, None]  # (m, R)
            some = q[:, start:stop].reshape(B, -1, D)
            high = visible.sum(1, dtype=torch.int32).repeat_interleave(H)
            with torch.no_grad():
                e = torch.bmm(some, seen.mT)
                total = exp_seen(e, torch.zeros_like(high), high)
            if index is not None:
                scores = self._scores(index, start, stop, R).masked_fill(~visible, -torch.inf)
                with torch.no_grad():
                    share = (1 / H) / total.clamp_min(1e-30)  # (B, m H)
                    target = torch.bmm(share.view(-1, 1, H), e.view(-1, H, R)).view(B, -1, R)
                has_rows = slice(max(ratio - 1 - start, 0), None)
                log_p = scores[:, has_rows].log_softmax(-1).masked_fill(~visible[has_rows], 0)
                t = target[:, has_rows]
                losses.append((torch.special.xlogy(t, t) - t * log_p).sum((1, 2)))
                if self.hp.indexer_top_k < R:
                    chosen = torch.zeros_like(target, dtype=torch.bool)
                    chosen.scatter_(2, scores.detach().topk(self.hp.indexer_top_k).indices, True)
                    e.view(B, -1, H, R).mul_(chosen[:, :, None])
                    hits.append((target * chosen).sum((1, 2)))
                else:
                    hits.append(target.sum((1, 2)))
            weight, value = attend(some, seen.contiguous(), e)
            weights.append(weight.view(B, -1, H))
            values.append(value.view(B, -1, H, D))
        if index is not None:
            n_scored = B * (n - ratio + 1)
            out.index_loss = out.index_loss + torch.stack(losses).sum() / n_scored
            out.index_hits[layer] = float(torch.stack(hits).sum() / n_scored)
        return torch.cat(weights, 1), torch.cat(values, 1)

    def _index_inputs(self, x: Tensor, aq: Tensor, turn: Turn, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, n, H_i, D_i), rows (B, R, D_i) and head weights (B, n, H_i) of the indexer."""
        at = f"layers.{layer}.attn.indexer"
        H, D = self.hp.indexer_n_head, self.hp.indexer_head_dim
        q = functional.linear(aq, self.stored(f"{at}.wq_b.weight")).unflatten(-1, (H, D))
        g = functional.linear(x, self.stored(f"{at}.weights_proj.weight")) * (D**-0.5 * H**-0.5)
        q = rotate(q.view(-1, H, D), turn).view(q.shape)
        return self._index(q), self._index(self._compress(x, f"{at}.compressor", 4)), g

    @staticmethod
    def _scores(index: tuple[Tensor, Tensor, Tensor], start: int, stop: int, n_rows: int) -> Tensor:
        q, rows, g = (t[:, :n_rows] if i == 1 else t[:, start:stop] for i, t in enumerate(index))
        B, m, H, D = q.shape
        dots = torch.bmm(q.reshape(B, m * H, D), rows.transpose(1, 2)).relu().view(B * m, H, n_rows)
        return torch.bmm(g.reshape(B * m, 1, H), dots).view(B, m, n_rows)

    # --- experts ---

    def _expert(self, xq: Tensor, weight: Tensor | None, w13: Tensor, w2: Tensor) -> Tensor:
        h = gate(functional.linear(xq, w13), weight, self.hp.swiglu_limit, self.level == "full")
        return functional.linear(h, w2)

    def _experts(self, x: Tensor, tokens: Tensor, layer: int, out: Output) -> Tensor:
        """Input (N, d) and ids (N,) -> (N, d)."""
        hp, at = self.hp, f"layers.{layer}.ffn"
        k = hp.n_expert_used
        score = functional.softplus(functional.linear(x, self.stored(f"{at}.gate.weight"))).sqrt()  # (N, E)
        if layer < hp.n_hash_layer:
            chosen = self.params[f"{at}.gate.tid2eid"][tokens]
        else:
            chosen = (score.detach() + self.params[f"{at}.gate.bias"]).topk(k).indices
            out.loads[layer] = torch.bincount(chosen.flatten(), minlength=hp.n_expert) / chosen.numel()
        picked = score.gather(1, chosen)
        weight = (hp.expert_weights_scale * picked / picked.sum(1, keepdim=True)).flatten()
        xq = self._input(x)
        w1, w3, w2 = (self.stored(f"{at}.shared_experts.{w}.weight") for w in ("w1", "w3", "w2"))
        y = self._expert(xq, None, torch.cat([w1, w3]), w2)
        w1, w3, w2 = (self.stored(f"{at}.experts.{{e}}.{w}.weight") for w in ("w1", "w3", "w2"))
        experts = list(zip(torch.cat([w1, w3], 1).unbind(), w2.unbind(), strict=True))
        slots = chosen.flatten().argsort(stable=True)  # slot = token * k + place, grouped by expert
        counts = torch.bincount(chosen.flatten(), minlength=hp.n_expert).tolist()
        rows = slots // k
        grouped, own = xq[rows].split(counts), weight[slots].split(counts)
        results = [self._expert(grouped[e], own[e], *experts[e]) for e in range(hp.n_expert) if counts[e]]
        return y.index_add(0, rows, torch.cat(results))

    # --- the whole ---

    def forward(self, tokens: Tensor, selected: Tensor | None = None) -> Output:
        """Run whole sequences.

        Args:
            tokens: ``(B, n) int64``.
            selected: ``(B, n) bool``, positions whose logits are wanted; None for all, in order.
        """
        hp = self.hp
        B, n_given = tokens.shape
        tokens = functional.pad(
            tokens, (0, -n_given % hp.n_swa)
        )  # nothing looks ahead: what is added changes nothing
        n = tokens.shape[1]
        out = Output(logits=torch.empty(0), index_loss=torch.zeros(()))
        ids = tokens.flatten()
        x = functional.embedding(tokens, self.stored("embed.weight")).view(B * n, 1, hp.n_embd)
        s = x.expand(-1, hp.hc_count, -1).contiguous()  # (N, S, d)
        for layer in range(hp.n_layer):
            u, post, mix = self._enter(s, layer, "attn")
            s = leave(self._attention(u.view(B, n, -1), layer, out).view(B * n, -1), s, post, mix)
            u, post, mix = self._enter(s, layer, "ffn")
            s = leave(self._experts(u, ids, layer, out), s, post, mix)
        wanted = torch.ones(B, n_given, dtype=torch.bool) if selected is None else selected
        s = s[functional.pad(wanted, (0, n - n_given)).flatten()]
        flat = s.flatten(1)
        z = functional.linear(unit(flat, hp.rms_eps), self.stored("hc_head_fn"))
        pre = torch.sigmoid(z * self.stored("hc_head_scale") + self.stored("hc_head_base")) + hp.hc_eps
        x = torch.bmm(pre[:, None], s)[:, 0]
        x = unit(x, hp.rms_eps) * self.stored("norm.weight")
        out.logits = functional.linear(x, self.stored("head.weight"))
        return out
