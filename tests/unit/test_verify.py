"""Verification: every kind of damage is named by tensor, byte and value; sound files are sound."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import Gguf, Tensor, native_v4
from shards import split_in_three

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import convert
from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    CheckpointError,
    FormatError,
    ModelFileError,
    ModelNotFoundError,
    NotGGUFError,
)
from pyllama_dsv4.findings import Findings
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.header import read_header
from pyllama_dsv4.manifest import read_manifest
from pyllama_dsv4.verify import CHECKS, Finding, VerifyReport, verify

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")

F8 = "blk.1.attn_q_b.weight"  # 128 x 512: four tiles of one column
EXPERTS = "blk.2.ffn_up_exps.weight"  # 256 x 128 x 8
TABLE = "blk.0.ffn_gate_tid2eid"  # 3 x 512
NORM = "blk.3.attn_norm.weight"
HEAD = "output.weight"
MTP = "mtp.0.enorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three shards, with a vocabulary and a draft tensor."""
    folder = synth.write_checkpoint(
        tmp_path_factory.mktemp("source") / "Tiny-V4", seed=5, tokenizer="bytes", n_shards=3
    )
    rewrite(folder, lambda tensors: tensors.update({MTP: ("BF16", np.ones(256, np.uint16))}), shard=2)
    return folder


@pytest.fixture(scope="module")
def original(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("original") / "x.gguf", chat_template="{{ x }}").path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copy(original, tmp_path / "x.gguf"))


Tensors = dict[str, tuple[str, np.ndarray]]


def rewrite(folder: Path, change: Callable[[Tensors], object], *, shard: int | None = None) -> None:
    """Change the tensors of one shard of a checkpoint, or of its only file; keep the index in step."""
    with Checkpoint(folder) as checkpoint:
        file = checkpoint.shards[shard or 0]
        tensors = {
            name: (t.dtype, checkpoint.read(name)) for name, t in checkpoint.tensors.items() if t.path == file
        }
    before = set(tensors)
    change(tensors)
    synth.write_safetensors(file, tensors)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        for name in before - set(tensors):
            del content["weight_map"][name]
        content["weight_map"].update(dict.fromkeys(tensors, file.name))
        index.write_text(json.dumps(content))


def change_bytes(path: Path, tensor: str, at: int, data: bytes) -> int:
    """Overwrite bytes of a tensor; return their offset in the file."""
    found = read_header(path).tensor(tensor)
    assert found is not None
    with path.open("r+b") as file:
        file.seek(found.start + at)
        file.write(data)
    return found.start + at


