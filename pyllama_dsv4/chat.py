"""Chat in OpenAI's terms: the prompt that the native side makes of a request, and the reading of its answer.

Owns what comes back from the engine (``ChatPrompt``) and how the deltas of an answer are numbered and named
(``AnswerReader``); the request is ``chat_request.py``'s, the shapes of answers are ``responses.py``'s, both can be had
from here. Leaves the text of the prompt, its token ids and the parsing of answers to ``native/capi/pyl-chat.cpp``,
and generation to ``chat_completion.py``. Pure Python: it never loads the engine.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .chat_request import ChatRequest, ReasoningEffort, ToolChoice
from .responses import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionUsage,
    FinishReason,
    ToolCall,
    ToolCallDelta,
)

__all__ = [
    "AnswerReader",
    "AssistantMessage",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatPrompt",
    "ChatRequest",
    "Completion",
    "CompletionUsage",
    "FinishReason",
    "PromptPart",
    "ReasoningEffort",
    "ToolCall",
    "ToolChoice",
]


# --- the prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptPart:
    """A stretch of the prompt: the template's own text, or text that came with the request (``is_input``)."""

    text: str
    is_input: bool


@dataclass(frozen=True)
class ChatPrompt:
    """A formatted conversation.

    Attributes:
        tokens: The exact prompt, BOS included; no id of a special token comes from message text.
        parts: Its display, piece by piece.
        parser_state: What ``pyl_chat_parser_init`` needs to read the answer.
        grammar: GBNF that the answer must follow, or ``""``.
        grammar_lazy: Whether the grammar applies only from the first trigger on.
        grammar_triggers: Pairs of kind (``token``, ``word``, ``pattern``, ``pattern_full``) and text.
        generation_tokens: Ids at the end of the prompt that a grammar which is not lazy begins with.
        preserved_tokens: Ids of special tokens whose text must stay in the answer for the parser to see.
        stops: Strings that end the answer, besides the end-of-generation tokens.
        supports_thinking: Whether the template knows a thinking mode.
    """

    tokens: list[int]
    parts: list[PromptPart]
    parser_state: str
    grammar: str
    grammar_lazy: bool
    grammar_triggers: list[tuple[str, str]]
    generation_tokens: list[int]
    preserved_tokens: list[int]
    stops: list[str]
    supports_thinking: bool

    @classmethod
    def from_json(cls, text: str | bytes) -> ChatPrompt:
        """Read what ``pyl_chat_format`` returned."""
        body = json.loads(text)
        return cls(
            tokens=body["tokens"],
            parts=[PromptPart(part["text"], part["is_input"]) for part in body["parts"]],
            parser_state=json.dumps(body["parser"]),
            grammar=body["grammar"],
            grammar_lazy=body["grammar_lazy"],
            grammar_triggers=[(trigger["type"], trigger["value"]) for trigger in body["grammar_triggers"]],
            generation_tokens=body["generation_tokens"],
            preserved_tokens=body["preserved_tokens"],
            stops=body["stops"],
            supports_thinking=body["supports_thinking"],
        )

    @property
    def text(self) -> str:
        """The prompt as text, for display: tokenising it again would not tell message text from markup."""
        return "".join(part.text for part in self.parts)


# --- the answer -----------------------------------------------------------------------------------


class AnswerReader:
    """Turns generated text into deltas, and at its end into a message.

    Args:
        push: Takes a piece of the answer (whole characters) and whether it is the last, and returns the JSON
            of ``pyl_chat_parser_push``.

    Text that may be the beginning of markup is held back until it is clear what it is, so that no tag shows
    up in ``content``. The deltas add up to the message.
    """

    def __init__(self, push: Callable[[str, bool], str | bytes]) -> None:
        self._push = push
        self._raw: list[str] = []
        self._ids: list[str] = []

    @property
    def raw(self) -> str:
        """The generated text so far, markup included."""
        return "".join(self._raw)

    def feed(self, text: str) -> ChatDelta:
        """Take a piece of the answer; return what it adds, possibly nothing (an empty dictionary)."""
        if not text:
            return {}
        self._raw.append(text)
        return self._delta(json.loads(self._push(text, False))["deltas"])

    def finish(self, finish_reason: FinishReason) -> tuple[ChatDelta, AssistantMessage, FinishReason, bool]:
        """End the answer.

        Args:
            finish_reason: Why generation ended: ``"stop"``, ``"length"`` or ``"loop"``.

        Returns:
            The last delta; the whole message; the finish reason, ``"tool_calls"`` if tools are to be called;
            and whether the text follows the format. If not (a call of an unknown tool, broken markup, an end
            in the middle of a call that the model chose), the message holds what could be read and ``raw``
            everything that was generated.
        """
        end = json.loads(self._push("", True))
        delta = self._delta(end["deltas"])
        calls = end["message"]["tool_calls"]
        message: AssistantMessage = {"role": "assistant", "content": end["message"]["content"]}
        if end["message"]["reasoning_content"]:
            message["reasoning_content"] = end["message"]["reasoning_content"]
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": function}
                for call_id, function in zip(self._ids, calls, strict=True)
            ]
        if finish_reason in ("length", "loop"):
            return delta, message, finish_reason, True  # cut off, as was asked for
        follows_format = end["complete"] and all(_is_json_object(call["arguments"]) for call in calls)
        if calls and follows_format:
            finish_reason = "tool_calls"
        return delta, message, finish_reason, follows_format

    def _delta(self, body: dict[str, Any]) -> ChatDelta:
        out: ChatDelta = {}
        if "reasoning_content" in body:
            out["reasoning_content"] = body["reasoning_content"]
        if "content" in body:
            out["content"] = body["content"]
        for call in body.get("tool_calls", ()):
            piece: ToolCallDelta = {"index": call["index"]}
            if "name" in call:
                self._ids.append(f"call_{secrets.token_hex(12)}")
                piece["id"] = self._ids[-1]
                piece["type"] = "function"
                piece["function"] = {"name": call["name"], "arguments": call["arguments"]}
            else:
                piece["function"] = {"arguments": call["arguments"]}
            out.setdefault("tool_calls", []).append(piece)
        return out


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
