"""Conversion: the header, the bytes, what is refused, and what interruptions leave behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import convert, repack, template, writer
from pyllama_dsv4.convert.metadata import GENERATION_KEY
from pyllama_dsv4.convert.plan import Plan, make_plan
from pyllama_dsv4.convert.tokenizer import TokenType, read_vocabulary
from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    CheckpointError,
    ConvertError,
    DiskFullError,
    MissingScaleError,
    MissingShardError,
    ModelFileError,
    ModelNotFoundError,
    TileShapeError,
    UnsupportedModelError,
)
from pyllama_dsv4.header import check_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

Tensors = dict[str, tuple[str, np.ndarray]]
TEMPLATE = "{{ bos_token }}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a vocabulary."""
    folder = tmp_path_factory.mktemp("spoken") / "Tiny-V4"
    return synth.write_checkpoint(folder, seed=3, tokenizer="bytes", is_sparse=True)


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """Copy the tiny checkpoint with its tensors changed by a function."""

    def make(change: Callable[[Tensors], object]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny, folder)
        with Checkpoint(tiny) as checkpoint:
            tensors = {n: (t.dtype, checkpoint.read(n)) for n, t in checkpoint.tensors.items()}
        change(tensors)
        synth.write_safetensors(folder / "model.safetensors", tensors)
        return folder

    return make


def plan_of(folder: Path, **options: Any) -> Plan:
    with Checkpoint(folder) as checkpoint:
        return make_plan(checkpoint, **options)


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- keys ------------------------------------------------------------------------------------------------

# The order of the native file (spec section 4.1), then what upstream's loader needs on top.
NATIVE_KEYS = """
general.architecture str | general.type str | general.sampling.top_p f32 | general.sampling.temp f32
general.name str | general.size_label str | general.license str | deepseek4.block_count u32
deepseek4.context_length u32 | deepseek4.embedding_length u32 | deepseek4.attention.head_count u32
deepseek4.attention.head_count_kv u32 | deepseek4.rope.scaling.type str | deepseek4.rope.scaling.factor f32
deepseek4.rope.scaling.original_context_length u32 | deepseek4.rope.scaling.yarn_beta_fast f32
deepseek4.rope.scaling.yarn_beta_slow f32 | deepseek4.rope.freq_base f32
deepseek4.attention.layer_norm_rms_epsilon f32 | deepseek4.expert_used_count u32
deepseek4.attention.key_length u32 | deepseek4.attention.value_length u32 | general.file_type u32
tokenizer.chat_template str | deepseek4.vocab_size u32 | deepseek4.attention.q_lora_rank u32
deepseek4.rope.dimension_count u32 | deepseek4.attention.sliding_window u32 | deepseek4.rope.freq_base_swa f32
deepseek4.leading_dense_block_count u32 | deepseek4.expert_feed_forward_length u32 | deepseek4.expert_count u32
deepseek4.expert_shared_count u32 | deepseek4.expert_weights_scale f32 | deepseek4.expert_weights_norm bool
deepseek4.swiglu_clamp_exp f32[] | deepseek4.attention.indexer.head_count u32
deepseek4.attention.indexer.key_length u32 | deepseek4.attention.indexer.top_k u32
general.quantization_version u32
"""
UPSTREAM_KEYS = """
deepseek4.swiglu_clamp_shexp f32[] | deepseek4.attention.output_group_count u32
deepseek4.attention.output_lora_rank u32 | deepseek4.attention.compress_rope_freq_base f32
deepseek4.attention.compress_ratios i32[] | deepseek4.hyper_connection.count u32
deepseek4.hyper_connection.sinkhorn_iterations u32 | deepseek4.hyper_connection.epsilon f32
deepseek4.hash_layer_count u32 | deepseek4.expert_gating_func u32 | deepseek4.embedding_length_out u32
"""
TOKENIZER_KEYS = """
tokenizer.ggml.model str | tokenizer.ggml.pre str | tokenizer.ggml.tokens str[]
tokenizer.ggml.token_type i32[] | tokenizer.ggml.merges str[] | tokenizer.ggml.bos_token_id u32
tokenizer.ggml.eos_token_id u32 | tokenizer.ggml.padding_token_id u32 | tokenizer.ggml.add_bos_token bool
tokenizer.ggml.add_eos_token bool
"""


