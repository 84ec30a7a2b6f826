"""Translated files in the engine: equal logits where weights are equal, and those of an unpatched llama.cpp.

``stock-v4-q8_0.logits`` are the logits of an unpatched llama.cpp for the tiny model after
``translate --to upstream --dense q8_0``. With a build of the pin without patches at hand, and the version of
``tests/data/stock_logits.c`` compiled against it, it is made, and the file checked again, by::

    PYLLAMA_DSV4_STOCK_LOGITS=./stock_logits pytest tests/native/test_translate.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama
from pyllama_dsv4.header import check_header
from pyllama_dsv4.translate import translate

IDS = [1, 17, 95, 3]
N_VOCAB = 320
RECORDED = Path(__file__).parents[1] / "data" / "stock-v4-q8_0.logits"

Array = npt.NDArray[np.float32]


def logits_of(path: Path) -> Array:
    with Llama(path, n_ctx=512, n_threads=1, act_quant="none", warmup=False) as llm:
        rows = []
        for token in IDS:
            llm.eval([token])
            rows.append(llm.logits.copy())
    return np.array(rows)


def parse(text: str) -> Array:
    return np.array([float.fromhex(line) for line in text.split()], np.float32).reshape(len(IDS), N_VOCAB)


def error(a: Array, b: Array) -> float:
    return float(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.fixture(scope="module")
def native(tiny_model: Path) -> Array:
    return logits_of(tiny_model)


@pytest.fixture(scope="module")
def q8_0(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return translate(tiny_model, tmp_path_factory.mktemp("q8") / "q.gguf", to="upstream", dense="q8_0").path


def test_the_same_weights_give_the_same_logits(tiny_model: Path, native: Array, tmp_path: Path) -> None:
    """Bit for bit: upstream's names with FP8 weights, and back again."""
    upstream = translate(tiny_model, tmp_path / "u.gguf", to="upstream").path
    assert check_header(upstream).dialect == "upstream"
    assert np.array_equal(logits_of(upstream), native)
    back = translate(upstream, tmp_path / "n.gguf", to="native").path
    assert back.read_bytes() == tiny_model.read_bytes()


def test_dense_types(tiny_model: Path, native: Array, q8_0: Path, tmp_path: Path) -> None:
    """BF16 holds every FP8 weight, so only the kernels' rounding differs; Q8_0 rounds weights too."""
    bf16 = translate(tiny_model, tmp_path / "b.gguf", to="upstream", dense="bf16").path
    assert error(logits_of(bf16), native) < 1e-3
    assert 0 < error(logits_of(q8_0), native) < 2e-2


def test_the_logits_of_an_unpatched_engine(q8_0: Path) -> None:
    """What stock llama.cpp computed for this file; the tolerance leaves room for kernels of other machines and for
    the rounding of cached rows, which is ours alone."""
    stock = parse(RECORDED.read_text())
    assert error(logits_of(q8_0), stock) < 5e-2


@pytest.mark.skipif(
    "PYLLAMA_DSV4_STOCK_LOGITS" not in os.environ,
    reason="PYLLAMA_DSV4_STOCK_LOGITS names no program that runs an unpatched llama.cpp",
)
def test_an_unpatched_engine_opens_it(tiny_model: Path, q8_0: Path, tmp_path: Path) -> None:
    program = os.environ["PYLLAMA_DSV4_STOCK_LOGITS"]

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, path, *map(str, IDS)], capture_output=True, text=True)

    # neither the native file nor its upstream form with FP8 weights
    assert run(tiny_model).returncode == 3
    assert run(translate(tiny_model, tmp_path / "u.gguf", to="upstream").path).returncode == 3
    done = run(q8_0)
    assert done.returncode == 0, done.stderr
    assert error(parse(done.stdout), parse(RECORDED.read_text())) < 1e-6
    bf16 = translate(tiny_model, tmp_path / "b.gguf", to="upstream", dense="bf16").path
    done = run(bf16)
    assert done.returncode == 0, done.stderr
    assert error(parse(done.stdout), logits_of(bf16)) < 5e-2