def byte_at(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(1)[0]


def only(report: VerifyReport, check: str) -> Finding:
    """Return the one finding of a check, of which there must be exactly one; all others must be of `differs`."""
    (finding,) = (f for f in report.findings if f.check == check)
    assert {f.check for f in report.findings} <= {check, "differs"}
    return finding


# --- sound files ----------------------------------------------------------------------------------


def test_a_converted_file_is_sound(original: Path, source: Path) -> None:
    report = verify(original, against=source)
    assert report.ok
    assert report.findings == []
    assert (report.n_tensors, report.n_tensors_compared) == (178, 178)
    header = read_header(original)
    assert report.n_bytes == sum(t.n_bytes for t in header.tensors)
    with Checkpoint(source) as checkpoint:
        assert report.n_bytes_checkpoint == sum(
            t.n_bytes for name, t in checkpoint.tensors.items() if name != MTP
        )
    assert [note for note in report.notes if "draft" in note] == [
        "the checkpoint's 1 draft tensors (mtp.*, from mtp.0.enorm.weight to mtp.0.enorm.weight, 512 bytes)"
        " have no place in the file"
    ]


def test_the_result_does_not_depend_on_threads(path: Path, source: Path) -> None:
    change_bytes(path, F8, 129, b"\xff")
    change_bytes(path, EXPERTS, 17 * 5, b"\xff")
    change_bytes(path, HEAD, 100, struct.pack("<H", 0x7F80))
    reports = [verify(path, against=source, n_threads=n) for n in (1, 2, 7)]
    assert reports[0].findings == reports[1].findings == reports[2].findings
    assert len(reports[0].findings) == 7


def test_an_upstream_file_holds_the_same_values(source: Path, tmp_path: Path) -> None:
    """FP8 and FP4 widened to F32: other bytes, equal numbers."""
    path = synth.write_upstream_f32(source, tmp_path / "u.gguf", chat_template="{{ x }}")
    report = verify(path, against=source)
    assert (report.ok, report.findings, report.n_tensors_compared) == (True, [], 178)
    at = change_bytes(path, "blk.4.attn_kv.weight", 4 * 1000, struct.pack("<f", 0.3))
    finding = only(verify(path, against=source), "differs")
    assert (finding.tensor, finding.offset, finding.where) == ("blk.4.attn_kv.weight", at, "row 3, 232")
    assert finding.found == "0.3"


def test_other_models(tmp_path: Path) -> None:
    model = Gguf(
        [("general.architecture", "str", "llama")],
        [Tensor("a", (64, 2), 8), Tensor("b", (256, 2), 12), Tensor("c", (8,), 0)],
    ).write(tmp_path / "x.gguf")
    report = verify(model)
    assert (report.ok, report.dialect) == (True, "other")
    assert report.notes == ["1 tensors of type Q4_K: sizes and padding were checked, values were not"]


# --- values ---------------------------------------------------------------------------------------


def test_fp8_scale_nan(path: Path) -> None:
    at = change_bytes(path, F8, 129 * 200, b"\xff")
    report = verify(path)
    assert not report.ok
    scale, tile = report.findings
    assert (scale.check, scale.tensor, scale.offset, scale.where) == ("scale_nan", F8, at, "row 200, block 0")
    assert (scale.found, scale.severity) == ("scale byte 255, NaN", "error")
    assert (tile.check, tile.offset, tile.n) == ("tile", at, 1)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_code_nan(path: Path, code: int) -> None:
    at = change_bytes(path, F8, 129 * 300 + 1 + 77, bytes([code]))
    change_bytes(path, F8, 129 * 301 + 5, bytes([code]))
    finding = only(verify(path), "code_nan")
    assert (finding.tensor, finding.offset, finding.n) == (F8, at, 2)
    assert finding.where == "row 300, block 0, element 77"
    assert finding.found == f"code 0x{code:02x}, NaN"


@pytest.mark.parametrize("row", [0, 1, 127, 128, 511])
def test_a_scale_that_differs_within_its_tile(path: Path, row: int) -> None:
    """The row that is wrong is named, the first of a tile too; so are both bytes."""
    found = read_header(path).tensor(F8)
    assert found is not None
    right = byte_at(path, found.start + 129 * row)
    at = change_bytes(path, F8, 129 * row, bytes([right + 1]))
    finding = only(verify(path), "tile")
    assert (finding.tensor, finding.offset, finding.severity) == (F8, at, "error")
    assert finding.where == f"row {row}, block 0"
    assert finding.found == f"scale byte {right + 1}"
    assert finding.expected.startswith(f"{right}, as in the other rows")


def test_weights_quantised_block_by_block_are_no_damage(path: Path) -> None:
    """Scales of their own in every block: nothing is broken, but it is no checkpoint's tensor."""
    found = read_header(path).tensor(F8)
    assert found is not None
    for row in range(512):
        change_bytes(path, F8, 129 * row, bytes([100 + row % 3]))
    report = verify(path)
    finding = only(report, "tile")
    assert (finding.severity, finding.n) == ("warning", 4)
    assert report.ok


def test_scale_zero_is_worth_a_look(path: Path) -> None:
    at = change_bytes(path, EXPERTS, 17 * 9, b"\0")
    finding = only(verify(path), "scale_zero")
    assert (finding.tensor, finding.offset, finding.severity) == (EXPERTS, at, "warning")
    assert finding.found == "scale byte 0"
    change_bytes(path, EXPERTS, 17 * 9, bytes(17))
    report = verify(path)
    assert only(report, "scale_zero").found == "scale byte 0 of a block of zeros"
    assert report.ok


def test_mxfp4_scale_nan(path: Path) -> None:
    at = change_bytes(path, EXPERTS, (2 * 128 + 5) * 136 + 17 * 3, b"\xff")
    finding = only(verify(path), "scale_nan")
    assert (finding.tensor, finding.offset, finding.where) == (EXPERTS, at, "row 261, block 3")


@pytest.mark.parametrize("name", [EXPERTS, F8])
def test_a_hole_in_quantised_weights(path: Path, name: str) -> None:
    """What a download that allocated the file first leaves behind."""
    start = change_bytes(path, name, 20000, bytes(9000))
    report = verify(path)
    finding = next(f for f in report.findings if f.check == "hole")
    assert not report.ok
    assert finding.tensor == name
    assert finding.offset is not None
    assert start <= finding.offset <= start + 4096
    assert finding.n in (1, 2)


def test_zeros_of_the_checkpoint_are_no_damage(source: Path, path: Path, tmp_path: Path) -> None:
    """A hole that is in the checkpoint too is worth a look only; other models may have rows of zeros anyway."""
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    with Checkpoint(folder) as checkpoint:
        shard = checkpoint.shards.index(checkpoint.tensors["head.weight"].path)
    rewrite(folder, lambda t: t["head.weight"][1].fill(0), shard=shard)
    size = 2 * 256 * 512
    change_bytes(path, HEAD, 0, bytes(size))
    assert not verify(path).ok
    report = verify(path, against=folder)
    assert report.ok
    assert [(f.check, f.severity) for f in report.findings] == [("hole", "warning")]
    assert not verify(path, against=source).ok
    model = Gguf(
        [("general.architecture", "str", "llama")], [Tensor("a", (4096, 8), 42), Tensor("b", (8,), 0)]
    )
    report = verify(model.write(tmp_path / "other.gguf"))
    assert (report.ok, {f.check for f in report.findings}) == (True, {"hole", "scale_zero"})


def test_holes_in_plain_weights(path: Path) -> None:
    start = change_bytes(path, HEAD, 40000, bytes(20000))
    report = verify(path)
    finding = only(report, "zeros")
    assert finding.severity == "warning"
    assert report.ok
    assert finding.offset is not None
    assert start <= finding.offset <= start + 4096
    assert finding.n in (3, 4)
    change_bytes(path, HEAD, 0, bytes(2 * 256 * 512))
    assert only(verify(path), "hole").found == "nothing but zeros"


@pytest.mark.parametrize(
    ("name", "bits", "text"),
    [
        (NORM, struct.pack("<I", 0x7FC00000), "nan"),
        (NORM, struct.pack("<I", 0xFF800000), "-inf"),
        (HEAD, struct.pack("<H", 0x7F80), "inf"),
        (HEAD, struct.pack("<H", 0xFFC1), "nan"),
    ],
)
def test_numbers_that_are_none(path: Path, name: str, bits: bytes, text: str) -> None:
    at = change_bytes(path, name, len(bits) * 130, bits)
    finding = only(verify(path), "not_finite")
    assert (finding.tensor, finding.offset, finding.found) == (name, at, text)
    assert finding.where == ("element 130" if name == NORM else "row 0, 130")


def test_q8_0_scales(tmp_path: Path) -> None:
    model = Gguf([("general.architecture", "str", "x")], [Tensor("a", (64, 4), 8)]).write(tmp_path / "x.gguf")
    at = change_bytes(model, "a", 34 * 5, struct.pack("<H", 0xFC00))
    finding = only(verify(model), "not_finite")
    assert (finding.offset, finding.where, finding.found) == (at, "row 2, block 1", "scale -inf")


@pytest.mark.parametrize("expert", [8, -1, 2**31 - 1])
def test_experts_that_do_not_exist(path: Path, expert: int) -> None:
    at = change_bytes(path, TABLE, 4 * (3 * 100 + 2), struct.pack("<i", expert))
    finding = only(verify(path), "expert_id")
    assert (finding.tensor, finding.offset, finding.where) == (TABLE, at, "token 100, slot 2")
    assert (finding.found, finding.expected) == (f"expert {expert}", "0 to 7")


def test_an_expert_twice_is_worth_a_look(path: Path) -> None:
    at = change_bytes(path, TABLE, 4 * 3 * 77, struct.pack("<3i", 5, 1, 5))
    report = verify(path)
    finding = only(report, "expert_twice")
    assert (finding.offset, finding.where, finding.severity) == (at, "token 77", "warning")
    assert report.ok


# --- structure ------------------------------------------------------------------------------------


def test_padding(path: Path) -> None:
    header = read_header(path)
    scale = header.tensor("blk.0.hc_attn_scale")
    assert scale is not None
    assert scale.n_bytes == 12
    with path.open("r+b") as file:
        file.seek(scale.start + 15)
        file.write(b"\x07\x01")
    finding = only(verify(path), "padding")
    assert (finding.tensor, finding.offset, finding.found) == (
        "blk.0.hc_attn_scale",
        scale.start + 15,
        "byte 7",
    )
    assert finding.n == 2


def test_padding_before_the_data(tmp_path: Path) -> None:
    model = native_v4().set("general.name", "str", "x" * 18)
    path = model.write(tmp_path / "x.gguf")
    shard = parse_gguf(path)
    assert shard.infos_end < shard.data_start
    with path.open("r+b") as file:
        file.seek(shard.data_start - 1)
        file.write(b"\x01")
    finding = next(f for f in verify(path).findings if f.check == "padding")
    assert (finding.tensor, finding.offset) == (None, shard.data_start - 1)


def test_a_truncated_file_names_every_tensor_that_is_cut(path: Path) -> None:
    header = read_header(path)
    *_, head, norm = header.tensors
    os.truncate(path, head.start + 1000)
    report = verify(path)
    cut = [f for f in report.findings if f.check == "truncated"]
    assert [f.tensor for f in cut] == [head.name, norm.name]
    assert [f.found for f in cut] == [
        "1,000 bytes before the end of the file",
        "0 bytes before the end of the file",
    ]
    assert cut[0].expected == f"{head.n_bytes:,}"
    # the rest was checked all the same
    assert report.n_bytes == sum(t.n_bytes for t in header.tensors) - head.n_bytes - norm.n_bytes


def test_trailing_bytes_are_worth_a_look(path: Path) -> None:
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"abc")
    report = verify(path)
    finding = only(report, "trailing")
    assert (finding.offset, finding.severity) == (size, "warning")
    assert finding.found == "3 bytes behind the last tensor"
    assert report.ok


