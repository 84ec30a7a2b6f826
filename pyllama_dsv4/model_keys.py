"""The metadata keys of a DeepSeek-V4 model: order, types, ranges, and how absent ones are derived.

It owns step 6 of the header check (``header`` lists all steps): every key the engine reads, in the order of
the format specification's table, with the values it can run, and the derivation of the keys that the native
dialect does not write. It works on parsed metadata and tensor dimensions; reading files is left to
``gguf_file``. The engine has a twin, ``native/llama/dsv4-hparams.cpp``, and tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .errors import FormatError, MissingKeyError, MissingTensorError, TensorShapeError, UnsupportedModelError
from .gguf_file import KeyValue, ValueType
from .tensors import ARCHITECTURE, MAX_EXPERTS, MAX_LAYERS, RATIOS, HParams, native_to_upstream

__all__ = ["Dims", "ModelKeys", "read_model_keys"]

Dims = Mapping[str, tuple[int, ...]]
"""Dimensions of a file's tensors by name as spelled in the file, ne0 first."""

# beyond this the engine would stop the process
_MAX_SINKHORN: Final = 64
_MIN_HADAMARD: Final = 64  # indexer rows are rotated in pieces of this size or its multiples by 2
_INT32_MAX: Final = 2**31 - 1
_UINT32_MAX: Final = 2**32 - 1

_HC_COUNT: Final = 4
_SQRT_SOFTPLUS: Final = 4
_ROPE_SCALING_TYPES: Final = ("none", "linear", "yarn", "longrope")

# what the native dialect leaves out and no tensor shows; the same in the configurations of Flash and Pro
_SINKHORN_ITERATIONS: Final = 20
_HC_EPSILON: Final = 1e-6
_COMPRESS_ROPE_FREQ_BASE: Final = 160000.0
_YARN: Final[dict[str, Any]] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 65536,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
_ROPE_FREQ_BASE: Final = 10000.0

_HINT: Final = "Convert the checkpoint again, or fetch a complete file."


class ModelKeys(NamedTuple):
    """What the metadata of a model file says.

    Attributes:
        hparams: Dimensions and constants.
        derived: Keys that the file does not have and that were derived, full name to value.
        n_mtp: Layers at the end of ``block_count`` that the file declares as prediction (MTP) layers.
    """

    hparams: HParams
    derived: dict[str, Any]
    n_mtp: int


def read_model_keys(kv: Mapping[str, KeyValue], dims: Dims, *, path: str | None = None) -> ModelKeys:
    """Read and check every key the engine reads, deriving those that the native dialect leaves out.

    Args:
        kv: Metadata of the first shard.
        dims: Dimensions of all tensors of all shards, named as in the file. Their names tell the dialect;
            keys are derived in native-dialect files only, and never overwritten.
        path: The file, for messages.

    Raises:
        MissingKeyError: A key is absent and cannot be derived, or has the wrong GGUF type.
        FormatError: A key's value is out of the range that the engine can run.
        MissingTensorError: A key is absent, and so is the tensor that it follows from.
        TensorShapeError: A key is absent, and the tensor that it follows from has impossible dimensions.
        UnsupportedModelError: The vocabulary is of a kind that DeepSeek-V4 does not have.

    Source: format specification sections 4.1 to 4.3.
    """
    keys = _Keys(kv, path)
    is_native = any(native_to_upstream(name) != name for name in dims)
    return _read(keys, _Deriver(keys, dims, is_native))


