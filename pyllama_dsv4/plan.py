"""What a model needs in memory and how fast it can be at best, from its header alone.

Owns the arithmetic: sizes of caches and buffers, where layers go, bytes that one token reads, and the verdict.
``Llama`` asks the same questions before a load (``Plan.check``). The compute buffer of DeepSeek-V4 is
``graph_memory``'s, what the machine has ``machine``'s. Never loads the engine.

For DeepSeek-V4 the sizes are those that the engine reserves, as the tests compare. For other models, whose graphs and
caches differ, they are estimates (``Plan.is_estimate``).
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Final, Literal

from .errors import ArgumentError, MemoryLimitError, UnsupportedModelError
from .gguf_file import ArrayValue
from .graph_memory import BatchShape, compute_bytes, draft_compute_bytes, padded
from .header import Header, HeaderReport, Tensor, check_header, read_header
from .machine import available_bytes, read_bandwidth
from .tensors import HParams

__all__ = ["CACHE_BYTES", "Place", "Plan", "TokenBytes", "draft_kind", "plan_file", "plan_model"]

CACHE_BYTES: Final = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Bytes of one value in the KV cache, by type."""

N_CTX_DEFAULT: Final = 8192
N_UBATCH_DEFAULT: Final = 512
_CELLS: Final = 256
"""The engine rounds contexts and caches up to this."""
_LAYER: Final = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """What one kind of memory holds, in bytes.

    Attributes:
        name: ``host``, or ``GPU 0`` and so on.
        weights: Tensor data. On the host these are pages of the mapped file, which need not all be resident.
        experts: The part of it that is routed experts.
        cache: KV cache and compressor states.
        compute: Buffers of the largest graph.
        available: What there is; None when unknown.
        bandwidth: Bytes per second that reading it yields; None when unknown.
    """

    name: str
    weights: int
    experts: int
    cache: int
    compute: int
    available: int | None
    bandwidth: float | None

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that evaluating one token reads, at a full context.

    Attributes:
        dense: Weights that every token reads, without the head; of the embedding one row.
        head: The output matrix.
        experts: The routed experts of a token.
        cache: Rows of the KV caches that attention and indexer look at.
    """

    dense: int
    head: int
    experts: int
    cache: int

    @property
    def total(self) -> int:
        return self.dense + self.head + self.experts + self.cache


@dataclass(frozen=True)
class Plan:
    """What a load takes and yields. See ``plan_model``.

    Attributes:
        path: The model file.
        n_file_bytes: Size of all its shards.
        n_ctx: Tokens of context.
        cache_type: Type of the KV cache.
        n_gpu_layers: Layers on GPUs, the output layer counting as one.
        n_cpu_moe: First layers whose experts stay in host memory.
        is_mapped: The file is mapped: its pages need not all be in memory at once.
        is_estimate: Caches and buffers are estimates, because the model is not DeepSeek-V4.
        host: Host memory.
        gpus: GPUs, in the order given.
        token: Bytes read per token.
        token_on_gpus: The part of it that is in each GPU's memory.
        draft: A draft model beside it, counted as host memory: on GPUs it takes what the model leaves. Its bytes are
            not in ``token``.
        disk_bandwidth: Bytes per second that the file is read at when its pages are not in memory; None when unknown.
    """

    path: str
    n_file_bytes: int
    n_ctx: int
    cache_type: str
    n_gpu_layers: int
    n_cpu_moe: int
    is_mapped: bool
    is_estimate: bool
    host: Place
    gpus: tuple[Place, ...]
    token: TokenBytes
    token_on_gpus: tuple[int, ...]
    disk_bandwidth: float | None = None
    draft: Place | None = None

    @property
    def weights(self) -> int:
        """Bytes of weights in host memory, a draft model's included."""
        return self.host.weights + (0 if self.draft is None else self.draft.weights)

    @property
    def resident(self) -> int:
        """Bytes of host memory without which the model does not run."""
        return self.needs - (self.weights if self.is_mapped else 0)

    @property
    def needs(self) -> int:
        """Bytes of host memory that it needs to run from memory alone."""
        return self.host.total + (0 if self.draft is None else self.draft.total)

    @property
    def is_streamed(self) -> bool:
        """Whether weights come from the disk again and again, because memory does not hold them all."""
        return self.fits and self.host.available is not None and self.needs > self.host.available

    @property
    def fits(self) -> bool:
        """Whether it runs at all."""
        places = ((self.resident, self.host), *((gpu.total, gpu) for gpu in self.gpus))
        return all(place.available is None or n <= place.available for n, place in places)

    @property
    def verdict(self) -> Literal["fits", "runs from disk", "does not fit"]:
        if not self.fits:
            return "does not fit"
        return "runs from disk" if self.is_streamed else "fits"

    @property
    def token_on_host(self) -> int:
        """Bytes of host memory that a token reads."""
        return self.token.total - sum(self.token_on_gpus)

    @property
    def token_from_disk(self) -> int:
        """Bytes that a token reads from disk at least: what memory does not hold of what it uses.

        Assumed is that memory holds what every token reads before experts, and that all experts are used alike.
        """
        if not self.is_streamed:
            return 0
        assert self.host.available is not None
        room = self.host.available - self.resident
        token_experts = self.token.experts if self.host.experts else 0
        dense = max(self.token_on_host - self.token.cache - token_experts, 0)
        if room < dense:
            return dense - room + token_experts
        missing = 1 - (room - dense) / self.host.experts if self.host.experts else 0.0
        return round(max(missing, 0.0) * token_experts)

    @property
    def tokens_per_s(self) -> float | None:
        """Upper bound of the decoding speed by the bandwidths that are known; None if that of the host is not."""
        if self.host.bandwidth is None:
            return None
        seconds = self.token_on_host / self.host.bandwidth
        for n, gpu in zip(self.token_on_gpus, self.gpus, strict=True):
            if gpu.bandwidth is not None:
                seconds += n / gpu.bandwidth
        if self.disk_bandwidth is not None:
            seconds += self.token_from_disk / self.disk_bandwidth
        return 1 / seconds if seconds else None

    def with_bandwidth(self, bandwidth: float | None = None) -> Plan:
        """Return the plan with the host's bandwidth.

        Args:
            bandwidth: Bytes per second; None measures it, which takes a fraction of a second.
        """
        if bandwidth is None:
            bandwidth = read_bandwidth(self.token_on_host)
        return replace(self, host=replace(self.host, bandwidth=bandwidth))

    def line(self) -> str:
        """Return the verdict in one line: needs, has, expected tokens per second."""
        parts = [f"needs {_gb(self.needs)}"]
        if self.host.available is not None:
            parts.append(f"has {_gb(self.host.available)}")
        for gpu in self.gpus:
            has = "" if gpu.available is None else f" of {_gb(gpu.available)}"
            parts.append(f"{gpu.name} {_gb(gpu.total)}{has}")
        if self.verdict != "fits":
            parts.append(self.verdict)
        if self.token_from_disk:
            parts.append(f"{_gb(self.token_from_disk)} a token from disk")
        if self.tokens_per_s is not None:
            parts.append(f"at most {_rate(self.tokens_per_s)}")
        return ", ".join(parts)

    def check(self) -> None:
        """Refuse what does not fit: the system would grant it, and end the process when it is written to.

        Estimated caches and buffers refuse nothing.

        Raises:
            MemoryLimitError: naming what is too large.
        """
        for gpu in self.gpus:
            if gpu.available is not None and gpu.total > gpu.available:
                raise MemoryLimitError(
                    f"the model's part does not fit into {gpu.name}",
                    path=self.path,
                    key="n_gpu_layers",
                    found=f"{_gb(gpu.available)} available",
                    expected=_gb(gpu.total),
                    hint="Fewer n_gpu_layers or more n_cpu_moe need less there.",
                )
        available = self.host.available
        if available is None:
            return
        found = f"{_gb(available)} available"
        if not self.is_mapped and self.weights > available:
            raise MemoryLimitError(
                "the weights do not fit into memory",
                path=self.path,
                key="use_mmap",
                found=found,
                expected=_gb(self.weights),
                hint="With use_mmap=True and use_mlock=False the file may be larger than memory.",
            )
        if not self.is_estimate and self.resident > available:
            raise MemoryLimitError(
                f"the KV cache of {self.n_ctx} tokens does not fit into memory",
                path=self.path,
                key="n_ctx",
                found=found,
                expected=_gb(self.resident),
                hint="A smaller n_ctx, cache_type='q8_0' or flash_attn='on' need less.",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in JSON types; sizes in bytes, rates per second."""
        return {
            **asdict(self),
            "needs": self.needs,
            "resident": self.resident,
            "verdict": self.verdict,
            "fits": self.fits,
            "token": {**asdict(self.token), "total": self.token.total},
            "token_from_disk": self.token_from_disk,
            "tokens_per_s": self.tokens_per_s,
        }


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 100 else f"{tokens_per_s:.2g} tokens/s"


def plan_file(path: str | os.PathLike[str], **options: Any) -> Plan:
    """Check a GGUF file of any architecture and plan its load.

    Args:
        path: The file; the first shard of a split model.
        options: As ``plan_model``.

    Raises:
        ModelFileError, FormatError and its subclasses: as ``header.check_header``.
        ArgumentError: An option.
    """
    return plan_model(check_header(path, any_architecture=True), **options)


def plan_model(
    report: HeaderReport,
    *,
    n_ctx: int = N_CTX_DEFAULT,
    n_seq: int = 1,
    n_batch: int | None = None,
    n_ubatch: int = N_UBATCH_DEFAULT,
    cache_type: str = "f16",
    act_quant: Literal["none", "cache", "full"] = "cache",
    flash_attn: Literal["auto", "on", "off"] = "auto",
    is_mapped: bool = True,
    gpu_bytes: Sequence[int] = (),
    gpu_names: Sequence[str] = (),
    n_gpu_layers: int | None = None,
    n_cpu_moe: int | None = None,
    host_bytes: int | None = None,
    bandwidth: float | None = None,
    gpu_bandwidth: float | None = None,
    disk_bandwidth: float | None = None,
    draft: str | os.PathLike[str] | None = None,
    n_draft: int = 0,
) -> Plan:
    """Plan the load of a checked model.

    Args:
        report: The checked header.
        n_ctx: Tokens of context.
        n_seq: Sequences that are in the cache at once, each of `n_ctx` tokens.
        n_batch: Tokens per call at most; None takes `n_ubatch`.
        n_ubatch: Tokens evaluated at once.
        cache_type: Key of ``CACHE_BYTES``.
        act_quant: What is rounded as in DeepSeek's own code: nothing, rows that are cached, or inputs of products too.
        flash_attn: Attention in one operation; ``off`` keeps the scores of all heads in memory.
        is_mapped: The file is mapped and not locked in memory.
        gpu_bytes: Memory of each GPU.
        gpu_names: What they are called: workers on other machines count as GPUs. Empty numbers them.
        n_gpu_layers: Layers on GPUs, from the last to the first, the output layer counting as one; negative means
            all. None takes as many as fit.
        n_cpu_moe: First layers whose experts stay in host memory. None takes as few as fit.
        host_bytes: Host memory; None asks the machine.
        bandwidth: Bytes per second that host memory is read at; None leaves the speed open, see
            ``Plan.with_bandwidth``.
        gpu_bandwidth: The same of each GPU; None neglects the time they take.
        disk_bandwidth: The same of the disk with the file.
        draft: A draft model's file, of which the header is read.
        n_draft: Tokens that it proposes at most; V4 keeps as many copies of its compressor states.

    Raises:
        ArgumentError: An argument is out of its range.
        ModelFileError, FormatError: The draft model's file.
        UnsupportedModelError: It drafts for DeepSeek-V4 only, or is no draft model.
    """
    if cache_type not in CACHE_BYTES:
        raise _bad_argument("cache_type", repr(cache_type), ", ".join(CACHE_BYTES))
    if act_quant not in ("none", "cache", "full"):
        raise _bad_argument("act_quant", repr(act_quant), "none, cache, full")
    if flash_attn not in ("auto", "on", "off"):
        raise _bad_argument("flash_attn", repr(flash_attn), "auto, on, off")
    for name, value in (("n_ctx", n_ctx), ("n_seq", n_seq), ("n_batch", n_batch), ("n_ubatch", n_ubatch)):
        if value is not None and not 1 <= value < 2**31:
            raise _bad_argument(name, value, "a number from 1 to 2^31-1")
    for name, rate in (
        ("bandwidth", bandwidth),
        ("gpu_bandwidth", gpu_bandwidth),
        ("disk_bandwidth", disk_bandwidth),
    ):
        if rate is not None and not rate > 0:
            raise _bad_argument(name, rate, "more than 0 bytes per second")
    batch = min(n_ubatch, n_batch or n_ubatch, n_ctx)
    n_copies = n_draft if draft is not None else 0
    sizes = _Sizes.of(report, n_ctx, batch, cache_type, act_quant, flash_attn != "off", n_seq, n_copies)
    layout = _Layout(
        sizes,
        gpu_bytes=tuple(gpu_bytes),
        gpu_names=tuple(gpu_names) or tuple(f"GPU {i}" for i in range(len(gpu_bytes))),
        host_bytes=available_bytes() if host_bytes is None else host_bytes,
        bandwidth=bandwidth,
        gpu_bandwidth=gpu_bandwidth,
    )
    n_gpu, n_moe = layout.choose(n_gpu_layers, n_cpu_moe)
    host, gpus, token_on_gpus = layout.places(n_gpu, n_moe)
    return Plan(
        path=report.header.path,
        n_file_bytes=report.header.n_file_bytes,
        n_ctx=n_ctx,
        cache_type=cache_type,
        n_gpu_layers=n_gpu,
        n_cpu_moe=n_moe,
        is_mapped=is_mapped,
        is_estimate=report.hparams is None,
        host=host,
        gpus=gpus,
        token=sizes.token,
        token_on_gpus=token_on_gpus,
        disk_bandwidth=disk_bandwidth,
        draft=None
        if draft is None
        else _draft_place(report, draft, n_ctx, batch, cache_type, act_quant, flash_attn != "off", n_seq),
    )


def _bad_argument(key: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError("planning a load", key=key, found=found, expected=expected)


# --- sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer; the last one of a model is its output layer."""

    dense: int = 0
    experts: int = 0
    cache: int = 0
    token_dense: int = 0
    token_experts: int = 0
    token_cache: int = 0


@dataclass(frozen=True)
class _Sizes:
    """A model cut into what can be placed: input, layers, output layer.

    Attributes:
        input: Bytes of the embedding, which always stays on the host.
        layers: The layers, then the output layer.
        compute: Bytes of the compute buffer.
        token: Bytes that a token reads.
        token_input: The part of it that is the embedding's.
    """

    input: int
    layers: tuple[_Layer, ...]
    compute: int
    token: TokenBytes
    token_input: int

    @classmethod
    def of(
        cls,
        report: HeaderReport,
        n_ctx: int,
        batch: int,
        cache_type: str,
        act_quant: str,
        has_flash_attn: bool,
        n_seq: int,
        n_copies: int,
    ) -> _Sizes:
        header, hp = report.header, report.hparams
        n_cells = padded(n_ctx, _CELLS)
        if hp is not None:
            shape = _batch_shape(hp, n_cells, batch, cache_type, act_quant, has_flash_attn)
            caches = [_v4_cache(hp, ratio, shape, n_copies) for ratio in hp.compress_ratios[: hp.n_layer]]
            compute = compute_bytes(hp, shape)
            n_used, n_expert = hp.n_expert_used, hp.n_expert
        else:
            other = _OtherModel(header)
            caches = [other.cache(il, n_cells, CACHE_BYTES[cache_type]) for il in range(other.n_layer)]
            compute = other.compute(batch, n_cells, has_flash_attn)
            n_used, n_expert = other.n_expert_used, other.n_expert
        caches = [(n_seq * cache, token) for cache, token in caches]
        return cls._sum(header, caches, compute, n_used, n_expert)

    @classmethod
    def _sum(
        cls, header: Header, caches: list[tuple[int, int]], compute: int, n_used: int, n_expert: int
    ) -> _Sizes:
        n_layer = len(caches)
        dense = [0] * (n_layer + 1)
        experts = [0] * n_layer
        token_dense = [0] * (n_layer + 1)
        embedding = token_input = head = 0
        is_tied = header.tensor("output.weight") is None
        for tensor in header.tensors:
            name, n = tensor.upstream_name, tensor.n_bytes
            match = _LAYER.match(name)
            il = min(int(match[1]), n_layer) if match else n_layer
            if name == "token_embd.weight":
                embedding += n
                token_input += _row_bytes(tensor)
                if is_tied:  # the same matrix is the head
                    head += n
            elif name == "output.weight":
                dense[il] += n
                head += n
            elif "_exps" in name and il < n_layer:
                experts[il] += n
            else:
                dense[il] += n
                token_dense[il] += _row_bytes(tensor) if "tid2eid" in name else n
        token_experts = [n * n_used // max(n_expert, 1) for n in experts]
        layers = tuple(
            _Layer(dense[il], experts[il], caches[il][0], token_dense[il], token_experts[il], caches[il][1])
            for il in range(n_layer)
        )
        token = TokenBytes(
            dense=token_input + sum(token_dense),
            head=head,
            experts=sum(token_experts),
            cache=sum(cache for _, cache in caches),
        )
        output = _Layer(dense=dense[n_layer], token_dense=token_dense[n_layer] + head)
        return cls(embedding, (*layers, output), compute, token, token_input)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.type.n_bytes(tensor.dims[0])


def _batch_shape(
    hp: HParams, n_cells: int, batch: int, cache_type: str, act_quant: str, has_flash_attn: bool
) -> BatchShape:
    def rows(ratio: int) -> int:
        return padded(max(1, -(-n_cells // ratio)), _CELLS)

    return BatchShape(
        n_tokens=batch,
        n_outputs=batch,
        n_raw=padded(min(n_cells, hp.n_swa + batch), _CELLS),
        n_csa=rows(4),
        n_hca=rows(128),
        cache_value_bytes=CACHE_BYTES[cache_type],
        is_cache_quantized=cache_type == "q8_0",
        rounds_cache=act_quant != "none",
        rounds_inputs=act_quant == "full",
        has_flash_attn=has_flash_attn,
    )


def _v4_cache(hp: HParams, ratio: int, shape: BatchShape, n_copies: int = 0) -> tuple[int, int]:
    """Return the bytes of a layer's caches, and of the rows in them that a token reads.

    A layer has the window's cells; with a ratio, one compressed row per so many tokens, for ratio 4 another one for the
    indexer; and the compressor's state in F32, twice (values and scores), with copies where tokens can be dropped.

    Source: ``src/llama-kv-cache-dsv4.cpp``.
    """
    n_values = shape.n_raw * hp.head_dim
    n_state = 0
    if ratio == 4:
        n_values += shape.n_csa * (hp.head_dim + hp.indexer_head_dim)
        n_state = 2 * ratio * 2 * (hp.head_dim + hp.indexer_head_dim)
    elif ratio:
        n_values += shape.n_hca * hp.head_dim
        n_state = ratio * hp.head_dim
    n_rows = int(n_values * shape.cache_value_bytes)
    return n_rows + 2 * 4 * n_state * (1 + n_copies), n_rows


def _draft_place(
    report: HeaderReport,
    draft: str | os.PathLike[str],
    n_ctx: int,
    batch: int,
    cache_type: str,
    act_quant: str,
    has_flash_attn: bool,
    n_seq: int,
) -> Place:
    """Return what a draft model takes: its file, the window of each block (keys and values), its largest graph.

    Its dimensions are those of the model, which the engine insists on.
    """
    hp, header = report.hparams, read_header(draft)
    kind = draft_kind(header)
    if hp is None or kind is None:
        raise UnsupportedModelError(
            "planning a draft model",
            path=draft if kind is None else report.header.path,
            found=f"a model of '{(header if kind is None else report.header).architecture}'",
            expected="an MTP or DSpark file, beside a model of deepseek4",
        )
    is_mtp = kind == "mtp"
    key = "deepseek4.nextn_predict_layers" if is_mtp else "dflash.block_count"
    found = header.metadata.get(key)
    n_blocks = found if isinstance(found, int) and 0 < found < 100 else 1
    shape = _batch_shape(hp, padded(n_ctx, _CELLS), batch, cache_type, act_quant, has_flash_attn)
    n_window = int(2 * shape.n_raw * hp.head_dim * shape.cache_value_bytes)
    experts = sum(tensor.n_bytes for tensor in header.tensors if "_exps" in tensor.name)
    return Place(
        name="draft",
        weights=sum(tensor.n_bytes for tensor in header.tensors),
        experts=experts,
        cache=n_seq * n_blocks * n_window,
        compute=draft_compute_bytes(hp, shape, n_blocks=n_blocks, is_mtp=is_mtp),
        available=None,
        bandwidth=None,
    )


def draft_kind(header: Header) -> Literal["mtp", "dspark", "dflash"] | None:
    """Return how a file drafts for a model, or None if it does not.

    Source: upstream common/speculative.cpp:common_speculative_types_from_gguf.
    """
    names = {tensor.name for tensor in header.tensors}
    if header.architecture == "dflash":
        return "dspark" if "markov_w1.weight" in names else "dflash"
    if header.architecture == "deepseek4" and any(n.endswith(".nextn.eh_proj.weight") for n in names):
        return "mtp"
    return None


class _OtherModel:
    """Estimates for architectures whose graph and caches are not known here."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self.n_layer = self._int("block_count") or 1 + max(
            (int(match[1]) for t in header.tensors if (match := _LAYER.match(t.name))), default=0
        )
        self.n_expert = self._int("expert_count")
        self.n_expert_used = self._int("expert_used_count")
        self._n_embd = self._int("embedding_length")
        self._n_head = max(self._int("attention.head_count"), 1)

    def _value(self, key: str) -> Any:
        return self._header.metadata.get(f"{self._header.architecture}.{key}")

    def _int(self, key: str, il: int = 0) -> int:
        value = self._value(key)
        if isinstance(value, ArrayValue):
            value = value[il] if il < len(value) else None
        return value if isinstance(value, int) and value > 0 else 0

    def cache(self, il: int, n_cells: int, value_bytes: float) -> tuple[int, int]:
        """Return the bytes of a layer's keys and values: as if every layer attended over the whole context."""
        if self._value("attention.head_count_kv") is None:
            n_head_kv = self._int("attention.head_count", il)
        else:
            n_head_kv = self._int("attention.head_count_kv", il)
        head = self._n_embd // self._n_head
        width = (self._int("attention.key_length") or head) + (self._int("attention.value_length") or head)
        n = int(n_cells * n_head_kv * width * value_bytes)
        return n, n

    def compute(self, batch: int, n_cells: int, has_flash_attn: bool) -> int:
        """Return the larger of the head's and a layer's activations in F32, and the mask of a batch in F16.

        Without flash attention the mask is F32, and there are the scores of all heads.
        """
        embd = self._header.tensor("token_embd.weight")
        n_vocab = embd.dims[1] if embd is not None and len(embd.dims) > 1 else 0
        inner = max(
            self._int("feed_forward_length"), self._int("expert_feed_forward_length") * self.n_expert_used
        )
        values = 2 * self._n_embd + max(n_vocab, 5 * self._n_embd + 2 * inner)
        return batch * (4 * values + (2 if has_flash_attn else 4 * (1 + self._n_head)) * n_cells)


# --- placement ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where layers go: as the engine does it, the last ones on GPUs, divided in proportion to their memory."""

    sizes: _Sizes
    gpu_bytes: tuple[int, ...]
    gpu_names: tuple[str, ...]
    host_bytes: int | None
    bandwidth: float | None
    gpu_bandwidth: float | None

    def choose(self, n_gpu_layers: int | None, n_cpu_moe: int | None) -> tuple[int, int]:
        """Return both numbers, those that are open chosen: all layers on GPUs if experts on the host make room."""
        n_all = len(self.sizes.layers)
        if not self.gpu_bytes:
            return 0, min(n_cpu_moe or 0, n_all - 1)
        if n_gpu_layers is not None and n_gpu_layers < 0:
            n_gpu_layers = n_all
        layer_choices = range(n_all, -1, -1) if n_gpu_layers is None else [min(n_gpu_layers, n_all)]
        for n_gpu in layer_choices:
            moe_choices = range(n_all) if n_cpu_moe is None else [min(n_cpu_moe, n_all - 1)]
            for n_moe in moe_choices:
                _, gpus, _ = self.places(n_gpu, n_moe)
                if all(gpu.available is None or gpu.total <= gpu.available for gpu in gpus):
                    return n_gpu, n_moe
        return layer_choices[-1], n_all - 1 if n_cpu_moe is None else min(n_cpu_moe, n_all - 1)

    def places(self, n_gpu_layers: int, n_cpu_moe: int) -> tuple[Place, tuple[Place, ...], tuple[int, ...]]:
        """Return host, GPUs, and the bytes that a token reads in each GPU's memory."""
        sizes = self.sizes
        host = Place("host", sizes.input, 0, 0, 0, self.host_bytes, self.bandwidth)
        gpus = [
            Place(name, 0, 0, 0, 0, n, self.gpu_bandwidth)
            for name, n in zip(self.gpu_names, self.gpu_bytes, strict=True)
        ]
        token_on_gpus = [0] * len(gpus)
        shares = list(accumulate(self.gpu_bytes))
        first = len(sizes.layers) - n_gpu_layers
        for il, layer in enumerate(sizes.layers):
            experts_here = il >= n_cpu_moe
            if il < first or not gpus:
                host = _add(host, layer.dense + layer.experts, layer.experts, layer.cache)
                continue
            i = bisect.bisect_right(shares, (il - first) / n_gpu_layers * shares[-1])
            experts = layer.experts if experts_here else 0
            gpus[i] = _add(gpus[i], layer.dense + experts, experts, layer.cache)
            host = _add(host, layer.experts - experts, layer.experts - experts, 0)
            token_on_gpus[i] += (
                layer.token_dense + layer.token_cache + (layer.token_experts if experts_here else 0)
            )
        # every device evaluates its part of the graph in buffers of its own, at most as large as the whole graph's
        used = [replace(gpu, compute=sizes.compute) if gpu.weights else gpu for gpu in gpus]
        return replace(host, compute=sizes.compute), tuple(used), tuple(token_on_gpus)


def _add(place: Place, weights: int, experts: int, cache: int) -> Place:
    return replace(
        place, weights=place.weights + weights, experts=place.experts + experts, cache=place.cache + cache
    )
