"""LoRA adapters: equal to merged weights; what upstream's graph would leave out is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama, batch, errors
from pyllama_dsv4.generate import TextSteps
from pyllama_dsv4.header import read_header
from pyllama_dsv4.tensors import upstream_to_native

Array = npt.NDArray[np.float32]
Pairs = dict[str, tuple[Array, Array]]

EXACT: dict[str, Any] = {
    "n_ctx": 512, "n_threads": 1, "warmup": False, "cache_type": "f32", "flash_attn": "off", "act_quant": "none",
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 200)]
RANK, ALPHA = 4, 8.0
LAYER = (
    "attn_q_a", "attn_q_b", "attn_kv", "attn_output_b", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
    "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "attn_compressor_kv", "attn_compressor_gate",
    "indexer.attn_q_b", "indexer.proj", "indexer_compressor_kv", "indexer_compressor_gate",
)  # fmt: skip


def write_adapter(path: Path, pairs: Pairs, **keys: str) -> Path:
    """Write an adapter; arrays are (rank, n_in) and (n_out, rank), with one more dimension in front for experts."""
    writer = gguf.GGUFWriter(path, keys.get("architecture", "deepseek4"))
    writer.add_type(keys.get("type", "adapter"))
    writer.add_string("adapter.type", keys.get("adapter", "lora"))
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def all_pairs(model: Path, seed: int) -> Pairs:
    """Return random pairs for every weight that the graph gives an adapter's part."""
    r = np.random.default_rng(seed)
    out: Pairs = {}
    for tensor in read_header(model).tensors:
        stem = tensor.name.removeprefix("blk.").partition(".")[2].removesuffix(".weight")
        if stem not in LAYER and tensor.name != "token_embd.weight":
            continue
        n_in, n_out, *experts = tensor.dims
        scale = 0.3 / np.sqrt(n_in)
        if tensor.name == "token_embd.weight":  # rows are looked up: b is that of one-hot inputs
            a, b = r.normal(0, scale, (n_out, RANK)), r.normal(0, 1, (n_in, RANK))
        else:
            a, b = r.normal(0, scale, (*experts, RANK, n_in)), r.normal(0, 1, (*experts, n_out, RANK))
        out[tensor.name] = (a.astype(np.float32), b.astype(np.float32))
    return out


def merged(source: Path, path: Path, pairs: Pairs, scale: float) -> Path:
    """Copy an F32 file with the adapter's part added to its weights."""
    shutil.copyfile(source, path)
    infos = {t.name: t for t in read_header(path).tensors}
    with path.open("r+b") as stream:
        for name, (a, b) in pairs.items():
            info = infos[name]
            assert info.type.name == "F32"
            stream.seek(info.start)
            weight = np.frombuffer(stream.read(info.n_bytes), np.float32).reshape(info.dims[::-1])
            delta = a @ b.T if name == "token_embd.weight" else b @ a
            stream.seek(info.start)
            stream.write((weight + scale * ALPHA / RANK * delta).astype(np.float32).tobytes())
    return path


def logits_of(llm: Llama) -> Array:
    llm.reset()
    return llm.eval(IDS, logits="all")


def nmse(a: Array, b: Array) -> float:
    return float(np.square(a - b).mean() / np.square(b).mean())


@pytest.fixture(scope="module")
def pairs(tiny_upstream: Path) -> Pairs:
    found = all_pairs(tiny_upstream, 1)
    stems = {n.removeprefix("blk.").partition(".")[2].removesuffix(".weight") for n in found}
    assert stems >= set(LAYER)  # the tiny model has layers of every kind
    return found


@pytest.fixture(scope="module")
def adapter(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "adapter.gguf", pairs)


@pytest.fixture(scope="module")
def base(tiny_upstream: Path) -> Array:
    with Llama(tiny_upstream, **EXACT) as llm:
        return logits_of(llm)


@pytest.fixture(params=["native", "upstream"])
def llm(request: pytest.FixtureRequest, tiny_model: Path, tiny_upstream: Path) -> Iterator[Llama]:
    with Llama(tiny_model if request.param == "native" else tiny_upstream, **EXACT) as llm:
        yield llm


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_an_adapter_equals_merged_weights(
    llm: Llama, tiny_upstream: Path, pairs: Pairs, adapter: Path, base: Array, scale: float, tmp_path: Path
) -> None:
    with Llama(merged(tiny_upstream, tmp_path / "merged.gguf", pairs, scale), **EXACT) as other:
        expected = logits_of(other)
    assert nmse(base, expected) > 0.05  # it changes much
    llm.load_lora(adapter, scale)
    assert nmse(logits_of(llm), expected) < 1e-6


@pytest.mark.parametrize("stem", ["token_embd", *LAYER])
def test_each_weights_part_counts(
    tiny_upstream: Path, pairs: Pairs, base: Array, stem: str, tmp_path: Path
) -> None:
    """An adapter that works by half gives fluent, wrong text."""
    some = {n: p for n, p in pairs.items() if n.removesuffix(".weight").endswith(stem)}
    with Llama(merged(tiny_upstream, tmp_path / "merged.gguf", some, 1.0), **EXACT) as other:
        expected = logits_of(other)
    with Llama(tiny_upstream, lora_path=write_adapter(tmp_path / "a.gguf", some), **EXACT) as llm:
        assert nmse(logits_of(llm), expected) < 1e-6
    assert nmse(base, expected) > 1e-5


