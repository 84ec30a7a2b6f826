"""The dictionaries that users get, in OpenAI's shapes. Pure Python: it never loads the engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from .logprobs import ChatLogprobs, CompletionLogprobs

__all__ = [
    "AssistantMessage",
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatDelta",
    "Completion",
    "CompletionUsage",
    "Embedding",
    "Embeddings",
    "FinishReason",
    "FunctionCall",
    "ResponseHead",
    "ToolCall",
    "ToolCallDelta",
    "add_logprobs",
    "chat_choice",
    "chat_completion",
    "chat_completion_chunk",
    "completion",
    "embeddings",
    "usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "loop"]


class FunctionCall(TypedDict):
    """Which function with which arguments; ``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(TypedDict, total=False):
    """A piece of a call: the name comes once, the arguments grow."""

    name: str
    arguments: str


class ToolCallDelta(TypedDict, total=False):
    """A piece of the call number ``index``; ``id`` and ``type`` come with its first piece."""

    index: int
    id: str
    type: Literal["function"]
    function: FunctionCallDelta


class _AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None


class AssistantMessage(_AssistantMessage, total=False):
    """An answer; it can be put back into ``messages`` as it is. ``content`` may be ``None`` with calls."""

    reasoning_content: str
    tool_calls: list[ToolCall]


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to the answer."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class PromptTokensDetails(TypedDict):
    """``cached_tokens``: how many tokens of the prompt were in the KV cache already."""

    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    """``reasoning_tokens``: how many of the generated tokens were reasoning, its end mark included."""

    reasoning_tokens: int


class CompletionUsage(TypedDict):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class _ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChoice(_ChatChoice, total=False):
    """One answer. ``unparsed``, all the text as generated, is there when it does not follow the format."""

    unparsed: str


class ChatCompletion(TypedDict):
    """An answer to ``create_chat_completion``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class _ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunkChoice(_ChatChunkChoice, total=False):
    """One answer's part of a chunk. ``unparsed`` as in ``ChatChoice``, in the last chunk."""

    unparsed: str


class _ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]


class ChatCompletionChunk(_ChatCompletionChunk, total=False):
    """A piece of a streamed answer; ``usage`` comes with the last."""

    usage: CompletionUsage


class CompletionChoice(TypedDict):
    """One continuation of a text; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class _Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]


class Completion(_Completion, total=False):
    """An answer to ``create_completion``, or a piece of a streamed one; ``usage`` comes with the last."""

    usage: CompletionUsage


class Embedding(TypedDict):
    """The vector of one text; without pooling one for each of its tokens."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[list[float]]


class EmbeddingUsage(TypedDict):
    """Token counts of one request."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """An answer to ``create_embedding``."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


def embeddings(model: str, rows: list[Any], n_tokens: int) -> Embeddings:
    """Return vectors in OpenAI's form."""
    data: list[Embedding] = [
        {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
    ]
    usage: EmbeddingUsage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}


@dataclass(frozen=True)
class ResponseHead:
    """What all objects of one answer share.

    Attributes:
        id: ``chatcmpl-...`` or ``cmpl-...``.
        created: Seconds since 1970.
        model: Name of the model.
        system_fingerprint: What the answer depends on besides the request.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, kind: Literal["chatcmpl", "cmpl"], model: str, system_fingerprint: str) -> ResponseHead:
        """Return a head with a random id and the present time."""
        return cls(f"{kind}-{secrets.token_hex(14)}", int(time.time()), model, system_fingerprint)


def usage(
    n_tokens_prompt: int, n_tokens_completion: int, n_tokens_cached: int = 0, n_tokens_reasoning: int = 0
) -> CompletionUsage:
    """Return token counts in OpenAI's form."""
    return {
        "prompt_tokens": n_tokens_prompt,
        "completion_tokens": n_tokens_completion,
        "total_tokens": n_tokens_prompt + n_tokens_completion,
        "prompt_tokens_details": {"cached_tokens": n_tokens_cached},
        "completion_tokens_details": {"reasoning_tokens": n_tokens_reasoning},
    }


def chat_completion(head: ResponseHead, choices: list[ChatChoice], usage: CompletionUsage) -> ChatCompletion:
    """Return whole answers in OpenAI's form."""
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": choices,
        "usage": usage,
    }


def chat_choice(
    index: int,
    message: AssistantMessage,
    finish_reason: FinishReason,
    unparsed: str | None = None,
    logprobs: ChatLogprobs | None = None,
) -> ChatChoice:
    """Return one whole answer."""
    choice: ChatChoice = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    if unparsed is not None:
        choice["unparsed"] = unparsed
    return choice


def chat_completion_chunk(
    head: ResponseHead,
    index: int,
    delta: ChatDelta,
    finish_reason: FinishReason | None = None,
    usage: CompletionUsage | None = None,
    unparsed: str | None = None,
    logprobs: ChatLogprobs | None = None,
) -> ChatCompletionChunk:
    """Return a piece of an answer in OpenAI's form; the first says the role, the last the finish reason."""
    choice: ChatChunkChoice = {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
    if unparsed is not None:
        choice["unparsed"] = unparsed
    chunk: ChatCompletionChunk = {
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": [choice],
    }
    if usage is not None:
        chunk["usage"] = usage
    return chunk


def completion(
    head: ResponseHead,
    index: int,
    text: str,
    finish_reason: FinishReason | None = None,
    usage: CompletionUsage | None = None,
    logprobs: CompletionLogprobs | None = None,
) -> Completion:
    """Return a continuation of a text, or a piece of one, in OpenAI's form."""
    body: Completion = {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}],
    }
    if usage is not None:
        body["usage"] = usage
    return body


def add_logprobs(choice: CompletionChoice, logprobs: CompletionLogprobs | None) -> None:
    """Append those of a piece to those of the choice."""
    if logprobs is None:
        return
    known = choice["logprobs"]
    if known is None:
        choice["logprobs"] = logprobs
        return
    known["tokens"] += logprobs["tokens"]
    known["token_logprobs"] += logprobs["token_logprobs"]
    known["top_logprobs"] += logprobs["top_logprobs"]
    known["text_offset"] += logprobs["text_offset"]
