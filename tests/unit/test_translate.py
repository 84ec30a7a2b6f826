"""Translation: names, keys, bytes, the way back, and what cannot be translated."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writer import TINY, Gguf, native_v4, upstream_v4
from shards import split_in_three

from pyllama_dsv4 import synth
from pyllama_dsv4 import translate as translate_module
from pyllama_dsv4.convert import convert
from pyllama_dsv4.convert.template import chat_template
from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    DiskFullError,
    FormatError,
    MissingTensorError,
    ModelNotFoundError,
    PyllamaError,
)
from pyllama_dsv4.gguf_types import register
from pyllama_dsv4.header import check_header, read_header
from pyllama_dsv4.tensors import native_to_upstream
from pyllama_dsv4.translate import RECORD, translate
from pyllama_dsv4.verify import verify

codec = pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

P = "deepseek4."
F8 = "blk.1.attn_q_b.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth.write_checkpoint(tmp_path_factory.mktemp("source") / "Tiny-V4", seed=6, tokenizer="bytes")


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file with a template that is not V4's, as published native files have."""
    return convert(source, tmp_path_factory.mktemp("out") / "x.gguf", chat_template="{{ short }}").path


@pytest.fixture(scope="module")
def published(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors with only the keys that published native files have."""
    header = read_header(native)
    model = native_v4(TINY, n_tokens=None)
    model.set(P + "vocab_size", "u32", 512)
    model.change("token_embd.weight", dims=(256, 512)).change("output.weight", dims=(256, 512))
    for il in range(3):
        model.change(f"blk.{il}.ffn_gate_tid2eid", dims=(3, 512))
    path = tmp_path_factory.mktemp("published") / "x.gguf"
    front = model.header()
    path.write_bytes(front + native.read_bytes()[header.data_start :])
    check_header(path)
    return path


def data_of(path: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor by upstream name."""
    header = read_header(path)
    raw = [Path(shard.path).read_bytes() for shard in header.shards]
    return {t.upstream_name: raw[t.shard][t.start : t.start + t.n_bytes] for t in header.tensors}


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["native", "published"])
def test_there_and_back_are_the_same_bytes(which: str, request: Any, tmp_path: Path) -> None:
    path: Path = request.getfixturevalue(which)
    there = translate(path, tmp_path / "u.gguf", to="upstream").path
    assert check_header(there).dialect == "upstream"
    assert there.read_bytes() != path.read_bytes()
    back = translate(there, tmp_path / "n.gguf", to="native").path
    assert back.read_bytes() == path.read_bytes()


def test_there_and_back_from_upstream(tmp_path: Path) -> None:
    path = upstream_v4().write(tmp_path / "u.gguf")
    result = translate(path, tmp_path / "n.gguf", to="native")
    assert result.added == [P + "vocab_size", P + "rope.freq_base_swa"]
    report = check_header(result.path)
    assert report.dialect == "native"
    assert report.hparams == check_header(path).hparams
    assert (
        translate(result.path, tmp_path / "back.gguf", to="upstream").path.read_bytes() == path.read_bytes()
    )


def test_tensors_are_copied_and_renamed(native: Path, tmp_path: Path) -> None:
    result = translate(native, tmp_path / "u.gguf", to="upstream")
    before, after = read_header(native), read_header(result.path)
    assert [t.name for t in after.tensors] == [native_to_upstream(t.name) for t in before.tensors]
    assert [(t.dims, t.type) for t in after.tensors] == [(t.dims, t.type) for t in before.tensors]
    assert data_of(result.path) == data_of(native)
    assert (result.n_tensors, result.n_renamed, result.n_reencoded) == (178, 81, 0)
    assert result.n_bytes == result.path.stat().st_size
    assert any("50 tensors stay F8_E4M3_B128" in note for note in result.notes)


def test_keys_that_native_files_lack_are_written(published: Path, tmp_path: Path) -> None:
    """All that the loader would derive, under the types that upstream's loader wants."""
    derived = check_header(published).derived_keys
    result = translate(published, tmp_path / "u.gguf", to="upstream")
    report = check_header(result.path)
    assert report.derived_keys == {}
    hparams = check_header(published).hparams
    assert hparams is not None
    # 1e-6 is rounded to F32 by the file
    assert report.hparams == replace(hparams, hc_eps=float(np.float32(1e-6)))
    assert list(result.added) == list(derived)
    types = {key: report.header.kv[key].type_name for key in result.added}
    assert types == {
        P + "swiglu_clamp_shexp": "arr[f32]",
        P + "attention.output_group_count": "u32",
        P + "attention.output_lora_rank": "u32",
        P + "attention.compress_rope_freq_base": "f32",
        P + "attention.compress_ratios": "arr[i32]",
        P + "hyper_connection.count": "u32",
        P + "hyper_connection.sinkhorn_iterations": "u32",
        P + "hyper_connection.epsilon": "f32",
        P + "hash_layer_count": "u32",
        P + "expert_gating_func": "u32",
    }
    # nothing else that was there has changed
    assert list(result.replaced) == ["tokenizer.chat_template"]
    before = dict(read_header(published).kv)
    del before["tokenizer.chat_template"]
    for key, entry in before.items():
        after = report.header.kv[key]
        assert after.type_name == entry.type_name, key
        assert np.array_equal(after.value, entry.value), key


