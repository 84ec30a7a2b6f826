"""Draft models for speculative decoding: MTP of the preview, DSpark of 0731, each in the form that upstream loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import ConvertResult, convert
from pyllama_dsv4.convert.draft import make_draft_plan
from pyllama_dsv4.convert.metadata import GENERATION_KEY
from pyllama_dsv4.convert.plan import make_plan
from pyllama_dsv4.errors import CheckpointError, TileShapeError, UnsupportedModelError
from pyllama_dsv4.header import check_header, read_header
from pyllama_dsv4.tensors import HParams

codec = pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

Tensors = dict[str, tuple[str, np.ndarray]]


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "Tiny-V4"
    return synth.write_checkpoint(folder, seed=3, tokenizer="bytes", draft="mtp")


@pytest.fixture(scope="module")
def dspark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dspark") / "Tiny-V4"
    return synth.write_checkpoint(folder, seed=3, tokenizer="bytes", draft="dspark")


def draft_of(folder: Path, path: Path) -> tuple[ConvertResult, dict[str, Any], dict[str, np.ndarray]]:
    """Convert; return the result, the keys and the tensors' bytes."""
    result = convert(folder, path, draft=True)
    header = read_header(path)
    data = {}
    with open(path, "rb") as f:
        for t in header.tensors:
            f.seek(t.start)
            data[t.name] = np.frombuffer(f.read(t.n_bytes), np.uint8)
    return result, {key: entry.value for key, entry in header.kv.items()}, data


