"""Scores a demonstration model on held-out conversations, greedily, through the package.

Owns what counts as right. The conversations are ``data.py``'s; no torch is needed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pyllama_dsv4 import Llama
from pyllama_dsv4.demo import TRAINED

from .data import Conversation, conversation
from .tasks import CALCULATOR, FACTS, Turn, draw

__all__ = ["GOALS", "N_CTX", "score_model"]

# name -> share that has to be right
GOALS: dict[str, float] = {
    "sums": 0.95,
    "sums, thinking": 0.99,
    "copy": 0.95,
    "reverse": 0.95,
    "sort": 0.95,
    "recall 500": 0.95,
    "recall 2000": 0.90,
    "recall 4000": 0.80,
    "tool call": 0.95,
    "talk": 0.95,
}
SEED = 20
N_ANSWER = 256
N_CTX = 6144


def _single(turn: Turn, *, thinking: bool = False, tools: bool = False) -> Conversation:
    c = Conversation(thinking=thinking, tools=[CALCULATOR] if tools else [])
    c.add(turn)
    return c


def _recall(llm: Llama, rng: random.Random, distance: int) -> Conversation:
    """A fact is stated, `distance` to 1.15 times as many tokens pass, and it is asked for."""
    kinds = sorted(FACTS)
    aim = distance
    while True:
        c = conversation(rng, "held-out", aim, kind=rng.choice(kinds))
        c.thinking = False
        if c.tools:
            continue
        n = len(llm.format_chat_tokens(c.messages[2:-2], add_generation_prompt=False))
        if distance <= n <= 1.15 * distance:
            return c
        aim = max(round(aim * 1.07 * distance / n), 8)


def _questions(llm: Llama, task: str, rng: random.Random) -> Conversation:
    name, _, option = task.partition(" ")
    if name == "recall":
        return _recall(llm, rng, int(option))
    if task == "tool call":
        return _single(draw("calculate", rng, "held-out"), tools=True)
    if task.startswith("sums"):
        name = rng.choice(("add", "subtract"))
        return _single(draw(name, rng, "held-out"), thinking="thinking" in task)
    return _single(draw(name, rng, "held-out"))


def _is_right(llm: Llama, c: Conversation) -> bool:
    """Whether every answer of the last turn is the expected one."""
    last_user = max(i for i, m in enumerate(c.messages) if m["role"] == "user")
    for i in range(last_user + 1, len(c.messages)):
        want = c.messages[i]
        if want["role"] != "assistant":
            continue
        got: dict[str, Any] = dict(
            llm.create_chat_completion(
                c.messages[:i],
                thinking=c.thinking,
                tools=c.tools or None,
                temperature=0,
                max_tokens=N_ANSWER,
            )["choices"][0]["message"]
        )
        calls = [_call(call) for call in got.get("tool_calls") or ()]
        if calls != [_call(call) for call in want.get("tool_calls") or ()]:
            return False
        if (got.get("content") or "").strip() != want["content"]:
            return False
    return True


def _call(call: dict[str, Any]) -> tuple[str, Any]:
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def score_model(llm: Llama, n: int, tasks: list[str] | None = None) -> Iterator[tuple[str, int, list[str]]]:
    """Yield each task with the number of right answers out of `n`, and the questions that went wrong."""
    for task in tasks or list(GOALS):
        rng = random.Random(f"{SEED} {task}")
        wrong = []
        for _ in range(n):
            c = _questions(llm, task, rng)
            if not _is_right(llm, c):
                wrong.append(next(m["content"] for m in reversed(c.messages) if m["role"] == "user"))
        yield task, n - len(wrong), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a demonstration model on held-out conversations.")
    parser.add_argument("model", type=Path, nargs="?", default=TRAINED, help="default: the package's")
    parser.add_argument("-n", type=int, default=200, help="questions per task")
    parser.add_argument("--task", action="append", choices=list(GOALS))
    parser.add_argument("--act-quant", choices=("none", "cache", "full"), default="cache")
    parser.add_argument("--cache-type", default="f16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wrong", action="store_true", help="list the questions that went wrong")
    args = parser.parse_args()
    level: Literal["none", "cache", "full"] = args.act_quant
    with Llama(
        args.model,
        n_ctx=N_CTX,
        n_threads=args.threads,
        act_quant=level,
        cache_type=args.cache_type,
        warmup=False,
    ) as llm:
        for task, n_right, wrong in score_model(llm, args.n, args.task):
            goal = GOALS[task]
            mark = "met" if n_right >= goal * args.n else "missed"
            print(f"{task:16} {n_right / args.n:7.1%} of {args.n}, goal {goal:.0%} {mark}", flush=True)
            for question in wrong if args.wrong else ():
                print(f"    {question}")


if __name__ == "__main__":
    main()