@pytest.mark.parametrize(
    ("model", "subject", "words"),
    [
        (native_v4().remove("output.weight"), "output.weight", "absent"),
        (native_v4().change(NORM, dims=(512,)), NORM, "wrong dimensions"),
        (native_v4().drop("deepseek4.attention.key_length"), "deepseek4.attention.key_length", "absent"),
        (
            native_v4().rename("hc_head_fn", "output_hc_fn.weight"),
            "output_hc_fn.weight",
            "mixes native and upstream",
        ),
    ],
    ids=["tensor", "dims", "key", "dialect"],
)
def test_what_a_load_refuses(tmp_path: Path, model: Gguf, subject: str, words: str) -> None:
    report = verify(model.write(tmp_path / "x.gguf"))
    finding = next(f for f in report.findings if f.check == "header")
    assert subject in (finding.tensor, finding.key)
    assert words in finding.found
    assert not report.ok


def test_forms_that_do_not_run_may_be_sound(tmp_path: Path) -> None:
    """Values and padding are checked; what a load misses is a note, not damage."""
    model = native_v4()
    model.tensors = [t for t in model.tensors if "_exps." not in str(t.name)]
    path = model.write(tmp_path / "x.gguf")
    report = verify(path)
    assert "header" not in {f.check for f in report.findings}
    assert any("form native-dense" in note for note in report.notes)
    at = change_bytes(path, F8, 129 * 200, b"\xff")
    assert ("scale_nan", at) in {(f.check, f.offset) for f in verify(path).findings}


