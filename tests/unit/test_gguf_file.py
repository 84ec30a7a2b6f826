"""One file's header: what the engine's parser accepts and refuses, and values as others read them."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from gguf_writer import (
    Gguf,
    Tensor,
    string,
    typed_value,
    upstream_v4,
)
from refusals import refusal, verdict

from pyllama_dsv4 import gguf_file
from pyllama_dsv4.errors import (
    FormatError,
    ModelFileError,
    ModelNotFoundError,
    NotGGUFError,
    PyllamaError,
    TruncatedFileError,
)
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.header import check_header, read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


# --- values ---------------------------------------------------------------------------------------


def test_metadata_values(path: Path) -> None:
    values = {
        "u8": 255,
        "i8": -1,
        "u16": 65535,
        "i16": -2,
        "u32": 2**32 - 1,
        "i32": -3,
        "f32": 1.5,
        "bool": True,
        "str": "two\nlines \u2581",
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 0.1,
        "arr[u8]": [1, 2],
        "arr[bool]": [True, False],
        "arr[str]": ["", "a", "\U0001f600"],
        "arr[f64]": [0.5],
        "arr[i32]": [],
    }
    header = read_header(Gguf([("k." + type_, type_, value) for type_, value in values.items()]).write(path))
    assert list(header.kv) == ["k." + type_ for type_ in values]
    assert [entry.type_name for entry in header.kv.values()] == list(values)
    for type_, value in values.items():
        found = header.metadata["k." + type_]
        assert (list(found) if type_.startswith("arr") else found) == value
    array = header.metadata["k.arr[str]"]
    assert (len(array), array[1], array[-1], array[:2]) == (3, "a", "\U0001f600", ["", "a"])
    path.write_bytes(b"")  # what was read once is kept; the rest is gone with the file
    assert array[1] == "a"


def test_a_file_that_shrinks_while_it_is_looked_at(path: Path) -> None:
    array = read_header(Gguf([("a", "arr[u8]", [1, 2])]).write(path)).metadata["a"]
    path.write_bytes(b"GGUF")
    with pytest.raises(TruncatedFileError, match="became shorter"):
        list(array)


def test_arrays_longer_than_a_read_are_skipped_right(path: Path) -> None:
    texts = [f"{i}" * (i % 97) for i in range(60000)]
    model = Gguf([("a", "arr[str]", texts), ("b", "arr[f64]", [0.5] * 200_000), ("c", "str", "end")])
    header = read_header(model.write(path))
    assert header.metadata["c"] == "end"
    assert list(header.metadata["a"]) == texts
    assert sum(header.metadata["b"]) == 100_000


def test_the_gguf_package_sees_the_same(path: Path) -> None:
    upstream_v4().write(path)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, list(t.dims), t.type.id, t.start, t.n_bytes) for t in header.tensors] == [
        (
            t.name,
            t.shape.tolist() if len(t.shape) == 1 or t.shape[-1] != 1 else t.shape[:-1].tolist(),
            int(t.tensor_type),
            int(t.data_offset),
            int(t.n_bytes),
        )
        for t in theirs.tensors
    ]
    assert header.data_start == theirs.data_offset
    for key, value in header.metadata.items():
        found = theirs.fields[key].contents()
        assert (list(value) if isinstance(found, list) else value) == found


# --- files ----------------------------------------------------------------------------------------


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "c.txt"):
        (tmp_path / name).touch()
    error = refusal(tmp_path / "model.gguf")
    assert isinstance(error, ModelNotFoundError)
    assert isinstance(error, FileNotFoundError)
    assert "a.gguf, b.gguf" in str(error)
    assert "c.txt" not in str(error)
    assert "no folder" in str(refusal(tmp_path / "nowhere" / "model.gguf"))


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "inside.gguf").touch()
    error = refusal(tmp_path)
    assert isinstance(error, ModelFileError)
    assert "a directory" in str(error)
    assert "inside.gguf" in str(error)
    assert isinstance(refusal("nul\0byte.gguf"), ModelFileError)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert isinstance(refusal(tmp_path / "pipe"), ModelFileError)


def test_what_the_system_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gguf_file, "open", refuse, raising=False)
    error = refusal(path)
    assert (type(error), error.found) == (ModelFileError, "Permission denied")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GGU", "too short"),
        (b"\x80\x02\x00\x00safetensors", "not a GGUF"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs", "Git LFS"),
        (b"tjgg\x01\x00\x00\x00", "older"),
        (b"GGUF" + struct.pack("<I", 0), "version 0"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack("<I", 4), "version 4"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
    ],
)
def test_not_a_gguf_file(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    error = refusal(path, any_architecture=True)
    assert type(error) is NotGGUFError
    assert words in str(error)


# --- step 1: the parser ---------------------------------------------------------------------------


def test_every_cut_of_the_header_is_truncation(path: Path) -> None:
    """An interrupted download, byte by byte: never another verdict, never another exception."""
    model = Gguf(
        [
            ("general.architecture", "str", "llama"),
            ("n", "u32", 1),
            ("a", "arr[str]", ["x", "yy"]),
            ("b", "arr[i32]", [1, 2]),
        ],
        [Tensor("t", (128, 2), 42), Tensor("u", (7,), 0)],
    )
    header = model.header()
    for n in range(4, len(header)):
        path.write_bytes(header[:n])
        error = refusal(path, any_architecture=True)
        assert (type(error), error.tensor, error.key) == (TruncatedFileError, None, None), n
    path.write_bytes(header)
    assert verdict(path)[:2] == (TruncatedFileError, "t")


ALIGNMENT = "general.alignment"


def header_bytes(*parts: bytes, n_tensors: int = 0, n_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", 3, n_tensors, n_keys) + b"".join(parts)


def info(
    name: bytes = b"t",
    dims: tuple[int, ...] = (32,),
    type_: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    head = string(name) + struct.pack(f"<I{len(dims)}q", len(dims) if n_dims is None else n_dims, *dims)
    return head + struct.pack("<iQ", type_, offset)


# three tensors whose padded sizes add up to more than 2^64
BEYOND_64_BITS = (
    info(type_=24, dims=(2**63 - 32,)),
    info(b"u", type_=24, dims=(2**63 - 32,), offset=2**63 - 32),
    info(b"v", type_=24, dims=(64,), offset=2**64 - 64),
)


@pytest.mark.parametrize(
    ("content", "class_", "tensor", "key"),
    [
        (header_bytes(n_tensors=-1), FormatError, None, None),
        (header_bytes(n_tensors=2**63 - 1), FormatError, None, None),
        (header_bytes(n_tensors=(2**64 - 1) // 344), TruncatedFileError, None, None),
        (header_bytes(n_keys=-1), FormatError, None, None),
        (header_bytes(n_keys=2**63 - 1), FormatError, None, None),
        (header_bytes(n_keys=(2**64 - 1) // 88), TruncatedFileError, None, None),
        (header_bytes(string(b""), n_keys=1), FormatError, None, None),
        (header_bytes(struct.pack("<Q", 2**30 + 1), n_keys=1), FormatError, None, None),
        (header_bytes(struct.pack("<Q", 2**30), n_keys=1), TruncatedFileError, None, None),
        (header_bytes(*[string(b"k") + typed_value("u8", 1)] * 2, n_keys=2), FormatError, None, "k"),
        (header_bytes(string(b"k") + struct.pack("<i", 13), n_keys=1), FormatError, None, "k"),
        (header_bytes(string(b"k") + struct.pack("<i", -1), n_keys=1), FormatError, None, "k"),
        (header_bytes(string(b"k") + struct.pack("<iiQ", 9, 9, 0), n_keys=1), FormatError, None, "k"),
        (header_bytes(string(b"k") + struct.pack("<iiQ", 9, 77, 0), n_keys=1), FormatError, None, "k"),
        (header_bytes(string(b"k") + struct.pack("<iiQ", 9, 4, 2**64 - 1), n_keys=1), TruncatedFileError, None, None),
        (header_bytes(string(b"k") + struct.pack("<iiQ", 9, 8, 2**61), n_keys=1), TruncatedFileError, None, None),
        (header_bytes(string(b"k") + struct.pack("<iiQQ", 9, 8, 1, 2**64 - 1), n_keys=1), FormatError, None, None),
        (header_bytes(string(ALIGNMENT.encode()) + typed_value("i32", 32), n_keys=1), FormatError, None, ALIGNMENT),
        (header_bytes(string(ALIGNMENT.encode()) + typed_value("u32", 0), n_keys=1), FormatError, None, ALIGNMENT),
        (header_bytes(string(ALIGNMENT.encode()) + typed_value("u32", 48), n_keys=1), FormatError, None, ALIGNMENT),
        (header_bytes(info(b"n" * 64), n_tensors=1), FormatError, None, None),
        (header_bytes(info(b"t"), info(b"t"), n_tensors=2), FormatError, "t", None),
        (header_bytes(info(n_dims=5), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(dims=(-1,)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(dims=(1, -5)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(dims=(2**32, 2**31)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(dims=(2**32, 2**31), type_=24), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(dims=(2**62,)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=-1), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=4), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=37), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=43), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=8, dims=(33,)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(type_=42, dims=(96,)), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(), n_tensors=1), TruncatedFileError, None, None),
        (header_bytes(info(offset=32), bytes(64), n_tensors=1), FormatError, "t", None),
        (header_bytes(info(), info(b"u", offset=129), bytes(512), n_tensors=2), FormatError, "u", None),
        (header_bytes(*BEYOND_64_BITS, bytes(512), n_tensors=3), FormatError, "v", None),
    ],
)  # fmt: skip
def test_what_the_engines_parser_refuses(
    path: Path, content: bytes, class_: type[PyllamaError], tensor: str | None, key: str | None
) -> None:
    path.write_bytes(content)
    error = refusal(path, any_architecture=True)
    assert (type(error), error.tensor, error.key) == (class_, tensor, key)


def test_what_the_engines_parser_accepts(path: Path) -> None:
    """Odd, but no reason to refuse: a scalar without dimensions, an empty tensor, a name of 63 bytes."""
    content = header_bytes(
        info(b"n" * 63, dims=()),
        info(b"", dims=(0, 2**40, 2**40), offset=32),
        info(b"\xff\x00tail", dims=(1, 1, 1, 1), offset=32),
        n_tensors=3,
    )
    path.write_bytes(content + bytes(-len(content) % 32 + 64))
    tensors = check_header(path, any_architecture=True).header.tensors
    assert [(tensor.name, tensor.dims, tensor.n_bytes) for tensor in tensors] == [
        ("n" * 63, (1,), 4),
        ("", (0, 2**40, 2**40), 0),
        ("\udcff", (1,), 4),
    ]


def test_names_are_c_strings_to_the_loader(path: Path) -> None:
    content = header_bytes(info(b"t\0a"), info(b"t\0b", offset=128), n_tensors=2)
    path.write_bytes(content + bytes(-len(content) % 32 + 256))
    assert [tensor.name for tensor in parse_gguf(path).tensors] == ["t", "t"]
    assert verdict(path) == (FormatError, "t", None)
    content = header_bytes(
        string(b"k\0x") + typed_value("u8", 1), string(b"k") + typed_value("u8", 2), n_keys=2
    )
    path.write_bytes(content)
    assert read_header(path).metadata == {"k": 1}


def test_an_array_beyond_the_parsers_limit(path: Path) -> None:
    """2^30 items are read, one more is not, although the file (a hole) has them."""
    for n in (2**30, 2**30 + 1):
        with path.open("wb") as file:
            file.write(header_bytes(string(b"k") + struct.pack("<iiQ", 9, 0, n), n_keys=1))
            file.truncate(2**31)
        if n == 2**30:
            assert len(read_header(path).metadata["k"]) == n
        else:
            assert verdict(path) == (TruncatedFileError, None, None)


def test_counts_in_the_file_allocate_nothing(path: Path) -> None:
    """A header of 100 bytes in a big file may claim 10^9 strings; memory follows what is there, not what is said."""
    with path.open("wb") as file:
        file.write(header_bytes(string(b"k") + struct.pack("<iiQ", 9, 6, 2**29), n_keys=2))
        file.truncate(2**32)
    tracemalloc.start()
    error = refusal(path)  # after the array the hole reads as an empty key name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(error) is FormatError
    assert peak < 2**23
