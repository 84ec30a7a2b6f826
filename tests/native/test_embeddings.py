"""Embeddings of a model that has them, and the refusal of DeepSeek-V4, whose graph has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import AsyncLlama, Llama, errors
from pyllama_dsv4.header import read_header

MODEL = Path(__file__).resolve().parents[1] / "data" / "stock-q2_0.gguf"  # llama, one layer, 96 tokens
OPTIONS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "warmup": False, "cache_type": "f32"}
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 20)]


@pytest.fixture
def llm() -> Iterator[Llama]:
    with Llama(MODEL, embedding=True, pooling_type="none", flash_attn="off", **OPTIONS) as llm:
        yield llm


def test_rows_of_tokens_are_what_the_head_makes_logits_of(llm: Llama) -> None:
    (rows,) = llm.embed([IDS])
    assert rows.shape == (20, 128)
    info = next(t for t in read_header(MODEL).tensors if t.name == "output.weight")
    with MODEL.open("rb") as file:
        file.seek(info.start)
        blocks = np.frombuffer(file.read(info.n_bytes), np.uint8).reshape(96, 4, 34)  # Q8_0
    scale = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    head = (blocks[:, :, 2:].view(np.int8) * scale).reshape(96, 128)
    logits = llm.eval(IDS, logits="all")
    error = np.square(rows @ head.T - logits).mean() / np.square(logits).mean()
    assert error < 1e-3  # the engine rounds a product's input to 8 bits


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooled_rows(llm: Llama, pooling: Any) -> None:
    (rows,) = llm.embed([IDS])
    expected = {"mean": rows.mean(axis=0), "last": rows[-1], "cls": rows[0]}[pooling]
    with Llama(MODEL, embedding=True, pooling_type=pooling, flash_attn="off", **OPTIONS) as pooled:
        (row,) = pooled.embed([IDS])
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
        (unit,) = pooled.embed([IDS], normalize=True)
        np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)


def test_embedding_leaves_the_conversation_alone(llm: Llama) -> None:
    llm.eval(IDS[:5])
    logits = llm.logits
    llm.embed([IDS, IDS[:3]])
    assert llm.n_tokens == 5
    assert np.array_equal(llm.logits, logits)


def test_openais_shape(llm: Llama) -> None:
    answer = llm.create_embedding([IDS, IDS[:4]])
    assert answer["object"] == "list"
    assert [d["index"] for d in answer["data"]] == [0, 1]
    assert np.asarray(answer["data"][1]["embedding"]).shape == (4, 128)
    assert answer["usage"] == {"prompt_tokens": 24, "total_tokens": 24}


def test_embedding_stops_and_awaits(llm: Llama) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.CancelledError, match="stop_event"):
        llm.embed([IDS], stop_event=stop)

    async def main() -> None:
        expected = llm.create_embedding([IDS])
        async_llm = AsyncLlama(llm)
        assert await async_llm.create_embedding([IDS]) == expected
        with pytest.raises(errors.ContextFullError):
            await async_llm.create_embedding([[1] * 65])

    asyncio.run(main())


def test_refusals(llm: Llama, tiny_model: Path) -> None:
    with pytest.raises(errors.TokenizeError):
        llm.embed("text, and the file has no vocabulary")
    with pytest.raises(errors.ContextFullError):
        llm.embed([[1] * 65])
    with pytest.raises(errors.ArgumentError, match="no tokens"):
        llm.embed([[]])
    with pytest.raises(errors.ArgumentError, match="pooling_type"):
        Llama(MODEL, embedding=True, pooling_type="rank", **OPTIONS)  # type: ignore[arg-type]
    with Llama(MODEL, **OPTIONS) as plain, pytest.raises(errors.ArgumentError, match="embedding=True"):
        plain.embed([IDS])
    with pytest.raises(errors.UnsupportedModelError, match="gives none"):
        Llama(tiny_model, embedding=True, **OPTIONS)
