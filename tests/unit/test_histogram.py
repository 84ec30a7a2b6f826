"""Histograms: counts against the bytes themselves, text, pictures, refusals."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import Gguf, Tensor

from pyllama_dsv4.errors import ArgumentError, ModelFileError, TensorShapeError
from pyllama_dsv4.header import read_header
from pyllama_dsv4.histogram import Histogram, histogram, plot, render_text

KINDS: dict[str, tuple[int | str, tuple[int, ...]]] = {
    "f8": (42, (256, 64)),
    "mxfp4": (39, (64, 32, 4)),
    "f32": (0, (100, 7)),
    "bf16": (30, (100, 7)),
    "f16": (1, (100, 7)),
    "q8_0": (8, (64, 4)),
    "last": (0, (8,)),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor per type, of random bytes; FP8 spread over pieces is left to a test of its own."""
    model = Gguf(
        [("general.architecture", "str", "x")],
        [Tensor(name, dims, kind) for name, (kind, dims) in KINDS.items()],
    )
    path = model.write(tmp_path_factory.mktemp("x") / "x.gguf")
    rng = np.random.default_rng(1)
    with path.open("r+b") as file:
        for tensor in read_header(path).tensors:
            file.seek(tensor.start)
            file.write(rng.integers(0, 256, tensor.n_bytes, np.uint8).tobytes())
    return path


def bytes_of(path: Path, name: str) -> np.ndarray:
    tensor = read_header(path).tensor(name)
    assert tensor is not None
    return np.frombuffer(path.read_bytes(), np.uint8, tensor.n_bytes, tensor.start)


def test_fp8(path: Path) -> None:
    counts = histogram(path, "f8")
    blocks = bytes_of(path, "f8").reshape(-1, 129)
    assert counts.kind == "e4m3"
    assert counts.scales is not None
    for value in range(256):
        assert counts.scales[value] == (blocks[:, 0] == value).sum()
        assert counts.codes[value] == (blocks[:, 1:] == value).sum()


def test_mxfp4(path: Path) -> None:
    counts = histogram(path, "mxfp4")
    blocks = bytes_of(path, "mxfp4").reshape(-1, 17)
    low, high = blocks[:, 1:] & 15, blocks[:, 1:] >> 4
    assert counts.scales is not None
    assert counts.scales.sum() == blocks.shape[0]
    assert counts.codes.tolist() == [int((low == c).sum() + (high == c).sum()) for c in range(16)]


@pytest.mark.parametrize(("name", "bits"), [("f32", 23), ("bf16", 7), ("f16", 10)])
def test_plain_numbers(path: Path, name: str, bits: int) -> None:
    counts = histogram(path, name)
    data = bytes_of(path, name)
    words = data.view("<u4" if name == "f32" else "<u2")
    n_fields = 32 if name == "f16" else 256
    assert counts.codes.shape == (2, n_fields)
    for sign in (0, 1):
        for field in range(n_fields):
            assert counts.codes[sign, field] == (words >> bits == sign * n_fields + field).sum()
    info = counts.to_json()
    assert sum(e["positive"] + e["negative"] for e in info["exponents"]) == 700
    assert info["exponents"][-1]["power"] == "none"  # random bytes hold infinities and NaN
    text = render_text(counts)
    assert "700 values by magnitude" in text
    assert "no number" in text


def test_pieces_add_up(tmp_path: Path) -> None:
    """More than one piece of 2 MiB, read by several threads."""
    path = Gguf([("general.architecture", "str", "x")], [Tensor("a", (4096, 1024), 42)]).write(tmp_path / "x")
    tensor = read_header(path).tensor("a")
    assert tensor is not None
    with path.open("r+b") as file:
        file.seek(tensor.start + tensor.n_bytes - 129)
        file.write(b"\x05" * 129)
    counts = histogram(path, "a")
    assert counts.scales is not None
    assert (counts.scales[0], counts.scales[5]) == (32 * 1024 - 1, 1)
    assert (counts.codes[0], counts.codes[5]) == (4096 * 1024 - 128, 128)


def hand_made(**changes: Any) -> Histogram:
    scales, codes = np.zeros(256, np.int64), np.zeros(256, np.int64)
    scales[115], scales[117] = 3, 1
    codes[0], codes[0x38], codes[0xB8], codes[0x7E], codes[0x7F] = 10, 20, 60, 8, 2
    fields: dict[str, Any] = {
        "tensor": "t", "type": "F8_E4M3_B128", "dims": (128, 4), "scales": scales, "codes": codes, "kind": "e4m3",
    }  # fmt: skip
    return Histogram(**(fields | changes))


def test_text() -> None:
    lines = render_text(hand_made()).splitlines()
    assert lines[0] == "t: F8_E4M3_B128, 128 x 4"
    assert lines[2:6] == [
        "4 scales",
        "  115  2^-12   75.00 %  " + "#" * 40,
        "  116  2^-11    0.00 %",
        "  117  2^-10   25.00 %  " + "#" * 13,
    ]
    assert "  zero         10.00 %  #####" in lines
    assert "  2^0          80.00 %  " + "#" * 40 in lines
    assert "  448           8.00 %  ####" in lines
    assert "  NaN           2.00 %  #" in lines
    assert lines[-1] == "  60.00 % have a minus sign"
    assert max(map(len, lines)) <= 80


def test_pictures(tmp_path: Path, path: Path) -> None:
    """Two panels with scales, one without; the picture depends on the counts."""
    pytest.importorskip("matplotlib")
    sizes = {}
    for name in ("f8", "mxfp4", "f32", "bf16"):
        picture = plot(histogram(path, name), tmp_path / f"{name}.png")
        data = picture.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        sizes[name] = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert sizes == {"f8": (1200, 816), "mxfp4": (1200, 816), "f32": (1200, 408), "bf16": (1200, 408)}
    first = plot(hand_made(), tmp_path / "a.png").read_bytes()
    scales = np.zeros(256, np.int64)
    scales[255] = 4
    assert plot(hand_made(scales=scales), tmp_path / "b.png").read_bytes() != first
    empty = hand_made(scales=np.zeros(256, np.int64), codes=np.zeros(256, np.int64))
    assert plot(empty, tmp_path / "c.png").exists()
    assert render_text(empty)


def test_refusals(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="no such tensor"):
        histogram(path, "f9")
    with pytest.raises(TensorShapeError) as error:
        histogram(path, "q8_0")
    assert (error.value.tensor, error.value.found) == ("q8_0", "Q8_0")
    with pytest.raises(ArgumentError, match="kind of file"):
        plot(hand_made(), tmp_path / "x.pdf")
    pytest.importorskip("matplotlib")
    with pytest.raises(ModelFileError):
        plot(hand_made(), tmp_path / "absent" / "x.png")
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArgumentError, match="needs matplotlib") as missing:
        plot(hand_made(), tmp_path / "x.png")
    assert "pip install" in str(missing.value)


def test_counting_needs_neither_matplotlib_nor_the_codecs() -> None:
    code = (
        "import sys, pyllama_dsv4.histogram\n"
        "assert not {'matplotlib', 'pyllama_dsv4._codec', 'pyllama_dsv4._llama'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