def test_what_cannot_be_read_is_an_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        verify(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError):
        verify(tmp_path)
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(NotGGUFError):
        verify(tmp_path / "text")
    with pytest.raises(ModelNotFoundError):
        verify(path, against=tmp_path / "absent")
    with pytest.raises(ModelNotFoundError):
        verify(path, check_manifest=tmp_path / "absent")
    with pytest.raises(ArgumentError, match="n_threads"):
        verify(path, n_threads=0)
    # an offset that is not the running sum leaves no way to tell where tensors are
    broken = native_v4().change("output_norm.weight", offset=64).write(tmp_path / "broken.gguf")
    with pytest.raises(FormatError, match="does not start where"):
        verify(broken)


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def split(original: Path, tmp_path: Path) -> Path:
    return split_in_three(original, tmp_path)


def test_shards(split: Path, source: Path, original: Path) -> None:
    report = verify(split, against=source)
    assert (report.ok, report.n_tensors_compared) == (True, 178), report.findings
    header = read_header(split)
    assert len(header.shards) == 3
    tensor = header.tensors[-1]
    assert tensor.shard == 2
    at = tensor.start + 4
    with Path(header.shards[2].path).open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<f", np.inf))
    finding = only(verify(split), "not_finite")
    assert (finding.path, finding.tensor, finding.offset) == (header.shards[2].path, tensor.name, at)
    os.unlink(header.shards[1].path)
    with pytest.raises(ModelNotFoundError):
        verify(split)


