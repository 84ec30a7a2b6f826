"""Upstream's Q2_0, which shares file id 42 with FP8, in files that otherwise look like native ones.

Names, architecture and ``general.file_type`` are those of a native file; only the stride says what the tensors are.
That a stock file of another model computes what the stock engine computes is tested in
``native/tests/test-stock-q2_0.cpp``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama
from pyllama_dsv4.gguf_file import parse_gguf
from pyllama_dsv4.gguf_types import TYPE_42, register

F32 = 0
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 320, 24)]

Array = npt.NDArray[np.float32]


def to_q2_0(x: Array) -> tuple[bytes, Array]:
    """Quantise to blocks of 64 values: an f16 scale d and 2-bit codes q for (q - 1) * d. Returns them decoded too."""
    blocks = x.reshape(-1, 64)
    d = blocks.std(axis=1, keepdims=True).astype(np.float16)
    q = np.clip(np.rint(blocks / d) + 1, 0, 3).astype(np.uint8)
    packed = q[:, 0::4] | q[:, 1::4] << 2 | q[:, 2::4] << 4 | q[:, 3::4] << 6
    raw = np.concatenate([d.view(np.uint8), packed], axis=1).tobytes()
    return raw, ((q.astype(np.float32) - 1) * d.astype(np.float32)).reshape(x.shape)


def rewrite(source: Path, target: Path, encode: Callable[[Array], tuple[int, bytes]]) -> None:
    """Copy a native file with every FP8 tensor given other bytes; keys, names, dims and order stay."""
    member = register()
    raw = source.read_bytes()
    file = parse_gguf(source)
    first = file.tensors[0].name.encode()
    infos_start = raw.index(struct.pack("<Q", len(first)) + first)
    infos, data = [], bytearray()
    for tensor in file.tensors:
        n_dims = max((i + 1 for i in range(4) if tensor.dims[i] != 1), default=1)
        type_id = tensor.type_id
        begin = file.data_start + tensor.offset
        if type_id == TYPE_42:
            bytes_ = np.frombuffer(raw, np.uint8, tensor.n_elements // 128 * 129, begin)
            values = gguf.dequantize(bytes_.reshape(-1, tensor.dims[0] // 128 * 129), member)
            type_id, content = encode(values)
        else:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
            content = raw[begin : begin + tensor.n_elements // block * size]
        name = tensor.name.encode()
        infos.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", n_dims))
        infos.append(
            struct.pack(f"<{n_dims}q", *tensor.dims[:n_dims]) + struct.pack("<iQ", type_id, len(data))
        )
        data += content + b"\0" * (-len(content) % 32)
    header = raw[:infos_start] + b"".join(infos)
    target.write_bytes(header + b"\0" * (-len(header) % 32) + data)


@pytest.fixture(scope="module")
def q2_0_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q2_0") / "q2_0.gguf"
    rewrite(tiny_model, path, lambda x: (TYPE_42, to_q2_0(x)[0]))
    return path


@pytest.fixture(scope="module")
def plain_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values in float32."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    rewrite(tiny_model, path, lambda x: (F32, to_q2_0(x)[1].tobytes()))
    return path


def logits(path: Path) -> Array:
    with Llama(path, n_ctx=256, n_threads=1, warmup=False) as llm:
        return np.array(llm.eval(IDS, logits="all"))


def test_q2_0_under_native_names_is_read_as_q2_0(
    q2_0_model: Path, plain_model: Path, tiny_model: Path
) -> None:
    got, want = logits(q2_0_model), logits(plain_model)
    error = ((got - want) ** 2).sum(axis=1) / (want**2).sum(axis=1)
    # the weights are equal; products with Q2_0 round the activations to Q8_0. A few tokens may choose other experts.
    assert np.median(error) < 1e-2
    assert np.isfinite(got).all()
    # to show that the measure would see other weights: those of the FP8 model, which the 2-bit ones were made from
    other = logits(tiny_model)
    assert np.median(((other - want) ** 2).sum(axis=1) / (want**2).sum(axis=1)) > 0.1


def test_it_is_called_q2_0(q2_0_model: Path, tiny_model: Path) -> None:
    with Llama(q2_0_model, n_ctx=256, n_threads=1, warmup=False) as llm:
        assert "Q2_0" in llm.desc
    with Llama(tiny_model, n_ctx=256, n_threads=1, warmup=False) as llm:
        assert "F8_E4M3_MXFP4" in llm.desc