def lines(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", "|").split("|") if part.strip()]


def test_keys_types_and_order(spoken: Path) -> None:
    found = [f"{e.key} {e.type}" for e in plan_of(spoken, template=TEMPLATE).metadata]
    assert len(lines(NATIVE_KEYS)) + len(lines(TOKENIZER_KEYS)) == 50
    assert found == lines(NATIVE_KEYS) + lines(UPSTREAM_KEYS) + lines(TOKENIZER_KEYS)


FLASH_VALUES = {
    "general.architecture": "deepseek4",
    "general.type": "model",
    "general.name": "DeepSeek V4 Flash",
    "general.size_label": "256x8.4B",
    "general.license": "mit",
    "general.file_type": 41,
    "general.quantization_version": 2,
    "general.sampling.top_p": 1.0,
    "general.sampling.temp": 1.0,
    "deepseek4.block_count": 43,
    "deepseek4.context_length": 1048576,
    "deepseek4.embedding_length": 4096,
    "deepseek4.attention.head_count": 64,
    "deepseek4.attention.head_count_kv": 1,
    "deepseek4.rope.scaling.type": "yarn",
    "deepseek4.rope.scaling.factor": 16,
    "deepseek4.rope.scaling.original_context_length": 65536,
    "deepseek4.rope.scaling.yarn_beta_fast": 32,
    "deepseek4.rope.scaling.yarn_beta_slow": 1,
    "deepseek4.rope.freq_base": 10000,
    "deepseek4.attention.layer_norm_rms_epsilon": 1e-6,
    "deepseek4.expert_used_count": 6,
    "deepseek4.attention.key_length": 512,
    "deepseek4.attention.value_length": 512,
    "deepseek4.vocab_size": 129280,
    "deepseek4.attention.q_lora_rank": 1024,
    "deepseek4.rope.dimension_count": 64,
    "deepseek4.attention.sliding_window": 128,
    "deepseek4.rope.freq_base_swa": 160000,
    "deepseek4.leading_dense_block_count": 0,
    "deepseek4.expert_feed_forward_length": 2048,
    "deepseek4.expert_count": 256,
    "deepseek4.expert_shared_count": 1,
    "deepseek4.expert_weights_scale": 1.5,
    "deepseek4.expert_weights_norm": True,
    "deepseek4.swiglu_clamp_exp": [10.0] * 43,
    "deepseek4.swiglu_clamp_shexp": [10.0] * 43,
    "deepseek4.attention.indexer.head_count": 64,
    "deepseek4.attention.indexer.key_length": 128,
    "deepseek4.attention.indexer.top_k": 512,
    "deepseek4.attention.output_group_count": 8,
    "deepseek4.attention.output_lora_rank": 1024,
    "deepseek4.attention.compress_rope_freq_base": 160000,
    "deepseek4.attention.compress_ratios": (0, 0, *(4, 128) * 20, 4, 0),
    "deepseek4.hyper_connection.count": 4,
    "deepseek4.hyper_connection.sinkhorn_iterations": 20,
    "deepseek4.hyper_connection.epsilon": 1e-6,
    "deepseek4.hash_layer_count": 3,
    "deepseek4.expert_gating_func": 4,
    "deepseek4.embedding_length_out": 16384,
    "tokenizer.ggml.model": "none",
}


def test_flash_dimensions_dry_run(tmp_path: Path) -> None:
    """True dimensions, headers only: the numbers of the published file (spec sections 0, 4 and 5)."""
    folder = tmp_path / "DeepSeek-V4-Flash"
    synth.write_checkpoint(folder, synth.flash_config(), seed=0, is_sparse=True, n_shards=46)
    result = convert(folder, tmp_path / "flash.gguf", dry_run=True)
    assert os.listdir(tmp_path) == ["DeepSeek-V4-Flash"]
    assert result.is_dry_run
    assert result.n_tensors == 1328
    assert result.n_tensors_by_type == {
        "F32": 684, "I32": 3, "BF16": 147, "MXFP4": 129, "F8_E4M3_B128": 365,
    }  # fmt: skip
    assert result.n_bytes_payload == 156_142_862_684
    assert result.n_bytes - result.n_bytes_header == 156_142_864_448
    assert result.n_bytes_by_type == {
        "MXFP4": 147_169_738_752,
        "F8_E4M3_B128": 5_903_106_048,
        "BF16": 2_737_307_648,
        "F32": 323_402_076,
        "I32": 9_308_160,
    }
    assert {e.key: e.value for e in result.plan.metadata} == FLASH_VALUES
    # spec section 3.3: where stock readers first stumble
    by_name = {info.name: info for info in result.plan.infos}
    assert by_name["blk.0.attn_output_a.weight"].offset == 1_061_181_696
    assert result.plan.infos[0].name == "token_embd.weight"
    assert result.plan.infos[-1].name == "output_norm.weight"
    assert result.fits == (result.n_bytes <= shutil.disk_usage(tmp_path).free)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("DeepSeek-V4-Flash", "DeepSeek V4 Flash"),
        ("models--deepseek-ai--DeepSeek-V4-Flash/snapshots/60d8d707", "DeepSeek V4 Flash"),
    ],
)
def test_name_comes_from_the_folder(spoken: Path, tmp_path: Path, folder: str, name: str) -> None:
    shutil.copytree(spoken, tmp_path / folder)
    keys = {e.key: e.value for e in plan_of(tmp_path / folder, template=TEMPLATE).metadata}
    assert keys["general.name"] == name
    keys = {e.key: e.value for e in plan_of(tmp_path / folder, template=TEMPLATE, name="X").metadata}
    assert keys["general.name"] == "X"


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlibrary: x\r\nlicense: 'apache-2.0'\r\n---\r\ntext", "apache-2.0"),
        ("---\nlibrary: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n  - mit\n---\n", None),
        (None, None),
    ],
)
def test_license_comes_from_the_model_card(
    spoken: Path, tmp_path: Path, card: str | None, license_: str | None
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(spoken, folder)
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_bytes(card.encode())
    keys = {e.key: e.value for e in plan_of(folder, template=TEMPLATE).metadata}
    assert keys.get("general.license") == license_


def test_sampling_comes_from_the_generation_config(spoken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(spoken, folder)
    path = folder / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    sampling = [e for e in plan_of(folder, template=TEMPLATE).metadata if "sampling" in e.key]
    assert [(e.key, e.type, e.value) for e in sampling] == [
        ("general.sampling.top_k", "i32", 20),
        ("general.sampling.temp", "f32", 0.6),
    ]
    path.write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match="temperature") as caught:
        plan_of(folder, template=TEMPLATE)
    assert caught.value.path == str(path)
    path.unlink()
    assert not any("sampling" in e.key for e in plan_of(folder, template=TEMPLATE).metadata)


# --- chat template ---------------------------------------------------------------------------------------


class TestTemplate:
    """Upstream's template of the checkpoint's generation is written, from wherever it is installed."""

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(template.resources, "files", lambda _: tmp_path / "package")
        monkeypatch.setattr(template, "__file__", str(tmp_path / "package" / "convert" / "template.py"))
        (tmp_path / "package" / "data").mkdir(parents=True)
        return tmp_path

    def test_installed(self, package: Path) -> None:
        (package / "package" / "data" / "chat_template_v4.jinja").write_text("four", encoding="utf-8")
        (package / "package" / "data" / "chat_template_v4_0731.jinja").write_text("0731\uff5c", "utf-8")
        assert template.chat_template("preview") == "four"
        assert template.chat_template("0731") == "0731\uff5c"

    def test_source_checkout(self, package: Path) -> None:
        templates = package / "vendor" / "llama.cpp" / "models" / "templates"
        templates.mkdir(parents=True)
        (templates / "deepseek-ai-DeepSeek-V4.jinja").write_text("four")
        assert template.chat_template("preview") == "four"

    def test_nowhere(self, package: Path) -> None:
        with pytest.raises(ModelNotFoundError, match=r"chat_template_v4_0731\.jinja"):
            template.chat_template("0731")

    def test_generation(self) -> None:
        assert template.generation_of(["embed.weight", "mtp.0.e_proj.weight"]) == "preview"
        assert template.generation_of(["embed.weight", "mtp.0.main_proj.weight"]) == "0731"

    @pytest.mark.parametrize("generation", ["preview", "0731"])
    def test_written(
        self, package: Path, changed: Any, monkeypatch: pytest.MonkeyPatch, generation: str
    ) -> None:
        """DSpark tensors decide the template and leave a key; MTP tensors are skipped either way."""
        monkeypatch.setattr("pyllama_dsv4.convert.plan.chat_template", lambda g: f"template of {g}")
        name = "mtp.0.main_proj.weight" if generation == "0731" else "mtp.0.e_proj.weight"
        folder = changed(lambda t: t.update({name: ("BF16", np.zeros((2, 2), np.uint16))}))
        synth.tokenizers.write_tokenizer(folder, "bytes")
        edit_json(folder / "tokenizer.json", added_tokens=[], model=small_model(320))
        edit_json(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None)
        plan = plan_of(folder)
        keys = {e.key: e.value for e in plan.metadata}
        assert keys["tokenizer.chat_template"] == f"template of {generation}"
        assert keys.get(GENERATION_KEY) == (None if generation == "preview" else "0731")
        assert [t.name for t in plan.skipped] == [name]
        assert any("1 " in note and "mtp.*, 8 bytes" in note for note in plan.notes)


def small_model(n: int) -> dict[str, object]:
    return {"type": "BPE", "vocab": {f"t{i}": i for i in range(n)}, "merges": []}


# --- vocabulary ------------------------------------------------------------------------------------------


class TestVocabulary:
    """tokenizer.json becomes tokens, types and merges; anything the engine would treat otherwise is refused."""

    @pytest.fixture
    def folder(self, spoken: Path, tmp_path: Path) -> Path:
        shutil.copytree(spoken, tmp_path / "x")
        return tmp_path / "x"

    @staticmethod
    def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        value = json.loads((folder / "tokenizer.json").read_text())
        change(value)
        (folder / "tokenizer.json").write_text(json.dumps(value))

    @staticmethod
    def read(folder: Path, n_vocab: int = 512) -> Any:
        with Checkpoint(folder) as checkpoint:
            return read_vocabulary(checkpoint, n_vocab)

    def test_types(self, folder: Path) -> None:
        """Control: flagged special or delimited like it; user-defined: other added tokens; unused: no token."""
        added = [
            ("<\uff5cUser\uff5c>", False, TokenType.CONTROL, "<\uff5cUser\uff5c>"),
            ("<|EOT|>", False, TokenType.CONTROL, "<|EOT|>"),
            ("<think>", False, TokenType.USER_DEFINED, "<think>"),
            ("\uff5cDSML\uff5c", False, TokenType.USER_DEFINED, "\uff5cDSML\uff5c"),
            ("<\uff5c/table>\uff5c", False, TokenType.USER_DEFINED, "<\uff5c/table>\uff5c"),
            ("a\u2581b", False, TokenType.USER_DEFINED, "a b"),
            ("any", True, TokenType.CONTROL, "any"),
        ]
        entries = [{"id": 440 + i, "content": text, "special": s} for i, (text, s, _, _) in enumerate(added)]
        self.edit(folder, lambda t: t.update(added_tokens=t["added_tokens"][:3] + entries))
        vocabulary = self.read(folder)
        for i, (_, _, kind, text) in enumerate(added):
            assert (vocabulary.tokens[440 + i], vocabulary.types[440 + i]) == (text, kind)
        assert (vocabulary.tokens[0], vocabulary.types[0]) == (
            "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            TokenType.CONTROL,
        )
        assert (vocabulary.tokens[3], vocabulary.types[3]) == ("\u0100", TokenType.NORMAL)
        assert (vocabulary.tokens[511], vocabulary.types[511]) == ("[PAD511]", TokenType.UNUSED)
        assert len(vocabulary.tokens) == len(vocabulary.types) == 512
        assert vocabulary.special_ids == {"bos": 0, "eos": 1, "padding": 1}

    def test_merges_in_both_forms(self, folder: Path) -> None:
        as_text = self.read(folder).merges
        self.edit(folder, lambda t: t["model"].update(merges=[m.split(" ") for m in t["model"]["merges"]]))
        assert self.read(folder).merges == as_text
        assert "\u0120 t" in as_text

    def test_special_tokens_as_plain_text(self, folder: Path) -> None:
        edit_json(folder / "tokenizer_config.json", eos_token="<\uff5c\u2581pad\uff5c>", pad_token=...)
        with pytest.raises(CheckpointError, match="eos_token"):
            self.read(folder)
        edit_json(folder / "tokenizer_config.json", eos_token="<\uff5c\u2581pad\u2581\uff5c>")
        assert self.read(folder).special_ids == {"bos": 0, "eos": 2}

    def test_no_tokenizer_at_all(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        plan = plan_of(folder)
        keys = {e.key: e.value for e in plan.metadata}
        assert keys["tokenizer.ggml.model"] == "none"
        assert "tokenizer.chat_template" not in keys
        assert any("no tokenizer.json" in note for note in plan.notes)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_half_a_tokenizer(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(MissingShardError, match="the tokenizer is incomplete") as caught:
            self.read(folder)
        assert caught.value.path == str(folder / name)

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("model.type", lambda t: t["model"].update(type="Unigram")),
            ("model.type", lambda t: t.update(model=None)),
            ("model.vocab", lambda t: t["model"].update(vocab=["a"])),
            ("model.vocab", lambda t: t["model"]["vocab"].update(x=-1)),
            ("model.vocab", lambda t: t["model"]["vocab"].update(x=1.0)),
            ("model.vocab", lambda t: t["model"]["vocab"].update(x=512)),
            ("model.vocab", lambda t: t["model"]["vocab"].update(x=5)),
            ("model.vocab", lambda t: t["model"]["vocab"].update({"[PAD511]": 510})),
            ("model.merges", lambda t: t["model"].update(merges=None)),
            ("model.merges", lambda t: t["model"]["merges"].append("abc")),
            ("model.merges", lambda t: t["model"]["merges"].append("a b c")),
            ("model.merges", lambda t: t["model"]["merges"].append(["a", "b c"])),
            ("model.merges", lambda t: t["model"]["merges"].append(["a"])),
            ("added_tokens", lambda t: t["added_tokens"].append({"id": "x", "content": "x"})),
            ("added_tokens", lambda t: t["added_tokens"].append({"id": 600, "content": "x"})),
            ("added_tokens", lambda t: t["added_tokens"].append({"id": 0, "content": "x"})),
            ("added_tokens", lambda t: t["added_tokens"].append({"id": 5, "content": "x"})),
            ("added_tokens", lambda t: t["added_tokens"].append({"id": 505, "content": "<think>"})),
            ("added_tokens", lambda t: t.update(added_tokens={})),
            ("pre_tokenizer", lambda t: t.update(pre_tokenizer=None)),
            ("pre_tokenizer", lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0)),
            ("pre_tokenizer", lambda t: t["pre_tokenizer"]["pretokenizers"].pop()),
            ("pre_tokenizer", lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
            (
                "pre_tokenizer",
                lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}"),
            ),
            ("pre_tokenizer", lambda t: t["pre_tokenizer"]["pretokenizers"][3].update(use_regex=True)),
            ("normalizer", lambda t: t.update(normalizer={"type": "NFC"})),
            (
                "normalizer",
                lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            ),
        ],
    )
    def test_refused(self, folder: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
        self.edit(folder, change)
        with pytest.raises(CheckpointError, match="cannot use this tokenizer") as caught:
            self.read(folder)
        assert (caught.value.key, caught.value.path) == (key, str(folder / "tokenizer.json"))

    def test_empty_normalizer_sequence_is_none(self, folder: Path) -> None:
        """V4's own file has one."""
        self.edit(folder, lambda t: t.update(normalizer={"type": "Sequence", "normalizers": []}))
        assert self.read(folder) is not None


# --- refusals of tensors ---------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(name)


def put(name: str, dtype: str, array: np.ndarray) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: (dtype, array)})