def test_a_split_file_answers_to_the_manifest_of_the_original(
    split: Path, original: Path, tmp_path: Path
) -> None:
    verify(original, manifest=tmp_path / "m.json")
    report = verify(split, check_manifest=tmp_path / "m.json")
    assert report.ok
    assert any("tensors were compared, keys were not" in note for note in report.notes)


# --- against a checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "where"),
    [
        (F8, 129 * 5 + 1 + 3, "row 5, block 0"),
        (EXPERTS, (7 * 128 + 100) * 136 + 17 * 2 + 4, "row 996, block 2"),
        (HEAD, 2 * (256 * 3 + 9), "row 3, 9"),
        (NORM, 4 * 7 + 3, "element 7"),
        (TABLE, 4 * (3 * 9 + 1), "row 9, 1"),
    ],
)
def test_one_bit_is_found(path: Path, source: Path, name: str, at: int, where: str) -> None:
    """One flipped bit, whose value is sound by itself: only the checkpoint tells."""
    found = read_header(path).tensor(name)
    assert found is not None
    right = byte_at(path, found.start + at)
    change_bytes(path, name, at, bytes([right ^ 1]))
    report = verify(path, against=source)
    finding = next(f for f in report.findings if f.check == "differs")
    assert (finding.tensor, finding.where, finding.n, finding.severity) == (name, where, 1, "error")
    assert finding.offset is not None
    assert abs(finding.offset - (found.start + at)) <= 4
    assert not report.ok
    if name != TABLE:
        assert verify(path).ok  # without the checkpoint nothing shows


def test_a_scale_is_compared(path: Path, source: Path) -> None:
    """A whole tile of another scale: no rule of the format is broken."""
    found = read_header(path).tensor(F8)
    assert found is not None
    right = byte_at(path, found.start)
    for row in range(128):
        change_bytes(path, F8, 129 * row, bytes([right + 1]))
    assert verify(path).ok
    finding = only(verify(path, against=source), "differs")
    assert (finding.found, finding.n) == (f"scale byte {right + 1}", 128)
    assert finding.expected == f"{right}, as in the checkpoint"


def test_swapped_experts_are_found(path: Path, source: Path) -> None:
    found = read_header(path).tensor(EXPERTS)
    assert found is not None
    size = 128 * 136
    with path.open("r+b") as file:
        file.seek(found.start + 2 * size)
        two, three = file.read(size), file.read(size)
        file.seek(found.start + 2 * size)
        file.write(three + two)
    assert verify(path).ok
    finding = only(verify(path, against=source), "differs")
    assert (finding.tensor, finding.where) == (EXPERTS, "row 256, block 0")