def _read(k: _Keys, d: _Deriver) -> ModelKeys:
    n_layer = k.u32("block_count", 1, MAX_LAYERS)
    n_ctx_train = k.u32("context_length", 1)
    n_embd = k.u32("embedding_length", 1, _INT32_MAX)
    n_head = k.u32_per_layer("attention.head_count", n_layer, 1, _INT32_MAX)
    k.u32_per_layer("attention.head_count_kv", n_layer, 1, 1)  # one latent serves all heads
    yarn = _read_rope_scaling(k, d)
    rope_theta = k.f32("rope.freq_base", minimum=0.0, is_open=True, default=_ROPE_FREQ_BASE)
    rms_eps = k.f32("attention.layer_norm_rms_epsilon", minimum=0.0)
    n_expert_used = k.u32_per_layer("expert_used_count", n_layer, 1, MAX_EXPERTS)
    # upstream's defaults for these three would be other numbers than V4's: fluent, wrong text
    head_dim = k.u32("attention.key_length", 1, _INT32_MAX)
    k.u32("attention.value_length", head_dim, head_dim)
    k.u32("general.file_type", default=0)
    k.text("tokenizer.chat_template", default="")
    k.u32("vocab_size", default=0)
    q_lora_rank = k.u32("attention.q_lora_rank", 1, _INT32_MAX)
    n_rot = k.u32("rope.dimension_count", 2, head_dim)
    if n_rot % 2 != 0:
        raise k.bad_value("rope.dimension_count", n_rot, "an even number")
    n_swa = k.u32("attention.sliding_window", 1, _INT32_MAX)
    freq_base_swa = k.f32("rope.freq_base_swa", minimum=0.0, is_open=True, default=_COMPRESS_ROPE_FREQ_BASE)
    n_ff_exp = k.u32_per_layer("expert_feed_forward_length", n_layer, 1, _INT32_MAX)
    n_expert = k.u32("expert_count", n_expert_used, MAX_EXPERTS)
    n_expert_shared = k.u32("expert_shared_count", 1, MAX_EXPERTS)
    expert_weights_scale = k.f32("expert_weights_scale")
    k.boolean("expert_weights_norm")
    swiglu_limits = k.f32_per_layer("swiglu_clamp_exp", n_layer)
    indexer_n_head = k.u32("attention.indexer.head_count", 1, _INT32_MAX)
    indexer_head_dim = k.u32("attention.indexer.key_length", n_rot, _INT32_MAX)
    if indexer_head_dim % _MIN_HADAMARD != 0:
        raise k.bad_value("attention.indexer.key_length", indexer_head_dim, f"a multiple of {_MIN_HADAMARD}")
    indexer_top_k = k.u32("attention.indexer.top_k", 1, _INT32_MAX)
    if d.derives("swiglu_clamp_shexp"):
        d.add("swiglu_clamp_shexp", swiglu_limits)
    elif k.has("swiglu_clamp_shexp"):
        k.f32_per_layer("swiglu_clamp_shexp", n_layer)
    o_groups, o_lora_rank = _read_output_groups(k, d, n_head, head_dim)
    compress_rope_theta = (
        d.add("attention.compress_rope_freq_base", freq_base_swa)
        if d.derives("attention.compress_rope_freq_base")
        else k.f32("attention.compress_rope_freq_base", minimum=0.0, is_open=True)
    )
    compress_ratios = _read_ratios(k, d, n_layer)
    hc_count, hc_iterations, hc_eps = _read_hyper_connections(k, d)
    n_hash_layer = (
        d.add("hash_layer_count", d.hash_layers(n_layer))
        if d.derives("hash_layer_count")
        else k.u32("hash_layer_count", 0, n_layer)
    )
    if d.derives("expert_gating_func"):
        d.add("expert_gating_func", _SQRT_SOFTPLUS)
    else:
        k.u32("expert_gating_func", _SQRT_SOFTPLUS, _SQRT_SOFTPLUS)
    k.u32("embedding_length_out", default=0)
    n_mtp = k.u32("nextn_predict_layers", 0, n_layer, default=0)
    _check_guards(k, head_dim, n_rot, n_expert)
    n_vocab = _read_vocabulary(k)

    hparams = HParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        head_dim=head_dim,
        n_rot=n_rot,
        q_lora_rank=q_lora_rank,
        o_groups=o_groups,
        o_lora_rank=o_lora_rank,
        n_swa=n_swa,
        compress_ratios=compress_ratios,
        indexer_n_head=indexer_n_head,
        indexer_head_dim=indexer_head_dim,
        indexer_top_k=indexer_top_k,
        n_ff_exp=n_ff_exp,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_expert_shared=n_expert_shared,
        n_hash_layer=n_hash_layer,
        expert_weights_scale=expert_weights_scale,
        swiglu_limit=swiglu_limits[0] if isinstance(swiglu_limits, list) else swiglu_limits,
        hc_count=hc_count,
        hc_sinkhorn_iterations=hc_iterations,
        hc_eps=hc_eps,
        rms_eps=rms_eps,
        rope_theta=rope_theta,
        compress_rope_theta=compress_rope_theta,
        yarn_factor=yarn["factor"],
        yarn_n_ctx_orig=yarn["original_context_length"] or n_ctx_train,
        yarn_beta_fast=yarn["yarn_beta_fast"],
        yarn_beta_slow=yarn["yarn_beta_slow"],
        n_ctx_train=n_ctx_train,
        n_vocab=n_vocab,
    )
    return ModelKeys(hparams, d.derived, n_mtp)


