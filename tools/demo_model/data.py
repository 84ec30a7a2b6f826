"""Conversations for training and for the held-out scores, and their token ids.

A conversation is a run of turns from ``tasks.py``, as long as is asked for: one sequence needs no padding, its first
turn stands where a user's first question stands, and facts are asked for after as many tokens as wanted. The ids come
from the package's own prompt formatting, so that training sees what ``Llama.create_chat_completion`` evaluates.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import Llama

from .tasks import CALCULATOR, FACTS, Fact, Split, Turn, draw, draw_fact

__all__ = ["ALL", "FIRST", "SHORT", "Conversation", "Formatter", "Mixture", "batch", "conversation"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mixture:
    """What conversations are made of.

    Attributes:
        weights: How often each task is drawn.
        p_fact: That a turn states or asks for a fact.
        p_thinking: That a conversation has thinking on.
        p_short: That a conversation with thinking has few turns; others fill the rest of the sequence.
    """

    weights: dict[str, int]
    p_fact: float
    p_thinking: float
    p_short: float


FIRST = Mixture({"add": 6, "subtract": 5, "talk": 1}, p_fact=0.05, p_thinking=0.4, p_short=0.0)
SHORT = Mixture({"add": 5, "subtract": 6, "talk": 1}, p_fact=0.05, p_thinking=0.6, p_short=0.9)
ALL = Mixture(
    {
        "add": 5, "subtract": 5, "multiply": 1, "copy": 2, "reverse": 3, "sort": 4, "units": 2, "talk": 3,
        "unknown": 1,
    },
    p_fact=0.25,
    p_thinking=0.5,
    p_short=0.8,
)  # fmt: skip
P_TOOLS = 0.3  # of a conversation with the calculator
N_SHORT = 40  # tokens at most before the last turn of a short conversation
P_SUM_LAST = 0.7  # of a sum at the end of thinking: without tools only the last turn keeps its reasoning
N_MARKUP = 3  # characters that the markup around a text counts as
TOKENS_PER_CHARACTER = 0.45  # a first guess of the length
N_LEAST = 20  # tokens that are worth another conversation
N_TOOLS_TOKENS = 1024  # shorter conversations have no room for the description of tools
USER, ASSISTANT, EOS = (
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


@dataclass
class Conversation:
    """OpenAI messages and the options they are formatted with."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)

    def add(self, turn: Turn, *, call_id: str = "call_0") -> None:
        """Append a turn: question, call and result if there are any, answer."""
        reasoning = {"reasoning_content": turn.reasoning} if self.thinking else {}
        self.messages.append({"role": "user", "content": turn.ask})
        if turn.call is not None:
            arguments = json.dumps({"expression": turn.call})
            call = {
                "id": call_id,
                "type": "function",
                "function": {"name": "calculator", "arguments": arguments},
            }
            self.messages.append({"role": "assistant", "content": "", "tool_calls": [call], **reasoning})
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": turn.result})
            reasoning = {"reasoning_content": "The result is there."} if self.thinking else {}
        self.messages.append({"role": "assistant", "content": turn.answer, **reasoning})

    @property
    def n_characters(self) -> int:
        """Characters of the prompt, without the description of tools and the reasoning that it leaves out."""
        keys = ("content", "tool_calls", "reasoning_content")[: 3 if self.tools else 2]
        return sum(len(str(m.get(key, ""))) + N_MARKUP for m in self.messages for key in keys)


def _turn_of(key: str, ask: str, answer: str) -> Turn:
    return Turn(key, ask, answer, "The user told me.")