def test_both_directions(path: Path, source: Path, tmp_path: Path) -> None:
    """A tensor less and a tensor more in the checkpoint, each by name."""
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    with Checkpoint(folder) as checkpoint:
        shard = checkpoint.shards.index(checkpoint.tensors["norm.weight"].path)

    def change(tensors: Tensors) -> None:
        del tensors["norm.weight"]
        tensors["vision.weight"] = ("F32", np.ones(4, np.float32))

    rewrite(folder, change, shard=shard)
    report = verify(path, against=folder)
    assert {(f.check, f.tensor) for f in report.findings} == {
        ("no_source", "output_norm.weight"),
        ("not_in_file", "vision.weight"),
    }
    assert not report.ok


def test_a_tensor_less_and_more_in_the_file(source: Path, tmp_path: Path) -> None:
    hp_model = native_v4().remove("blk.5.attn_sinks")
    hp_model.tensors.append(Tensor("blk.9.other", (8,), 0))
    report = verify(hp_model.write(tmp_path / "x.gguf"), against=source)
    found = {(f.check, f.tensor) for f in report.findings}
    assert ("not_in_file", "blk.5.attn_sinks") in found
    assert ("no_source", "blk.9.other") in found


def test_a_type_that_cannot_hold_the_values(source: Path, tmp_path: Path) -> None:
    model = native_v4()
    model.change(F8, kind=8)
    report = verify(model.write(tmp_path / "x.gguf"), against=source)
    finding = next(f for f in report.findings if f.check == "lossy")
    assert (finding.tensor, finding.found) == (F8, "Q8_0")


