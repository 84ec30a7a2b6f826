"""The ids that were sampled for an answer, back in the next prompt of its conversation.

A message holds text; tokenising it again may give other ids than those that were sampled, and tool calls are written
anew from their arguments. What differs is not in the cache. Owns the memory of answers and finding their places in a
prompt of V4's format; other formats are left as they are. Pure Python: it never loads the engine.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Marks", "Replay"]

N_ANSWERS_MAX = 256


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that enclose an answer; -1 for those that the vocabulary has not.

    Attributes:
        end: End of the answer.
        think: Begin of its reasoning.
        think_end: End of its reasoning, or of the header of an answer without.
        tasks: Tokens of quick tasks; an answer to one begins behind it.
        reminder: Its text stands between a header and the answer.
    """

    end: int
    think: int
    think_end: int
    tasks: frozenset[int]
    reminder: int


@dataclass(frozen=True)
class _Answer:
    reasoning: list[int]  # the end mark included; empty without reasoning
    visible: list[int]


_Key = tuple[str, "str | None"]


class Replay:
    """Answers by what their messages say, the newest ``N_ANSWERS_MAX``."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._answers: OrderedDict[_Key, _Answer] = OrderedDict()

    def remember(self, message: Mapping[str, Any], sampled: Sequence[int], has_reasoning: bool) -> None:
        """Remember an answer.

        Args:
            message: What it says: ``content``, ``reasoning_content``, ``tool_calls``.
            sampled: Its ids, without the end mark.
            has_reasoning: Whether it began with reasoning.
        """
        visible_key = _visible_key(message)
        if visible_key is None:
            return
        n_reasoning = 0
        if has_reasoning:
            if self._marks.think_end not in sampled:
                return
            n_reasoning = sampled.index(self._marks.think_end) + 1
        answer = _Answer(list(sampled[:n_reasoning]), list(sampled[n_reasoning:]))
        for key in ((visible_key, None), (visible_key, message.get("reasoning_content") or "")):
            self._answers[key] = answer
            self._answers.move_to_end(key)
        while len(self._answers) > 2 * N_ANSWERS_MAX:
            self._answers.popitem(last=False)

    def put_back(self, ids: list[int], messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return a prompt with the sampled ids of the answers in it that are remembered.

        Args:
            ids: The prompt of `messages`; no id of a mark comes from message text.
            messages: In normal form (``ChatRequest.messages``).
        """
        answers = [(i, m) for i, m in enumerate(messages) if m["role"] == "assistant"]
        ends = [i for i, token in enumerate(ids) if token == self._marks.end]
        if not self._answers or len(ends) != len(answers):
            return ids
        out: list[int] = []
        start = 0
        for end, (i, message) in zip(ends, answers, strict=True):
            is_behind_reminder = i > 0 and messages[i - 1]["role"] == "latest_reminder"
            out += self._replaced(ids[start:end], message, is_behind_reminder)
            start = end
        return out + ids[start:]

    def _replaced(self, span: list[int], message: Mapping[str, Any], is_behind_reminder: bool) -> list[int]:
        """Return ids from the end of an answer to that of the next one, which is `message`."""
        visible_key = _visible_key(message)
        marks = self._marks
        at_end = _last(span, (marks.think_end,))
        at_task = _last(span, marks.tasks)
        if visible_key is None or max(at_end, at_task) < 0:
            return span
        if at_task < at_end:
            at_think = _last(span[:at_end], (marks.think,))
            # in a kept reasoning nothing stands between its marks but itself
            if at_think >= 0 and not is_behind_reminder:
                known = self._answers.get((visible_key, message.get("reasoning_content") or ""))
                if known is not None and known.reasoning:
                    return span[: at_think + 1] + known.reasoning + known.visible
            if _last(span, (marks.reminder,)) > at_end:
                return span  # the reminder's text has no end mark
        known = self._answers.get((visible_key, None))
        return span if known is None else span[: max(at_end, at_task) + 1] + known.visible


def _last(ids: Sequence[int], wanted: frozenset[int] | tuple[int, ...]) -> int:
    """Return the index of the last wanted id; -1 if there is none."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in wanted), -1)


def _visible_key(message: Mapping[str, Any]) -> str | None:
    """Return what a message says apart from reasoning, the same for the same meaning; None for nothing."""
    calls = []
    for call in message.get("tool_calls") or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            return None
        calls.append([call["function"]["name"], arguments])
    content = message.get("content") or ""
    if not content and not calls:
        return None
    return json.dumps([content, calls], sort_keys=True)