WKV, EXPERT, SHARED = "layers.3.attn.wkv", "layers.1.ffn.experts.7.w2", "layers.0.ffn.shared_experts.w1"

REFUSALS: dict[str, tuple[Callable[[Tensors], object], type[Exception], str, str]] = {
    # change, error, tensor named, part of the message
    "missing weight": (drop(f"{WKV}.weight"), CheckpointError, f"{WKV}.weight", "lacks a tensor"),
    "missing norm": (drop("norm.weight"), CheckpointError, "norm.weight", "for output_norm.weight"),
    "missing expert": (drop(f"{EXPERT}.weight"), CheckpointError, f"{EXPERT}.weight", "ffn_down_exps"),
    "missing scale": (drop(f"{WKV}.scale"), MissingScaleError, f"{WKV}.weight", f"found no {WKV}.scale"),
    "missing FP4 scale": (drop(f"{EXPERT}.scale"), MissingScaleError, f"{EXPERT}.weight", "has no scale"),
    "other scale name": (
        lambda t: t.update({f"{WKV}.weight_scale_inv": t.pop(f"{WKV}.scale")}),
        MissingScaleError,
        f"{WKV}.weight",
        "other ways of storing scales",
    ),
    "32x32 tiles": (
        put(f"{WKV}.scale", "F8_E8M0", np.zeros((4, 8), np.uint8)),
        TileShapeError,
        f"{WKV}.scale",
        r"found \[4, 8\], expected \[1, 2\], one per 128x128 tile of a weight of 128 x 256",
    ),
    "FP4 scale per 16": (
        put(f"{EXPERT}.scale", "F8_E8M0", np.zeros((256, 8), np.uint8)),
        TileShapeError,
        f"{EXPERT}.scale",
        r"expected \[256, 4\], one per 32 columns",
    ),
    "one-dimensional scale": (
        put(f"{WKV}.scale", "F8_E8M0", np.zeros(2, np.uint8)),
        TileShapeError,
        f"{WKV}.scale",
        r"found \[2\]",
    ),
    "scale of another dtype": (
        put(f"{WKV}.scale", "BF16", np.zeros((1, 2), np.uint16)),
        CheckpointError,
        f"{WKV}.scale",
        "found BF16, expected F8_E8M0 or F32",
    ),
    "dequantised weight": (
        put(f"{WKV}.weight", "BF16", np.zeros((128, 256), np.uint16)),
        CheckpointError,
        f"{WKV}.weight",
        "convert the checkpoint as released",
    ),
    "E5M2 weight": (
        put(f"{WKV}.weight", "F8_E5M2", np.zeros((128, 256), np.uint8)),
        CheckpointError,
        f"{WKV}.weight",
        "found F8_E5M2, expected F8_E4M3",
    ),
    "FP8 expert": (
        put(f"{EXPERT}.weight", "F8_E4M3", np.zeros((256, 128), np.uint8)),
        CheckpointError,
        f"{EXPERT}.weight",
        "Experts in FP8",
    ),
    "F32 embedding": (
        put("embed.weight", "F32", np.zeros((320, 256), np.float32)),
        CheckpointError,
        "embed.weight",
        "found F32, expected BF16",
    ),
    "wrong shape": (
        put("layers.0.attn_norm.weight", "BF16", np.zeros(128, np.uint16)),
        CheckpointError,
        "layers.0.attn_norm.weight",
        r"found \[128\], expected \[256\]",
    ),
    "transposed": (
        put(f"{WKV}.weight", "F8_E4M3", np.zeros((256, 128), np.uint8)),
        CheckpointError,
        f"{WKV}.weight",
        r"found \[256, 128\], expected \[128, 256\]",
    ),
    "unknown tensor": (
        put("layers.0.attn.new.weight", "F32", np.zeros(3, np.float32)),
        CheckpointError,
        "layers.0.attn.new.weight",
        "DeepSeek-V4 does not have",
    ),
    "vision tensor": (
        put("layers.5.ffn.gate.bias_vl", "F32", np.zeros(8, np.float32)),
        CheckpointError,
        "layers.5.ffn.gate.bias_vl",
        "another variant",
    ),
    "bias in a hash layer": (
        put("layers.0.ffn.gate.bias", "F32", np.zeros(8, np.float32)),
        CheckpointError,
        "layers.0.ffn.gate.bias",
        "DeepSeek-V4 does not have",
    ),
    "a ninth expert": (
        put("layers.0.ffn.experts.8.w1.weight", "I8", np.zeros((128, 128), np.int8)),
        CheckpointError,
        "layers.0.ffn.experts.8.w1.weight",
        "DeepSeek-V4 does not have",
    ),
    "scale of a plain weight": (
        put("embed.scale", "F8_E8M0", np.zeros((2, 2), np.uint8)),
        CheckpointError,
        "embed.scale",
        "DeepSeek-V4 does not have",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_anything_is_written(changed: Any, tmp_path: Path, case: str) -> None:
    change, error, tensor, message = REFUSALS[case]
    folder = changed(change)
    with pytest.raises(error, match=message) as caught:
        convert(folder, tmp_path / "x.gguf")
    assert isinstance(caught.value, CheckpointError)
    assert caught.value.tensor == tensor
    assert caught.value.path is not None
    assert str(folder) in caught.value.path
    assert sorted(os.listdir(tmp_path)) == ["changed"]


SCALES = np.array([[1.0, 2.0**-127]], np.float32)


@pytest.mark.parametrize("bad", [3.0, 0.0, -1.0, np.inf, np.nan, 2.0**-128, 1.0000001, -(2.0**-127)])
def test_f32_scales_that_are_no_powers_of_two(changed: Any, tmp_path: Path, bad: float) -> None:
    scales = np.array([[1.0, bad]], np.float32)
    folder = changed(put(f"{WKV}.scale", "F32", scales))
    with pytest.raises(CheckpointError, match=r"at \[0, 1\], expected a positive power of two") as caught:
        convert(folder, tmp_path / "x.gguf")
    assert caught.value.tensor == f"{WKV}.scale"
    assert os.listdir(tmp_path) == ["changed"]


def test_f32_scales_that_are_powers_of_two(changed: Any, tiny: Path, tmp_path: Path) -> None:
    """The same file results as from E8M0 scales, up to the ends of the range."""
    with Checkpoint(tiny) as checkpoint:
        names = [n for n, t in checkpoint.tensors.items() if t.dtype == "F8_E8M0"]
    extreme = np.array([[0, 254]], np.uint8)

    def with_bytes(t: Tensors) -> None:
        t[f"{WKV}.scale"] = ("F8_E8M0", extreme)

    def with_floats(t: Tensors) -> None:
        with_bytes(t)
        for name in names:
            t[name] = ("F32", np.ldexp(np.float32(1), t[name][1].astype(int) - 127).astype(np.float32))

    convert(changed(with_bytes), tmp_path / "bytes.gguf", name="x")
    shutil.rmtree(tmp_path / "changed")
    convert(changed(with_floats), tmp_path / "floats.gguf", name="x")
    assert sha256(tmp_path / "bytes.gguf") == sha256(tmp_path / "floats.gguf")


@pytest.mark.parametrize("name", [f"{SHARED}.scale", f"{EXPERT}.scale"])
def test_nan_scale(changed: Any, tmp_path: Path, name: str) -> None:
    def change(t: Tensors) -> None:
        t[name][1][-1, -1] = 255

    folder = changed(change)
    with pytest.raises(CheckpointError, match="255, which is NaN at") as caught:
        convert(folder, tmp_path / "x.gguf")
    assert caught.value.tensor == name
    assert os.listdir(tmp_path) == ["changed"]


def test_bad_fp8_scales_are_found_before_hours_of_writing(changed: Any, tmp_path: Path) -> None:
    """The first in file order is named, also by a dry run."""

    def change(t: Tensors) -> None:
        for name in (f"{SHARED}.scale", f"{WKV}.scale"):
            t[name][1][-1, -1] = 255

    folder = changed(change)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match="is NaN") as caught:
            convert(folder, tmp_path / "x.gguf", dry_run=dry_run, progress=lambda *_: pytest.fail("writing"))
        assert caught.value.tensor == f"{SHARED}.scale"
        assert os.listdir(tmp_path) == ["changed"]


@pytest.mark.parametrize("bad", [-1, 8, 2**32, -(2**63)])
def test_expert_id_out_of_range(changed: Any, tmp_path: Path, bad: int) -> None:
    """2**32 would become expert 0 if it were narrowed first."""

    def change(t: Tensors) -> None:
        t["layers.1.ffn.gate.tid2eid"][1][123, 2] = bad

    folder = changed(change)
    with pytest.raises(CheckpointError, match=f"found {bad} for token 123, expected 0 to 7"):
        convert(folder, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == ["changed"]


@pytest.mark.parametrize(
    ("changes", "error", "key"),
    [
        ({"model_type": "deepseek_v3"}, UnsupportedModelError, "model_type"),
        ({"hidden_size": ...}, CheckpointError, "hidden_size"),
        ({"hidden_size": "256"}, CheckpointError, "hidden_size"),
        ({"vocab_size": 2**32}, CheckpointError, "vocab_size"),
        ({"rope_theta": 1e300}, CheckpointError, "rope_theta"),
        ({"n_routed_experts": 2**31 - 1}, CheckpointError, "n_routed_experts"),
        ({"num_hidden_layers": 600, "compress_ratios": [0] * 600}, CheckpointError, "num_hidden_layers"),
        ({"compress_ratios": [0, 0, 4]}, CheckpointError, "compress_ratios"),
        ({"index_head_dim": 96}, CheckpointError, "index_head_dim"),
        ({"scoring_func": "sigmoid"}, CheckpointError, "scoring_func"),
    ],
)
def test_refused_configuration(
    tiny: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], key: str
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(tiny, folder)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(error) as caught:
        plan_of(folder)
    assert caught.value.key == key  # type: ignore[attr-defined]
    assert caught.value.path == str(folder / "config.json")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"q_lora_rank": 192}, "layers.0.attn.wq_a.weight"),
        ({"moe_intermediate_size": 48}, "layers.0.ffn.experts.0.w2.weight"),
    ],
)
def test_dimensions_that_no_tile_fits(
    tiny: Path, tmp_path: Path, changes: dict[str, object], tensor: str
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(tiny, folder)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(TileShapeError) as caught:
        plan_of(folder)
    assert caught.value.tensor == tensor


# --- the file --------------------------------------------------------------------------------------------


def test_same_bytes_with_any_number_of_threads_and_shards(tiny: Path, tmp_path: Path) -> None:
    synth.write_checkpoint(tmp_path / "Tiny-V4", seed=3, n_shards=7)
    files = [
        convert(tiny, tmp_path / "1.gguf", n_threads=1),
        convert(tiny, tmp_path / "1.gguf", n_threads=1),
        convert(tiny, tmp_path / "4.gguf", n_threads=4),
        convert(tmp_path / "Tiny-V4", tmp_path / "7.gguf"),
    ]
    assert len({sha256(f.path) for f in files}) == 1
    for f in files:
        assert (
            f.path.stat().st_size
            == f.n_bytes
            == f.n_bytes_header + sum(writer.padded(i.n_bytes) for i in f.plan.infos)
        )
        report = check_header(f.path)
        assert (report.dialect, report.derived_keys) == ("native", {})
    assert sorted(os.listdir(tmp_path)) == ["1.gguf", "4.gguf", "7.gguf", "Tiny-V4"]


@pytest.mark.parametrize("n_bytes", [800, 40_000])
def test_same_bytes_in_any_pieces(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """Tiny tensors fit one piece; real ones are made of many, at row and tile offsets of their own."""
    n_calls = []
    for name, size in (("whole", repack.PIECE_BYTES), ("pieces", n_bytes)):
        monkeypatch.setattr(repack, "PIECE_BYTES", size)
        calls: list[str] = []
        convert(tiny, tmp_path / f"{name}.gguf", progress=lambda *args, calls=calls: calls.append(args[2]))
        n_calls.append(len(calls))
    assert n_calls[1] > n_calls[0] + 50
    assert sha256(tmp_path / "pieces.gguf") == sha256(tmp_path / "whole.gguf")


def test_an_existing_file_is_replaced_only_by_a_complete_one(
    changed: Any, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def change(t: Tensors) -> None:
        t[f"{EXPERT}.scale"][1][0, 0] = 255

    folder = changed(change)
    with pytest.raises(CheckpointError):
        convert(folder, path)
    assert path.read_bytes() == b"old"
    convert(tiny, path)
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_link_is_followed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real" / "x.gguf")
    assert convert(tiny, tmp_path / "link.gguf").path == tmp_path / "real" / "x.gguf"
    assert (tmp_path / "link.gguf").is_symlink()


def test_progress(tiny: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    result = convert(tiny, tmp_path / "x.gguf", progress=lambda *args: calls.append(args))
    done = [n for n, _, _ in calls]
    assert done == sorted(done)
    assert {total for _, total, _ in calls} == {result.n_bytes_payload} == {done[-1]}
    names = list(dict.fromkeys(name for _, _, name in calls))
    assert names == [info.name for info in result.plan.infos]


def test_cancel(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        convert(tiny, tmp_path / "x.gguf", progress=lambda done, *_: done < 1_000_000)
    assert os.listdir(tmp_path) == []


def test_an_exception_in_the_callback_comes_through(tiny: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        convert(tiny, tmp_path / "x.gguf", progress=fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"outtype": "q8_0"}, "outtype"),
        ({"n_threads": 0}, "n_threads"),
        ({"n_threads": 10_000}, "n_threads"),
    ],
)
def test_arguments(tiny: Path, tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        convert(tiny, tmp_path / "x.gguf", **options)
    assert caught.value.key == key


def test_impossible_output_paths(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a folder"):
        convert(tiny, tmp_path)
    with pytest.raises(ArgumentError, match="a device or pipe"):
        convert(tiny, "/dev/null")
    with pytest.raises(ModelNotFoundError, match="folder of the output file"):
        convert(tiny, tmp_path / "no" / "x.gguf")
    folder = tmp_path / "x"
    shutil.copytree(tiny, folder)
    before = sha256(folder / "model.safetensors")
    with pytest.raises(ArgumentError, match="a shard of the checkpoint"):
        convert(folder, folder / "model.safetensors")
    assert sha256(folder / "model.safetensors") == before


def test_no_permission(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writer.os, "open", refuse)
    with pytest.raises(ModelFileError, match="Permission denied"):
        convert(tiny, tmp_path / "x.gguf")


def test_two_conversions_to_one_file(tiny: Path, tmp_path: Path) -> None:
    with (
        writer.OutputFile(tmp_path / "x.gguf", b"GGUF"),
        pytest.raises(ConvertError, match="another process is writing"),
    ):
        convert(tiny, tmp_path / "x.gguf")
    convert(tiny, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == ["x.gguf"]


# --- disk full, interruption, memory ---------------------------------------------------------------------


def test_not_enough_space_is_said_before_writing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="1,000 bytes free"):
        convert(tiny, tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []
    assert not convert(tiny, tmp_path / "x.gguf", dry_run=True).fits


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("n_calls", [1, 2, 3, 100])
def test_disk_full_while_writing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_calls: int, code: int
) -> None:
    """Nothing is left of a file of which there was little."""
    whole, calls = os.write, []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == n_calls:
            raise OSError(code, os.strerror(code))
        return whole(*args)

    monkeypatch.setattr(writer.os, "write", full)
    with pytest.raises(DiskFullError, match="the disk is full") as caught:
        convert(tiny, tmp_path / "x.gguf")
    assert str(caught.value.path).startswith(str(tmp_path / "x.gguf"))
    assert "nothing of it is left" in str(caught.value) or n_calls == 1  # the first call writes the journal
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["fdatasync", "fsync", "replace"])
def test_disk_full_when_flushing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    """What is complete and on the disk is kept, and said to be; whatever fails, resuming gives the file."""
    if not hasattr(os, step):
        pytest.skip(f"no {step} here")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, step, full)
        with pytest.raises(DiskFullError, match="the disk is full") as caught:
            convert(tiny, tmp_path / "x.gguf")
    left = sorted(os.listdir(tmp_path))
    if step == "replace":
        assert "what there is of it is in x.gguf.partial" in str(caught.value)
        assert left == ["x.gguf.partial", "x.gguf.partial.journal"]
    else:
        assert left == []
    resumed = convert(tiny, tmp_path / "x.gguf", resume=True)
    assert (resumed.n_bytes_resumed > 0) == (step == "replace")
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert sha256(resumed.path) == sha256(convert(tiny, tmp_path / "y.gguf").path)


def run_python(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


CONVERT = """
    import sys
    from pyllama_dsv4.convert import convert
    convert(sys.argv[1], sys.argv[2])
"""


def test_file_size_limit(tiny: Path, tmp_path: Path) -> None:
    """The system itself refuses the write: a limit stands in for a full disk."""
    limit = 3_000_000
    process = run_python(
        CONVERT,
        tiny,
        tmp_path / "x.gguf",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "DiskFullError" in stderr
    assert f"File too large at byte {limit}" in stderr
    assert os.listdir(tmp_path) == []


def test_small_disk(tiny: Path, tmp_path: Path) -> None:
    """A real file system of 4 MB, in a namespace of our own."""
    script = (
        'mount -t tmpfs -o size=4m tmpfs "$1" || exit 77;'
        ' "$2" -c "$3" "$4" "$1/x.gguf"; code=$?; ls -A "$1"; exit $code'
    )
    bypass = textwrap.dedent("""
        import shutil
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)  # the check before writing
    """)
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    try:
        done = subprocess.run(
            [*command, mount, sys.executable, bypass + textwrap.dedent(CONVERT), tiny],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "DiskFullError" in done.stderr
    assert "No space left on device" in done.stderr
    assert done.stdout == ""


SLOW_CONVERT = """
    import sys, time
    from pyllama_dsv4.convert import convert

    def report(done, total, name):
        if done > 5_000_000:
            print("half", flush=True)
            time.sleep(60)

    convert(sys.argv[1], sys.argv[2], progress=report)
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way(tiny: Path, tmp_path: Path, sig: signal.Signals) -> None:
    """Whatever is left after a kill is marked as partial and is no GGUF file; Ctrl-C leaves nothing."""
    path = tmp_path / "x.gguf"
    process = run_python(SLOW_CONVERT, tiny, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(sig)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not path.exists()
    if sig == signal.SIGINT:
        assert os.listdir(tmp_path) == []
        return
    partial = tmp_path / "x.gguf.partial"
    assert sorted(os.listdir(tmp_path)) == [partial.name, f"{partial.name}.journal"]
    assert partial.read_bytes()[:4] != b"GGUF"
    convert(tiny, path)  # what was left does not stand in the way
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert sha256(path) == sha256(convert(tiny, tmp_path / "y.gguf").path)


MEASURE = """
    import sys
    import numpy, gguf
    from pyllama_dsv4.convert import convert
    from pyllama_dsv4.convert import repack
    from pyllama_dsv4.machine import peak_bytes
    before = peak_bytes()
    convert(sys.argv[1], sys.argv[2], n_threads=2)
    print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_below_one_tensor(tmp_path: Path) -> None:
    """An embedding of 128 MiB: reading it whole would need that much."""
    config = synth.tiny_config(vocab_size=262144, num_hash_layers=0, num_hidden_layers=1)
    config["compress_ratios"] = [0]
    synth.write_checkpoint(tmp_path / "big", config, seed=0, is_sparse=True)
    process = run_python(MEASURE, tmp_path / "big", tmp_path / "x.gguf")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (tmp_path / "x.gguf").stat().st_size > 2 * 128 << 20
    assert int(stdout) < 48 << 20


def test_pool_gives_what_is_asked_for() -> None:
    """A joined matrix once came back as memory of two dimensions, of which a piece was rows instead of bytes."""
    pool = writer.Pool()
    first = pool.take(100)
    pool.give_back(first)
    again = pool.take(60)
    assert again.shape == (60,)
    assert np.shares_memory(first, again)
    pool.give_back(again)
    larger = pool.take(101)
    assert larger.shape == (101,)
    for foreign in (
        np.zeros((8, 8), np.uint8).reshape(-1),
        np.zeros(64, "<u4").view(np.uint8),
        np.zeros(64, np.uint8),
        np.frombuffer(bytes(64), np.uint8),
    ):
        pool.give_back(foreign)
        taken = pool.take(16)
        assert taken.shape == (16,)
        assert taken.flags.writeable
        assert not np.shares_memory(taken, foreign)


def test_pieces_wait_for_the_writer(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk must not make finished pieces pile up in memory."""
    n_made = n_written = n_most = 0
    write = writer.OutputFile.write

    def jobs(*_: object) -> Any:
        nonlocal n_made

        def job() -> np.ndarray:
            nonlocal n_made
            n_made += 1
            return np.zeros(32, np.uint8)

        for _ in range(100):
            yield job

    def slow(self: writer.OutputFile, data: memoryview | bytes) -> None:
        nonlocal n_written, n_most
        time.sleep(0.001)
        n_most = max(n_most, n_made - n_written)
        n_written += 1
        write(self, data)

    monkeypatch.setattr(writer.OutputFile, "write", slow)
    info = writer.OutputTensor("x", (800,), 0, 0, 3200)
    with writer.OutputFile(tmp_path / "x", b"") as out:
        writer.write_tensors(out, [(info, jobs())], n_threads=3, n_bytes_total=3200)
    assert 1 < n_most <= 3 + 2