def conversation(
    rng: random.Random, split: Split, n_tokens: int, *, kind: str | None = None, mixture: Mixture = ALL
) -> Conversation:
    """Write a conversation of roughly `n_tokens` tokens.

    Args:
        rng: Source of all choices.
        split: Every turn belongs to it.
        n_tokens: How long, by a guess from the characters, at most; at least one turn.
        kind: A kind of fact that is stated first and asked for last; None for any or none.
        mixture: What the turns between are.
    """
    c = Conversation(thinking=rng.random() < mixture.p_thinking)
    if n_tokens >= N_TOOLS_TOKENS and rng.random() < P_TOOLS:
        c.tools.append(CALCULATOR)
        n_tokens -= 500
    elif kind is None and c.thinking and mixture.p_short and rng.random() < mixture.p_short:
        n_tokens = min(n_tokens, max(rng.randint(-N_SHORT, N_SHORT), 0))
    told: dict[str, Fact] = {}  # by question: a later statement replaces an earlier one
    names, weights = list(mixture.weights), list(mixture.weights.values())
    if kind is None and n_tokens > 400 and rng.random() < 0.7:
        kind = rng.choice(sorted(FACTS))
    last = draw_fact(kind, rng, split) if kind is not None else None
    if last is not None:
        c.add(_turn_of(last.key, last.tell, last.reply))
    n_goal = n_tokens / TOKENS_PER_CHARACTER
    n_characters = c.n_characters
    while n_characters < n_goal:
        before = len(c.messages)
        if rng.random() < mixture.p_fact:
            if told and rng.random() < 0.6:
                fact = told[rng.choice(sorted(told))]
                c.add(_turn_of(fact.key, fact.ask, fact.answer))
            else:
                fact = draw_fact(rng.choice(sorted(FACTS)), rng, split)
                if last is not None and fact.ask == last.ask:
                    continue
                told[fact.ask] = fact
                c.add(_turn_of(fact.key, fact.tell, fact.reply))
        elif c.tools and rng.random() < 0.4:
            c.add(draw("calculate", rng, split), call_id=f"call_{before}")
        else:
            c.add(draw(rng.choices(names, weights)[0], rng, split))
        n_characters += Conversation(c.messages[before:], tools=c.tools).n_characters
    if last is not None:
        c.add(_turn_of(last.key, last.ask, last.answer))
    elif not c.messages or (c.thinking and rng.random() < P_SUM_LAST):
        c.add(draw(rng.choice(("add", "subtract")), rng, split))
    return c


class Formatter:
    """Turns conversations into token ids with the package's own chat formatting.

    Args:
        model_path: Any file with the vocabulary, such as an export of the untrained model.
    """

    def __init__(self, model_path: Path) -> None:
        self._llm = Llama(model_path, n_ctx=64, n_threads=1, warmup=False)
        self.assistant, self.eos = self.token(ASSISTANT), self.token(EOS)

    def __enter__(self) -> Formatter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.close()

    def token(self, text: str) -> int:
        """Return the id of a special token."""
        ids = self._llm.tokenize(text, special=True)
        if len(ids) != 1:
            raise ValueError(f"{text} is no special token of this vocabulary: it is not DeepSeek-V4's")
        return ids[0]

    def encode(self, c: Conversation) -> tuple[Ids, Mask]:
        """Return the ids (n,), and which of them the model has to produce (n,).

        Those are the ids after ``<Assistant><think>`` or ``<Assistant></think>``, which end the prompt, up to and
        with the end of the answer.
        """
        ids = np.asarray(
            self._llm.format_chat_tokens(
                c.messages, thinking=c.thinking, tools=c.tools or None, add_generation_prompt=False
            ),
            dtype=np.int64,
        )
        mask = np.zeros(ids.size, dtype=np.bool_)
        for start in np.flatnonzero(ids == self.assistant):
            ends = np.flatnonzero(ids[start:] == self.eos)
            mask[start + 2 : start + ends[0] + 1] = True
        return ids, mask


def batch(
    formatter: Formatter, seed: int, step: int, n_rows: int, n_tokens: int, mixture: Mixture = ALL
) -> tuple[Ids, Mask]:
    """Return the ids (n_rows, n_tokens + 1) of a training step and which are to be learned.

    It depends on the arguments only. A row holds one conversation or, if the mixture has short ones, several, each from
    its beginning of sentence. Rows are cut at the length; short ones end in EOS that is not learned.
    """
    ids = np.full((n_rows, n_tokens + 1), formatter.eos, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=np.bool_)
    for row in range(n_rows):
        rng = random.Random(f"{seed} {step} {row}")
        start = 0
        while start < n_tokens - N_LEAST and (start == 0 or mixture.p_short):
            aim = (n_tokens - start) * rng.uniform(0.85, 1.0)  # so that most rows hold their last answer
            some_ids, some_mask = formatter.encode(conversation(rng, "train", int(aim), mixture=mixture))
            n = min(some_ids.size, n_tokens + 1 - start)
            ids[row, start : start + n], mask[row, start : start + n] = some_ids[:n], some_mask[:n]
            start += n
    return ids, mask
