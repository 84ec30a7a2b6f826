"""How large the engine's compute buffer gets for DeepSeek-V4, without the engine.

Owns a list of the tensors that the graph makes for one batch, in the order of their evaluation, and the engine's rule
for placing them: each takes the smallest hole that is large enough, some overwrite an operand, and what was read for
the last time leaves a hole. The end of the highest tensor is the size of the buffer. Weights, caches and what else
memory is needed for are ``plan``'s.

The order decides about holes, so the list follows the graph closely, and a test compares the result with the engine's
own reservation. It stands for a CPU.

Source: ``src/models/deepseek4.cpp:graph``, ``src/llama-graph.cpp:build_moe_ffn``, ``ggml/src/ggml-alloc.c``.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, replace
from typing import Final

from .tensors import HParams

__all__ = ["BatchShape", "compute_bytes", "draft_compute_bytes", "padded"]

_ALIGNMENT: Final = 32
_F16: Final = 2
_F32: Final = 4
_I64: Final = 8
_CSA: Final = 4  # ratio of the layers with compressed sparse attention, which have an indexer
_HCA: Final = 128  # ratio of the layers with heavily compressed attention


def padded(n: int, multiple: int) -> int:
    """Return `n` rounded up to a multiple."""
    return (n + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class BatchShape:
    """What the size of the graph's tensors depends on beside the model.

    Attributes:
        n_tokens: Tokens evaluated at once.
        n_outputs: How many of them have logits.
        n_raw: Cells of the window cache.
        n_csa: Rows of the caches of compression ratio 4.
        n_hca: Rows of the caches of ratio 128.
        cache_value_bytes: Bytes of a value in the caches.
        is_cache_quantized: The engine then rotates what it caches.
        rounds_cache: What is cached, and the indexer's queries, are rounded before.
        rounds_inputs: The inputs of FP8 and FP4 products are rounded.
        has_flash_attn: Attention is one operation, which the engine chooses by itself; otherwise all scores are kept.
    """

    n_tokens: int
    n_outputs: int
    n_raw: int
    n_csa: int
    n_hca: int
    cache_value_bytes: float
    is_cache_quantized: bool
    rounds_cache: bool = False
    rounds_inputs: bool = False
    has_flash_attn: bool = True


class _Tensor:
    """One tensor; `uses` counts readings to come, `address` is None unless it occupies memory."""

    __slots__ = ("address", "is_kept", "n_bytes", "shape", "uses", "value_bytes")

    def __init__(self, shape: tuple[int, ...], value_bytes: float, is_kept: bool) -> None:
        self.shape = shape
        self.value_bytes = value_bytes
        self.n_bytes = padded(int(math.prod(shape) * value_bytes), _ALIGNMENT)
        self.is_kept = is_kept
        self.uses = 0
        self.address: int | None = None


@dataclass(frozen=True)
class _View:
    """A reading of a tensor through a view, which keeps the reader from overwriting it."""

    of: _Tensor


class _Graph:
    """Tensors in the order of evaluation, each with what it reads."""

    def __init__(self) -> None:
        self.inputs: list[_Tensor] = []
        self._steps: list[tuple[_Tensor | None, tuple[_Tensor | _View, ...], bool]] = []

    def input(self, *shape: int, value_bytes: int = _F32) -> _Tensor:
        """Add a tensor that is filled before the evaluation; it never moves, and is never freed if nothing reads it."""
        tensor = _Tensor(shape, value_bytes, is_kept=False)
        self.inputs.append(tensor)
        return tensor

    def new(
        self,
        shape: tuple[int, ...],
        *reads: _Tensor | _View,
        value_bytes: float = _F32,
        in_place: bool = False,
        is_kept: bool = False,
    ) -> _Tensor:
        """Add an operation and return its result."""
        tensor = _Tensor(shape, value_bytes, is_kept)
        self._step(tensor, reads, in_place)
        return tensor

    def same(self, like: _Tensor, *reads: _Tensor | _View) -> _Tensor:
        """Add an elementwise operation, which may overwrite an operand."""
        return self.new(like.shape, *reads, value_bytes=like.value_bytes, in_place=True)

    def store(self, *reads: _Tensor | _View) -> None:
        """Add an operation that writes into a cache."""
        self._step(None, reads, False)

    def _step(self, result: _Tensor | None, reads: tuple[_Tensor | _View, ...], in_place: bool) -> None:
        for read in reads:
            _root(read).uses += 1
        self._steps.append((result, reads, in_place))

    def peak_bytes(self) -> int:
        """Place all tensors and return the size of the buffer."""
        arena = _Arena()
        for tensor in self.inputs:
            tensor.address = arena.take(tensor.n_bytes)
        for result, reads, in_place in self._steps:
            if result is not None:
                if in_place:
                    _overwrite(result, reads)
                if result.address is None:
                    result.address = arena.take(result.n_bytes)
            for read in reads:
                tensor = _root(read)
                tensor.uses -= 1
                if tensor.uses == 0 and tensor.address is not None and not tensor.is_kept:
                    arena.give(tensor.address, tensor.n_bytes)
        return arena.peak


def _root(read: _Tensor | _View) -> _Tensor:
    return read.of if isinstance(read, _View) else read


def _overwrite(result: _Tensor, reads: tuple[_Tensor | _View, ...]) -> None:
    """Put the result where the first operand is that has the same layout and no other reader."""
    for read in reads:
        if isinstance(read, _View) or read.uses != 1 or read.address is None or read.is_kept:
            continue
        if (read.shape, read.value_bytes) == (result.shape, result.value_bytes):
            result.address, read.address = read.address, None
            return


class _Arena:
    """Memory with holes, sorted by address; the last one has no end."""

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = [(0, 1 << 62)]  # start, end
        self.peak = 0

    def take(self, n: int) -> int:
        best = len(self._holes) - 1
        best_size = 1 << 62
        for i, (start, end) in enumerate(self._holes[:-1]):
            if n <= end - start <= best_size:
                best, best_size = i, end - start
        start, end = self._holes[best]
        if start + n == end:
            del self._holes[best]
        else:
            self._holes[best] = (start + n, end)
        self.peak = max(self.peak, start + n)
        return start

    def give(self, start: int, n: int) -> None:
        hole = (start, start + n)
        insort(self._holes, hole)
        i = self._holes.index(hole)
        if self._holes[i + 1][0] == hole[1]:
            hole = (hole[0], self._holes.pop(i + 1)[1])
        if i > 0 and self._holes[i - 1][1] == hole[0]:
            hole = (self._holes[i - 1][0], hole[1])
            del self._holes[i]
            i -= 1
        self._holes[i] = hole


def compute_bytes(hp: HParams, batch: BatchShape) -> int:
    """Return the bytes of the compute buffer for the largest graph of a context.

    Args:
        hp: The model.
        batch: The batch and the caches it reads.
    """
    return _Builder(hp, batch).build().peak_bytes()


def draft_compute_bytes(hp: HParams, batch: BatchShape, *, n_blocks: int, is_mtp: bool) -> int:
    """Return the bytes of a draft model's compute buffer.

    Args:
        hp: The model that it drafts for.
        batch: As for that model.
        n_blocks: Its blocks: without compression, routed with a bias.
        is_mtp: It is a prediction block. DSpark's graph is not followed in detail, and comes out up to a quarter too
            large.

    Source: ``src/models/deepseek4.cpp:graph_mtp``, ``src/models/dflash.cpp``.
    """
    blocks = replace(hp, n_layer=n_blocks, compress_ratios=(0,) * n_blocks, n_hash_layer=0)
    return _Builder(blocks, batch, is_mtp=is_mtp).build().peak_bytes()


def _rotation_size(head_dim: int) -> int:
    """Return the largest power of two from 64 that divides a head; the engine rotates in pieces of that size."""
    size = 64
    while head_dim % (2 * size) == 0:
        size *= 2
    return size


class _Builder:
    def __init__(self, hp: HParams, batch: BatchShape, *, is_mtp: bool = False) -> None:
        self.hp = hp
        self.is_mtp = is_mtp
        self.b = batch
        self.t = batch.n_tokens
        self.g = _Graph()
        # the engine takes every cache for the indexer's where the heads have the same size
        is_like_index = hp.head_dim == hp.indexer_head_dim
        self.rotates = is_like_index or (batch.is_cache_quantized and hp.head_dim % 64 == 0)
        self.mask_bytes = _F16 if batch.has_flash_attn else _F32  # but for the indexer's mask

    def build(self) -> _Graph:
        g, hp, t = self.g, self.hp, self.t
        ratios = hp.compress_ratios[: hp.n_layer]
        self._add_inputs(ratios)
        embd = g.new((hp.n_embd, t), self.tokens)
        stream = self._mtp_stream(embd) if self.is_mtp else g.new((hp.n_embd, hp.hc_count, t), _View(embd))
        for il, ratio in enumerate(ratios):
            mixes, x = self._hc_pre(stream)
            x = self._attention(x, ratio)
            post, comb = self._hc_post_weights(mixes)
            stream = g.new(stream.shape, x, stream, post, comb)
            stream = self._ffn(stream, is_hash=il < hp.n_hash_layer)
        self._head(stream)
        return g

    def _add_inputs(self, ratios: tuple[int, ...]) -> None:
        """Add the inputs in the order of the graph's leaves."""
        g, hp, b, t = self.g, self.hp, self.b, self.t
        self.tokens = g.input(t)
        if self.is_mtp:
            self.hidden = g.input(hp.n_embd * hp.hc_count, t)
        else:
            g.input(hp.n_embd, t)  # embeddings in place of tokens; nothing reads them
        if self.rotates:
            self.raw_rotation = g.input(_rotation_size(hp.head_dim), _rotation_size(hp.head_dim))
        self.raw_mask = g.input(b.n_raw, t, value_bytes=self.mask_bytes)
        self.positions = g.input(t)
        self.raw_rows = g.input(t, value_bytes=_I64)
        self.zeros: list[_Tensor] = []
        has_csa = has_hca = False
        for ratio in ratios:
            if ratio == _CSA:
                if not has_csa:
                    self.csa = self._compressor_inputs(_CSA, hp.head_dim, self.rotates)
                    self.lid = self._compressor_inputs(_CSA, hp.indexer_head_dim, True, is_index=True)
                self.zeros.append(g.input(1, self._n_selected(), t, value_bytes=self.mask_bytes))
                if not has_csa:
                    self.lid_mask = g.input(b.n_csa, t, value_bytes=_F16)
                    self.csa_mask = g.input(b.n_csa, t, value_bytes=self.mask_bytes)
                has_csa = True
            elif ratio == _HCA and not has_hca:
                self.hca = self._compressor_inputs(_HCA, hp.head_dim, self.rotates)
                self.hca_mask = g.input(b.n_hca, t, value_bytes=self.mask_bytes)
                has_hca = True
        self.outputs = g.input(b.n_outputs)
        self.zeros.reverse()

    def _n_selected(self) -> int:
        return min(self.hp.indexer_top_k, self.b.n_csa)

    def _compressor_inputs(
        self, ratio: int, head_dim: int, rotates: bool, *, is_index: bool = False
    ) -> _CompressorInputs:
        g = self.g
        n_blocks = self.t // ratio + 1
        n_kept = min(self.t, ratio * (2 if ratio == _CSA else 1))
        return _CompressorInputs(
            n_blocks=n_blocks,
            n_kept=n_kept,
            reads=g.input(n_blocks * ratio * (2 if ratio == _CSA else 1)),
            rows=g.input(self.t),
            positions=g.input(n_blocks),
            targets=g.input(n_blocks, value_bytes=_I64),
            kept=g.input(n_kept),
            kept_targets=g.input(n_kept),
            rotation=g.input(_rotation_size(head_dim), _rotation_size(head_dim)) if rotates else None,
            is_index=is_index,
        )

    def _mtp_stream(self, embd: _Tensor) -> _Tensor:
        """Join a token's embedding with the model's hidden state, stream by stream."""
        g, hp, t = self.g, self.hp, self.t
        embd = self._norm(embd)
        embd = g.new((hp.n_embd, hp.hc_count, t), _View(embd))
        hidden = g.new((hp.n_embd, hp.hc_count, t), _View(self.hidden))
        hidden = g.same(hidden, hidden)
        joined = g.new((2 * hp.n_embd, hp.hc_count, t), embd, hidden)
        return g.new((hp.n_embd, hp.hc_count, t), joined)

    # --- hyper-connections ---

    def _hc_pre(self, stream: _Tensor) -> tuple[_Tensor, _Tensor]:
        """Mix the streams into the input of a block; return the mixing weights too."""
        mixes = self._hc_mixes(stream)
        weights = self._affine(mixes)
        return mixes, self._norm(self.g.new((self.hp.n_embd, self.t), stream, weights))

    def _hc_mixes(self, stream: _Tensor) -> _Tensor:
        g, hp, t = self.g, self.hp, self.t
        flat = g.new((hp.hc_count * hp.n_embd, t), _View(stream))
        return g.new((hp.hc_count * (hp.hc_count + 2), t), flat)

    def _affine(self, mixes: _Tensor) -> _Tensor:
        x = self.g.new((self.hp.hc_count, self.t), _View(mixes))
        for _ in range(3):
            x = self.g.same(x, x)
        return x

    def _hc_post_weights(self, mixes: _Tensor) -> tuple[_Tensor, _Tensor]:
        post = self._affine(mixes)
        return post, self.g.new((self.hp.hc_count, self.hp.hc_count, self.t), mixes)

    def _norm(self, x: _Tensor) -> _Tensor:
        x = self.g.same(x, x)
        return self.g.same(x, x)

    def _rounded(self, x: _Tensor) -> _Tensor:
        """Round a row that is cached; the operation never works in place."""
        return self.g.new(x.shape, x) if self.b.rounds_cache else x

    def _input(self, x: _Tensor) -> _Tensor:
        """Round the input of an FP8 or FP4 product; several products of one input share it."""
        return self.g.new(x.shape, x) if self.b.rounds_inputs else x

    # --- attention ---

    def _attention(self, cur: _Tensor, ratio: int) -> _Tensor:
        g, hp, b, t = self.g, self.hp, self.b, self.t
        if ratio == _CSA:
            self._compress(cur, self.csa, _CSA, hp.head_dim)
            self._compress(cur, self.lid, _CSA, hp.indexer_head_dim)
        elif ratio == _HCA:
            self._compress(cur, self.hca, _HCA, hp.head_dim)

        cur_in = self._input(cur)
        low = self._input(self._norm(g.new((hp.q_lora_rank, t), cur_in)))
        heads = (hp.head_dim, hp.n_head, t)
        q = g.new(heads, _View(g.new((hp.n_head * hp.head_dim, t), low)))
        q = g.same(q, q, self.positions)
        if self.rotates:
            q = g.new((hp.head_dim, hp.n_head * t), self.raw_rotation, _View(q))
        kv = self._norm(g.new((hp.head_dim, t), cur_in))
        kv = self._rounded(g.new((hp.head_dim, 1, t), _View(kv), self.positions))
        if self.rotates:
            kv = g.new((hp.head_dim, t), self.raw_rotation, _View(kv))
        g.store(_View(kv), self.raw_rows)

        attend = self._flash_attention if b.has_flash_attn else self._attention_in_steps
        out = attend(q, cur, low, ratio)
        if self.rotates:
            out = g.new((hp.head_dim, hp.n_head * t), self.raw_rotation, _View(out))
        out = g.new(heads, _View(out), self.positions)
        low = g.new((hp.o_lora_rank, t, hp.o_groups), _View(out))
        low = self._input(g.new((hp.o_lora_rank * hp.o_groups, t), _View(low)))
        return g.new((hp.n_embd, t), low)

    def _flash_attention(self, q: _Tensor, cur: _Tensor, low: _Tensor, ratio: int) -> _Tensor:
        n_rows = self._n_rows(ratio)
        keys = self._all_keys(ratio)
        reads: tuple[_Tensor | _View, ...] = keys
        if self.b.cache_value_bytes == _F32:
            reads = self._cast_keys(n_rows, *keys[:1])
        return self.g.new(q.shape, _View(q), *reads, self._mask(cur, low, ratio))

    def _attention_in_steps(self, q: _Tensor, cur: _Tensor, low: _Tensor, ratio: int) -> _Tensor:
        """Keep the scores of all heads: they are most of the buffer."""
        g, hp, n_rows = self.g, self.hp, self._n_rows(ratio)
        keys = self._all_keys(ratio)
        values = g.new((n_rows, hp.head_dim), *keys[:1], value_bytes=self.b.cache_value_bytes)
        scores = g.new((n_rows, self.t, hp.n_head), *keys[:1], _View(q))
        scores = g.same(scores, scores, self._mask(cur, low, ratio))
        out = g.new((hp.head_dim, self.t, hp.n_head), values, scores)
        return g.new((hp.head_dim * hp.n_head, self.t), _View(out))

    def _n_rows(self, ratio: int) -> int:
        return self.b.n_raw + {0: 0, _CSA: self.b.n_csa, _HCA: self.b.n_hca}[ratio]

    def _all_keys(self, ratio: int) -> tuple[_View, ...]:
        """Put window and compressed rows together, to be read as keys and values; a window alone is read in place."""
        if not ratio:
            return ()
        rows = self.g.new((self.hp.head_dim, 1, self._n_rows(ratio)), value_bytes=self.b.cache_value_bytes)
        return _View(rows), _View(rows)

    def _mask(self, cur: _Tensor, low: _Tensor, ratio: int) -> _Tensor:
        if not ratio:
            return self.raw_mask
        extra = self._selected_mask(cur, low) if ratio == _CSA else self.hca_mask
        return self.g.new((self._n_rows(ratio), self.t), self.raw_mask, extra, value_bytes=self.mask_bytes)

    def _cast_keys(self, n_rows: int, *reads: _View) -> tuple[_Tensor, _Tensor]:
        """Flash attention takes no F32 keys: they are copied, once as keys and once as values."""
        first = self.g.new((self.hp.head_dim, n_rows), *reads, value_bytes=_F16)
        return first, self.g.new((self.hp.head_dim, n_rows), *reads, value_bytes=_F16)

    def _selected_mask(self, cur: _Tensor, low: _Tensor) -> _Tensor:
        """Score the compressed rows with the indexer, and mask all but the best."""
        g, hp, b, t = self.g, self.hp, self.b, self.t
        zeros = self.zeros.pop()
        zeros = g.same(zeros, zeros)
        q = g.new((hp.indexer_n_head * hp.indexer_head_dim, t), low)
        q = g.new((hp.indexer_head_dim, hp.indexer_n_head, t), _View(q), self.positions)
        assert self.lid.rotation is not None
        q = g.new((hp.indexer_head_dim, hp.indexer_n_head * t), self.lid.rotation, _View(q))
        if b.rounds_cache:
            q = g.new(q.shape, _View(q))
        weights = g.new((hp.indexer_n_head, t), cur)
        weights = g.same(weights, weights)
        score = g.new((b.n_csa, t), _View(q), _View(weights), self.lid_mask)
        best = g.new((self._n_selected(), t), g.new((self._n_selected(), t), score))
        mask = g.same(self.csa_mask, self.csa_mask)
        g.store(zeros, _View(best), _View(mask))
        return g.same(mask, _View(mask), self.csa_mask)

    def _compress(self, cur: _Tensor, inp: _CompressorInputs, ratio: int, head_dim: int) -> None:
        """Pool the tokens of a batch and the state into rows of a compressed cache, and keep the new state."""
        g, t = self.g, self.t
        width = head_dim * (2 if ratio == _CSA else 1)
        kv = g.new((width, t), cur)
        values = self._pooling_windows(kv, inp, ratio, head_dim)
        score = g.new((width, t), cur)
        score = g.same(score, score, g.new((width, t), inp.rows))
        scores = self._pooling_windows(score, inp, ratio, head_dim)
        weights = g.same(scores, scores)
        row = g.same(values, values, weights)
        row = g.new((1, head_dim, inp.n_blocks), row)
        row = g.new((head_dim, 1, inp.n_blocks), _View(row))
        row = self._norm(row)
        row = g.same(row, row, inp.positions)
        if not inp.is_index:
            row = self._rounded(row)
        if inp.rotation is not None:
            row = g.new((head_dim, inp.n_blocks), inp.rotation, _View(row))
        if inp.is_index:
            row = self._rounded(row)
        g.store(_View(row), inp.targets)
        for state in (kv, score):
            g.store(g.new((width, inp.n_kept), state, inp.kept), inp.kept_targets)

    def _pooling_windows(self, rows: _Tensor, inp: _CompressorInputs, ratio: int, head_dim: int) -> _Tensor:
        """Gather the rows that each compressed row is pooled from, so that a window lies along the first axis."""
        g = self.g
        n_read = ratio * inp.n_blocks
        width = rows.shape[0]
        if ratio == _HCA:
            source = g.new((width, _HCA + self.t), rows)
            window = g.new((width, n_read), source, inp.reads)
            return g.new((ratio, head_dim, inp.n_blocks), _View(window))
        source = g.new((width, 2 * _CSA + self.t), rows)
        zero = g.new((width, 1), _View(source))
        source = g.new((width, 2 * _CSA + self.t + 1), source, _View(zero))
        gathered = g.new((width, 2 * n_read), source, inp.reads)
        halves = [g.new((head_dim, n_read), _View(gathered)) for _ in range(2)]
        window = g.new((head_dim, 2 * ratio, inp.n_blocks), *map(_View, halves))
        return g.new((2 * ratio, head_dim, inp.n_blocks), _View(window))

    # --- experts and head ---

    def _ffn(self, stream: _Tensor, *, is_hash: bool) -> _Tensor:
        g, hp, t = self.g, self.hp, self.t
        mixes = self._hc_mixes(stream)
        post, comb = self._hc_post_weights(mixes)
        weights = self._affine(mixes)
        cur = self._norm(g.new((hp.n_embd, t), stream, weights))

        probs = g.new((hp.n_expert, t), cur)
        for _ in range(2):
            probs = g.same(probs, probs)
        used = (hp.n_expert_used, t)
        chosen = self._chosen_by_hash() if is_hash else self._chosen_by_score(probs)
        share = g.new((1, *used), _View(probs), chosen)
        total = g.new((1, t), _View(share))
        total = g.same(total, total)
        share = g.new(used, _View(share), total)
        share = g.new((1, *used), _View(share))
        inner = (hp.n_ff_exp, *used)
        cur = self._input(cur)
        gate = g.new(inner, _View(cur), chosen)
        up = g.new(inner, _View(cur), chosen)
        hidden = g.new(inner, gate, up)
        if self.b.rounds_inputs:  # an expert's share is multiplied in before its output matrix
            hidden = self._input(g.same(hidden, hidden, share))
        down = g.new((hp.n_embd, *used), hidden, chosen)
        if not self.b.rounds_inputs:
            down = g.same(down, down, share)
        out = g.new((hp.n_embd, t), _View(down), _View(down)) if hp.n_expert_used > 1 else down
        for _ in range(hp.n_expert_used - 2):
            out = g.same(out, out, _View(down))

        shared = (hp.n_ff_exp * hp.n_expert_shared, t)
        gate = g.new(shared, cur)
        up = g.new(shared, cur)
        shared_out = g.new((hp.n_embd, t), self._input(g.new(shared, gate, up)))
        out = g.same(out, out, shared_out)
        return g.new(stream.shape, out, stream, post, comb)

    def _chosen_by_hash(self) -> _Tensor | _View:
        return self.g.new((self.hp.n_expert_used, self.t), self.tokens)

    def _chosen_by_score(self, probs: _Tensor) -> _Tensor | _View:
        biased = self.g.same(probs, probs)
        return _View(self.g.new(probs.shape, biased))  # all experts, sorted

    def _head(self, stream: _Tensor) -> None:
        g, hp, n = self.g, self.hp, self.b.n_outputs
        # the hidden state is what the next proposal begins with
        flat = g.new((hp.hc_count * hp.n_embd, n), _View(stream), self.outputs, is_kept=self.is_mtp)
        weights = g.new((hp.hc_count, n), g.new((hp.hc_count * hp.n_embd, n), _View(flat)))
        for _ in range(4):
            weights = g.same(weights, weights)
        out = g.new((hp.n_embd, n), _View(flat), _View(weights))
        for _ in range(hp.hc_count - 1):
            out = g.same(out, out, g.new((hp.n_embd, n), _View(flat), _View(weights)))
        out = g.same(out, out)
        out = g.new((hp.n_embd, n), out, in_place=True, is_kept=True)
        g.new((hp.n_vocab, n), out, is_kept=True)


@dataclass(frozen=True)
class _CompressorInputs:
    """The index inputs of one kind of compressor, of which each layer of that kind reads all."""

    n_blocks: int
    n_kept: int
    reads: _Tensor
    rows: _Tensor
    positions: _Tensor
    targets: _Tensor
    kept: _Tensor
    kept_targets: _Tensor
    rotation: _Tensor | None
    is_index: bool
