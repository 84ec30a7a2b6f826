"""The header check: every refusal by class, tensor and key, their order, and what is accepted."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import (
    FLASH,
    FLASH_FILE_BYTES,
    PRO,
    TINY,
    Gguf,
    Tensor,
    flash_file,
    keys_native_lacks,
    native_v4,
    upstream_v4,
)
from refusals import refusal, verdict

from pyllama_dsv4.errors import (
    DialectError,
    FormatError,
    MissingKeyError,
    MissingTensorError,
    ModelNotFoundError,
    PyllamaError,
    TensorShapeError,
    TruncatedFileError,
    Type42Error,
    UnsupportedModelError,
)
from pyllama_dsv4.gguf_types import FILE_TYPES
from pyllama_dsv4.header import check_header, read_header
from pyllama_dsv4.tensors import HParams, tensor_table

P = "deepseek4."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# --- accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [0, None], ids=["gpt2", "none"])
def test_native_file(path: Path, n_tokens: int | None) -> None:
    report = check_header(native_v4(n_tokens=n_tokens).write(path))
    assert report.dialect == "native"
    assert report.hparams is not None
    assert asdict(report.hparams) == asdict(replace(TINY, rms_eps=np.float32(1e-6).item()))
    assert report.type_counts == {"BF16": 16, "F32": 91, "F8_E4M3_B128": 50, "MXFP4": 18, "I32": 3}
    assert report.n_params == sum(spec.n_elements for spec in tensor_table(TINY))
    assert sum(report.type_bytes.values()) == sum(spec.n_bytes for spec in tensor_table(TINY))
    assert report.derived_keys == {
        P + "swiglu_clamp_shexp": [3.0] * 6,
        P + "attention.output_group_count": 2,
        P + "attention.output_lora_rank": 128,
        P + "attention.compress_rope_freq_base": 160000.0,
        P + "attention.compress_ratios": [0, 0, 4, 128, 4, 128],
        P + "hyper_connection.count": 4,
        P + "hyper_connection.sinkhorn_iterations": 20,
        P + "hyper_connection.epsilon": 1e-6,
        P + "hash_layer_count": 3,
        P + "expert_gating_func": 4,
    }


def test_native_file_without_rope_scaling(path: Path) -> None:
    """The sibling of the published file lacks the group; upstream's defaults would be wrong."""
    report = check_header(native_v4(with_rope_scaling=False).write(path))
    assert {key.removeprefix(P): value for key, value in report.derived_keys.items() if ".rope." in key} == {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 65536,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    assert report.hparams is not None
    assert (report.hparams.yarn_factor, report.hparams.yarn_n_ctx_orig) == (16.0, 65536)


def test_rope_scaling_is_derived_as_a_group_only(path: Path) -> None:
    report = check_header(native_v4().drop(P + "rope.scaling.factor").write(path))
    assert not any(".rope." in key for key in report.derived_keys)
    assert report.hparams is not None
    assert report.hparams.yarn_factor == 1.0


def test_present_keys_are_never_overwritten(path: Path) -> None:
    model = native_v4()
    model.keys += keys_native_lacks(replace(TINY, compress_rope_theta=5.0, hc_sinkhorn_iterations=7))
    report = check_header(model.write(path))
    assert report.derived_keys == {}
    assert report.hparams is not None
    assert report.hparams.compress_rope_theta == 5.0
    assert report.hparams.hc_sinkhorn_iterations == 7


def test_compressed_rope_base_has_a_default(path: Path) -> None:
    model = native_v4().set(P + "rope.freq_base_swa", "f32", 77.0)
    assert check_header(model.write(path)).derived_keys[P + "attention.compress_rope_freq_base"] == 77.0
    model.drop(P + "rope.freq_base_swa")
    assert check_header(model.write(path)).derived_keys[P + "attention.compress_rope_freq_base"] == 160000.0


def test_upstream_file(path: Path) -> None:
    report = check_header(upstream_v4().write(path))
    assert (report.dialect, report.derived_keys) == ("upstream", {})
    assert report.type_counts["Q8_0"] == 50
    assert report.hparams is not None
    assert report.hparams.compress_ratios == (0, 0, 4, 128, 4, 128, 0)


@pytest.mark.parametrize("type_", ["u32", "i32"])
def test_values_may_be_stored_per_layer(path: Path, type_: str) -> None:
    model = upstream_v4()
    for key, value in (("attention.head_count", 4), ("attention.head_count_kv", 1), ("expert_used_count", 3)):
        model.set(P + key, f"arr[{type_}]", [value] * 6)
    model.set(P + "swiglu_clamp_exp", "f32", 3.0)
    report = check_header(model.write(path))
    assert report.hparams is not None
    assert (report.hparams.n_head, report.hparams.n_expert_used, report.hparams.swiglu_limit) == (4, 3, 3.0)


@pytest.mark.parametrize("hp", [FLASH, PRO], ids=["flash", "pro"])
def test_real_dimensions(path: Path, hp: HParams) -> None:
    report = check_header(native_v4(hp, n_tokens=None).write(path))
    assert report.hparams is not None
    assert report.hparams.compress_ratios == hp.compress_ratios
    assert report.derived_keys[P + "attention.output_group_count"] == hp.o_groups


def test_the_published_files_header(path: Path) -> None:
    flash_file(path)
    start = time.process_time()
    report = check_header(path)
    assert time.process_time() - start < 2
    assert report.header.n_file_bytes == FLASH_FILE_BYTES
    assert report.header.data_start == 5_325_312
    assert len(report.header.tensors) == 1328
    assert report.n_params == 284_334_567_511
    last = report.header.tensors[-1]
    assert (last.name, last.start + last.n_bytes) == ("output_norm.weight", FLASH_FILE_BYTES)


def test_community_types_in_the_native_dialect(path: Path) -> None:
    """Names and keys are translated whatever the weights' types are."""
    model = native_v4(replace(TINY, n_embd=512))
    for tensor in model.tensors:
        if tensor.kind in (39, 42) and tensor.dims[0] % 256 == 0:
            model.change(str(tensor.name), kind=12)
        elif tensor.kind == 42:
            model.change(str(tensor.name), kind="q2_0")
    report = check_header(model.write(path))
    assert report.dialect == "native"
    assert set(report.type_counts) == {"BF16", "F32", "I32", "MXFP4", "Q2_0", "Q4_K"}


def test_a_stock_q2_0_file_is_not_taken_for_fp8(path: Path) -> None:
    model = upstream_v4()
    for tensor in model.tensors:
        if tensor.kind == 8:
            model.change(str(tensor.name), kind="q2_0")
    assert check_header(model.write(path)).type_counts["Q2_0"] == 50


def test_router_weights_may_be_bf16_and_output_a_grouped(path: Path) -> None:
    model = upstream_v4()
    for il in range(6):
        model.change(f"blk.{il}.ffn_gate_inp.weight", kind=30)
        model.change(f"blk.{il}.attn_output_a.weight", dims=(256, 128, 2))
        model.change(f"blk.{il}.attn_norm.weight", dims=(256, 1, 1, 1))
    check_header(model.write(path))


def test_optional_tensors(path: Path) -> None:
    model = native_v4().change("output.weight", kind=40)
    model.tensors += [
        Tensor("blk.5.exp_probs_b_vl.bias", (8,), 0),
        Tensor("blk.0.ffn_gate_shexp.scale", (1,), 0),
        Tensor("blk.0.ffn_down_exps.input_scale", (8,), 0),
        Tensor("output.scale", (1,), 0),
    ]
    check_header(model.write(path))


def test_trailing_data_is_accepted(path: Path) -> None:
    check_header(native_v4().write(path, extra=1000))


def test_version_2_and_other_alignments(path: Path) -> None:
    model = native_v4()
    model.version, model.alignment = 2, 64
    report = check_header(model.set("general.alignment", "u32", 64).write(path))
    assert (report.header.alignment, report.header.data_start % 64) == (64, 0)


def test_a_model_of_another_architecture(path: Path) -> None:
    model = Gguf(
        [("general.architecture", "str", "llama")],
        [
            Tensor("a", (256, 8), 12),
            Tensor("b", (128, 8), 42),
            Tensor("c", (128, 8), "q2_0"),
            Tensor("d", (8,), 0),
        ],
    ).write(path)
    report = check_header(model, any_architecture=True)
    assert (report.dialect, report.hparams, report.derived_keys) == ("other", None, {})
    assert [tensor.type.name for tensor in report.header.tensors] == ["Q4_K", "F8_E4M3_B128", "Q2_0", "F32"]
    assert check_header(read_header(model), any_architecture=True).type_counts == report.type_counts


def test_any_architecture_still_checks_a_v4_model(path: Path) -> None:
    assert check_header(native_v4().write(path), any_architecture=True).hparams is not None
    error = refusal(native_v4().remove("output.weight").write(path), any_architecture=True)
    assert type(error) is MissingTensorError


def test_a_file_without_tensors_is_a_gguf_file(path: Path) -> None:
    report = check_header(Gguf([("general.architecture", "str", "clip")]).write(path), any_architecture=True)
    assert report.header.tensors == ()
    # no data section, so no padding in front of it either
    assert report.header.data_start == path.stat().st_size


# --- the view -------------------------------------------------------------------------------------


def test_lookup_by_either_name(path: Path) -> None:
    header = read_header(native_v4().write(path))
    tensor = header.tensor("blk.2.attn_compress_ape")
    assert tensor is not None
    assert header.tensor("blk.2.attn_compressor_ape.weight") is tensor
    assert (tensor.dims, tensor.upstream_name) == ((256, 4), "blk.2.attn_compressor_ape.weight")
    assert header.tensor("blk.2.nothing") is None
    fp8 = header.tensor("blk.0.attn_kv_latent.weight")
    assert fp8 is not None
    assert fp8.type42 is not None
    assert fp8.type42.avail == fp8.n_bytes == 256 * 128 // 128 * 129


def test_reading_alone_refuses_only_what_a_parser_does(path: Path) -> None:
    native_v4().remove("output.weight").drop(P + "block_count").set("general.architecture", "str", "x").write(
        path, cut=100
    )
    header = read_header(path)
    assert (header.dialect, header.architecture) == ("other", "x")
    mixed = native_v4().rename("blk.3.attn_sinks", "blk.3.attn_sinks.weight").write(path)
    assert read_header(mixed).dialect == "mixed"
    with pytest.raises(DialectError):
        check_header(read_header(mixed))


# --- step 2: bounds and shards --------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 1000, 1024])
def test_a_truncated_last_tensor(path: Path, cut: int) -> None:
    error = refusal(native_v4().write(path, cut=cut))
    assert (type(error), error.tensor) == (TruncatedFileError, "output_norm.weight")
    assert "interrupted" in str(error)


def test_the_first_truncated_tensor_is_named(path: Path) -> None:
    model = native_v4()
    cut = sum(tensor.n_bytes for tensor in model.tensors[-3:]) + 32
    assert verdict(model.write(path, cut=cut)) == (TruncatedFileError, "hc_head_fn", None)


def test_a_missing_padding_at_the_end_is_no_truncation(path: Path) -> None:
    model = Gguf([("general.architecture", "str", "x")], [Tensor("a", (7,), 0)])
    check_header(model.write(path, cut=4), any_architecture=True)
    assert type(refusal(model.write(path, cut=5), any_architecture=True)) is TruncatedFileError


def test_a_cut_last_fp8_tensor_is_truncated_not_q2_0(path: Path) -> None:
    """The bytes left would do for a smaller claimant of type 42; the others' meaning decides."""
    model = native_v4()
    model.tensors.append(model.tensors.pop(model.tensors.index(model.tensor("blk.5.ffn_up_shexp.weight"))))
    cut = model.tensors[-1].n_bytes // 2
    error = refusal(model.write(path, cut=cut))
    assert (type(error), error.tensor) == (TruncatedFileError, "blk.5.ffn_up_shexp.weight")
    assert "F8_E4M3_B128 33,024" in str(error)


def shards(tmp_path: Path, n: int = 3, **changes: Callable[[list[Gguf]], None]) -> Path:
    """Split the tiny native model into n files."""
    model = native_v4()
    parts = [Gguf([], []) for _ in range(n)]
    parts[0].keys = list(model.keys)
    for i, tensor in enumerate(model.tensors):
        parts[min(i // 60, n - 1)].tensors.append(tensor)
    for i, part in enumerate(parts):
        part.set("split.no", "u16", i).set("split.count", "u16", n)
        part.set("split.tensors.count", "i32", len(model.tensors))
    for change in changes.values():
        change(parts)
    for i, part in enumerate(parts):
        part.write(tmp_path / f"m-{i + 1:05d}-of-{n:05d}.gguf")
    return tmp_path / f"m-00001-of-{n:05d}.gguf"


def test_shards(tmp_path: Path) -> None:
    report = check_header(shards(tmp_path))
    assert report.dialect == "native"
    assert [len(shard.tensors) for shard in report.header.shards] == [60, 60, 58]
    assert report.derived_keys[P + "attention.compress_ratios"] == [0, 0, 4, 128, 4, 128]
    tensor = report.header.tensor("output_norm.weight")
    assert tensor is not None
    assert tensor.shard == 2
    assert tensor.start == report.header.shards[2].data_start + tensor.offset
    assert report.header.n_file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_one_shard_of_one(tmp_path: Path) -> None:
    model = native_v4().set("split.count", "u16", 1)
    check_header(model.write(tmp_path / "any-name.gguf"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first = shards(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    error = refusal(first)
    assert type(error) is ModelNotFoundError
    assert error.path == str(tmp_path / "m-00002-of-00003.gguf")


def test_a_later_shard_names_the_first(tmp_path: Path) -> None:
    shards(tmp_path)
    error = refusal(tmp_path / "m-00002-of-00003.gguf")
    assert (type(error), error.key) == (FormatError, "split.no")
    assert "-00001-of-00003.gguf" in str(error)


SINKS = "blk.3.attn_sinks.weight"


@pytest.mark.parametrize(
    ("change", "class_", "tensor", "key", "shard"),
    [
        (lambda s: s[0].set("split.count", "u32", 3), MissingKeyError, None, "split.count", 1),
        (lambda s: s[0].set("split.no", "u32", 0), MissingKeyError, None, "split.no", 1),
        (lambda s: s[0].drop("split.no"), MissingKeyError, None, "split.no", 1),
        (lambda s: s[0].set("split.count", "u16", 4), FormatError, None, "split.count", 1),
        (lambda s: s[1].set("split.no", "u16", 2), FormatError, None, "split.no", 2),
        (lambda s: s[1].set("split.no", "u8", 1), MissingKeyError, None, "split.no", 2),
        (lambda s: s[2].drop("split.no"), MissingKeyError, None, "split.no", 3),
        (lambda s: s[0].set("split.tensors.count", "u32", 178), MissingKeyError, None, "split.tensors.count", 1),
        (lambda s: s[0].drop("split.tensors.count"), MissingKeyError, None, "split.tensors.count", 1),
        (lambda s: s[0].set("split.tensors.count", "i32", 179), FormatError, None, "split.tensors.count", 1),
        (lambda s: s[2].tensors.append(s[0].tensors[3]), FormatError, "blk.0.attn_q_a_norm.weight", None, 3),
        (lambda s: s[1].rename("blk.3.attn_sinks", SINKS), DialectError, SINKS, None, 1),
    ],
)  # fmt: skip
def test_wrong_shards(
    tmp_path: Path,
    change: Callable[[list[Gguf]], None],
    class_: type[PyllamaError],
    tensor: str | None,
    key: str | None,
    shard: int,
) -> None:
    error = refusal(shards(tmp_path, change=change))
    assert (type(error), error.tensor, error.key) == (class_, tensor, key)
    assert str(error.path).endswith(f"-{shard:05d}-of-00003.gguf")


def test_a_truncated_shard(tmp_path: Path) -> None:
    first = shards(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    os.truncate(second, second.stat().st_size - 100)
    error = refusal(first)
    assert (type(error), error.path) == (TruncatedFileError, str(second))


def test_a_shard_named_by_its_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path).rename(tmp_path / "-00001-of-00003.gguf")
    monkeypatch.chdir(tmp_path)
    error = refusal("-00001-of-00003.gguf")
    assert (type(error), error.key) == (FormatError, "split.count")


def test_a_shard_without_its_name(tmp_path: Path) -> None:
    first = shards(tmp_path)
    error = refusal(first.rename(tmp_path / "renamed.gguf"))
    assert (type(error), error.key) == (FormatError, "split.count")


# --- step 3: type 42 ------------------------------------------------------------------------------


def test_an_unknown_stride(path: Path) -> None:
    # Q4_K's stride under id 42, in the middle of the file
    model = native_v4().change("blk.1.attn_q_a.weight", kind=12, type_id=42)
    error = refusal(model.write(path))
    assert (type(error), error.tensor) == (Type42Error, "blk.1.attn_q_a.weight")
    for part in (
        "32,768 elements",
        "18,432 bytes available",
        "F8_E4M3_B128 33,024",
        "Q2_0 9,216",
        "PRISM_Q2_0 8,704",
    ):
        assert part in str(error)


def test_prism_is_known_and_not_supported(path: Path) -> None:
    error = refusal(native_v4().change("blk.1.attn_q_a.weight", kind="prism").write(path))
    assert (type(error), error.tensor) == (Type42Error, "blk.1.attn_q_a.weight")
    assert "PrismML" in str(error)


def test_a_last_prism_tensor(path: Path) -> None:
    model = Gguf([("general.architecture", "str", "deepseek4")], [Tensor("a", (1024, 64), "prism")])
    assert verdict(model.write(path)) == (Type42Error, "a", None)
    # other models' files are not judged, only their parse is
    check_header(model.set("general.architecture", "str", "x").write(path), any_architecture=True)


def test_mixed_meanings(path: Path) -> None:
    error = refusal(native_v4().change("blk.1.attn_q_a.weight", kind="q2_0").write(path))
    assert (type(error), error.tensor) == (Type42Error, "blk.1.attn_q_a.weight")
    assert "blk.0.attn_kv_latent.weight" in str(error)


def test_mixed_meanings_across_shards(tmp_path: Path) -> None:
    def change(parts: list[Gguf]) -> None:
        for part in parts[1:]:
            for tensor in part.tensors:
                if tensor.kind == 42:
                    part.change(str(tensor.name), kind="q2_0")

    error = refusal(shards(tmp_path, change=change))
    assert type(error) is Type42Error
    assert str(error.path).endswith("-00002-of-00003.gguf")


def test_rows_fp8_cannot_store(path: Path) -> None:
    model = Gguf([], [Tensor("a", (192, 256), 42), Tensor("b", (8,), 0)])
    error = refusal(model.write(path))
    assert (type(error), error.tensor) == (Type42Error, "a")
    assert "multiple of 128" in str(error)


def test_too_small_to_decide(path: Path) -> None:
    model = Gguf(
        [("general.alignment", "u32", 256)], [Tensor("a", (128,), 42), Tensor("b", (8,), 0)], alignment=256
    )
    error = refusal(model.write(path))
    assert (type(error), error.tensor) == (Type42Error, "a")
    assert "too small" in str(error)


def test_a_lone_last_tensor_of_unknown_size(path: Path) -> None:
    # more bytes than Q2_0 takes, fewer than FP8: an interrupted download of either is possible
    model = Gguf([("general.architecture", "str", "deepseek4")], [Tensor("a", (1024, 64), 42)])
    error = refusal(model.write(path, cut=10000))
    assert (type(error), error.tensor) == (Type42Error, "a")
    assert "incomplete" in str(error)
    error = refusal(model.write(path, cut=60000))
    assert (type(error), error.tensor) == (TruncatedFileError, "a")


# --- steps 4 and 5 --------------------------------------------------------------------------------


def test_an_alignment_that_cannot_be_mapped(path: Path) -> None:
    # the engine asserts on it when it maps the file
    model = native_v4()
    model.alignment = 16
    model.set("general.alignment", "u32", 16)
    model.write(path)
    assert verdict(path) == (FormatError, None, "general.alignment")


def test_indexer_rows_that_cannot_be_rotated(path: Path) -> None:
    # the engine asserts on it when it builds the graph
    native_v4(replace(TINY, indexer_head_dim=96)).write(path)
    assert verdict(path) == (FormatError, None, P + "attention.indexer.key_length")


@pytest.mark.parametrize("name", ["deepseek41", "deepseek2", "llama", ""])
def test_another_architecture(path: Path, name: str) -> None:
    error = refusal(native_v4().set("general.architecture", "str", name).write(path))
    assert (type(error), error.key) == (UnsupportedModelError, "general.architecture")
    assert ("V4.1" in str(error)) == (name == "deepseek41")
    assert repr(name) in str(error)


def test_no_architecture(path: Path) -> None:
    assert verdict(native_v4().drop("general.architecture").write(path)) == (
        MissingKeyError,
        None,
        "general.architecture",
    )
    model = native_v4().set("general.architecture", "u32", 4)
    assert verdict(model.write(path)) == (MissingKeyError, None, "general.architecture")


def test_mixed_names(path: Path) -> None:
    model = native_v4().rename("blk.3.attn_sinks", "blk.3.attn_sinks.weight")
    error = refusal(model.write(path))
    assert (type(error), error.tensor) == (DialectError, "blk.3.attn_sinks.weight")
    assert "blk.0.attn_sinks" in str(error)
    model = upstream_v4().rename("output_hc_base.weight", "hc_head_base")
    assert verdict(model.write(path)) == (DialectError, "hc_head_base", None)


def test_both_forms_of_one_tensor(path: Path) -> None:
    model = native_v4()
    model.tensors.append(Tensor("output_hc_fn.weight", (1024, 4), 0))
    assert verdict(model.write(path)) == (DialectError, "output_hc_fn.weight", None)


# --- step 7: tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [native_v4, upstream_v4], ids=["native", "upstream"])
def test_every_tensor_is_required(path: Path, make: Callable[[], Gguf]) -> None:
    model = make()
    model.keys += [key for key in keys_native_lacks(TINY) if key not in model.keys]
    names = [str(tensor.name) for tensor in model.tensors]
    for name in names[::7] + names[-5:]:
        tensors = list(model.tensors)
        model.remove(name)
        assert verdict(model.write(path)) == (MissingTensorError, name, None)
        model.tensors = tensors


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("token_embd.weight", (256, 319)),
        ("blk.0.attn_sinks", (3,)),
        ("blk.0.attn_sinks", (4, 2)),
        ("blk.0.attn_output_a.weight", (256, 128)),
        ("blk.2.attn_compress_norm.weight", (256,)),
        ("blk.2.indexer.attn_q_b.weight", (128, 4096)),
        ("blk.3.exp_probs_b", (9,)),
        ("blk.0.ffn_gate_tid2eid", (4, 320)),
        ("blk.4.ffn_up_exps.weight", (256, 128, 7)),
        ("output.weight", (512, 160)),
    ],
)
def test_wrong_dimensions(path: Path, name: str, dims: tuple[int, ...]) -> None:
    model = native_v4()
    model.keys += keys_native_lacks(TINY)
    error = refusal(model.change(name, dims=dims).write(path))
    assert (type(error), error.tensor) == (TensorShapeError, name)
    assert error.found == " x ".join(map(str, dims))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.0.attn_norm.weight", 30),
        ("blk.0.attn_norm.weight", 1),
        ("blk.3.exp_probs_b", 26),
        ("hc_head_scale", 1),
        ("blk.0.ffn_gate_tid2eid", 0),
        ("blk.0.ffn_gate_tid2eid", 27),
        ("blk.0.attn_q_a.weight", 26),
        ("blk.2.attn_compress_ape", 27),
        *(("token_embd.weight", kind) for kind in (9, 15, 24, 25, 26, 27, 28)),
    ],
)
def test_a_type_the_engine_cannot_use_there(path: Path, name: str, kind: int) -> None:
    error = refusal(native_v4().change(name, kind=kind).write(path))
    assert (type(error), error.tensor) == (TensorShapeError, name)
    assert error.found == FILE_TYPES[kind].name


@pytest.mark.parametrize(
    ("tensor", "class_"),
    [
        (Tensor("blk.0.attn_q.weight", (8,), 0), UnsupportedModelError),
        (Tensor("blk.6.attn_norm.weight", (256,), 0), UnsupportedModelError),
        (Tensor("blk.00.attn_norm.weight", (256,), 0), UnsupportedModelError),
        (Tensor("blk.6.exp_probs_b_vl.bias", (8,), 0), UnsupportedModelError),
        (Tensor("output.scale", (1,), 0), UnsupportedModelError),
        (Tensor("blk.0.exp_probs_b_vl.bias", (9,), 0), TensorShapeError),
        (Tensor("blk.0.exp_probs_b_vl.bias", (8,), 1), TensorShapeError),
        (Tensor("blk.0.ffn_up_shexp.scale", (8,), 0), TensorShapeError),
    ],
)
def test_other_tensors(path: Path, tensor: Tensor, class_: type[PyllamaError]) -> None:
    model = native_v4()
    model.tensors.append(tensor)
    assert verdict(model.write(path)) == (class_, tensor.name, None)


# --- the order ------------------------------------------------------------------------------------


def test_the_first_fault_in_order_is_named(path: Path) -> None:
    """All steps wrong at once, then repaired one by one: the verdict moves from step to step."""
    model = native_v4()
    model.tensors.append(Tensor("blk.9.other", (8,), 0))
    model.change("output.weight", kind=26)
    model.change("blk.5.attn_norm.weight", dims=(255,))
    model.remove("blk.4.ffn_norm.weight")
    model.set("tokenizer.ggml.model", "str", "bert")
    model.set(P + "expert_count", "u32", 9999)
    model.drop(P + "context_length")
    model.rename("blk.3.hc_ffn_fn", "blk.3.hc_ffn_fn.weight")
    model.set("general.architecture", "str", "deepseek41")
    model.change("blk.1.attn_q_a.weight", kind="q2_0")
    model.change("token_embd.weight", type_id=43)
    model.set("general.alignment", "i32", 32)

    assert verdict(model.write(path, cut=1)) == (FormatError, None, "general.alignment")
    model.drop("general.alignment")
    assert verdict(model.write(path, cut=1)) == (FormatError, "token_embd.weight", None)
    model.change("token_embd.weight", type_id=None)
    assert verdict(model.write(path, cut=1)) == (TruncatedFileError, "blk.9.other", None)
    assert verdict(model.write(path)) == (Type42Error, "blk.1.attn_q_a.weight", None)
    model.change("blk.1.attn_q_a.weight", kind=42)
    assert verdict(model.write(path)) == (UnsupportedModelError, None, "general.architecture")
    model.set("general.architecture", "str", "deepseek4")
    assert verdict(model.write(path)) == (DialectError, "blk.3.hc_ffn_fn.weight", None)
    model.rename("blk.3.hc_ffn_fn.weight", "blk.3.hc_ffn_fn")
    assert verdict(model.write(path)) == (MissingKeyError, None, P + "context_length")
    model.set(P + "context_length", "u32", 4096)
    assert verdict(model.write(path)) == (FormatError, None, P + "expert_count")
    model.set(P + "expert_count", "u32", 8)
    assert verdict(model.write(path)) == (UnsupportedModelError, None, "tokenizer.ggml.model")
    model.set("tokenizer.ggml.model", "str", "gpt2")
    assert verdict(model.write(path)) == (MissingTensorError, "blk.4.ffn_norm.weight", None)
    model.tensors.append(Tensor("blk.4.ffn_norm.weight", (256,), 0))
    assert verdict(model.write(path)) == (TensorShapeError, "blk.5.attn_norm.weight", None)
    model.change("blk.5.attn_norm.weight", dims=(256,))
    assert verdict(model.write(path)) == (TensorShapeError, "output.weight", None)
    model.change("output.weight", kind=30)
    assert verdict(model.write(path)) == (UnsupportedModelError, "blk.9.other", None)
    model.remove("blk.9.other")
    check_header(model.write(path))


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_breaks_the_check(path: Path, seed: int) -> None:
    """Random damage to a header ends in a named error or in acceptance, never in another exception."""
    rng = random.Random(seed)
    model = native_v4(replace(TINY, n_vocab=64))
    intact = model.header()
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(intact)
        for _ in range(rng.choice((1, 1, 1, 3))):
            damage(damaged, rng)
        with path.open("wb") as file:
            file.write(damaged)
            file.truncate(len(damaged) + model.data_bytes)
        outcomes.add(outcome(path))
    assert len(outcomes) >= 6


def damage(data: bytearray, rng: random.Random) -> None:
    where = rng.randrange(len(data) - 8)
    match rng.randrange(4):
        case 0:
            data[where] ^= 1 << rng.randrange(8)
        case 1:
            data[where] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            data[where : where + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
        case _:
            del data[where : where + rng.randrange(1, 9)]


def outcome(path: Path) -> str:
    try:
        check_header(path)
    except PyllamaError as error:
        return type(error).__name__
    return "accepted"


def test_import_loads_neither_the_engine_nor_gguf() -> None:
    code = (
        "import sys, pyllama_dsv4.header\n"
        "loaded = {name.removeprefix('pyllama_dsv4.') for name in sys.modules}\n"
        "assert not loaded & {'gguf', 'numpy', 'cffi', '_llama', '_codec', 'rich', 'click'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
