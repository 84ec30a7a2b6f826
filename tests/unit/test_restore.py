"""The proof that conversion loses nothing: every shard of a checkpoint comes back from the file, by its SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import synth
from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert import (
    Recipe,
    compare_tensor,
    convert,
    read_recipe,
    recipe,
    repack,
    restore,
    unpack,
    write_recipe,
)
from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    CheckpointError,
    ConvertError,
    DiskFullError,
    FormatError,
    MissingKeyError,
    MissingTensorError,
    ModelNotFoundError,
    TensorShapeError,
)
from pyllama_dsv4.header import check_header

pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose codes and scales take every value they can, not only likely ones."""
    folder = synth.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-V4", seed=3, n_shards=5)
    rng = np.random.default_rng(3)
    with Checkpoint(folder) as checkpoint:
        for shard in checkpoint.shards:
            tensors = {}
            for name, t in checkpoint.tensors.items():
                if t.path == shard:
                    array = checkpoint.read(name)
                    if t.dtype in ("F8_E4M3", "I8"):
                        array = rng.integers(0, 256, t.shape, np.uint8).view(array.dtype)
                    elif t.dtype == "F8_E8M0":
                        array = rng.integers(0, 255, t.shape, np.uint8)
                    elif t.dtype == "BF16":
                        array = rng.integers(0, 65536, t.shape, np.uint16)
                    tensors[name] = (t.dtype, array)
            # the layout is the writer's own choice: not in order of names, with metadata
            synth.write_safetensors(shard, dict(sorted(tensors.items(), key=lambda kv: kv[0][::-1])))
    return folder


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    folder = tmp_path_factory.mktemp("made")
    kept = write_recipe(tiny, folder / "r.recipe")
    return convert(tiny, folder / "x.gguf").path, kept


# --- there and back --------------------------------------------------------------------------------------


def test_every_shard_comes_back(tiny: Path, made: tuple[Path, Recipe], tmp_path: Path) -> None:
    path, kept = made
    calls: list[tuple[int, int, str]] = []
    result = restore(path, kept.path, tmp_path / "new" / "out", progress=lambda *args: calls.append(args))
    assert result.is_complete
    assert sums(tmp_path / "new" / "out") == sums(tiny)
    assert sorted(os.listdir(tmp_path / "new" / "out")) == sorted(sums(tiny))
    assert [p.name for p in result.paths] == sorted(sums(tiny))
    assert result.n_bytes == sum(p.stat().st_size for p in result.paths)
    done = [n for n, _, _ in calls]
    assert done == sorted(done)
    assert {total for _, total, _ in calls} == {done[-1]}


