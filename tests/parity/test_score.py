"""Scores against the NumPy reference and against arithmetic written out here; comparisons with a known answer."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from reference.model import Model
from reference.weights import load_checkpoint

from pyllama_dsv4 import Llama, errors, synth
from pyllama_dsv4.score import compare, read_record, record, score

N_TOKENS = 150
IDS = [int(i) for i in np.random.default_rng(9).integers(0, 320, N_TOKENS)]
EXACT = {
    "n_ctx": 256,
    "n_threads": 1,
    "warmup": False,
    "cache_type": "f32",
    "flash_attn": "off",
    "act_quant": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    synth.write_checkpoint(folder / "checkpoint", synth.tiny_config(), seed=4)
    synth.write_upstream_f32(folder / "checkpoint", folder / "f32.gguf")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Llama]:
    with Llama(folder / "f32.gguf", **EXACT) as llm:  # type: ignore[arg-type]
        yield llm


def logprobs(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log probabilities of (n, V) logits, by the definition."""
    return np.asarray(
        [row - np.log(np.sum(np.exp(row - row.max()))) - row.max() for row in logits.astype(np.float64)]
    )


@pytest.mark.slow
def test_the_likelihood_is_that_of_the_reference(folder: Path, llm: Llama) -> None:
    config, weights = load_checkpoint(folder / "checkpoint")
    want = logprobs(Model(config, weights, np.float64, "none").forward(IDS).logits[:-1])
    result = score(llm, IDS)
    assert result.n_tokens == N_TOKENS - 1
    assert abs(result.nll + np.mean(want[np.arange(N_TOKENS - 1), IDS[1:]])) < 1e-4
    assert result.perplexity == pytest.approx(np.exp(result.nll))


def test_windows_begin_anew(folder: Path, llm: Llama) -> None:
    """A text longer than the context is the sum of its windows; a single left-over token predicts nothing."""
    with Llama(folder / "f32.gguf", **(EXACT | {"n_ctx": 64})) as small:  # type: ignore[arg-type]
        whole = score(small, IDS[:129])
    parts = [score(llm, IDS[:64]), score(llm, IDS[64:128])]
    assert whole.n_tokens == 126 == sum(p.n_tokens for p in parts)
    assert whole.nll_sum == pytest.approx(sum(p.nll_sum for p in parts), abs=1e-3)
    values = -logprobs(_logits(llm, IDS[:64]))[np.arange(63), IDS[1:64]]
    assert parts[0].nll_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(63), rel=1e-5)


def _logits(llm: Llama, ids: list[int]) -> npt.NDArray[np.float64]:
    llm.reset()
    return llm.eval(ids, logits="all")[:-1].astype(np.float64)


def test_a_run_does_not_differ_from_itself(folder: Path, llm: Llama) -> None:
    with Llama(folder / "f32.gguf", **EXACT) as same:  # type: ignore[arg-type]
        result = compare(llm, same, IDS)
    assert result.kl == result.kl_max == result.nmse == result.max_logprob_error == 0
    assert result.top_k == {1: 1.0, 5: 1.0}
    assert result.first == result.second


def test_memory_does_not_grow_with_the_text(llm: Llama) -> None:
    def peak(n: int) -> int:
        ids = (IDS * 10)[:n]
        tracemalloc.start()
        score(llm, ids)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)  # imports and caches
    assert peak(1500) < 1.5 * peak(64)


def test_two_runs_differ_by_the_definition(folder: Path, llm: Llama) -> None:
    with Llama(folder / "f32.gguf", **(EXACT | {"act_quant": "full"})) as other:  # type: ignore[arg-type]
        result = compare(llm, other, IDS, top_k=(1, 3))
        x, y = _logits(llm, IDS), _logits(other, IDS)
    p, q = logprobs(x), logprobs(y)
    kl = np.sum(np.exp(p) * (p - q), axis=1)
    # the rows of a batch of 32 and of all at once differ in their last bits
    assert result.kl == pytest.approx(kl.mean(), rel=1e-2)
    assert result.kl_max == pytest.approx(kl.max(), rel=5e-2)
    assert result.nmse == pytest.approx(np.sum((x - y) ** 2) / np.sum(x**2), rel=2e-2)
    same = [set(np.argsort(-a)[:3]) == set(np.argsort(-b)[:3]) for a, b in zip(x, y, strict=True)]
    assert result.top_k[3] == pytest.approx(np.mean(same), abs=0.02)
    assert result.top_k[1] == pytest.approx(np.mean(x.argmax(1) == y.argmax(1)), abs=0.02)
    assert result.first.nll != result.second.nll


def test_a_record_compares_as_the_run_it_came_from(llm: Llama, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written = record(llm, IDS, path, top_k=7)
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]
    result = compare(llm, read_record(path), IDS)
    assert result.max_logprob_error < 1e-12
    assert result.top_k == {1: 1.0, 5: 1.0}
    assert result.second.nll == pytest.approx(written.nll, abs=1e-12)
    assert result.kl is None

    lines = path.read_text().splitlines()
    line = json.loads(lines[5])
    line["logprob"] -= 0.5
    line["top"][0][0] = (line["top"][0][0] + 1) % 320
    path.write_text("\n".join([*lines[:5], json.dumps(line), *lines[6:]]))
    result = compare(llm, read_record(path), IDS)
    assert result.max_logprob_error == pytest.approx(0.5)
    assert result.top_k[1] == pytest.approx(1 - 1 / (N_TOKENS - 1))


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "{}", "line 1"),
        (1, '{"record": 2}', "version 2"),
        (3, "not json", "line 3"),
        (3, '{"id": 1, "logprob": -1.0}', "line 3.*top"),
        (4, '{"id": 1, "logprob": -1.0, "top": [[1, -1.0]]}', "line 4.*1 likely tokens, 7 before"),
    ],
)
def test_a_damaged_record_is_refused_by_line(
    llm: Llama, tmp_path: Path, line: int, text: str, message: str
) -> None:
    path = tmp_path / "run.jsonl"
    record(llm, IDS[:20], path, top_k=7)
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    with pytest.raises(errors.FormatError, match=message):
        read_record(path)


def test_a_record_of_another_text_is_refused(llm: Llama, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(llm, IDS[:20], path, top_k=2)
    with pytest.raises(errors.ArgumentError, match="other tokens from position 0"):
        compare(llm, read_record(path), IDS[20:40], top_k=(1,))
    with pytest.raises(errors.ArgumentError, match="19, as recorded"):
        compare(llm, read_record(path), IDS[:10], top_k=(1,))
    with pytest.raises(errors.ArgumentError, match="at most 2"):
        compare(llm, read_record(path), IDS[:20], top_k=(5,))


def test_what_cannot_be_scored(llm: Llama, folder: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="at least 2"):
        score(llm, IDS[:1])
    synth.write_checkpoint(folder / "other", synth.tiny_config(vocab_size=384), seed=4)
    synth.write_upstream_f32(folder / "other", folder / "other.gguf")
    with (
        Llama(folder / "other.gguf", **EXACT) as other,  # type: ignore[arg-type]
        pytest.raises(errors.ArgumentError, match="320 and 384"),
    ):
        compare(llm, other, IDS)