def packed(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return codec.f8_e4m3_b128_pack(checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.scale"))


def widened(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = checkpoint.read(name)
    if values.dtype == np.uint16:
        values = values.astype(np.uint32) << 16
    return values.reshape(-1).view(np.uint8)


# Source: upstream conversion/deepseek.py and src/models/deepseek4.cpp, dflash.cpp:load_arch_tensors
BLOCK = [
    "attn_sinks.weight",
    "attn_kv_a_norm.weight",
    "attn_q_a_norm.weight",
    "attn_kv.weight",
    "attn_output_a.weight",
    "attn_output_b.weight",
    "attn_q_a.weight",
    "attn_q_b.weight",
    "attn_norm.weight",
    "ffn_down_exps.weight",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "exp_probs_b.bias",
    "ffn_gate_inp.weight",
    "ffn_gate_shexp.weight",
    "ffn_down_shexp.weight",
    "ffn_up_shexp.weight",
    "ffn_norm.weight",
    "hc_attn_base.weight",
    "hc_attn_fn.weight",
    "hc_attn_scale.weight",
    "hc_ffn_base.weight",
    "hc_ffn_fn.weight",
    "hc_ffn_scale.weight",
]
HEAD = ["output_hc_base.weight", "output_hc_fn.weight", "output_hc_scale.weight"]


def test_mtp(mtp: Path, tmp_path: Path) -> None:
    result, keys, data = draft_of(mtp, tmp_path / "d.gguf")
    nextn = [f"blk.6.nextn.{n}.weight" for n in ("eh_proj", "enorm", "hnorm", "shared_head_norm")]
    assert list(data) == [
        "token_embd.weight",
        *(f"blk.6.{name}" for name in BLOCK),
        *nextn,
        *HEAD,
        "output.weight",
        "output_norm.weight",
    ]
    assert keys["general.architecture"] == "deepseek4"
    assert keys["general.name"] == "Tiny V4 MTP"
    assert keys["deepseek4.block_count"] == 7
    assert keys["deepseek4.nextn_predict_layers"] == 1
    assert list(keys["deepseek4.attention.compress_ratios"]) == [0, 0, 4, 128, 4, 128, 0]
    assert list(keys["deepseek4.swiglu_clamp_exp"]) == [3.0] * 7
    assert keys["deepseek4.hash_layer_count"] == 3
    assert keys["general.file_type"] == 41
    assert "deepseek4.rope.freq_base_swa" not in keys
    assert GENERATION_KEY not in keys
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert result.n_bytes == (tmp_path / "d.gguf").stat().st_size
    assert any("--spec-type draft-mtp" in note for note in result.notes)
    with Checkpoint(mtp) as c:
        # every row of e_proj is followed by the same row of h_proj: one product with both inputs
        both = np.concatenate([packed(c, "mtp.0.e_proj"), packed(c, "mtp.0.h_proj")], axis=1)
        assert read_header(tmp_path / "d.gguf").dims["blk.6.nextn.eh_proj.weight"] == (512, 256)
        np.testing.assert_array_equal(data["blk.6.nextn.eh_proj.weight"], both.reshape(-1))
        np.testing.assert_array_equal(data["blk.6.attn_kv.weight"], packed(c, "mtp.0.attn.wkv").reshape(-1))
        w1 = codec.mxfp4_pack(
            c.read("mtp.0.ffn.experts.7.w1.weight").view(np.uint8), c.read("mtp.0.ffn.experts.7.w1.scale")
        )
        np.testing.assert_array_equal(data["blk.6.ffn_gate_exps.weight"][-w1.size :], w1.reshape(-1))
        for name, source in {
            "blk.6.nextn.shared_head_norm.weight": "mtp.0.norm.weight",
            "blk.6.nextn.enorm.weight": "mtp.0.enorm.weight",
            "blk.6.nextn.hnorm.weight": "mtp.0.hnorm.weight",
            "output_norm.weight": "norm.weight",
            "output_hc_fn.weight": "mtp.0.hc_head_fn",
            "blk.6.exp_probs_b.bias": "mtp.0.ffn.gate.bias",
        }.items():
            np.testing.assert_array_equal(data[name], widened(c, source), err_msg=name)
        np.testing.assert_array_equal(data["output.weight"].view("<u2"), c.read("head.weight").reshape(-1))


def test_dspark(dspark: Path, tmp_path: Path) -> None:
    result, keys, data = draft_of(dspark, tmp_path / "d.gguf")
    assert list(data) == [
        *(f"blk.{i}.{name}" for i in range(3) for name in BLOCK),
        "fc.weight",
        "enc.output_norm.weight",
        "markov_w1.weight",
        "markov_w2.weight",
        "conf_proj.weight",
        *HEAD,
        "output_norm.weight",
    ]
    assert keys["general.architecture"] == "dflash"
    assert not [key for key in keys if key.startswith("deepseek4.")]
    assert keys["dflash.block_count"] == 3
    assert list(keys["dflash.attention.compress_ratios"]) == [0, 0, 0]
    assert keys["dflash.hash_layer_count"] == 0
    assert keys["dflash.block_size"] == 5
    assert list(keys["dflash.target_layers"]) == [
        4,
        5,
        6,
    ]  # one more than in the checkpoint: the embedding is 0
    assert keys["tokenizer.ggml.mask_token_id"] == 511
    assert keys[GENERATION_KEY] == "0731"
    assert any("--spec-type draft-dspark" in note for note in result.notes)
    header = read_header(tmp_path / "d.gguf")
    assert header.dims["fc.weight"] == (3 * 256, 256)
    assert header.dims["markov_w1.weight"] == header.dims["markov_w2.weight"] == (256, 512)
    assert header.dims["conf_proj.weight"] == (512,)
    with Checkpoint(dspark) as c:
        np.testing.assert_array_equal(data["fc.weight"], packed(c, "mtp.0.main_proj").reshape(-1))
        np.testing.assert_array_equal(data["blk.2.attn_q_b.weight"], packed(c, "mtp.2.attn.wq_b").reshape(-1))
        np.testing.assert_array_equal(
            data["markov_w2.weight"].view("<u2"), c.read("mtp.2.markov_head.markov_w2.weight").reshape(-1)
        )
        np.testing.assert_array_equal(data["output_norm.weight"], widened(c, "mtp.2.norm.weight"))
        np.testing.assert_array_equal(data["enc.output_norm.weight"], widened(c, "mtp.0.main_norm.weight"))


def test_dspark_without_fp8_in_its_own_matrices(dspark: Path, changed: Any, tmp_path: Path) -> None:
    """The matrices that are not a block's keep whichever type they have."""

    def change(t: Tensors) -> None:
        t.pop("mtp.0.main_proj.scale")
        t["mtp.0.main_proj.weight"] = ("BF16", np.arange(256 * 768, dtype=np.uint16).reshape(256, 768))
        for name in ("markov_head.markov_w1", "confidence_head.proj"):
            bits = t[f"mtp.2.{name}.weight"][1].astype(np.uint32) << 16
            t[f"mtp.2.{name}.weight"] = ("F32", bits.view(np.float32) + np.float32(1e-7))

    folder = changed(dspark, change)
    _, _, data = draft_of(folder, tmp_path / "d.gguf")
    types = {t.name: t.type.name for t in read_header(tmp_path / "d.gguf").tensors}
    assert (types["fc.weight"], types["markov_w1.weight"], types["markov_w2.weight"]) == (
        "BF16",
        "F32",
        "BF16",
    )
    with Checkpoint(folder) as c:
        np.testing.assert_array_equal(
            data["fc.weight"], c.read("mtp.0.main_proj.weight").reshape(-1).view("u1")
        )
        for name, source in (("markov_w1", "markov_head.markov_w1"), ("conf_proj", "confidence_head.proj")):
            np.testing.assert_array_equal(data[f"{name}.weight"], widened(c, f"mtp.2.{source}.weight"))


def test_our_loader_names_what_it_does_not_run(mtp: Path, dspark: Path, tmp_path: Path) -> None:
    for folder, message in ((mtp, "multi-token prediction"), (dspark, "dflash")):
        path = convert(folder, tmp_path / "d.gguf", draft=True).path
        with pytest.raises(UnsupportedModelError, match=message):
            check_header(path)


@pytest.mark.parametrize(
    ("config", "draft", "n_left_out", "n_bytes_left_out"),
    [
        # the preview's as counted in the release
        (synth.flash_config(), "mtp", 1575, 3_593_787_756),
        (synth.flash_config(), "dspark", None, None),
        pytest.param(synth.pro_config(), "mtp", None, None, marks=pytest.mark.slow),
    ],
    ids=["flash", "flash-0731", "pro"],
)
def test_true_dimensions(
    tmp_path: Path, config: dict[str, Any], draft: synth.Draft, n_left_out: int | None, n_bytes_left_out: int
) -> None:
    """Headers only: model and draft file of the released sizes."""
    folder = synth.write_checkpoint(tmp_path / "c", config, seed=0, is_sparse=True, n_shards=46, draft=draft)
    with Checkpoint(folder) as c:
        plan = make_plan(c)
        draft_plan = make_draft_plan(c)
    assert plan.generation == draft_plan.generation == ("0731" if draft == "dspark" else "preview")
    if n_left_out is not None:
        assert len(plan.skipped) == n_left_out
        assert sum(t.n_bytes for t in plan.skipped) == n_bytes_left_out
        assert any("left out 1575 MTP tensors (mtp.*, 3,593,787,756 bytes)" in note for note in plan.notes)
    if draft == "mtp":
        hp = plan.hparams
        # what upstream's loader wants; e_proj and h_proj are one, embedding, head and norm the trunk's
        assert len(draft_plan.specs) == len(BLOCK) + 4 + 3 + 3
        assert draft_plan.n_bytes_payload > 2 * 2 * hp.n_vocab * hp.n_embd
    else:
        assert len(draft_plan.specs) == 3 * len(BLOCK) + 5 + 3 + 1
    types = {spec.file_type.name for spec in draft_plan.specs}
    assert types == {"F32", "BF16", "F8_E4M3_B128", "MXFP4"}


@pytest.mark.slow
def test_pro_dimensions(tmp_path: Path) -> None:
    """The model's header at V4-Pro's size (spec section 8)."""
    folder = synth.write_checkpoint(tmp_path / "c", synth.pro_config(), seed=0, is_sparse=True)
    result = convert(folder, tmp_path / "pro.gguf", dry_run=True)
    keys = {entry.key: entry.value for entry in result.plan.metadata}
    assert keys["deepseek4.block_count"] == 61
    assert keys["deepseek4.embedding_length"] == 7168
    assert keys["deepseek4.attention.indexer.top_k"] == 1024
    assert keys["deepseek4.expert_weights_scale"] == 2.5
    # layers 0 and 1 are compressed too, unlike Flash's
    assert tuple(keys["deepseek4.attention.compress_ratios"][:4]) == (128, 128, 4, 128)  # type: ignore[index]
    hp = HParams.from_hf_config(synth.pro_config())
    assert result.n_tensors == len(result.plan.specs)
    by_type = result.n_tensors_by_type
    n_indexed = sum(ratio == 4 for ratio in hp.compress_ratios[:61])
    assert by_type == {
        "MXFP4": 61 * 3,
        "F8_E4M3_B128": 61 * 8 + n_indexed,
        "BF16": 2 + 61 * 2 + n_indexed * 3,
        "I32": 3,
        "F32": 61 * 12 + 58 + 61 * 2 + n_indexed * 2 + 4,
    }


# --- refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Copy a checkpoint with its tensors or its configuration changed."""

    def make(folder: Path, change: Callable[[Tensors], object] | None = None, **config: object) -> Path:
        target = tmp_path / "changed"
        shutil.copytree(folder, target)
        if change is not None:
            with Checkpoint(folder) as c:
                tensors = {n: (t.dtype, c.read(n)) for n, t in c.tensors.items()}
            change(tensors)
            synth.write_safetensors(target / "model.safetensors", tensors)
        with Checkpoint(folder) as c:
            new = {k: v for k, v in (c.config | config).items() if v is not ...}
        synth.tokenizers.write_json(target / "config.json", new)
        return target

    return make


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({new: t.pop(old)})


def put(name: str, dtype: str, array: np.ndarray) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: (dtype, array)})


REFUSALS: dict[str, tuple[str, Callable[[Tensors], object], type[Exception], str, str]] = {
    # which checkpoint, change, error, tensor, part of the message
    "second block": (
        "mtp",
        rename("mtp.0.enorm.weight", "mtp.1.enorm.weight"),
        CheckpointError,
        "",
        "2 prediction blocks, expected 1",
    ),
    "no enorm": (
        "mtp",
        lambda t: t.pop("mtp.0.enorm.weight"),
        CheckpointError,
        "mtp.0.enorm.weight",
        "lacks",
    ),
    "no scale": (
        "mtp",
        lambda t: t.pop("mtp.0.h_proj.scale"),
        CheckpointError,
        "mtp.0.h_proj.weight",
        "no scale",
    ),
    "other tiles": (
        "mtp",
        put("mtp.0.e_proj.scale", "F8_E8M0", np.zeros((8, 8), np.uint8)),
        TileShapeError,
        "mtp.0.e_proj.scale",
        "128x128",
    ),
    "BF16 projection": (
        "mtp",
        put("mtp.0.e_proj.weight", "BF16", np.zeros((256, 256), np.uint16)),
        CheckpointError,
        "mtp.0.e_proj.weight",
        "found BF16, expected F8_E4M3",
    ),
    "unknown tensor": (
        "mtp",
        put("mtp.0.new.weight", "F32", np.zeros(3, np.float32)),
        CheckpointError,
        "mtp.0.new.weight",
        "not known",
    ),
    "no number": (
        "mtp",
        put("mtp.x.weight", "F32", np.zeros(3, np.float32)),
        CheckpointError,
        "mtp.x.weight",
        "not known",
    ),
    "missing stage": (
        "dspark",
        lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.1.ffn.gate.bias")],
        CheckpointError,
        "mtp.1.ffn.gate.bias",
        "lacks",
    ),
    "no Markov head": (
        "dspark",
        lambda t: t.pop("mtp.2.markov_head.markov_w2.weight"),
        CheckpointError,
        "mtp.2.markov_head.markov_w2.weight",
        "lacks",
    ),
    "hash routing": (
        "dspark",
        put("mtp.0.ffn.gate.tid2eid", "I64", np.zeros((512, 3), np.int64)),
        CheckpointError,
        "mtp.0.ffn.gate.tid2eid",
        "not known",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(mtp: Path, dspark: Path, changed: Any, tmp_path: Path, case: str) -> None:
    which, change, error, tensor, message = REFUSALS[case]
    folder = changed(mtp if which == "mtp" else dspark, change)
    with pytest.raises(error, match=message) as caught:
        convert(folder, tmp_path / "d.gguf", draft=True)
    assert (caught.value.tensor or "") == tensor  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("d.gguf*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dspark_block_size", ...),
        ("dspark_block_size", 0),
        ("dspark_block_size", True),
        ("dspark_target_layer_ids", ...),
        ("dspark_target_layer_ids", []),
        ("dspark_target_layer_ids", [3, 4, 6]),
        ("dspark_target_layer_ids", ["3"]),
        ("dspark_noise_token_id", ...),
        ("dspark_noise_token_id", 512),
    ],
)
def test_dspark_configuration(dspark: Path, changed: Any, tmp_path: Path, key: str, value: object) -> None:
    folder = changed(dspark, **{key: value})
    with pytest.raises(CheckpointError, match="cannot write the draft model") as caught:
        convert(folder, tmp_path / "d.gguf", draft=True)
    assert caught.value.key == key
    assert caught.value.path == str(folder / "config.json")


def test_no_draft(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "c", seed=1, is_sparse=True)
    with pytest.raises(CheckpointError, match="has no draft model"):
        convert(folder, tmp_path / "d.gguf", draft=True)


def test_the_trunk_need_not_be_complete(mtp: Path, changed: Any, tmp_path: Path) -> None:
    """Someone who wants the draft only can do with the shards that hold it, the embedding and the head."""
    folder = changed(mtp, lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.")])
    whole = convert(mtp, tmp_path / "a.gguf", draft=True, name="x").path.read_bytes()
    assert convert(folder, tmp_path / "b.gguf", draft=True, name="x").path.read_bytes() == whole