def test_rope_scaling_is_written_as_a_group(tmp_path: Path) -> None:
    path = native_v4(with_rope_scaling=False).write(tmp_path / "x.gguf")
    result = translate(path, tmp_path / "u.gguf", to="upstream")
    kv = check_header(result.path).header.kv
    assert kv[P + "rope.scaling.type"].value == "yarn"
    assert kv[P + "rope.scaling.original_context_length"].type_name == "u32"
    assert translate(result.path, tmp_path / "n.gguf", to="native").path.read_bytes() == path.read_bytes()


def test_the_template_is_what_a_load_would_use(native: Path, tmp_path: Path) -> None:
    """The loader replaces a native file's short template, but an upstream file's stands."""
    there = translate(native, tmp_path / "u.gguf", to="upstream").path
    kv = read_header(there).kv
    assert kv["tokenizer.chat_template"].value == chat_template("preview")
    assert kv[f"{RECORD}.was.tokenizer.chat_template"].value == "{{ short }}"
    own = native_v4().set("tokenizer.chat_template", "str", "{% set dsml_token = 1 %}")
    there = translate(own.write(tmp_path / "n.gguf"), tmp_path / "u2.gguf", to="upstream").path
    assert read_header(there).kv["tokenizer.chat_template"].value == "{% set dsml_token = 1 %}"
    later = native_v4().set("pyllama_dsv4.generation", "str", "0731")
    there = translate(later.write(tmp_path / "n.gguf"), tmp_path / "u3.gguf", to="upstream").path
    assert read_header(there).kv["tokenizer.chat_template"].value == chat_template("0731")


def test_an_added_key_that_was_changed_stays(published: Path, tmp_path: Path) -> None:
    """Undoing must not lose what somebody set meanwhile."""
    there = translate(published, tmp_path / "u.gguf", to="upstream").path
    raw = there.read_bytes()
    key = (P + "hyper_connection.sinkhorn_iterations").encode()
    at = raw.index(key + struct.pack("<i", 4)) + len(key) + 4
    assert struct.unpack_from("<I", raw, at) == (20,)
    there.write_bytes(raw[:at] + struct.pack("<I", 15) + raw[at + 4 :])
    back = check_header(translate(there, tmp_path / "n.gguf", to="native").path)
    assert back.hparams is not None
    assert back.hparams.hc_sinkhorn_iterations == 15
    assert P + "hash_layer_count" in back.derived_keys


