"""How likely a model finds a text, and how far two runs differ: two files, two settings, or a run and a record.

Owns the walk over a long text in windows, the sums over positions, and the record file. Memory stays bounded by a few
rows of logits, however long the text is. Uses ``Llama.eval`` and nothing else of the engine.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["Comparison", "Record", "Score", "compare", "read_record", "record", "score"]

N_ROWS = 32  # positions evaluated at a time: 32 rows of 129,280 logits are 16.5 MB
RECORD_VERSION = 1

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], object]


@dataclass
class Score:
    """Negative log-likelihood of a text.

    Attributes:
        n_tokens: Tokens that were predicted: all but the first of each window.
        nll: Mean over them of -log p, in nats.
    """

    n_tokens: int = 0
    nll_sum: float = field(default=0.0, repr=False)
    nll_square_sum: float = field(default=0.0, repr=False)

    @property
    def nll(self) -> float:
        return self.nll_sum / self.n_tokens if self.n_tokens else math.nan

    @property
    def nll_error(self) -> float:
        """Standard error of the mean."""
        if self.n_tokens < 2:
            return math.nan
        variance = max(self.nll_square_sum / self.n_tokens - self.nll**2, 0.0)
        return math.sqrt(variance / (self.n_tokens - 1))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def add(self, nll: Floats) -> None:
        """Add the values of some positions, in nats."""
        self.n_tokens += nll.size
        self.nll_sum += float(nll.sum())
        self.nll_square_sum += float((nll**2).sum())


@dataclass
class Comparison:
    """How the second run's distributions differ from the first's.

    Attributes:
        first, second: The scores of both.
        kl: Mean over positions of the Kullback-Leibler divergence from first to second, in nats; None against a
            record, which does not hold whole distributions.
        kl_max: Its largest value.
        nmse: Squared difference of logits over squared logits; None against a record.
        top_k: For each k, the share of positions where both name the same most likely k tokens, in any order.
        max_logprob_error: Largest difference of the logarithms of the text's own tokens' probabilities, in nats.
    """

    first: Score
    second: Score
    kl: float | None
    kl_max: float | None
    nmse: float | None
    top_k: dict[int, float]
    max_logprob_error: float


@dataclass(frozen=True)
class Record:
    """Recorded predictions of a run, position by position.

    Attributes:
        ids: The tokens that were predicted.
        logprobs: ``(n,) float64`` logarithms of their probabilities.
        top_ids: ``(n, k) int32`` most likely tokens, the most likely first.
        top_logprobs: ``(n, k) float64`` logarithms of their probabilities.
    """

    ids: npt.NDArray[np.int32]
    logprobs: Floats
    top_ids: npt.NDArray[np.int32]
    top_logprobs: Floats


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Return log probabilities in float64 of ``(n, n_vocab)`` logits."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def _windows(llms: Sequence[Llama], ids: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Yield pieces of the text, each at most a context long, and where they begin."""
    n_ctx = min(llm.n_ctx for llm in llms)
    if len(ids) < 2:
        raise ArgumentError("scoring a text", found=f"{len(ids)} tokens", expected="at least 2")
    if n_ctx < 2:
        raise ArgumentError("scoring a text", key="n_ctx", found=n_ctx, expected="at least 2")
    for start in range(0, len(ids), n_ctx):
        piece = list(ids[start : start + n_ctx])
        if len(piece) > 1:
            yield piece, start


def _rows(
    llms: Sequence[Llama], ids: Sequence[int], progress: Progress | None
) -> Iterator[tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float32]]]]:
    """Yield, some positions at a time, the tokens that come next and each model's logits for them."""
    for piece, begin in _windows(llms, ids):
        for llm in llms:
            llm.reset()
        for start in range(0, len(piece) - 1, N_ROWS):
            inputs = piece[start : min(start + N_ROWS, len(piece) - 1)]
            logits = [llm.eval(inputs, logits="all") for llm in llms]
            yield np.asarray(piece[start + 1 : start + 1 + len(inputs)]), logits
            if progress is not None:
                progress(begin + start + len(inputs), len(ids))


def _logprobs_of(logprobs: Floats, ids: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(np.take_along_axis(logprobs, ids[:, None], axis=1)[:, 0])


def _top(logprobs: Floats, k: int) -> npt.NDArray[np.int64]:
    """Return the `k` most likely ids of every row, the most likely first, smaller ids first among equals."""
    k = min(k, logprobs.shape[1])
    some = np.argpartition(-logprobs, k - 1, axis=1)[:, :k]
    some.sort(axis=1)
    order = np.argsort(-np.take_along_axis(logprobs, some, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, axis=1))


def score(llm: Llama, ids: Sequence[int], *, progress: Progress | None = None) -> Score:
    """Return the negative log-likelihood of a text.

    A text longer than the context is cut into windows, each evaluated from its first token on.

    Args:
        llm: The model; it is reset.
        ids: The text, at least two tokens; begin with BOS where the model expects one.
        progress: Called with the tokens done and their number.
    """
    result = Score()
    for ids_next, (logits,) in _rows([llm], ids, progress):
        result.add(-_logprobs_of(log_softmax(logits), ids_next))
    return result


def compare(
    first: Llama,
    second: Llama | Record,
    ids: Sequence[int],
    *,
    top_k: Sequence[int] = (1, 5),
    progress: Progress | None = None,
) -> Comparison:
    """Compare two runs over a text, or a run with a record of another.

    Args:
        first: The model that is compared with; it is reset.
        second: Another one with the same vocabulary, or a record of the same text.
        ids: The text, at least two tokens.
        top_k: Numbers of most likely tokens to compare.
        progress: Called with the tokens done and their number.

    Raises:
        ArgumentError: The vocabularies differ in size, or the record is of another text or too narrow.
    """
    if isinstance(second, Record):
        return _compare_record(first, second, ids, top_k, progress)
    if first.n_vocab != second.n_vocab:
        raise ArgumentError(
            "comparing two models",
            found=f"vocabularies of {first.n_vocab} and {second.n_vocab} tokens",
            expected="equal vocabularies",
        )
    scores = Score(), Score()
    kl_sum = kl_max = error_max = square_error = square = 0.0
    n_same = dict.fromkeys(top_k, 0)
    for ids_next, logits in _rows([first, second], ids, progress):
        logprobs = [log_softmax(x) for x in logits]
        own = [_logprobs_of(x, ids_next) for x in logprobs]
        for total, values in zip(scores, own, strict=True):
            total.add(-values)
        p, q = logprobs
        kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)  # below 0 only by rounding
        kl_sum += float(kl.sum())
        kl_max = max(kl_max, float(kl.max()))
        error_max = max(error_max, float(np.abs(own[0] - own[1]).max()))
        a, b = (x.astype(np.float64) for x in logits)
        square_error += float(((a - b) ** 2).sum())
        square += float((a**2).sum())
        for k in top_k:
            same = np.sort(_top(p, k), axis=1) == np.sort(_top(q, k), axis=1)
            n_same[k] += int(same.all(axis=1).sum())
    n = scores[0].n_tokens
    return Comparison(
        first=scores[0],
        second=scores[1],
        kl=kl_sum / n,
        kl_max=kl_max,
        nmse=square_error / square if square else 0.0,
        top_k={k: count / n for k, count in n_same.items()},
        max_logprob_error=error_max,
    )


