"""Reading hub-form checkpoints: what is read, and what malformed folders and shards get."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4.checkpoint import DTYPES, Checkpoint
from pyllama_dsv4.errors import (
    CheckpointError,
    ClosedError,
    MissingShardError,
    ModelFileError,
    ModelNotFoundError,
    PyllamaError,
)

Entry = dict[str, Any]


def shard_bytes(header: object, n_data: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        struct.pack("<Q", len(raw)) + raw + bytes(range(256)) * (n_data // 256) + bytes(range(n_data % 256))
    )


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD: dict[str, Entry] = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    return tmp_path


def write_single(folder: Path, header: object = GOOD, n_data: int = 32) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(shard_bytes(header, n_data))
    return path


def write_indexed(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for i, name in enumerate("ab", 1):
        (folder / f"s{i}.safetensors").write_bytes(shard_bytes({name: entry("U8", [4], 0, 4)}, 4))


# --- what is read ----------------------------------------------------------------------------------------


def test_tensors_and_bytes(folder: Path) -> None:
    path = write_single(folder, {"__metadata__": {"format": "pt"}, **GOOD})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.config == {"hidden_size": 8}
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["a"].shape == (2, 3)
        assert checkpoint.tensors["b"].path == path
        data = bytes(range(32))
        np.testing.assert_array_equal(checkpoint.read("a").view("u1").reshape(-1), list(data[:24]))
        assert checkpoint.read("a").dtype == np.float32
        assert checkpoint.read("b").tobytes() == data[24:]
        part = np.zeros(3, np.uint8)
        checkpoint.read_into("b", 2, part)
        assert part.tobytes() == data[26:29]
        with pytest.raises(ValueError, match="of b, which has 8"):
            checkpoint.read_into("b", 6, part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_empty_shapes(folder: Path, dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    write_single(
        folder,
        {
            "scalar": entry(dtype, [], 0, size),
            "none": entry(dtype, [0, 5], size, size),
            "x": entry(dtype, [3], size, 4 * size),
        },
        4 * size,
    )
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("none").shape == (0, 5)
        assert checkpoint.read("x").dtype == DTYPES[dtype]


def test_sharded(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors"})
    with Checkpoint(folder) as checkpoint:
        assert [t.path.name for t in checkpoint.tensors.values()] == ["s1.safetensors", "s2.safetensors"]
        assert checkpoint.read("b").tolist() == [0, 1, 2, 3]


def test_shards_may_be_links_as_in_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write_single(folder).rename(blobs / "0123")
    (folder / "model.safetensors").symlink_to(blobs / "0123")
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.read("b").shape == (4,)


def test_reading_without_positioned_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    write_single(folder)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.read("b").tobytes() == bytes(range(24, 32))


def test_side_files(folder: Path) -> None:
    write_single(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.json("tokenizer.json") == {"version": "1.0"}
        assert checkpoint.json("tokenizer_config.json") is None
        assert checkpoint.text("README.md") is None
        (folder / "README.md").write_bytes(b"\xff\xfe")
        with pytest.raises(CheckpointError, match="UTF-8"):
            checkpoint.text("README.md")


# --- what damaged shards get -----------------------------------------------------------------------------

AB = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}
BAD_HEADERS: dict[str, tuple[object, int, str, str | None]] = {
    # header, data bytes, part of the message, tensor named
    "not JSON": (b"{", 0, "not valid JSON", None),
    "not UTF-8": (b'{"\xff": 1}', 0, "not valid JSON in UTF-8", None),
    "not an object": ([], 0, "expected a JSON object", None),
    "the same name twice": (b'{"a": {}, "a": {}}', 0, "the key 'a' twice", None),
    "deep nesting": (b"[" * 100_000, 0, "not valid JSON", None),
    "absurd digits": (b'{"a": ' + b"9" * 100_000 + b"}", 0, "not valid JSON", None),
    "a lone surrogate as name": (b'{"\\ud800": {}}', 0, "printable", None),
    "a control character in a name": (b'{"a\\u001b[2J": {}}', 0, "printable", None),
    "an empty name": (b'{"": {}}', 0, "printable", None),
    "no object": ({"a": 3}, 0, "found 3", "a"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, 1, "dtype None", "a"),
    "unknown dtype": ({"a": entry("F8_E3M4", [4], 0, 4)}, 4, "F8_E3M4", "a"),
    "dtype of another kind": ({"a": {**AB["a"], "dtype": ["U8"]}}, 4, "dtype", "a"),
    "negative dimension": ({"a": entry("U8", [-4, -1], 0, 4)}, 4, "shape", "a"),
    "fractional dimension": ({"a": {**AB["a"], "shape": [4.0]}}, 4, "shape", "a"),
    "boolean dimension": ({"a": {**AB["a"], "shape": [True]}}, 4, "shape", "a"),
    "shape is no list": ({"a": {**AB["a"], "shape": "4"}}, 4, "shape", "a"),
    "huge dimension": ({"a": entry("U8", [2**63], 0, 4)}, 4, "shape", "a"),
    "huge product": ({"a": entry("U8", [2**62] * 16, 0, 4)}, 4, "4 bytes for U8", "a"),
    "too many dimensions": ({"a": entry("U8", [1] * 17, 0, 1)}, 1, "shape", "a"),
    "wrong size": ({"a": entry("F32", [4], 0, 4)}, 4, "expected 16 bytes", "a"),
    "backward offsets": ({"a": entry("U8", [4], 4, 0)}, 4, "data_offsets", "a"),
    "three offsets": ({"a": {**AB["a"], "data_offsets": [0, 4, 8]}}, 8, "data_offsets", "a"),
    "beyond the end": ({"a": AB["a"], "b": entry("U8", [4], 4, 8)}, 7, "download the shard again", "b"),
    "overlap": ({"a": AB["a"], "b": entry("U8", [4], 2, 6)}, 6, "overlaps", "b"),
    "same place": ({"a": AB["a"], "b": AB["a"]}, 4, "overlaps", "b"),
    "gap": ({"a": AB["a"], "b": entry("U8", [4], 6, 10)}, 10, "gap", "b"),
    "trailing bytes": (AB, 9, "1 bytes after the last tensor", None),
    "hidden data": ({}, 4, "4 bytes after the last tensor", None),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_header(folder: Path, case: str) -> None:
    header, n_data, message, tensor = BAD_HEADERS[case]
    path = write_single(folder, header, n_data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert caught.value.path == str(path)
    assert caught.value.tensor == tensor
    str(caught.value).encode()  # printable everywhere


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes, expected at least 8"),
        (b"\x10\0\0", "3 bytes, expected at least 8"),
        (struct.pack("<Q", 100) + b"{}", "shorter than its header"),
        (struct.pack("<Q", 2**63) + b"{}", "This is not a safetensors file"),
        (b"GGUF\3\0\0\0" + bytes(100), "This is not a safetensors file"),
    ],
)
def test_truncated_or_foreign_file(folder: Path, raw: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_huge_claimed_header_is_not_allocated(folder: Path) -> None:
    path = folder / "model.safetensors"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", 1 << 40))
        f.truncate(1 << 41)  # sparse: the size alone does not excuse the header
    with pytest.raises(CheckpointError, match="at most"):
        Checkpoint(folder)


def read_everything(folder: Path) -> CheckpointError | None:
    try:
        with Checkpoint(folder) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except CheckpointError as e:
        return e
    return None


def test_mutated_shards_are_read_or_refused_by_name(folder: Path) -> None:
    """Whatever one changed byte does to a header, the answer is a checkpoint or a named error."""
    rng = random.Random(0)
    good = shard_bytes({"__metadata__": {"k": "v"}, **GOOD}, 32)
    path = folder / "model.safetensors"
    n_refused = 0
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw) - 32)] = rng.choice([rng.randrange(256), *b'0123456789[]{},:"\\'])
        path.write_bytes(raw[: rng.choice([len(raw), len(raw), rng.randrange(len(raw))])])
        refusal = read_everything(folder)
        if refusal is not None:
            n_refused += 1
            assert refusal.path == str(path)
    assert 250 < n_refused < 500


# --- what incomplete or contradictory folders get --------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(ModelFileError, match="give the folder it lies in"):
        Checkpoint(folder / "config.json")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=r"no config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN', "\x00"])
def test_malformed_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON") as caught:
        Checkpoint(tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")


def test_no_weights_names_what_lies_there_instead(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingShardError, match=r"pytorch_model\.bin"):
        Checkpoint(folder)


def test_single_file_and_index(folder: Path) -> None:
    write_single(folder)
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors"})
    with pytest.raises(CheckpointError, match="found both"):
        Checkpoint(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s3.safetensors"})
    (folder / "s2.safetensors").unlink()
    with pytest.raises(MissingShardError, match=r"2 of 3 shards missing: s2\.safetensors, s3\.saf") as caught:
        Checkpoint(folder)
    assert caught.value.path == str(folder / "s2.safetensors")
    assert caught.value.tensor == "b"


@pytest.mark.parametrize(
    "shard",
    [
        "../s1.safetensors",
        "/etc/passwd",
        "sub/s1.safetensors",
        "..\\s1.safetensors",
        "C:s1.safetensors",
        "..",
        "",
        ".safetensors",
        "s1.safetensors\n",
        "s1.bin",
        7,
        None,
    ],
)
def test_index_may_not_leave_the_folder(folder: Path, shard: object) -> None:
    write_indexed(folder, {"a": shard})
    with pytest.raises(CheckpointError, match="outside the checkpoint folder") as caught:
        Checkpoint(folder)
    assert caught.value.path == str(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("weight_map", [None, [], {}, "a"])
def test_malformed_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="malformed shard index"):
        Checkpoint(folder)


def test_index_names_a_tensor_that_is_not_there(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"})
    with pytest.raises(CheckpointError, match="a shard lacks a tensor") as caught:
        Checkpoint(folder)
    assert caught.value.tensor == "c"


def test_shard_holds_a_tensor_that_the_index_does_not_place_there(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "c": "s2.safetensors"})
    with pytest.raises(CheckpointError, match="contradict") as caught:
        Checkpoint(folder)
    assert caught.value.tensor == "b"


def test_two_shards_with_one_tensor(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors"})
    (folder / "s2.safetensors").write_bytes(shard_bytes(AB, 8))
    with pytest.raises(CheckpointError, match="two tensors have the same name") as caught:
        Checkpoint(folder)
    assert caught.value.tensor == "a"


def test_shard_is_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelFileError):
        Checkpoint(folder)


# --- what happens while reading --------------------------------------------------------------------------


def test_shard_that_shrinks_is_named(folder: Path) -> None:
    path = write_single(folder)
    with Checkpoint(folder) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="became shorter") as caught:
            checkpoint.read("b")
        assert caught.value.tensor == "b"


def test_read_error_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_single(folder)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Checkpoint(folder) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ModelFileError, match="Input/output error") as caught:
            checkpoint.read("a")
    assert (caught.value.path, caught.value.tensor) == (str(path), "a")


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_single(folder)
    whole = os.preadv
    with Checkpoint(folder) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:5]], offset))
        assert checkpoint.read("a").tobytes() == bytes(range(24))


def test_closed(folder: Path) -> None:
    write_single(folder)
    with Checkpoint(folder) as checkpoint:
        pass
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.read("a")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_a_refused_checkpoint_leaves_no_file_open(folder: Path) -> None:
    write_indexed(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"})
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PyllamaError) as caught:
        Checkpoint(folder)
    assert len(os.listdir("/proc/self/fd")) == before
    assert caught.value.tensor == "c"  # the error is still alive, and with it whatever it refers to