def test_values_that_are_no_utf8_survive(tmp_path: Path) -> None:
    path = native_v4().write(tmp_path / "x.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"DeepSeek V4 Flash", b"Dee\xff\xfeeek V4 Flash", 1))
    there = translate(path, tmp_path / "u.gguf", to="upstream").path
    assert b"Dee\xff\xfeeek V4 Flash" in there.read_bytes()
    assert translate(there, tmp_path / "n.gguf", to="native").path.read_bytes() == path.read_bytes()


# --- for engines without FP8 ----------------------------------------------------------------------


def test_dense_bf16_is_exact(native: Path, source: Path, tmp_path: Path) -> None:
    result = translate(native, tmp_path / "b.gguf", to="upstream", dense="bf16")
    assert result.n_reencoded == 50
    report = check_header(result.path)
    assert "F8_E4M3_B128" not in report.type_counts
    assert report.header.kv["general.file_type"].value == 38
    assert verify(result.path, against=source).ok
    before, after = data_of(native), data_of(result.path)
    same = {name for name in before if before[name] == after[name]}
    assert len(same) == 128
    wide = np.frombuffer(after[F8], "<u2").astype("<u4") << 16
    blocks = np.frombuffer(before[F8], np.uint8).reshape(512, 129)
    assert np.array_equal(wide.view("<f4").reshape(512, 128), codec.f8_e4m3_b128_decode(blocks))


def test_dense_q8_0_is_what_the_gguf_package_quantises(native: Path, tmp_path: Path) -> None:
    f8 = register()
    result = translate(native, tmp_path / "q.gguf", to="upstream", dense="q8_0", n_threads=3)
    theirs = {t.name: t for t in gguf.GGUFReader(native).tensors}
    for t in gguf.GGUFReader(result.path).tensors:
        if t.tensor_type.name != "Q8_0":
            continue
        source = next(s for s in theirs.values() if native_to_upstream(s.name) == t.name)
        assert source.tensor_type == f8
        expected = gguf.quantize(gguf.dequantize(source.data, f8), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(t.data, expected)
    assert check_header(result.path).type_counts["Q8_0"] == 50


def test_dense_in_the_native_dialect(native: Path, tmp_path: Path) -> None:
    """Names stay, weights change: for engines that know the native names but not FP8."""
    result = translate(native, tmp_path / "q.gguf", to="native", dense="q8_0")
    assert (result.n_renamed, result.n_reencoded) == (0, 50)
    assert check_header(result.path).dialect == "native"
    assert any("already" in note for note in result.notes)


def test_dense_without_fp8(tmp_path: Path) -> None:
    path = upstream_v4().write(tmp_path / "u.gguf")
    result = translate(path, tmp_path / "q.gguf", to="upstream", dense="q8_0")
    assert any("no FP8 tensors" in note for note in result.notes)
    assert result.path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("byte", [0, 200])
def test_values_that_are_no_numbers_are_not_reencoded(native: Path, tmp_path: Path, byte: int) -> None:
    tensor = read_header(native).tensor(F8)
    assert tensor is not None
    path = tmp_path / "x.gguf"
    raw = bytearray(native.read_bytes())
    raw[tensor.start + byte // 129 * 129 + byte % 129] = 0xFF  # a scale, a code
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="no number") as error:
        translate(path, tmp_path / "q.gguf", to="upstream", dense="q8_0")
    assert error.value.tensor == F8
    assert f"row {byte // 129}," in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


# --- input and output -----------------------------------------------------------------------------


def test_shards_become_one_file(native: Path, tmp_path: Path) -> None:
    result = translate(split_in_three(native, tmp_path), tmp_path / "n.gguf", to="native")
    assert data_of(result.path) == data_of(native)
    assert set(result.removed) == {"split.no", "split.count", "split.tensors.count"}
    assert not any(key.startswith("split.") for key in read_header(result.path).kv)
    assert verify(result.path).ok


def test_another_alignment_becomes_the_usual(tmp_path: Path) -> None:
    model = native_v4().set("general.alignment", "u32", 128)
    model.alignment = 128
    result = translate(model.write(tmp_path / "x.gguf"), tmp_path / "u.gguf", to="upstream")
    header = check_header(result.path).header
    assert (header.alignment, list(result.removed)) == (32, ["general.alignment"])


def test_a_dry_run_writes_nothing(native: Path, tmp_path: Path) -> None:
    dry = translate(native, tmp_path / "q.gguf", to="upstream", dense="bf16", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = translate(native, tmp_path / "q.gguf", to="upstream", dense="bf16")
    assert dry.n_bytes == wet.n_bytes == wet.path.stat().st_size
    assert (dry.is_dry_run, dry.added, dry.notes) == (True, wet.added, wet.notes)


def test_refusals(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    options: list[tuple[dict[str, Any], type[PyllamaError]]] = [
        ({"to": "klingon"}, ArgumentError),
        ({"to": "native", "dense": "q4_0"}, ArgumentError),
        ({"to": "native", "n_threads": 0}, ArgumentError),
    ]
    for kwargs, class_ in options:
        with pytest.raises(class_):
            translate(native, out, **kwargs)
    with pytest.raises(ArgumentError, match="input file"):
        translate(native, native, to="upstream")
    with pytest.raises(ModelNotFoundError):
        translate(tmp_path / "absent", out, to="upstream")
    with pytest.raises(ModelNotFoundError):
        translate(native, tmp_path / "absent" / "out.gguf", to="upstream")
    broken = native_v4().remove("output.weight").write(tmp_path / "broken.gguf")
    with pytest.raises(MissingTensorError):
        translate(broken, out, to="upstream")
    other = Gguf([("general.architecture", "str", "llama")]).write(tmp_path / "other.gguf")
    with pytest.raises(FormatError):
        translate(other, out, to="upstream")
    assert not out.exists()


def test_interruptions_leave_nothing(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(CancelledError):
        translate(native, out, to="upstream", progress=lambda *_: False)
    usage = translate_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(translate_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="not enough space"):
        translate(native, out, to="upstream")
    monkeypatch.undo()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFullError):
        translate(native, out, to="upstream")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_progress(native: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    translate(native, tmp_path / "u.gguf", to="upstream", progress=lambda *call: calls.append(call))
    total = sum(t.n_bytes for t in read_header(native).tensors)
    assert calls[-1][:2] == (total, total)
    assert calls[0][2] == "token_embd.weight"