def _compare_record(
    llm: Llama, other: Record, ids: Sequence[int], top_k: Sequence[int], progress: Progress | None
) -> Comparison:
    width = other.top_ids.shape[1]
    if max(top_k, default=0) > width:
        raise ArgumentError(
            "comparing with a record", key="top_k", found=max(top_k), expected=f"at most {width}, its width"
        )
    scores = Score(), Score()
    error_max = 0.0
    n_same = dict.fromkeys(top_k, 0)
    at = 0
    for ids_next, (logits,) in _rows([llm], ids, progress):
        part = slice(at, at + ids_next.size)
        if not np.array_equal(other.ids[part], ids_next):
            raise ArgumentError(
                "comparing with a record",
                found=f"other tokens from position {at} on",
                expected="the recorded text, cut at the same context length",
            )
        at += ids_next.size
        logprobs = log_softmax(logits)
        own = _logprobs_of(logprobs, ids_next)
        scores[0].add(-own)
        scores[1].add(-other.logprobs[part])
        error_max = max(error_max, float(np.abs(own - other.logprobs[part]).max()))
        for k in top_k:
            same = np.sort(_top(logprobs, k), axis=1) == np.sort(other.top_ids[part, :k], axis=1)
            n_same[k] += int(same.all(axis=1).sum())
    if at != other.ids.size:
        raise ArgumentError(
            "comparing with a record", found=f"{at} positions", expected=f"{other.ids.size}, as recorded"
        )
    return Comparison(
        first=scores[0],
        second=scores[1],
        kl=None,
        kl_max=None,
        nmse=None,
        top_k={k: count / at for k, count in n_same.items()},
        max_logprob_error=error_max,
    )


# --- records ---


def record(
    llm: Llama,
    ids: Sequence[int],
    path: str | os.PathLike[str],
    *,
    top_k: int = 20,
    progress: Progress | None = None,
) -> Score:
    """Score a text and write the predictions to a file of JSON lines.

    The first line describes the file; every other one is ``{"id", "logprob", "top": [[id, logprob], ...]}``, which
    answers of OpenAI-like services can be brought into.

    Raises:
        OSError: The file cannot be written.
    """
    result = Score()
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps({"record": RECORD_VERSION, "n_vocab": llm.n_vocab, "top_k": top_k}) + "\n")
            for ids_next, (logits,) in _rows([llm], ids, progress):
                logprobs = log_softmax(logits)
                own = _logprobs_of(logprobs, ids_next)
                result.add(-own)
                top = _top(logprobs, top_k)
                for i, id_next in enumerate(ids_next):
                    line: dict[str, Any] = {
                        "id": int(id_next),
                        "logprob": float(own[i]),
                        "top": [[int(j), float(logprobs[i, j])] for j in top[i]],
                    }
                    file.write(json.dumps(line) + "\n")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return result


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read what ``record`` wrote.

    Raises:
        OSError: The file cannot be read.
        FormatError: naming the line that is not as it should be.
    """
    own_ids: list[int] = []
    logprobs: list[float] = []
    top: list[list[tuple[int, float]]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                if number == 1:
                    if line["record"] != RECORD_VERSION:
                        raise ValueError(f"version {line['record']}")
                    continue
                own_ids.append(int(line["id"]))
                logprobs.append(float(line["logprob"]))
                top.append([(int(i), float(x)) for i, x in line["top"]])
                if len(top[-1]) != len(top[0]):
                    raise ValueError(f"{len(top[-1])} likely tokens, {len(top[0])} before")
            except (ValueError, TypeError, KeyError) as error:
                raise FormatError(
                    f"reading a record: line {number}",
                    path=path,
                    found=f"{type(error).__name__}: {error}",
                    expected="a line as `score --record` writes it",
                ) from error
    if not own_ids:
        raise FormatError("reading a record", path=path, found="no predictions", expected="at least one line")
    width = len(top[0])
    return Record(
        np.asarray(own_ids, np.int32),
        np.asarray(logprobs, np.float64),
        np.asarray([[i for i, _ in row] for row in top], np.int32).reshape(-1, width),
        np.asarray([[x for _, x in row] for row in top], np.float64).reshape(-1, width),
    )
