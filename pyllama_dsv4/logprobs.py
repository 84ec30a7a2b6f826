"""Log-probabilities of tokens, and OpenAI's two shapes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib

__all__ = [
    "ChatLogprobs",
    "CompletionLogprobs",
    "TokenLogprobs",
    "chat_logprobs",
    "completion_logprobs",
    "token_logprobs",
]


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, and what was likeliest in its place, by the model's own logits.

    Attributes:
        token: The sampled id.
        logprob: Its log-probability before biases, penalties, temperature and grammar.
        top: The most likely ids with theirs, most likely first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: npt.NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `n_top` most likely ones.

    Args:
        logits: ``(n_vocab,) float32``.
        token: An id.
        n_top: How many alternatives.
    """
    out = ffi.new("float *")
    ids, values = ffi.new("int32_t[]", max(n_top, 1)), ffi.new("float[]", max(n_top, 1))
    data = ffi.from_buffer("float[]", logits)
    check(lib.pyl_logprobs(data, len(logits), token, n_top, out, ids, values), "reading log-probabilities")
    return TokenLogprobs(token, float(out[0]), list(zip(ids[0:n_top], values[0:n_top], strict=True)))


class CompletionLogprobs(TypedDict):
    """Of a text completion; one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(TypedDict):
    """One alternative; ``bytes`` are the token's, which may be a part of a character only."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One sampled token with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of a chat completion: all sampled tokens, those of reasoning and of calls included."""

    content: list[TokenLogprob]


def completion_logprobs(
    entries: Sequence[TokenLogprobs], offsets: Sequence[int], to_bytes: Callable[[int], bytes]
) -> CompletionLogprobs:
    """Return OpenAI's form for text completions."""

    def name(token: int) -> str:
        return to_bytes(token).decode("utf-8", "replace")

    return {
        "tokens": [name(e.token) for e in entries],
        "token_logprobs": [e.logprob for e in entries],
        "top_logprobs": [{name(t): p for t, p in reversed(e.top)} for e in entries],
        "text_offset": list(offsets),
    }


def chat_logprobs(entries: Sequence[TokenLogprobs], to_bytes: Callable[[int], bytes]) -> ChatLogprobs:
    """Return OpenAI's form for chats."""

    def one(token: int, logprob: float) -> TopLogprob:
        data = to_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {**one(e.token, e.logprob), "top_logprobs": [one(t, p) for t, p in e.top]} for e in entries
        ]
    }
