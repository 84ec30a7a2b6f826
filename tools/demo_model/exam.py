"""Records what a trained model computes in the training module: the exam that the package's self test repeats.

Owns which conversation and questions are asked. Only questions whose answer is far ahead of any other are taken, so
that rounding on another machine does not change it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyllama_dsv4.tensors import HParams

from .data import USER, Conversation, Formatter, conversation
from .model import LEVELS, Model
from .tasks import CALCULATOR, Turn, draw, draw_fact

__all__ = ["write_exam"]

SEED = 17
N_TOKENS = 900
N_EACH = 2  # questions of a task
MARGIN = 4.0  # nats by which each token of an answer leads
QUESTIONS = (
    ("add", False), ("subtract", False), ("add", True), ("subtract", True), ("talk", False), ("copy", False),
    ("reverse", False), ("sort", False), ("units", False), ("unknown", False),
)  # fmt: skip
FACTS = ("name", "color", "number", "secret")
N_CALLS = 3
FIRST = Turn("add 17 25", "What is 17 + 25?", "42")


def _answers(formatter: Formatter, c: Conversation) -> tuple[Tensor, Tensor]:
    ids, mask = formatter.encode(c)
    return torch.from_numpy(ids), torch.from_numpy(mask).nonzero()[:, 0]


def _is_certain(model: Model, formatter: Formatter, c: Conversation) -> bool:
    """Whether every token leads by the margin in what follows the last question, but for a tool's result."""
    ids, at = _answers(formatter, c)
    user = formatter.token(USER)
    if not c.tools:  # a result counts as the user's
        at = at[at > (ids == user).nonzero()[-1, 0]]
    logits = model.forward(ids[None, :-1]).logits[at - 1]
    top = logits.topk(2).values
    return bool(((logits.argmax(-1) == ids[at]) & (top[:, 0] - top[:, 1] > MARGIN)).all())


def write_exam(config: Mapping[str, Any], params: Mapping[str, Tensor], model_path: Path, out: Path) -> int:
    """Write the exam of an exported model.

    Args:
        config: ``config.json``.
        params: What was exported.
        model_path: The export; gives the vocabulary.
        out: The JSON file.

    Returns:
        The number of questions: fewer than asked if the model is not sure of its answers.
    """
    hp = HParams.from_hf_config(config)
    rng = random.Random(SEED)
    with Formatter(model_path) as formatter, torch.no_grad():
        c = conversation(rng, "held-out", N_TOKENS)
        while c.thinking:
            c = conversation(rng, "held-out", N_TOKENS)
        ids, at = _answers(formatter, c)
        nll = {}
        for level in LEVELS:
            logits = Model(hp, params, level).forward(ids[None, :-1]).logits[at - 1]
            nll[level] = functional.cross_entropy(logits, ids[at]).item()
        model = Model(hp, params, "cache")
        questions = []
        asked_of: list[tuple[Conversation, int]] = []  # with the number of messages that ask
        asked = [(FIRST, False)]
        asked += [(draw(task, rng, "held-out"), is_on) for task, is_on in QUESTIONS for _ in range(N_EACH)]
        for turn, thinking in asked:
            c = Conversation(thinking=thinking)
            c.add(turn)
            asked_of.append((c, 1))
        for kind in FACTS:
            fact, between = draw_fact(kind, rng, "held-out"), draw("talk", rng, "held-out")
            c = Conversation()
            for turn in (Turn("", fact.tell, fact.reply), between, Turn("", fact.ask, fact.answer)):
                c.add(turn)
            asked_of.append((c, 5))
        for _ in range(N_CALLS):
            c = Conversation(tools=[CALCULATOR])
            c.add(draw("calculate", rng, "held-out"))
            asked_of.append((c, 1))
        for c, n in asked_of:
            if _is_certain(model, formatter, c):
                question: dict[str, Any] = {
                    "messages": c.messages[:n],
                    "thinking": c.thinking,
                    "tools": c.tools,
                }
                if c.tools:
                    question["arguments"] = json.loads(
                        c.messages[n]["tool_calls"][0]["function"]["arguments"]
                    )
                else:
                    question["answer"] = c.messages[n]["content"]
                questions.append(question)
    exam = {"ids": ids.tolist(), "answers": at.tolist(), "nll": nll, "questions": questions}
    out.write_text(json.dumps(exam, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(questions)
