"""The one table of DeepSeek-V4's tensors, hyper-parameters and metadata keys.

It owns what a DeepSeek-V4 file contains: names in both dialects and in the hub checkpoint, dimensions,
storage kinds, file order, which metadata keys the native dialect leaves out and how they follow from the
tensors. Reading files is left to ``header`` and ``checkpoint``, writing them to ``convert``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from .errors import CheckpointError
from .gguf_types import FILE_TYPES, FileType

if TYPE_CHECKING:
    from .gguf_file import KeyValue

__all__ = [
    "ARCHITECTURE",
    "KIND_TYPES",
    "MAX_EXPERTS",
    "MAX_LAYERS",
    "HParams",
    "Kind",
    "TensorSpec",
    "block_specs",
    "native_to_upstream",
    "tensor_table",
    "upstream_to_native",
]

ARCHITECTURE: Final = "deepseek4"
"""``general.architecture`` of both dialects."""

Kind = Literal["f32", "i32", "bf16", "f8", "mxfp4"]

KIND_TYPES: Final[dict[Kind, FileType]] = {
    "f32": FILE_TYPES[0],
    "i32": FILE_TYPES[26],
    "bf16": FILE_TYPES[30],
    "f8": FILE_TYPES[42],
    "mxfp4": FILE_TYPES[39],
}
"""How the native file stores each kind."""


RATIOS: Final = (0, 4, 128)
"""Legal compression ratios of a layer: none, overlapping windows of 4, windows of 128."""


# --- hyper-parameters -----------------------------------------------------------------------------


@dataclass(frozen=True)
class HParams:
    """Dimensions and constants of one DeepSeek-V4 model, named in llama.cpp's terms.

    ``compress_ratios`` has at least ``n_layer`` entries; entries beyond the trunk belong to MTP blocks.
    """

    n_layer: int
    n_embd: int
    n_head: int
    head_dim: int
    n_rot: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_swa: int
    compress_ratios: tuple[int, ...]
    indexer_n_head: int
    indexer_head_dim: int
    indexer_top_k: int
    n_ff_exp: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_hash_layer: int
    expert_weights_scale: float
    swiglu_limit: float
    hc_count: int
    hc_sinkhorn_iterations: int
    hc_eps: float
    rms_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn_factor: float
    yarn_n_ctx_orig: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    n_ctx_train: int
    n_vocab: int

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, path: str | None = None) -> HParams:
        """Read the hyper-parameters out of a hub checkpoint's ``config.json``.

        Args:
            config: The parsed file.
            path: Its path, for messages.

        Raises:
            CheckpointError: A key is missing, of the wrong type, or has a value that no DeepSeek-V4 can have.
        """
        return _hparams_from_hf_config(_HfConfig(config, path))

    @classmethod
    def from_metadata(
        cls, kv: Mapping[str, KeyValue], dims: Mapping[str, tuple[int, ...]], *, path: str | None = None
    ) -> HParams:
        """Read the hyper-parameters out of a GGUF file's metadata, in either dialect.

        Args:
            kv: Metadata with the types it has in the file.
            dims: Dimensions of the file's tensors by name; what the native dialect leaves out follows
                from them.
            path: The file, for messages.

        Raises:
            FormatError: As ``model_keys.read_model_keys``.
        """
        from .model_keys import read_model_keys  # it needs this module

        return read_model_keys(kv, dims, path=path).hparams


# Spelled out as data so that a missing key is reported under its own name: field, config key.
_HF_INTS: Final = (
    ("n_layer", "num_hidden_layers"),
    ("n_embd", "hidden_size"),
    ("n_head", "num_attention_heads"),
    ("head_dim", "head_dim"),
    ("n_rot", "qk_rope_head_dim"),
    ("q_lora_rank", "q_lora_rank"),
    ("o_groups", "o_groups"),
    ("o_lora_rank", "o_lora_rank"),
    ("n_swa", "sliding_window"),
    ("indexer_n_head", "index_n_heads"),
    ("indexer_head_dim", "index_head_dim"),
    ("indexer_top_k", "index_topk"),
    ("n_ff_exp", "moe_intermediate_size"),
    ("n_expert", "n_routed_experts"),
    ("n_expert_used", "num_experts_per_tok"),
    ("n_expert_shared", "n_shared_experts"),
    ("hc_count", "hc_mult"),
    ("hc_sinkhorn_iterations", "hc_sinkhorn_iters"),
    ("n_ctx_train", "max_position_embeddings"),
    ("n_vocab", "vocab_size"),
)
_HF_FLOATS: Final = (
    ("expert_weights_scale", "routed_scaling_factor"),
    ("swiglu_limit", "swiglu_limit"),
    ("hc_eps", "hc_eps"),
    ("rms_eps", "rms_norm_eps"),
    ("rope_theta", "rope_theta"),
    ("compress_rope_theta", "compress_rope_theta"),
)


_INT32_MAX: Final = 2**31 - 1
_FLOAT32_MAX: Final = 3.4e38
# limits of the engine's fixed arrays; beyond them it would stop the process
MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 1024


class _HfConfig:
    """Typed access to ``config.json`` with named errors."""

    def __init__(self, config: Mapping[str, Any], path: str | None, prefix: str = "") -> None:
        self.config = config
        self.path = path
        self.prefix = prefix

    def error(self, key: str, found: object, expected: object, hint: str | None = None) -> CheckpointError:
        return CheckpointError(
            "cannot use this checkpoint configuration",
            path=self.path,
            key=self.prefix + key,
            found=found,
            expected=expected,
            hint=hint,
        )

    def value(self, key: str, expected: str) -> Any:
        if key not in self.config:
            raise self.error(
                key, "no such key", expected, "Only the original DeepSeek-V4 config.json is read"
            )
        return self.config[key]

    def integer(self, key: str, minimum: int = 1) -> int:
        # the engine keeps most of these in 32 bits, and a file has no room for more
        expected = f"an integer from {minimum} to {_INT32_MAX}"
        value = self.value(key, expected)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= _INT32_MAX:
            raise self.error(key, repr(value), expected)
        return value

    def number(self, key: str) -> float:
        expected = "a positive number in the range of float32"
        value = self.value(key, expected)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _FLOAT32_MAX:
            raise self.error(key, repr(value), expected)
        return float(value)


def _hparams_from_hf_config(c: _HfConfig) -> HParams:
    fields: dict[str, Any] = {field: c.integer(key) for field, key in _HF_INTS}
    fields |= {field: c.number(key) for field, key in _HF_FLOATS}
    fields["n_hash_layer"] = c.integer("num_hash_layers", minimum=0)

    ratios = c.value("compress_ratios", "a list of integers")
    n_layer = fields["n_layer"]
    if not isinstance(ratios, list) or len(ratios) < n_layer:
        found = f"{len(ratios)} entries" if isinstance(ratios, list) else repr(ratios)
        raise c.error("compress_ratios", found, f"a list of at least {n_layer} integers")
    for il, ratio in enumerate(ratios):
        if not isinstance(ratio, int) or isinstance(ratio, bool) or ratio not in RATIOS:
            raise c.error("compress_ratios", f"{ratio!r} for layer {il}", "0, 4 or 128")
    fields["compress_ratios"] = tuple(ratios)

    # the forward pass is fixed: these two are checked because another value would give fluent, wrong text
    for key, only in (("scoring_func", "sqrtsoftplus"), ("norm_topk_prob", True)):
        if c.config.get(key, only) != only:
            raise c.error(key, repr(c.config[key]), repr(only))

    scaling = c.value("rope_scaling", "a YaRN group")
    if not isinstance(scaling, Mapping) or scaling.get("type", scaling.get("rope_type")) != "yarn":
        raise c.error("rope_scaling", repr(scaling), 'a group with "type": "yarn"')
    yarn = _HfConfig(scaling, c.path, "rope_scaling.")
    fields["yarn_factor"] = yarn.number("factor")
    fields["yarn_n_ctx_orig"] = yarn.integer("original_max_position_embeddings")
    fields["yarn_beta_fast"] = yarn.number("beta_fast") if "beta_fast" in scaling else 32.0
    fields["yarn_beta_slow"] = yarn.number("beta_slow") if "beta_slow" in scaling else 1.0

    hp = HParams(**fields)
    for key, value, ok, expected in (
        (
            "num_hash_layers",
            hp.n_hash_layer,
            hp.n_hash_layer <= hp.n_layer,
            f"at most {hp.n_layer}, the layers",
        ),
        ("num_hidden_layers", hp.n_layer, hp.n_layer <= MAX_LAYERS, f"at most {MAX_LAYERS}"),
        ("n_routed_experts", hp.n_expert, hp.n_expert <= MAX_EXPERTS, f"at most {MAX_EXPERTS}"),
        ("num_experts_per_tok", hp.n_expert_used, hp.n_expert_used <= hp.n_expert, f"at most {hp.n_expert}"),
        ("qk_rope_head_dim", hp.n_rot, hp.n_rot < hp.head_dim, f"less than head_dim, {hp.head_dim}"),
        ("o_groups", hp.o_groups, hp.n_head % hp.o_groups == 0, f"a divisor of the {hp.n_head} heads"),
        # the graph applies Hadamard matrices to the indexer's rows, the smallest of 64
        (
            "index_head_dim",
            hp.indexer_head_dim,
            hp.indexer_head_dim % 64 == 0 and hp.indexer_head_dim >= hp.n_rot,
            f"a multiple of 64, at least qk_rope_head_dim, {hp.n_rot}",
        ),
    ):
        if not ok:
            raise c.error(key, value, expected)
    return hp


# --- names ----------------------------------------------------------------------------------------

# Tensors whose names differ: native -> upstream, without and with the "blk.N." prefix. All others are equal.
_TOP_RENAMES: Final = {
    "hc_head_base": "output_hc_base.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER_RENAMES: Final = {
    "attn_sinks": "attn_sinks.weight",
    "attn_kv_latent.weight": "attn_kv.weight",
    "attn_compress_ape": "attn_compressor_ape.weight",
    "attn_compress_norm.weight": "attn_compressor_norm.weight",
    "attn_compress_gate.weight": "attn_compressor_gate.weight",
    "attn_compress_kv.weight": "attn_compressor_kv.weight",
    "indexer.compress_ape": "indexer_compressor_ape.weight",
    "indexer.compress_norm.weight": "indexer_compressor_norm.weight",
    "indexer.compress_gate.weight": "indexer_compressor_gate.weight",
    "indexer.compress_kv.weight": "indexer_compressor_kv.weight",
    "exp_probs_b": "exp_probs_b.bias",
    "ffn_gate_tid2eid": "ffn_gate_tid2eid.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
}
_TOP_RENAMES_BACK: Final = {upstream: native for native, upstream in _TOP_RENAMES.items()}
_LAYER_RENAMES_BACK: Final = {upstream: native for native, upstream in _LAYER_RENAMES.items()}
_LAYER_NAME: Final = re.compile(r"(blk\.[0-9]+\.)(.+)", re.DOTALL)


def native_to_upstream(name: str) -> str:
    """Return a tensor's upstream-dialect name; a name equal in both dialects comes back unchanged."""
    return _rename(name, _TOP_RENAMES, _LAYER_RENAMES)


