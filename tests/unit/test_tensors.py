"""The tensor table against the inventory of the published file, and the reading of hub configurations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import FLASH, FLASH_FILE_BYTES, PRO, TINY, padded

from pyllama_dsv4.errors import CheckpointError
from pyllama_dsv4.tensors import (
    HParams,
    native_to_upstream,
    tensor_table,
    upstream_to_native,
)

INVENTORY = Path(__file__).parents[1] / "data" / "flash-tensors.tsv"


def inventory() -> dict[str, tuple[str, str, str, str]]:
    """Return native name -> (upstream name, dims, type, checkpoint names) of the published file."""
    tensors = {}
    for line in INVENTORY.read_text().splitlines():
        if line.startswith("#"):
            continue
        native, upstream, first, last, step, dims, type_, hf = line.split("\t")
        layers = range(int(first), int(last) + 1, int(step)) if first else [None]
        for layer in layers:

            def at(name: str, layer: int | None = layer) -> str:
                return name.replace("blk.N.", f"blk.{layer}.").replace("layers.N.", f"layers.{layer}.")

            tensors[at(native)] = (at(upstream), dims, type_, at(hf))
    return tensors


def test_flash_table_equals_the_published_files_inventory() -> None:
    ours = {
        spec.native: (
            spec.upstream,
            "x".join(map(str, spec.dims)),
            spec.file_type.name,
            "+".join(spec.hf).replace("{e}", "E"),
        )
        for spec in tensor_table(FLASH)
    }
    assert ours == inventory()


def test_flash_counts_and_bytes() -> None:
    table = tensor_table(FLASH)
    assert len(table) == 1328
    assert Counter(spec.kind for spec in table) == {
        "f32": 684,
        "i32": 3,
        "bf16": 147,
        "mxfp4": 129,
        "f8": 365,
    }
    n_bytes = Counter[str]()
    for spec in table:
        n_bytes[spec.kind] += spec.n_bytes
    assert n_bytes == {
        "mxfp4": 147_169_738_752,
        "f8": 5_903_106_048,
        "bf16": 2_737_307_648,
        "f32": 323_402_076,
        "i32": 9_308_160,
    }
    assert sum(n_bytes.values()) == 156_142_862_684
    assert sum(padded(spec.n_bytes) - spec.n_bytes for spec in table) == 1764
    assert FLASH_FILE_BYTES - sum(padded(spec.n_bytes) for spec in table) == 5_325_312


def test_flash_order_gives_the_published_offsets() -> None:
    # the offset at which a stock parser gives up on the published file, and the last tensor
    offset = 0
    offsets = {}
    for spec in tensor_table(FLASH):
        offsets[spec.native] = offset
        offset += padded(spec.n_bytes)
    assert offsets["blk.0.attn_output_a.weight"] == 1_061_181_696
    assert next(reversed(offsets)) == "output_norm.weight"
    layer0 = [name.removeprefix("blk.0.") for name in offsets if name.startswith("blk.0.")]
    assert layer0 == [
        "attn_sinks",
        "attn_kv_a_norm.weight",
        "attn_q_a_norm.weight",
        "attn_kv_latent.weight",
        "attn_output_a.weight",
        "attn_output_b.weight",
        "attn_q_a.weight",
        "attn_q_b.weight",
        "attn_norm.weight",
        "ffn_down_exps.weight",
        "ffn_gate_exps.weight",
        "ffn_up_exps.weight",
        "ffn_gate_tid2eid",
        "ffn_gate_inp.weight",
        "ffn_gate_shexp.weight",
        "ffn_down_shexp.weight",
        "ffn_up_shexp.weight",
        "ffn_norm.weight",
        "hc_attn_base",
        "hc_attn_fn",
        "hc_attn_scale",
        "hc_ffn_base",
        "hc_ffn_fn",
        "hc_ffn_scale",
    ]
    layer4 = [name.removeprefix("blk.4.") for name in offsets if name.startswith("blk.4.")]
    assert layer4[1:11] == [
        "attn_compress_ape",
        "attn_compress_norm.weight",
        "attn_compress_gate.weight",
        "attn_compress_kv.weight",
        "indexer.compress_ape",
        "indexer.compress_norm.weight",
        "indexer.compress_gate.weight",
        "indexer.compress_kv.weight",
        "indexer.proj.weight",
        "indexer.attn_q_b.weight",
    ]


def test_pro_counts() -> None:
    # 61 layers: 30 of ratio 4 (even from 2), 31 of ratio 128 (0, 1 and odd from 3), none without compression
    assert Counter(spec.kind for spec in tensor_table(PRO)) == {
        "f32": 61 * 12 + 58 + 61 * 2 + 30 * 2 + 4,
        "i32": 3,
        "bf16": 2 + 61 * 2 + 30 * 3,
        "mxfp4": 61 * 3,
        "f8": 61 * 8 + 30,
    }


def test_expert_stacks_are_named_by_template() -> None:
    stacks = [spec for spec in tensor_table(TINY) if spec.is_expert_stack]
    assert len(stacks) == 3 * TINY.n_layer
    assert {spec.kind for spec in stacks} == {"mxfp4"}
    assert stacks[0].hf == ("layers.0.ffn.experts.{e}.w2.weight", "layers.0.ffn.experts.{e}.w2.scale")
    assert all(spec.dims[2] == TINY.n_expert for spec in stacks)


def test_shared_experts_stand_side_by_side() -> None:
    by_name = {spec.native: spec.dims for spec in tensor_table(replace(TINY, n_expert_shared=2))}
    assert by_name["blk.0.ffn_gate_shexp.weight"] == (256, 2 * 128)
    assert by_name["blk.0.ffn_down_shexp.weight"] == (2 * 128, 256)


def test_names_are_a_bijection() -> None:
    table = tensor_table(FLASH)
    assert len({spec.native for spec in table}) == len({spec.upstream for spec in table}) == len(table)
    for spec in table:
        assert native_to_upstream(spec.native) == spec.upstream
        assert upstream_to_native(spec.upstream) == spec.native


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blk.0.attn_output_a.weight",
        "blk.0.indexer.proj.weight",
        "blk.attn_sinks",
        "blk..attn_sinks",
        "blk.x.attn_sinks",
        "blk.0.attn_sinks.weight.weight",
        "attn_sinks",
        "xblk.0.attn_sinks",
        "blk.0.hc_head_fn",
        "blk.\u0661.attn_sinks",
    ],
)
def test_other_names_are_left_alone(name: str) -> None:
    assert native_to_upstream(name) == name
    assert upstream_to_native(name) == name


# --- config.json ----------------------------------------------------------------------------------


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "sliding_window": 128,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 16,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "num_hash_layers": 3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 3.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1048576,
        "vocab_size": 320,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
    }
    return values | changes


def test_config_is_read() -> None:
    assert HParams.from_hf_config(config()) == replace(TINY, compress_ratios=(0, 0, 4, 128, 4, 128, 0))


def test_yarn_betas_have_defaults() -> None:
    hp = HParams.from_hf_config(
        config(rope_scaling={"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 4096})
    )
    assert (hp.yarn_factor, hp.yarn_n_ctx_orig, hp.yarn_beta_fast, hp.yarn_beta_slow) == (
        8.0,
        4096,
        32.0,
        1.0,
    )


@pytest.mark.parametrize("key", sorted(set(config()) - {"scoring_func", "norm_topk_prob"}))
def test_a_missing_key_is_named(key: str) -> None:
    values = config()
    del values[key]
    with pytest.raises(CheckpointError) as error:
        HParams.from_hf_config(values, path="somewhere/config.json")
    assert error.value.key == key
    assert error.value.path == "somewhere/config.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "6"),
        ("num_hidden_layers", 6.0),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_hash_layers", -1),
        ("num_hash_layers", 7),
        ("num_experts_per_tok", 9),
        ("qk_rope_head_dim", 128),
        ("o_groups", 3),
        ("routed_scaling_factor", 0),
        ("hc_eps", float("nan")),
        ("hc_eps", float("inf")),
        ("rope_theta", "1e4"),
        ("compress_ratios", [0, 0, 4, 128, 4]),
        ("compress_ratios", [0, 0, 4, 128, 4, 64]),
        ("compress_ratios", [0, 0, 4, 128, 4, 4.0]),
        ("compress_ratios", [False, 0, 4, 128, 4, 128]),
        ("compress_ratios", "0,4"),
        ("rope_scaling", None),
        ("rope_scaling", {"type": "linear", "factor": 16}),
        ("scoring_func", "sigmoid"),
        ("norm_topk_prob", False),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as error:
        HParams.from_hf_config(config(**{key: value}))
    assert error.value.key == key
    assert error.value.found is not None
    assert error.value.expected is not None


def test_a_wrong_yarn_value_is_named_with_its_group() -> None:
    with pytest.raises(CheckpointError) as error:
        HParams.from_hf_config(config(rope_scaling={"type": "yarn", "factor": 16}))
    assert error.value.key == "rope_scaling.original_max_position_embeddings"
