"""Step 6 of the header check: every metadata key, its type and range, and how absent ones are derived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import (
    PRO,
    TINY,
    Gguf,
    Tensor,
    keys_native_lacks,
    native_v4,
    upstream_v4,
)
from refusals import refusal, verdict

from pyllama_dsv4.errors import (
    FormatError,
    MissingKeyError,
    MissingTensorError,
    PyllamaError,
    TensorShapeError,
    UnsupportedModelError,
)
from pyllama_dsv4.header import check_header, read_header
from pyllama_dsv4.tensors import HParams

P = "deepseek4."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# --- step 6: keys ---------------------------------------------------------------------------------


REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "expert_used_count",
    "attention.key_length",
    "attention.value_length",
    "attention.q_lora_rank",
    "rope.dimension_count",
    "attention.sliding_window",
    "expert_feed_forward_length",
    "expert_count",
    "expert_shared_count",
    "expert_weights_scale",
    "expert_weights_norm",
    "swiglu_clamp_exp",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
]
REQUIRED_UPSTREAM = [key.removeprefix(P) for key, _, _ in keys_native_lacks(TINY)[1:]]
TOKENIZER = ["tokenizer.ggml.model", "tokenizer.ggml.merges", "tokenizer.ggml.tokens"]


@pytest.mark.parametrize("key", [P + key for key in REQUIRED] + TOKENIZER)
def test_a_missing_key(path: Path, key: str) -> None:
    assert verdict(native_v4().drop(key).write(path)) == (MissingKeyError, None, key)


@pytest.mark.parametrize("key", REQUIRED + REQUIRED_UPSTREAM)
def test_a_missing_key_of_the_upstream_dialect(path: Path, key: str) -> None:
    """Nothing is derived there: such a file opens or fails as it does with a stock engine."""
    assert verdict(upstream_v4().drop(P + key).write(path)) == (MissingKeyError, None, P + key)


OPTIONAL = [
    ("rope.scaling.type", "str"),
    ("rope.scaling.factor", "f32"),
    ("rope.scaling.original_context_length", "u32"),
    ("rope.scaling.yarn_beta_fast", "f32"),
    ("rope.scaling.yarn_beta_slow", "f32"),
    ("rope.freq_base", "f32"),
    ("general.file_type", "u32"),
    ("tokenizer.chat_template", "str"),
    ("vocab_size", "u32"),
    ("rope.freq_base_swa", "f32"),
    ("swiglu_clamp_shexp", "f32"),
    ("embedding_length_out", "u32"),
    ("nextn_predict_layers", "u32"),
    ("attention.causal", "bool"),
    ("attention.key_length_swa", "u32"),
    ("attention.value_length_swa", "u32"),
    ("rope.dimension_count_swa", "u32"),
    ("expert_group_count", "u32"),
    ("pooling_type", "u32"),
]


@pytest.mark.parametrize(
    "key",
    [*REQUIRED, *REQUIRED_UPSTREAM, *(key for key, _ in OPTIONAL), *TOKENIZER, "tokenizer.ggml.token_type"],
)
def test_a_key_of_the_wrong_type(path: Path, key: str) -> None:
    full = key if key.startswith(("general.", "tokenizer.")) else P + key
    assert verdict(upstream_v4().set(full, "i16", 1).write(path)) == (MissingKeyError, None, full)
    assert verdict(native_v4().set(full, "arr[i16]", [1] * 6).write(path)) == (MissingKeyError, None, full)


@pytest.mark.parametrize(
    ("key", "type_", "value"),
    [
        ("block_count", "u32", 0),
        ("block_count", "u32", 513),
        ("context_length", "u32", 0),
        ("embedding_length", "u32", 0),
        ("embedding_length", "u32", 2**31),
        ("attention.head_count", "u32", 0),
        ("attention.head_count", "arr[u32]", [4] * 5),
        ("attention.head_count", "arr[u32]", [4] * 5 + [5]),
        ("attention.head_count", "arr[i32]", [-4] * 6),
        ("attention.head_count_kv", "u32", 2),
        ("rope.scaling.type", "str", "YaRN"),
        ("rope.scaling.factor", "f32", -1.0),
        ("rope.scaling.factor", "f32", float("inf")),
        ("rope.scaling.yarn_beta_fast", "f32", float("nan")),
        ("rope.scaling.yarn_beta_slow", "f32", float("nan")),
        ("rope.freq_base", "f32", 0.0),
        ("attention.layer_norm_rms_epsilon", "f32", -1e-6),
        ("expert_used_count", "u32", 0),
        ("attention.key_length", "u32", 0),
        ("attention.value_length", "u32", 64),
        ("attention.q_lora_rank", "u32", 0),
        ("rope.dimension_count", "u32", 0),
        ("rope.dimension_count", "u32", 63),
        ("rope.dimension_count", "u32", 130),
        ("attention.sliding_window", "u32", 0),
        ("rope.freq_base_swa", "f32", -1.0),
        ("expert_feed_forward_length", "u32", 0),
        ("expert_count", "u32", 2),
        ("expert_count", "u32", 1025),
        ("expert_shared_count", "u32", 0),
        ("expert_weights_scale", "f32", float("inf")),
        ("swiglu_clamp_exp", "f32", float("nan")),
        ("swiglu_clamp_exp", "arr[f32]", [3.0] * 5),
        ("swiglu_clamp_exp", "arr[f32]", [3.0] * 5 + [float("inf")]),
        ("swiglu_clamp_shexp", "arr[f32]", [3.0] * 7),
        ("attention.indexer.head_count", "u32", 0),
        ("attention.indexer.key_length", "u32", 63),
        ("attention.indexer.top_k", "u32", 0),
        ("attention.output_group_count", "u32", 0),
        ("attention.output_group_count", "u32", 3),
        ("attention.output_group_count", "u32", 8),
        ("attention.output_lora_rank", "u32", 0),
        ("attention.compress_rope_freq_base", "f32", 0.0),
        ("attention.compress_ratios", "arr[i32]", [0, 0, 4, 128, 4]),
        ("attention.compress_ratios", "arr[i32]", [0] * 513),
        ("attention.compress_ratios", "arr[i32]", [0, 0, 4, 128, 4, 64]),
        ("attention.compress_ratios", "arr[u32]", [1, 0, 4, 128, 4, 128]),
        ("hyper_connection.count", "u32", 2),
        ("hyper_connection.sinkhorn_iterations", "u32", 0),
        ("hyper_connection.sinkhorn_iterations", "u32", 65),
        ("hyper_connection.epsilon", "f32", -1.0),
        ("hash_layer_count", "u32", 7),
        ("expert_gating_func", "u32", 2),
        ("nextn_predict_layers", "u32", 7),
        ("attention.causal", "bool", False),
        ("attention.key_length_swa", "u32", 64),
        ("attention.value_length_swa", "u32", 64),
        ("rope.dimension_count_swa", "u32", 32),
        ("expert_group_count", "u32", 2),
        ("pooling_type", "u32", 1),
        ("tokenizer.ggml.tokens", "arr[str]", []),
        ("tokenizer.ggml.tokens", "arr[str]", ["a", "b", "a"]),
        ("tokenizer.ggml.tokens", "arr[str]", ["a\0b", "a"]),
        ("tokenizer.ggml.tokens", "arr[str]", ["[EMPTY_1]", ""]),
        ("tokenizer.ggml.scores", "arr[f32]", [0.0] * 319),
        ("tokenizer.ggml.token_type", "arr[i32]", [1] * 319),
        ("tokenizer.ggml.bos_token_id", "u32", 320),
        ("tokenizer.ggml.padding_token_id", "u32", 2**32 - 1),
    ],
)
def test_a_value_the_engine_cannot_run(path: Path, key: str, type_: str, value: Any) -> None:
    full = key if key.startswith("tokenizer.") else P + key
    error = refusal(upstream_v4().set(full, type_, value).write(path))
    assert (type(error), error.key, error.tensor) == (FormatError, full, None)
    assert error.found is not None
    assert error.expected is not None


def test_range_edges_are_inside(path: Path) -> None:
    model = upstream_v4()
    for key, type_, value in (
        ("attention.compress_ratios", "arr[u32]", [0, 0, 4, 128, 4, 128] + [7] * 506),
        ("hyper_connection.sinkhorn_iterations", "u32", 64),
        ("hyper_connection.epsilon", "f32", 0.0),
        ("pooling_type", "u32", 2**32 - 1),
        ("attention.layer_norm_rms_epsilon", "f32", 0.0),
        ("rope.scaling.factor", "f32", 0.0),
        ("rope.scaling.type", "str", "none"),
        ("rope.dimension_count", "u32", 128),
        ("expert_group_count", "u32", 1),
        ("nextn_predict_layers", "u32", 6),
        ("swiglu_clamp_shexp", "f32", 3.0),
        ("attention.causal", "bool", True),
    ):
        model.set(P + key, type_, value)
    model.set("tokenizer.ggml.scores", "arr[f32]", [0.0] * 320)
    check_header(model.write(path))


def test_one_expert_forms_no_group(path: Path) -> None:
    model = native_v4(replace(TINY, n_expert=1, n_expert_used=1)).set(P + "expert_group_count", "u32", 0)
    assert check_header(model.write(path)).hparams is not None
    model.set(P + "expert_group_count", "u32", 1)
    assert verdict(model.write(path)) == (FormatError, None, P + "expert_group_count")


def test_an_upstream_file_without_rope_scaling_opens_as_ever(path: Path) -> None:
    model = upstream_v4()
    model.drop(*(key for key, _, _ in model.keys if ".rope.scaling." in key))
    report = check_header(model.write(path))
    assert report.derived_keys == {}
    assert report.hparams is not None
    assert (report.hparams.yarn_factor, report.hparams.yarn_n_ctx_orig) == (1.0, TINY.n_ctx_train)


def test_none_vocabulary_needs_its_size(path: Path) -> None:
    model = native_v4(n_tokens=None)
    check_header(model.set("tokenizer.ggml.model", "str", "no_vocab").write(path))
    assert verdict(model.drop(P + "vocab_size").write(path)) == (MissingKeyError, None, P + "vocab_size")
    model.set(P + "vocab_size", "u32", 0)
    assert verdict(model.write(path)) == (FormatError, None, P + "vocab_size")


@pytest.mark.parametrize("model", ["llama", "bert", "t5", ""])
def test_another_vocabulary(path: Path, model: str) -> None:
    key = "tokenizer.ggml.model"
    assert verdict(native_v4().set(key, "str", model).write(path)) == (UnsupportedModelError, None, key)


def test_prediction_layers(path: Path) -> None:
    model = native_v4().set(P + "nextn_predict_layers", "u32", 1)
    check_header(model.write(path))  # declared, but not there
    model.tensors.append(Tensor("blk.5.nextn.eh_proj.weight", (512, 256), 30))
    model.remove("output.weight")  # a later step would name another tensor
    assert verdict(model.write(path)) == (UnsupportedModelError, "blk.5.nextn.eh_proj.weight", None)


# --- step 6: derivation ---------------------------------------------------------------------------


WO_A = "blk.0.attn_output_a.weight"


@pytest.mark.parametrize(
    ("change", "class_", "tensor"),
    [
        (lambda m: m.remove(WO_A), MissingTensorError, WO_A),
        (lambda m: m.remove("hc_head_base"), MissingTensorError, "hc_head_base"),
        (lambda m: m.change("hc_head_base", dims=(8,)), TensorShapeError, "hc_head_base"),
        (lambda m: m.change(WO_A, dims=(384, 256)), TensorShapeError, WO_A),
        (lambda m: m.change(WO_A, dims=(256, 255)), TensorShapeError, WO_A),
        (lambda m: m.change(WO_A, dims=(64, 1024), kind=30), TensorShapeError, WO_A),  # 8 groups of 4 heads
        (lambda m: m.change("blk.3.attn_compress_ape", dims=(128, 64)), TensorShapeError, "blk.3.attn_compress_ape"),
        (lambda m: m.change("blk.3.attn_compress_ape", dims=(0, 0)), TensorShapeError, "blk.3.attn_compress_ape"),
        (lambda m: m.remove("blk.3.attn_compress_ape"), MissingTensorError, "blk.3.attn_compress_ape"),
        (lambda m: m.remove("blk.1.ffn_gate_tid2eid"), MissingTensorError, "blk.1.ffn_gate_tid2eid"),
        (lambda m: m.remove("blk.2.ffn_gate_tid2eid"), MissingTensorError, "blk.2.exp_probs_b"),
    ],
)  # fmt: skip
def test_sources_of_derived_keys(
    path: Path, change: Callable[[Gguf], None], class_: type[PyllamaError], tensor: str
) -> None:
    model = native_v4()
    change(model)
    error = refusal(model.write(path))
    assert (type(error), error.tensor, error.key) == (class_, tensor, None)
    if class_ is TensorShapeError:
        assert "cannot derive" in str(error)


def test_a_model_without_hash_or_compressed_layers(path: Path) -> None:
    hp = replace(TINY, n_hash_layer=0, compress_ratios=(0,) * 6)
    report = check_header(native_v4(hp).write(path))
    assert report.derived_keys[P + "hash_layer_count"] == 0
    assert report.derived_keys[P + "attention.compress_ratios"] == [0] * 6


def test_hparams_from_metadata(path: Path) -> None:
    header = read_header(native_v4(PRO, n_tokens=None).write(path))
    hp = HParams.from_metadata(header.kv, header.dims)
    assert hp == replace(PRO, rms_eps=np.float32(1e-6).item())