def test_keys_are_compared(source: Path, path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    config = json.loads((folder / "config.json").read_text())
    config["routed_scaling_factor"] = 2.5
    config["swiglu_limit"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"][3] = tokenizer["model"]["merges"][4]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = verify(path, against=folder)
    assert {(f.key, f.found) for f in report.findings if f.key != "tokenizer.ggml.merges"} == {
        ("expert_weights_scale", "1.5"),
        ("swiglu_limit", "3.0"),
    }
    merges = next(f for f in report.findings if f.key == "tokenizer.ggml.merges")
    assert "as entry 3" in merges.found
    assert {f.check for f in report.findings} == {"key"}


def test_the_generation_is_compared(source: Path, path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    rewrite(folder, lambda t: t.update({"mtp.0.main_proj.weight": ("BF16", np.ones(4, np.uint16))}), shard=2)
    finding = only(verify(path, against=folder), "key")
    assert (finding.key, finding.found) == ("pyllama_dsv4.generation", "preview")
    assert finding.expected.startswith("0731")


def test_scales_stored_as_f32(source: Path, path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    name = "layers.1.attn.wq_b.scale"
    with Checkpoint(folder) as checkpoint:
        shard = checkpoint.shards.index(checkpoint.tensors[name].path)

    def widen(tensors: Tensors) -> None:
        tensors[name] = ("F32", np.ldexp(np.float32(1), tensors[name][1].astype(int) - 127).astype("<f4"))

    rewrite(folder, widen, shard=shard)
    assert verify(path, against=folder).ok

    def bend(tensors: Tensors) -> None:
        tensors[name][1][2, 0] *= np.float32(1.5)

    rewrite(folder, bend, shard=shard)
    finding = only(verify(path, against=folder), "differs")
    assert (finding.tensor, finding.where) == (F8, "row 256, block 0")


def test_a_malformed_checkpoint_is_an_error(path: Path, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "c"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        verify(path, against=folder)


# --- manifests ------------------------------------------------------------------------------------


def test_manifest(path: Path, tmp_path: Path) -> None:
    """The sums are those of the bytes, and a second machine needs nothing else to find one flipped bit."""
    import hashlib

    sums = tmp_path / "sums.json"
    report = verify(path, manifest=sums)
    assert report.ok
    manifest = read_manifest(sums)
    assert report.manifest == manifest
    header = read_header(path)
    raw = path.read_bytes()
    for tensor, entry in zip(header.tensors, manifest.tensors, strict=True):
        assert (entry.name, entry.type, entry.dims) == (tensor.name, tensor.type.name, tensor.dims)
        data = raw[tensor.start : tensor.start + tensor.n_bytes]
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert manifest.shards[0].header_sha256 == hashlib.sha256(raw[: header.data_start]).hexdigest()

    assert verify(path, check_manifest=sums).ok
    at = header.tensors[50].start
    with path.open("r+b") as file:
        file.seek(at + 10)
        file.write(bytes([raw[at + 10] ^ 1]))
    report = verify(path, check_manifest=sums)
    finding = next(f for f in report.findings if f.check == "sha256")
    assert (finding.tensor, finding.offset) == (header.tensors[50].name, at)
    assert finding.expected == manifest.tensors[50].sha256
    assert not report.ok


def test_a_manifest_covers_keys_and_size(path: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums.json"
    verify(path, manifest=sums)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"Tiny V4")
    raw[at] ^= 1
    path.write_bytes(raw + bytes(64))
    assert {f.check for f in verify(path, check_manifest=sums).findings} == {
        "header_sha256",
        "size",
        "trailing",
    }


def test_a_manifest_of_another_model(path: Path, tmp_path: Path) -> None:
    other = native_v4()
    other.remove("blk.5.attn_sinks")
    other.change(NORM, kind=30)
    other.tensors.append(Tensor("more", (8,), 0))
    model = other.write(tmp_path / "other.gguf")
    sums = tmp_path / "sums.json"
    verify(path, manifest=sums)
    found = {(f.check, f.tensor) for f in verify(model, check_manifest=sums).findings}
    assert ("manifest_missing", "blk.5.attn_sinks") in found
    assert ("manifest_type", NORM) in found
    assert ("manifest_extra", "more") in found


def test_no_manifest_of_a_damaged_file(path: Path, tmp_path: Path) -> None:
    change_bytes(path, F8, 129, b"\xff")
    report = verify(path, manifest=tmp_path / "sums.json")
    assert not report.ok
    assert not (tmp_path / "sums.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "pyllama-dsv4 manifest", "version": 2}',
        '{"format": "pyllama-dsv4 manifest", "version": 1}',
        '{"format": "pyllama-dsv4 manifest", "version": 1, "dialect": "x", "tensors": [], "shards": []}',
        '{"format": "pyllama-dsv4 manifest", "version": 1, "dialect": "x", "tensors": [],'
        ' "shards": [{"name": "a", "n_bytes": -1, "header_sha256": "' + "0" * 64 + '"}]}',
        '{"format": "pyllama-dsv4 manifest", "version": 1, "dialect": "x", "tensors": [],'
        ' "shards": [{"name": "a", "n_bytes": 1, "header_sha256": "0"}]}',
        "[" * 100_000,
    ],
)
def test_malformed_manifests(path: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(FormatError, match="not a manifest"):
        verify(path, check_manifest=tmp_path / "m.json")


# --- progress, memory, names ----------------------------------------------------------------------


def test_progress_and_cancel(path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = verify(path, progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (report.n_bytes, report.n_bytes)
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert {call[2] for call in calls} == {t.name for t in read_header(path).tensors}
    with pytest.raises(CancelledError):
        verify(path, progress=lambda *_: False)


def test_every_check_is_documented() -> None:
    with pytest.raises(ValueError, match="no check is called"):
        Findings().add(Finding("unheard of", "error", "x"))
    assert all(text for text in CHECKS.values())


def test_findings_read_well(path: Path) -> None:
    at = change_bytes(path, NORM, 0, struct.pack("<f", np.nan))
    (finding,) = verify(path).findings
    assert str(finding) == (
        f"error: {NORM}: not_finite at byte {at:,}, element 0: found nan, expected a finite number"
    )
    report: dict[str, Any] = verify(path).to_json()
    json.dumps(report)
    assert report["ok"] is False
    assert report["findings"][0]["offset"] == at


MEASURE = """
import resource, sys
from pyllama_dsv4.verify import verify
resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))
report = verify(sys.argv[1], against=sys.argv[2], manifest=sys.argv[3], n_threads=4)
assert {f.check for f in report.findings} >= {"hole", "scale_zero"}  # a file of zeros
assert report.n_bytes > 1_000_000_000, report.n_bytes
# not ru_maxrss, which begins with the size of the process that started this one
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A layer of V4-Flash's true shapes, 3.7 GB, in holes: data segments stay far below 1 GiB."""
    config = synth.flash_config(
        num_hidden_layers=1, compress_ratios=[4, 0], num_hash_layers=1, vocab_size=512
    )
    folder = synth.write_checkpoint(tmp_path / "c", config, seed=0, is_sparse=True)
    path = synth.write_sparse_native(tmp_path / "x.gguf", config, tokenizer=None)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(folder), str(tmp_path / "m.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


# --- whatever happens to a file ---------------------------------------------------------------------------


def test_every_flipped_bit_is_found(original: Path, source: Path, tmp_path: Path) -> None:
    """One bit anywhere in the file: the sums find all of them, the checkpoint all that lie in tensors or padding."""
    sums = tmp_path / "sums.json"
    verify(original, manifest=sums)
    raw = original.read_bytes()
    header = read_header(original)
    rng = np.random.default_rng(8)
    places = [int(i) for i in rng.integers(0, len(raw), 60)]
    places += [int(i) for i in rng.integers(0, header.data_start, 60)]
    # small tensors and the padding behind them, which random places rarely hit
    small = [t for t in header.tensors if t.n_bytes % 32]
    places += [t.start + int(i) for t in small[:20] for i in rng.integers(0, t.n_bytes + 20, 2)]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    n_unreadable = 0
    with path.open("r+b") as file:
        for at in places:
            changed = raw[at] ^ (1 << int(rng.integers(8)))
            file.seek(at)
            file.write(bytes([changed]))
            file.flush()
            try:
                report = verify(path, check_manifest=sums, against=source)
                assert not report.ok, at
                if at >= header.data_start:
                    assert any(f.check in ("differs", "padding") for f in report.findings), at
            except FormatError:
                n_unreadable += 1
                assert at < header.data_start
            file.seek(at)
            file.write(raw[at : at + 1])
            file.flush()
    assert 5 < n_unreadable < 60  # most of the header is text that can still be read


def test_damage_never_ends_in_another_error(original: Path, tmp_path: Path) -> None:
    """Random garbage over random places, and random lengths: a report or a named error, nothing else."""
    raw = original.read_bytes()
    start = read_header(original).data_start
    rng = np.random.default_rng(9)
    path = tmp_path / "x.gguf"
    n_reports = 0
    for i in range(150):
        data = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            # half of the damage hits the header, which is 0.3 % of the file
            at = int(rng.integers(0, start if i % 2 else len(raw)))
            n = int(rng.integers(1, 5 if i % 2 else 3000))
            data[at : at + n] = rng.integers(0, 256, n, np.uint8).tobytes()[: len(data) - at]
        if i % 5 == 0:
            del data[int(rng.integers(0, len(data))) :]
        path.write_bytes(data)
        try:
            report = verify(path)
            str([str(finding) for finding in report.findings])
            json.dumps(report.to_json())
            n_reports += 1
        except (FormatError, ModelFileError):
            pass
    assert n_reports > 50


def test_a_file_that_shrinks_meanwhile(path: Path) -> None:
    def cut(done: int, _total: int, _tensor: str) -> None:
        if done < 300_000:
            os.truncate(path, 1_000_000)

    with pytest.raises(FormatError, match="ends where it should have data") as error:
        verify(path, n_threads=1, progress=cut)
    assert error.value.tensor is not None


def test_read_errors_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    real = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if offset > 2_000_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ModelFileError, match="Input/output error at byte") as error:
        verify(path)
    assert error.value.path == str(path)
    assert error.value.tensor is not None
    assert "disk may be damaged" in str(error.value)