def upstream_to_native(name: str) -> str:
    """Return a tensor's native-dialect name; a name equal in both dialects comes back unchanged."""
    return _rename(name, _TOP_RENAMES_BACK, _LAYER_RENAMES_BACK)


def _rename(name: str, top: Mapping[str, str], layer: Mapping[str, str]) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return top.get(name, name)
    prefix, suffix = match.groups()
    return prefix + layer.get(suffix, suffix)


# --- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a model of given hyper-parameters must have.

    Attributes:
        native: Name in the native dialect.
        upstream: Name in the upstream dialect.
        hf: Names in the hub checkpoint: the weight, then its scale where there is one. In expert stacks each
            name contains ``{e}``, to be replaced by 0, 1, ... ``dims[2] - 1``. Two weights with their scales are
            two matrices side by side: each row of the first is followed by that of the second.
        dims: GGUF order, ne0 (the contiguous dimension) first; trailing ones are left out.
        kind: How the native file stores it.
        layer: Layer index, None for the model's own tensors.
    """

    native: str
    upstream: str
    hf: tuple[str, ...]
    dims: tuple[int, ...]
    kind: Kind
    layer: int | None

    @property
    def is_expert_stack(self) -> bool:
        """Whether the tensor stacks one checkpoint tensor per routed expert along ne2."""
        return "{e}" in self.hf[0]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The matrices that lie side by side in it, as tensors of their own; the tensor itself if there is one."""
        if len(self.hf) <= 2:
            return (self,)
        dims = (self.dims[0] // 2, *self.dims[1:])
        return tuple(replace(self, hf=self.hf[i : i + 2], dims=dims) for i in (0, 2))

    @property
    def file_type(self) -> FileType:
        """The file type the native dialect uses for it."""
        return KIND_TYPES[self.kind]

    @property
    def n_elements(self) -> int:
        """Product of the dimensions."""
        n = 1
        for dim in self.dims:
            n *= dim
        return n

    @property
    def n_bytes(self) -> int:
        """Bytes in the native file, without padding."""
        return self.file_type.n_bytes(self.n_elements)


class _LayerDims:
    """Sizes of one layer that rows of the table below refer to."""

    def __init__(self, hp: HParams, ratio: int, is_hash: bool) -> None:
        self.ratio = ratio
        self.is_hash = is_hash
        self.d = hp.n_embd
        self.heads = hp.n_head
        self.head = hp.head_dim
        self.q = hp.n_head * hp.head_dim
        self.q_lora = hp.q_lora_rank
        self.o_in = hp.n_head * hp.head_dim // hp.o_groups
        self.o_mid = hp.o_groups * hp.o_lora_rank
        # ratio 4 pools overlapping windows: each token gives one half to its own window, one to the next
        self.pooled = hp.head_dim * (2 if self.ratio == 4 else 1)
        self.ix_heads = hp.indexer_n_head
        self.ix_head = hp.indexer_head_dim
        self.ff = hp.n_ff_exp
        self.ff_shared = hp.n_ff_exp * hp.n_expert_shared
        self.experts = hp.n_expert
        self.used = hp.n_expert_used
        self.vocab = hp.n_vocab
        self.hc_in = hp.hc_count * hp.n_embd
        self.hc_mix = hp.hc_count * (hp.hc_count + 2)


def _always(_: _LayerDims) -> bool:
    return True


def _compressed(s: _LayerDims) -> bool:
    return s.ratio != 0


def _indexed(s: _LayerDims) -> bool:
    return s.ratio == 4


def _hash(s: _LayerDims) -> bool:
    return s.is_hash


def _biased(s: _LayerDims) -> bool:
    return not s.is_hash


_Row = tuple[str, str, Kind, Callable[[_LayerDims], tuple[int, ...]], Callable[[_LayerDims], bool]]

# native name and checkpoint name without their layer prefixes, kind, dims, condition; in file order.
# A checkpoint name without a suffix is a plain tensor; "X.*" stands for X.weight and X.scale.
_LAYER_ROWS: Final[tuple[_Row, ...]] = (
    ("attn_sinks", "attn.attn_sink", "f32", lambda s: (s.heads,), _always),
    ("attn_compress_ape", "attn.compressor.ape", "f32", lambda s: (s.pooled, s.ratio), _compressed),
    ("attn_compress_norm.weight", "attn.compressor.norm.weight", "f32", lambda s: (s.head,), _compressed),
    (
        "attn_compress_gate.weight",
        "attn.compressor.wgate.weight",
        "bf16",
        lambda s: (s.d, s.pooled),
        _compressed,
    ),
    ("attn_compress_kv.weight", "attn.compressor.wkv.weight", "bf16", lambda s: (s.d, s.pooled), _compressed),
    ("indexer.compress_ape", "attn.indexer.compressor.ape", "f32", lambda s: (2 * s.ix_head, 4), _indexed),
    (
        "indexer.compress_norm.weight",
        "attn.indexer.compressor.norm.weight",
        "f32",
        lambda s: (s.ix_head,),
        _indexed,
    ),
    (
        "indexer.compress_gate.weight",
        "attn.indexer.compressor.wgate.weight",
        "bf16",
        lambda s: (s.d, 2 * s.ix_head),
        _indexed,
    ),
    (
        "indexer.compress_kv.weight",
        "attn.indexer.compressor.wkv.weight",
        "bf16",
        lambda s: (s.d, 2 * s.ix_head),
        _indexed,
    ),
    (
        "indexer.proj.weight",
        "attn.indexer.weights_proj.weight",
        "bf16",
        lambda s: (s.d, s.ix_heads),
        _indexed,
    ),
    (
        "indexer.attn_q_b.weight",
        "attn.indexer.wq_b.*",
        "f8",
        lambda s: (s.q_lora, s.ix_heads * s.ix_head),
        _indexed,
    ),
    ("attn_kv_a_norm.weight", "attn.kv_norm.weight", "f32", lambda s: (s.head,), _always),
    ("attn_q_a_norm.weight", "attn.q_norm.weight", "f32", lambda s: (s.q_lora,), _always),
    ("attn_kv_latent.weight", "attn.wkv.*", "f8", lambda s: (s.d, s.head), _always),
    ("attn_output_a.weight", "attn.wo_a.*", "f8", lambda s: (s.o_in, s.o_mid), _always),
    ("attn_output_b.weight", "attn.wo_b.*", "f8", lambda s: (s.o_mid, s.d), _always),
    ("attn_q_a.weight", "attn.wq_a.*", "f8", lambda s: (s.d, s.q_lora), _always),
    ("attn_q_b.weight", "attn.wq_b.*", "f8", lambda s: (s.q_lora, s.q), _always),
    ("attn_norm.weight", "attn_norm.weight", "f32", lambda s: (s.d,), _always),
    ("ffn_down_exps.weight", "ffn.experts.{e}.w2.*", "mxfp4", lambda s: (s.ff, s.d, s.experts), _always),
    ("ffn_gate_exps.weight", "ffn.experts.{e}.w1.*", "mxfp4", lambda s: (s.d, s.ff, s.experts), _always),
    ("ffn_up_exps.weight", "ffn.experts.{e}.w3.*", "mxfp4", lambda s: (s.d, s.ff, s.experts), _always),
    ("ffn_gate_tid2eid", "ffn.gate.tid2eid", "i32", lambda s: (s.used, s.vocab), _hash),
    ("exp_probs_b", "ffn.gate.bias", "f32", lambda s: (s.experts,), _biased),
    ("ffn_gate_inp.weight", "ffn.gate.weight", "f32", lambda s: (s.d, s.experts), _always),
    ("ffn_gate_shexp.weight", "ffn.shared_experts.w1.*", "f8", lambda s: (s.d, s.ff_shared), _always),
    ("ffn_down_shexp.weight", "ffn.shared_experts.w2.*", "f8", lambda s: (s.ff_shared, s.d), _always),
    ("ffn_up_shexp.weight", "ffn.shared_experts.w3.*", "f8", lambda s: (s.d, s.ff_shared), _always),
    ("ffn_norm.weight", "ffn_norm.weight", "f32", lambda s: (s.d,), _always),
    ("hc_attn_base", "hc_attn_base", "f32", lambda s: (s.hc_mix,), _always),
    ("hc_attn_fn", "hc_attn_fn", "f32", lambda s: (s.hc_in, s.hc_mix), _always),
    ("hc_attn_scale", "hc_attn_scale", "f32", lambda s: (3,), _always),
    ("hc_ffn_base", "hc_ffn_base", "f32", lambda s: (s.hc_mix,), _always),
    ("hc_ffn_fn", "hc_ffn_fn", "f32", lambda s: (s.hc_in, s.hc_mix), _always),
    ("hc_ffn_scale", "hc_ffn_scale", "f32", lambda s: (3,), _always),
)


def tensor_table(hp: HParams) -> list[TensorSpec]:
    """List every tensor of a model, in the order of the native file.

    Returns:
        One ``TensorSpec`` per tensor: 1328 for V4-Flash.
    """
    return list(_tensors(hp))


def _tensors(hp: HParams) -> Iterator[TensorSpec]:
    d, n_vocab, hc = hp.n_embd, hp.n_vocab, hp.hc_count
    yield _spec("token_embd.weight", "embed.weight", (d, n_vocab), "bf16", None)
    for il in range(hp.n_layer):
        yield from _layer(_LayerDims(hp, hp.compress_ratios[il], il < hp.n_hash_layer), il, f"layers.{il}")
    yield _spec("hc_head_base", "hc_head_base", (hc,), "f32", None)
    yield _spec("hc_head_fn", "hc_head_fn", (hc * d, hc), "f32", None)
    yield _spec("hc_head_scale", "hc_head_scale", (1,), "f32", None)
    yield _spec("output.weight", "head.weight", (d, n_vocab), "bf16", None)
    yield _spec("output_norm.weight", "norm.weight", (d,), "f32", None)


def _layer(sizes: _LayerDims, il: int, hf_layer: str) -> Iterator[TensorSpec]:
    for native, hf, kind, dims, is_present in _LAYER_ROWS:
        if is_present(sizes):
            yield _spec(f"blk.{il}.{native}", f"{hf_layer}.{hf}", dims(sizes), kind, il)


def block_specs(hp: HParams, il: int, hf_layer: str) -> list[TensorSpec]:
    """List the tensors of one block of a draft model: uncompressed, routed with a bias.

    Args:
        hp: The model it drafts for.
        il: Its index in the draft file.
        hf_layer: Prefix of its names in the checkpoint.
    """
    return list(_layer(_LayerDims(hp, 0, is_hash=False), il, hf_layer))


def _spec(native: str, hf: str, dims: tuple[int, ...], kind: Kind, layer: int | None) -> TensorSpec:
    stem = hf.removesuffix(".*")
    names = (hf,) if stem == hf else (f"{stem}.weight", f"{stem}.scale")
    return TensorSpec(native, native_to_upstream(native), names, dims, kind, layer)