def _read_rope_scaling(k: _Keys, d: _Deriver) -> dict[str, Any]:
    type_key = "rope.scaling.type"
    type_ = k.text(type_key, default="linear")
    if type_ not in _ROPE_SCALING_TYPES:
        raise k.bad_value(type_key, repr(type_), "'yarn'")
    values = {
        "factor": k.f32("rope.scaling.factor", minimum=0.0, default=1.0),
        "original_context_length": k.u32("rope.scaling.original_context_length", default=0),
        "yarn_beta_fast": k.f32("rope.scaling.yarn_beta_fast", default=_YARN["rope.scaling.yarn_beta_fast"]),
        "yarn_beta_slow": k.f32("rope.scaling.yarn_beta_slow", default=_YARN["rope.scaling.yarn_beta_slow"]),
    }
    # derived as a group only: a file with some of the five says what it wants
    if d.is_native and not any(k.has(key) for key in _YARN):
        for key, value in _YARN.items():
            d.add(key, value)
            values[key.removeprefix("rope.scaling.")] = value
    return values


def _read_output_groups(k: _Keys, d: _Deriver, n_head: int, head_dim: int) -> tuple[int, int]:
    key, source = "attention.output_group_count", "blk.0.attn_output_a.weight"
    if d.derives(key):
        ne0 = d.source(source, key)[0]
        n_groups = n_head * head_dim // ne0 if ne0 > 0 and n_head * head_dim % ne0 == 0 else 0
        if n_groups == 0 or n_head % n_groups != 0:
            raise d.misfit(source, key, f"ne0 that splits {n_head} heads of {head_dim} into equal groups")
        d.add(key, n_groups)
    else:
        n_groups = k.u32(key, 1, n_head)
        if n_head % n_groups != 0:
            raise k.bad_value(key, n_groups, f"a divisor of the {n_head} heads")

    key = "attention.output_lora_rank"
    if not d.derives(key):
        return n_groups, k.u32(key, 1, _INT32_MAX)
    ne1 = d.source(source, key)[1]
    if ne1 < 1 or ne1 % n_groups != 0 or ne1 // n_groups > _INT32_MAX:
        raise d.misfit(source, key, f"ne1 that is a multiple of the {n_groups} groups")
    return n_groups, d.add(key, ne1 // n_groups)


def _read_ratios(k: _Keys, d: _Deriver, n_layer: int) -> tuple[int, ...]:
    key = "attention.compress_ratios"
    if d.derives(key):
        return tuple(d.add(key, [d.ratio(il, key) for il in range(n_layer)]))
    ratios = list(k.array(key, ValueType.I32, ValueType.U32))
    if not n_layer <= len(ratios) <= MAX_LAYERS:
        raise k.bad_value(key, f"{len(ratios)} entries", f"{n_layer} to {MAX_LAYERS}")
    for il, ratio in enumerate(ratios[:n_layer]):
        if ratio not in RATIOS:
            raise k.bad_value(key, f"{ratio} for layer {il}", "0, 4 or 128")
    return tuple(ratios)


def _read_hyper_connections(k: _Keys, d: _Deriver) -> tuple[int, int, float]:
    key, source = "hyper_connection.count", "hc_head_base"
    if d.derives(key):
        if d.source(source, key)[0] != _HC_COUNT:
            raise d.misfit(source, key, f"ne0 = {_HC_COUNT}")
        d.add(key, _HC_COUNT)
    else:
        k.u32(key, _HC_COUNT, _HC_COUNT)  # the graph is written for four streams
    key = "hyper_connection.sinkhorn_iterations"
    iterations = d.add(key, _SINKHORN_ITERATIONS) if d.derives(key) else k.u32(key, 1, _MAX_SINKHORN)
    key = "hyper_connection.epsilon"
    epsilon = d.add(key, _HC_EPSILON) if d.derives(key) else k.f32(key, minimum=0.0)
    return _HC_COUNT, iterations, epsilon


def _check_guards(k: _Keys, head_dim: int, n_rot: int, n_expert: int) -> None:
    """Check keys that V4 files do not have, but that the engine reads for every architecture."""
    if not k.boolean("attention.causal", default=True):
        raise k.bad_value("attention.causal", "false", "true")
    k.u32("attention.key_length_swa", head_dim, head_dim, default=head_dim)
    k.u32("attention.value_length_swa", head_dim, head_dim, default=head_dim)
    k.u32("rope.dimension_count_swa", n_rot, n_rot, default=n_rot)
    k.u32("expert_group_count", 0, min(1, n_expert - 1), default=0)
    if k.u32("pooling_type", default=0) != _UINT32_MAX:  # "unspecified", as upstream's saver writes it
        k.u32("pooling_type", 0, 0, default=0)


def _read_vocabulary(k: _Keys) -> int:
    """Check the tokenizer's keys and return the number of tokens."""
    model = k.text("tokenizer.ggml.model")
    if model in ("none", "no_vocab"):
        return k.u32("vocab_size", 1, _INT32_MAX)
    if model not in ("gpt2", "test"):
        raise UnsupportedModelError(
            "cannot use this kind of vocabulary",
            path=k.path,
            key="tokenizer.ggml.model",
            found=repr(model),
            expected="'gpt2' (byte-level BPE) or 'none'",
            hint="DeepSeek-V4 has no other; the file is of another model.",
        )
    if model == "gpt2":
        k.array("tokenizer.ggml.merges", ValueType.STR)
    key = "tokenizer.ggml.tokens"
    tokens = k.array(key, ValueType.STR)
    n_vocab = len(tokens)
    if not 1 <= n_vocab <= _INT32_MAX:
        raise k.bad_value(key, f"{n_vocab} entries", "at least 1")
    # the engine asserts that the texts differ, as C strings and after giving empty ones a text
    seen: set[bytes] = set()
    for i, raw in enumerate(tokens.byte_strings()):
        text = raw.split(b"\0", 1)[0] or b"[EMPTY_%d]" % i
        if text in seen:
            raise k.bad_value(key, f"the text of token {i} twice", "texts that differ")
        seen.add(text)
    for name, types in (
        ("tokenizer.ggml.scores", (ValueType.F32, ValueType.I32)),
        ("tokenizer.ggml.token_type", (ValueType.I32,)),
    ):
        if k.has(name) and len(values := k.array(name, *types)) < n_vocab:
            raise k.bad_value(name, f"{len(values)} entries", f"at least {n_vocab}, the tokens")
    k.text("tokenizer.ggml.pre", default="")
    for name in ("bos", "eos", "padding"):  # out of range, the engine would take another token instead
        k.u32(f"tokenizer.ggml.{name}_token_id", 0, n_vocab - 1, default=0)
    k.boolean("tokenizer.ggml.add_bos_token", default=False)
    k.boolean("tokenizer.ggml.add_eos_token", default=False)
    return n_vocab


def _full(key: str) -> str:
    return key if key.startswith(("general.", "tokenizer.")) else f"{ARCHITECTURE}.{key}"


class _Keys:
    """Typed access to metadata by short name; what is wrong becomes a named error."""

    def __init__(self, kv: Mapping[str, KeyValue], path: str | None) -> None:
        self._kv = kv
        self.path = path

    def has(self, key: str) -> bool:
        return _full(key) in self._kv

    def value(self, key: str, *types: ValueType, default: Any = None) -> Any:
        """Return the value of a key of one of the types, or the default; with none it must be there."""
        expected = " or ".join(str(type_) for type_ in types)
        entry = self._kv.get(_full(key))
        if entry is None:
            if default is None:
                raise self._missing(
                    "a metadata key that the model needs is absent", key, "no such key", expected
                )
            return default
        if entry.type not in types:
            raise self._missing("a metadata key has the wrong type", key, entry.type_name, expected)
        return entry.value

    def u32(self, key: str, minimum: int = 0, maximum: int = _UINT32_MAX, default: int | None = None) -> int:
        value = self.value(key, ValueType.U32, default=default)
        return self._in_range(key, value, minimum, maximum) if self.has(key) else int(value)

    def u32_per_layer(self, key: str, n_layer: int, minimum: int, maximum: int) -> int:
        """Return a value that may be stored once or for each layer; the graph has one for all layers."""
        entry = self._kv.get(_full(key))
        if entry is None or entry.type is not ValueType.ARR:
            return self.u32(key, minimum, maximum)
        values = self._per_layer(key, n_layer, ValueType.U32, ValueType.I32)
        for il, value in enumerate(values):
            if value != values[0]:
                raise self.bad_value(key, f"{value} for layer {il}", f"{values[0]} as for layer 0")
        return self._in_range(key, values[0], minimum, maximum)

    def f32(
        self,
        key: str,
        *,
        minimum: float = -math.inf,
        is_open: bool = False,
        default: float | None = None,
    ) -> float:
        """Return a finite number of at least ``minimum``, or above it if the range is open."""
        value = float(self.value(key, ValueType.F32, default=default))
        self._check_f32(key, value, minimum, is_open=is_open)
        return value

    def f32_per_layer(self, key: str, n_layer: int) -> float | list[float]:
        entry = self._kv.get(_full(key))
        if entry is None or entry.type is not ValueType.ARR:
            return self.f32(key)
        values = self._per_layer(key, n_layer, ValueType.F32)
        for value in values:
            self._check_f32(key, value, -math.inf, is_open=False)
        return values

    def text(self, key: str, default: str | None = None) -> str:
        return str(self.value(key, ValueType.STR, default=default))

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        return bool(self.value(key, ValueType.BOOL, default=default))

    def array(self, key: str, *item_types: ValueType) -> Any:
        expected = " or ".join(f"arr[{type_}]" for type_ in item_types)
        entry = self._kv.get(_full(key))
        if entry is None:
            raise self._missing("a metadata key that the model needs is absent", key, "no such key", expected)
        if entry.type is not ValueType.ARR or entry.value.item_type not in item_types:
            raise self._missing("a metadata key has the wrong type", key, entry.type_name, expected)
        return entry.value

    def bad_value(self, key: str, found: object, expected: object) -> FormatError:
        return FormatError(
            "a metadata key has a value that the engine cannot run",
            path=self.path,
            key=_full(key),
            found=found,
            expected=expected,
            hint=_HINT,
        )

    def _missing(self, attempted: str, key: str, found: str, expected: str) -> MissingKeyError:
        return MissingKeyError(
            attempted, path=self.path, key=_full(key), found=found, expected=expected, hint=_HINT
        )

    def _per_layer(self, key: str, n_layer: int, *item_types: ValueType) -> list[Any]:
        values = self.array(key, *item_types)
        if len(values) != n_layer:
            raise self.bad_value(key, f"{len(values)} entries", f"{n_layer}, the layers")
        return list(values)

    def _in_range(self, key: str, value: int, minimum: int, maximum: int) -> int:
        if not minimum <= value <= maximum:
            if minimum == maximum:
                expected = f"{minimum}"
            elif maximum >= _INT32_MAX:
                expected = f"at least {minimum}"
            else:
                expected = f"{minimum} to {maximum}"
            raise self.bad_value(key, value, expected)
        return value

    def _check_f32(self, key: str, value: float, minimum: float, *, is_open: bool) -> None:
        if not math.isfinite(value) or value < minimum or (is_open and value == minimum):
            expected = "a finite number"
            if math.isfinite(minimum):
                expected += f" {'above' if is_open else 'of at least'} {minimum:g}"
            raise self.bad_value(key, value, expected)


class _Deriver:
    """Keys that the native dialect leaves out, from its tensors."""

    def __init__(self, keys: _Keys, dims: Dims, is_native: bool) -> None:
        self._keys = keys
        self._dims = dims
        self.is_native = is_native
        self.derived: dict[str, Any] = {}

    def derives(self, key: str) -> bool:
        """Whether the key is absent from a file whose dialect leaves it out."""
        return self.is_native and not self._keys.has(key)

    def add(self, key: str, value: Any) -> Any:
        self.derived[_full(key)] = value
        return value

    def source(self, tensor: str, key: str) -> tuple[int, int, int, int]:
        """Return the four dimensions of the tensor that a key follows from."""
        dims = self._dims.get(tensor)
        if dims is None:
            raise self._absent(tensor, f"the tensor that '{_full(key)}' follows from")
        ne0, ne1, ne2, ne3 = (*dims, 1, 1, 1)[:4]
        return ne0, ne1, ne2, ne3

    def misfit(self, tensor: str, key: str, expected: str) -> TensorShapeError:
        return TensorShapeError(
            f"cannot derive the absent key '{_full(key)}' from this tensor",
            path=self._keys.path,
            tensor=tensor,
            found=" x ".join(map(str, self._dims[tensor])),
            expected=expected,
            hint=_HINT,
        )

    def ratio(self, il: int, key: str) -> int:
        """Return a layer's compression ratio: as many rows as its positional table has, or 0."""
        table = f"blk.{il}.attn_compress_ape"
        if table not in self._dims:
            for name in self._dims:
                if name.startswith((f"blk.{il}.attn_compress_", f"blk.{il}.indexer.")):
                    raise self._absent(table, f"the table that belongs to '{name}'")
            return 0
        ratio = self.source(table, key)[1]
        if ratio not in RATIOS or ratio == 0:
            raise self.misfit(table, key, "ne1 = 4 or 128")
        return ratio

    def hash_layers(self, n_layer: int) -> int:
        """Return how many layers route by token id: a run from layer 0."""
        tables = [f"blk.{il}.ffn_gate_tid2eid" in self._dims for il in range(n_layer)]
        run = tables.index(False) if False in tables else n_layer
        if any(tables[run:]):
            later = run + tables[run:].index(True)
            raise self._absent(f"blk.{run}.ffn_gate_tid2eid", f"one, since layer {later} has one")
        return run

    def _absent(self, tensor: str, expected: str) -> MissingTensorError:
        return MissingTensorError(
            "a tensor that the model needs is absent",
            path=self._keys.path,
            tensor=tensor,
            found="no such tensor",
            expected=expected,
            hint="The file is incomplete: fetch or convert it again.",
        )