def test_adapters_are_scaled_removed_and_added(llm: Llama, adapter: Path, base: Array) -> None:
    before = logits_of(llm)
    assert nmse(before, base) < 1e-6
    first = llm.load_lora(adapter, 0.5)
    half = logits_of(llm)
    second = llm.load_lora(adapter, 0.5)
    both = logits_of(llm)
    llm.remove_lora(first)
    assert nmse(logits_of(llm), half) < 1e-12
    llm.set_lora_scale(second, 1.0)
    assert nmse(logits_of(llm), both) < 1e-6
    assert dict(llm.loras) == {second: 1.0}
    llm.remove_lora(second)
    assert np.array_equal(logits_of(llm), before)
    for use in (lambda: llm.remove_lora(second), lambda: llm.set_lora_scale(first, 1)):
        with pytest.raises(errors.ArgumentError, match="load_lora"):
            use()


def test_what_was_evaluated_with_other_weights_is_not_used(llm: Llama, adapter: Path, tmp_path: Path) -> None:
    llm.create_completion(IDS, max_tokens=1)
    state, fingerprint = llm.save_state(), llm.system_fingerprint
    llm.load_lora(adapter)
    assert llm.n_tokens == 0
    assert llm.system_fingerprint != fingerprint
    with pytest.raises(errors.StateError, match="lora differs"):
        llm.load_state(state)
    answer = llm.create_completion(IDS, max_tokens=1)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_prefixes_on_disk_belong_to_their_adapters(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    prompt = [*IDS, *IDS]

    def n_cached(**options: Any) -> int:
        with Llama(tiny_model, prefix_cache=tmp_path / "prefixes", **EXACT, **options) as llm:
            usage = llm.create_completion(prompt, max_tokens=1)["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

    assert [n_cached(), n_cached(lora_path=adapter), n_cached(lora_path=adapter), n_cached()] == [
        0,
        0,
        399,
        399,
    ]


def test_batches_use_the_adapters(tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Steps(TextSteps):
        def feed(self, token: int) -> str | None:
            seen.append(token)
            return super().feed(token)

    monkeypatch.setattr(batch, "TextSteps", Steps)
    with Llama(tiny_model, **EXACT) as llm:
        llm.eval(IDS[:40])
        without = llm.sample(temperature=0)
        llm.load_lora(adapter)
        llm.eval(IDS[:40])
        expected = llm.sample(temperature=0)
        assert expected != without
        llm.generate_batch([IDS[:40]], max_tokens=1, temperature=0)
    assert seen == [expected]


# --- refusals ---


def one(name: str, a: tuple[int, ...] = (4, 256), b: tuple[int, ...] = (256, 4)) -> Pairs:
    return {name: (np.zeros(a, np.float32), np.zeros(b, np.float32))}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_output_a.weight", "multiplies this weight without adapters"),
        ("output.weight", "multiplies this weight without adapters"),
        ("blk.0.attn_norm.weight", "multiplies this weight without adapters"),
        ("blk.0.nothing.weight", "would not be applied"),
        ("blk.0.attn_latent.weight", "would not be applied"),
    ],
)
def test_weights_without_an_adapters_part(llm: Llama, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=message) as caught:
        llm.load_lora(write_adapter(tmp_path / "a.gguf", one(name)))
    assert name in str(caught.value.tensor)


def test_names_are_upstreams_in_both_dialects(llm: Llama) -> None:
    assert upstream_to_native("blk.0.attn_kv.weight") == "blk.0.attn_kv_latent.weight"
    assert llm.loras == {}


@pytest.mark.parametrize(
    "shape", [((4, 255), (256, 4)), ((4, 256), (255, 4)), ((3, 256), (256, 4)), ((2, 4, 256), (2, 256, 4))]
)
def test_adapters_of_another_model(llm: Llama, shape: Any, tmp_path: Path) -> None:
    name = "blk.0.ffn_gate_inp.weight"
    with pytest.raises(errors.TensorShapeError, match=name):
        llm.load_lora(write_adapter(tmp_path / "a.gguf", one(name, *shape)))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"architecture": "llama"}, "general.architecture"),
        ({"type": "model"}, "general.type"),
        ({"adapter": "other"}, "adapter.type"),
    ],
)
def test_other_files_are_no_adapters(llm: Llama, keys: dict[str, str], key: str, tmp_path: Path) -> None:
    pairs = one("blk.0.ffn_gate_inp.weight")
    with pytest.raises(errors.UnsupportedModelError) as caught:
        llm.load_lora(write_adapter(tmp_path / "a.gguf", pairs, **keys))
    assert caught.value.key == key


def test_broken_files_and_scales(llm: Llama, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        llm.load_lora(tmp_path / "nothing.gguf")
    (tmp_path / "cut.gguf").write_bytes(adapter.read_bytes()[:-4000])
    with pytest.raises((errors.FormatError, errors.ModelLoadError)):
        llm.load_lora(tmp_path / "cut.gguf")
    for scale in (float("nan"), "1", True):
        with pytest.raises(errors.ArgumentError, match="scale"):
            llm.load_lora(adapter, scale)  # type: ignore[arg-type]
    assert llm.loras == {}