def test_from_split_files_and_pieces_of_any_size(
    tiny: Path, made: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = convert(tiny, tmp_path / "x.gguf", max_file_bytes=2_000_000).path
    monkeypatch.setattr(unpack, "PIECE_BYTES", 800)
    monkeypatch.setattr(repack, "PIECE_BYTES", 800)
    restore(path, made[1].path, tmp_path / "out", n_threads=3)
    assert sums(tmp_path / "out") == sums(tiny)


def test_scales_and_plain_tensors_of_other_types(tmp_path: Path) -> None:
    """F32 scales, F32 norms and I32 tables convert to the same file, and come back as what they were."""
    folder = synth.write_checkpoint(tmp_path / "c", seed=4)
    with Checkpoint(folder) as checkpoint:
        tensors = {n: (t.dtype, checkpoint.read(n)) for n, t in checkpoint.tensors.items()}
    for name, (dtype, array) in tensors.items():
        if dtype == "F8_E8M0":
            array.reshape(-1)[0] = 0
            tensors[name] = ("F32", np.ldexp(np.float32(1), array.astype(int) - 127).astype(np.float32))
        elif name.endswith("norm.weight"):
            tensors[name] = ("F32", np.random.default_rng(1).standard_normal(array.shape).astype(np.float32))
        elif dtype == "I64":
            tensors[name] = ("I32", array.astype(np.int32))
    synth.write_safetensors(folder / "model.safetensors", tensors)
    write_recipe(folder, tmp_path / "r")
    restore(convert(folder, tmp_path / "x.gguf").path, tmp_path / "r", tmp_path / "out")
    assert sums(tmp_path / "out") == sums(folder)


FLASH_SAMPLE = synth.flash_config(
    num_hidden_layers=3,
    compress_ratios=[0, 4, 128],
    num_hash_layers=1,
    n_routed_experts=2,
    num_experts_per_tok=2,
    vocab_size=512,
)
PRO_SAMPLE = synth.pro_config(
    num_hidden_layers=2,
    compress_ratios=[128, 4],
    num_hash_layers=1,
    n_routed_experts=2,
    num_experts_per_tok=2,
    vocab_size=512,
)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FLASH_SAMPLE, PRO_SAMPLE], ids=["flash", "pro"])
def test_true_shapes(tmp_path: Path, config: dict[str, Any]) -> None:
    """Layers of each kind in the released dimensions, with fewer experts and tokens."""
    folder = synth.write_checkpoint(tmp_path / "c", config, seed=5, n_shards=3)
    write_recipe(folder, tmp_path / "r", n_threads=2)
    path = convert(folder, tmp_path / "x.gguf").path
    check_header(path)
    restore(path, tmp_path / "r", tmp_path / "out")
    assert sums(tmp_path / "out") == sums(folder)


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_shards_with_tensors_left_out_are_named(tmp_path: Path, draft: synth.Draft) -> None:
    folder = synth.write_checkpoint(tmp_path / "c", seed=6, n_shards=4, draft=draft)
    write_recipe(folder, tmp_path / "r")
    result = restore(convert(folder, tmp_path / "x.gguf").path, tmp_path / "r", tmp_path / "out")
    assert not result.is_complete
    with Checkpoint(folder) as checkpoint:
        missing: dict[str, list[str]] = {}
        for name, t in checkpoint.tensors.items():
            if name.startswith("mtp."):
                missing.setdefault(t.path.name, []).append(name)
        assert {s.name: list(s.missing) for s in result.left_out} == missing
        for shard in result.left_out:
            n = sum(t.path.name == shard.name for t in checkpoint.tensors.values())
            assert shard.n_tensors == n
    originals = sums(folder)
    assert sums(tmp_path / "out") == {n: s for n, s in originals.items() if n not in missing}
    assert 0 < len(missing) < 4


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
@pytest.mark.parametrize("piece_bytes", [None, 800])
def test_with_the_draft_file_every_shard_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draft: synth.Draft, piece_bytes: int | None
) -> None:
    folder = synth.write_checkpoint(tmp_path / "c", seed=6, n_shards=4, draft=draft)
    write_recipe(folder, tmp_path / "r")
    model = convert(folder, tmp_path / "x.gguf").path
    extra = convert(folder, tmp_path / "d.gguf", draft=True).path
    if piece_bytes is not None:
        monkeypatch.setattr(unpack, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(repack, "PIECE_BYTES", piece_bytes)
    result = restore(model, tmp_path / "r", tmp_path / "out", draft=extra)
    assert result.is_complete
    assert sums(tmp_path / "out") == sums(folder)
    with pytest.raises((MissingTensorError, MissingKeyError)) as caught:
        restore(model, tmp_path / "r", tmp_path / "out", draft=model)
    assert caught.value.path == str(model)


def test_a_draft_file_of_other_weights(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "c", seed=6, n_shards=4, draft="mtp")
    other = synth.write_checkpoint(tmp_path / "o", seed=7, draft="mtp")
    write_recipe(folder, tmp_path / "r")
    model = convert(folder, tmp_path / "x.gguf").path
    extra = convert(other, tmp_path / "d.gguf", draft=True).path
    with pytest.raises(ConvertError, match="not the original") as caught:
        restore(model, tmp_path / "r", tmp_path / "out", draft=extra)
    assert Path(str(caught.value.path)).name == "model-00004-of-00004.safetensors"


# --- what cannot come back -------------------------------------------------------------------------------


def damage(path: Path, to: Path, tensor: str, at: int, value: bytes | None = None) -> Path:
    """Copy a file with one byte of a tensor changed."""
    shutil.copyfile(path, to)
    found = check_header(path).header.tensor(tensor)
    assert found is not None
    with open(to, "r+b") as f:
        f.seek(found.start + at)
        old = f.read(1)
        f.seek(found.start + at)
        f.write(value or bytes([old[0] ^ 1]))
    return to


def test_a_changed_code_is_found(tiny: Path, made: tuple[Path, Recipe], tmp_path: Path) -> None:
    path, kept = made
    bad = damage(path, tmp_path / "bad.gguf", "blk.5.ffn_up_exps.weight", 1000)
    with pytest.raises(ConvertError, match="not the original; found SHA-256") as caught:
        restore(bad, kept.path, tmp_path / "out")
    name = Path(str(caught.value.path)).name
    assert name in sums(tiny)
    assert name not in os.listdir(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial*"))
    rebuilt = sums(tmp_path / "out")  # the shards before it are the originals
    assert rebuilt == {n: s for n, s in sums(tiny).items() if n in rebuilt}


@pytest.mark.parametrize(
    ("tensor", "at", "message"),
    [
        ("blk.3.attn_q_a.weight", 0, "scale"),  # the scale of the first row of a tile, not that of the others
        ("output_norm.weight", 4, "BF16 does not have"),
    ],
)
def test_data_that_no_checkpoint_gives(
    made: tuple[Path, Recipe], tmp_path: Path, tensor: str, at: int, message: str
) -> None:
    path, kept = made
    bad = damage(path, tmp_path / "bad.gguf", tensor, at)
    with pytest.raises(FormatError, match=message) as caught:
        restore(bad, kept.path, tmp_path / "out")
    assert caught.value.tensor == tensor
    assert caught.value.path == str(bad)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # random scales leave the range of F32
def test_requantised_file(tiny: Path, made: tuple[Path, Recipe], tmp_path: Path) -> None:
    plain = synth.write_upstream_f32(tiny, tmp_path / "f32.gguf")
    with pytest.raises(TensorShapeError, match="requantised") as caught:
        restore(plain, made[1].path, tmp_path / "out")
    assert caught.value.tensor == "token_embd.weight"
    assert not (tmp_path / "out").exists()


def test_recipe_of_another_model(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    other = synth.write_checkpoint(tmp_path / "c", synth.tiny_config(hidden_size=128), seed=1)
    write_recipe(other, tmp_path / "r")
    with pytest.raises(FormatError, match="does not belong to the file") as caught:
        restore(made[0], tmp_path / "r", tmp_path / "out")
    assert caught.value.path == str(tmp_path / "r")


def test_recipe_of_other_weights(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    other = synth.write_checkpoint(tmp_path / "c", seed=99)
    write_recipe(other, tmp_path / "r")
    with pytest.raises(ConvertError, match="made from another checkpoint"):
        restore(made[0], tmp_path / "r", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_no_space(made: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError):
        restore(made[0], made[1].path, tmp_path / "out")


def test_cancelled(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        restore(made[0], made[1].path, tmp_path / "out", progress=lambda done, *_: done < 3_000_000)
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_missing_files(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such recipe"):
        restore(made[0], tmp_path / "r", tmp_path / "out")
    with pytest.raises(ModelNotFoundError):
        restore(tmp_path / "x", made[1].path, tmp_path / "out")


# --- recipes ---------------------------------------------------------------------------------------------


def test_a_recipe_is_small_and_always_the_same(tiny: Path, tmp_path: Path) -> None:
    a, b = (write_recipe(tiny, tmp_path / n, n_threads=t) for n, t in (("a", 1), ("b", 4)))
    assert a.path.read_bytes() == b.path.read_bytes()
    assert read_recipe(a.path).headers == a.headers
    others = {f.name: f.sha256 for f in a.files}
    assert others == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in tiny.iterdir()
        if p.suffix != ".safetensors"
    }
    assert {s.name: s.sha256 for s in a.shards} == sums(tiny)


def test_other_files_of_a_recipe(tmp_path: Path) -> None:
    """Those in folders too, but nothing hidden, and nothing that a conversion into the folder leaves there."""
    folder = synth.write_checkpoint(tmp_path / "c", seed=1, is_sparse=True)
    (folder / "inference").mkdir()
    (folder / "inference" / "model.py").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    before = [f.name for f in write_recipe(folder, folder / "r.recipe").files]
    assert before == ["README.md", "config.json", "generation_config.json", "inference/model.py"]
    (folder / "x.gguf.partial").write_text("x")
    assert [f.name for f in write_recipe(folder, folder / "r.recipe").files] == before


def test_a_recipe_is_current_until_a_shard_changes(tmp_path: Path) -> None:
    folder = synth.write_checkpoint(tmp_path / "c", seed=1, n_shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert not recipe.is_current(tmp_path / "r", folder)
    write_recipe(folder, tmp_path / "r")
    assert recipe.is_current(tmp_path / "r", folder)
    os.utime(shard)
    os.utime(tmp_path / "r", (2, 2))
    assert not recipe.is_current(tmp_path / "r", folder)
    os.utime(shard, (1, 1))
    assert recipe.is_current(tmp_path / "r", folder)
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b'"pt"', b'"np"', 1))
    os.utime(shard, (1, 1))
    assert not recipe.is_current(tmp_path / "r", folder)
    (tmp_path / "r").write_bytes(b"")
    assert not recipe.is_current(tmp_path / "r", folder)


def test_recipe_progress_and_cancel(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, str]] = []
    write_recipe(tiny, tmp_path / "a", progress=lambda *args: calls.append(args))
    assert calls[-1][0] == calls[-1][1] == sum(p.stat().st_size for p in tiny.iterdir())
    with pytest.raises(CancelledError):
        write_recipe(tiny, tmp_path / "b", progress=lambda *_: False)
    assert not (tmp_path / "b").exists()


def archive(manifest: object, headers: bytes | None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        if manifest is not ...:
            z.writestr("recipe.json", manifest if isinstance(manifest, str) else json.dumps(manifest))
        if headers is not None:
            z.writestr("headers", headers)
    return buffer.getvalue()


HEADER = (2).to_bytes(8, "little") + b"{}"
GOOD_SHARD = {"name": "a.safetensors", "n_bytes": 10, "sha256": "00", "n_bytes_header": 10}


def manifest(*shards: object, **changes: object) -> dict[str, object]:
    return {"format": 1, "shards": list(shards), "files": []} | changes


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "File is not a zip file"),
    "other file": (b"GGUF" * 100, "not a zip"),
    "no manifest": (archive(..., HEADER), "no member 'recipe.json'"),
    "no headers": (archive(manifest(GOOD_SHARD), None), "no member 'headers'"),
    "no JSON": (archive("{", HEADER), "malformed recipe"),
    "deep JSON": (archive("[" * 100_000, HEADER), "malformed recipe"),
    "other format": (archive(manifest(format=2), b""), "format 2"),
    "a list": (archive([], b""), "malformed recipe"),
    "no shards": (archive({"format": 1}, b""), "shards: None"),
    "missing field": (archive(manifest({"name": "a.safetensors"}), HEADER), "an object of name"),
    "wrong field": (archive(manifest(GOOD_SHARD | {"n_bytes": "10"}), HEADER), "an object of name"),
    "true as number": (archive(manifest(GOOD_SHARD | {"n_bytes": True}), HEADER), "an object of name"),
    "path as name": (archive(manifest(GOOD_SHARD | {"name": "../a.safetensors"}), HEADER), "shard name"),
    "negative size": (archive(manifest(GOOD_SHARD | {"n_bytes_header": -10}), HEADER), "bytes of header"),
    "short headers": (archive(manifest(GOOD_SHARD), HEADER[:-1]), "9 bytes of header"),
    "long headers": (archive(manifest(GOOD_SHARD), HEADER + b" "), "1 bytes after the last"),
    "other length": (archive(manifest(GOOD_SHARD), b"\3" + HEADER[1:]), "another length"),
    "same name twice": (archive(manifest(GOOD_SHARD, GOOD_SHARD), HEADER * 2), "two shards of one name"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_recipe(tmp_path: Path, case: str) -> None:
    raw, message = MALFORMED[case]
    (tmp_path / "r").write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        read_recipe(tmp_path / "r")
    assert caught.value.path == str(tmp_path / "r")


def test_recipe_with_a_malformed_header(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    header = (4).to_bytes(8, "little") + b"[1,]"
    raw = archive(manifest(GOOD_SHARD | {"n_bytes": 12, "n_bytes_header": 12}), header)
    (tmp_path / "r").write_bytes(raw)
    with pytest.raises(CheckpointError, match="JSON") as caught:
        restore(made[0], tmp_path / "r", tmp_path / "out")
    assert caught.value.path == "a.safetensors"


def test_a_recipe_that_unpacks_to_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "MAX_HEADERS_BYTES", 1000)
    (tmp_path / "r").write_bytes(archive(manifest(GOOD_SHARD), bytes(2000)))
    with pytest.raises(FormatError, match="2000 bytes of 'headers'"):
        read_recipe(tmp_path / "r")


def refusal(path: Path) -> FormatError | None:
    try:
        read_recipe(path)
    except FormatError as e:
        return e
    return None


def test_mutated_recipes_are_read_or_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    good = write_recipe(tiny, tmp_path / "good").path.read_bytes()
    rng = np.random.default_rng(0)
    n_refused = 0
    for _ in range(200):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(len(raw))] = rng.integers(256)
        (tmp_path / "r").write_bytes(raw[: rng.integers(len(raw)) if rng.integers(3) == 0 else None])
        error = refusal(tmp_path / "r")
        if error is not None:
            n_refused += 1
            assert error.path == str(tmp_path / "r")
    assert n_refused > 150


# --- one tensor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "native", "n_sources"),
    [
        ("blk.3.attn_kv_latent.weight", "blk.3.attn_kv_latent.weight", 2),
        ("blk.3.attn_kv.weight", "blk.3.attn_kv_latent.weight", 2),
        ("layers.4.ffn.experts.7.w2.scale", "blk.4.ffn_down_exps.weight", 16),
        ("norm.weight", "output_norm.weight", 1),
        ("blk.1.ffn_gate_tid2eid", "blk.1.ffn_gate_tid2eid", 1),
    ],
)
def test_compare_one_tensor(
    tiny: Path, made: tuple[Path, Recipe], tmp_path: Path, name: str, native: str, n_sources: int
) -> None:
    found = compare_tensor(tiny, name, file=made[0])
    assert found.is_equal
    assert (found.spec.native, found.n_sources, found.file) == (native, n_sources, made[0])
    tensor = check_header(made[0]).header.tensor(native)
    assert tensor is not None
    with open(made[0], "rb") as f:
        f.seek(tensor.start)
        assert hashlib.sha256(f.read(tensor.n_bytes)).hexdigest() == found.sha256
    at = tensor.n_bytes - 1
    bad = damage(made[0], tmp_path / "bad.gguf", native, at)
    found = compare_tensor(tiny, name, file=bad)
    assert not found.is_equal
    assert found.source_difference is None
    assert found.file_difference is not None
    assert f"byte {at:,} of {native}" in found.file_difference


def test_a_conversion_that_does_not_come_back(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = repack._codec.mxfp4_pack

    class Wrong:
        """Packs the last byte of each row wrong."""

        f8_e4m3_b128_pack = repack._codec.f8_e4m3_b128_pack

        @staticmethod
        def mxfp4_pack(*args: Any, **options: Any) -> Any:
            packed = pack(*args, **options)
            packed[:, -1] ^= 16
            return packed

    monkeypatch.setattr(repack, "_codec", Wrong)
    found = compare_tensor(tiny, "blk.3.ffn_up_exps.weight")
    assert not found.is_equal
    assert found.source_difference is not None
    assert "layers.3.ffn.experts.0.w3.weight" in found.source_difference
    assert compare_tensor(tiny, "blk.3.attn_q_a.weight").is_equal


def test_compare_needs_only_the_tensor(tmp_path: Path) -> None:
    """A checkpoint that cannot be converted as a whole can be tried."""
    folder = synth.write_checkpoint(tmp_path / "c", seed=1)
    with Checkpoint(folder) as c:
        tensors = {n: (t.dtype, c.read(n)) for n, t in c.tensors.items() if n != "norm.weight"}
    synth.write_safetensors(folder / "model.safetensors", tensors)
    assert compare_tensor(folder, "blk.0.attn_q_a.weight").is_equal
    with pytest.raises(CheckpointError) as caught:
        compare_tensor(folder, "output_norm.weight")
    assert caught.value.tensor == "norm.weight"


def test_compare_refusals(tiny: Path, made: tuple[Path, Recipe], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"blk\.3\.attn_q_a\.weight"):
        compare_tensor(tiny, "blk.3.attn_qa.weight")
    other = synth.write_checkpoint(
        tmp_path / "c", synth.tiny_config(num_hidden_layers=3, q_lora_rank=256), seed=1
    )
    file = convert(other, tmp_path / "other.gguf").path
    with pytest.raises(TensorShapeError) as wrong:
        compare_tensor(tiny, "blk.0.attn_q_a.weight", file=file)
    assert wrong.value.tensor == "blk.0.attn_q_a.weight"
    with pytest.raises(MissingTensorError):
        compare_tensor(tiny, "blk.5.attn_q_a.weight", file=file)
    with pytest.raises(CancelledError):
        compare_tensor(tiny, "blk.5.attn_q_a.weight", progress=lambda *_: False)


def test_existing_shards_are_replaced_when_complete(made: tuple[Path, Recipe], tmp_path: Path) -> None:
    (tmp_path / made[1].shards[0].name).write_bytes(b"old")
    restore(made[0], made[1].path, tmp_path)
    assert sums(tmp_path) == {s.name: s.sha256 for s in made[1].shards}
