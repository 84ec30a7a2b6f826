"""Chat completion: a conversation, and the answer to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

from . import chat
from .chat import ChatPrompt, ChatRequest
from .chat_engine import ChatEngine
from .completion import Completions
from .generate import stop_list
from .sampler import SamplingOptions, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ChatCompletions"]

N_REPLAYED_MAX = 256  # answers whose sampled ids are remembered


class ChatCompletions(Completions):
    """Answering conversations."""

    @cached_property
    def _replay(self) -> OrderedDict[bytes, list[int]]:
        """Sampled ids by the visible text they spelled, oldest first."""
        return OrderedDict()

    def _format(self, request: ChatRequest) -> ChatPrompt:
        with self._use():
            if self._engine is None:
                self._engine = ChatEngine(self._model, self._chat_template)
            return self._engine.format(request)

    def _request(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool,
        reasoning_effort: chat.ReasoningEffort | None,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> ChatRequest:
        return ChatRequest.create(
            messages,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def format_chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the exact prompt of a conversation, the one that ``create_chat_completion`` evaluates.

        Message text never becomes special tokens, whatever it spells. Answers that this object generated are put
        back with the very ids that were sampled.

        Args:
            messages: OpenAI messages; see ``ChatRequest.create``.
            thinking: Let the model reason before it answers.
            reasoning_effort: None, ``"high"`` or ``"max"``; needs `thinking`.
            tools: OpenAI function tools.
            add_generation_prompt: End where the assistant's answer begins.

        Raises:
            ChatError: The messages cannot be formatted.
        """
        request = self._request(messages, thinking, reasoning_effort, tools, add_generation_prompt)
        return self._replayed(self._format(request).tokens)

    def format_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt of a conversation as text, for display; arguments as ``format_chat_tokens``.

        Tokenising this text again would let message text become special tokens: use the ids for generating.
        """
        request = self._request(messages, thinking, reasoning_effort, tools, add_generation_prompt)
        return self._format(request).text

    def _replayed(self, ids: list[int]) -> list[int]:
        """Put the sampled ids of remembered answers in place of the ids that their text tokenises to."""
        if not self._replay:
            return ids
        out: list[int] = []
        run: list[int] = []  # ordinary ids since the last special one
        for token in ids:
            if not self._is_template_token(token):
                run.append(token)
                continue
            known = self._replay.get(self._tokenizer.detokenize_bytes(run)) if run else None
            out += run if known is None else known
            out.append(token)
            run = []
        return out + run

    def _is_template_token(self, token: int) -> bool:
        # single ids that spell themselves in angle brackets: <think> is not a control token in every file
        if self._tokenizer.is_special(token):
            return True
        data = self._tokenizer.token_to_bytes(token)
        return data in (b"<think>", b"</think>")

    def _remember(self, sampled: list[int], content: str) -> None:
        """Remember the ids of an answer's visible text, if they spell exactly that text.

        Control tokens among them spell nothing; a character that was incomplete when the answer was stopped has not
        been shown.
        """
        start = 0
        for i, token in enumerate(sampled):
            if self._tokenizer.token_to_bytes(token) == b"</think>":
                start = i + 1
        ids = sampled[start:]
        text = self._tokenizer.detokenize(ids)
        if content and text.startswith(content) and not text[len(content) :].strip("\ufffd"):
            self._replay[content.encode("utf-8")] = ids
            while len(self._replay) > N_REPLAYED_MAX:
                self._replay.popitem(last=False)

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = ...,
        reasoning_effort: chat.ReasoningEffort | None = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        stream: Literal[False] = ...,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> chat.ChatCompletion: ...
    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = ...,
        reasoning_effort: chat.ReasoningEffort | None = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        stream: Literal[True],
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[chat.ChatCompletionChunk]: ...

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stream: bool = False,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> chat.ChatCompletion | Iterator[chat.ChatCompletionChunk]:
        """Answer a conversation; return OpenAI's ``chat.completion``, or an iterator of chunks with `stream`.

        The part of the prompt that is in the cache already is not evaluated again
        (``usage.prompt_tokens_details.cached_tokens``).

        Args:
            messages: OpenAI messages; answers of this method can be put back as they are.
            thinking: Let the model reason first; the reasoning comes as ``reasoning_content``.
            reasoning_effort: None, ``"high"`` or ``"max"``; needs `thinking`.
            tools: OpenAI function tools; calls come as ``tool_calls``.
            stream: Yield chunks as they are generated.
            max_tokens: Tokens at most; None means until the model ends or the context is full.
            stop: Strings that end the answer.
            sampling: See ``SamplingOptions``.

        Raises:
            ChatError: The messages cannot be formatted.
            ContextFullError: The prompt does not fit.
        """
        own = ("thinking", "reasoning_effort", "tools", "stream", "max_tokens", "stop")
        self._refuse_unknown_sampling("create_chat_completion", own, sampling)
        params, stops = self._params(sampling), stop_list(stop)
        request = self._request(messages, thinking, reasoning_effort, tools, True)
        prompt = self._format(request)
        ids = self._replayed(prompt.tokens)
        self._check_fits(len(ids))
        chunks = self._chat_chunks(prompt, ids, params, max_tokens, stops)
        if stream:
            return (chunk for chunk, _ in chunks)
        for chunk, message in chunks:
            if message is not None:
                choice = chunk["choices"][0]
                reason = choice["finish_reason"]
                assert reason is not None  # the chunk with the message is the last
                head = chat.ResponseHead(chunk["id"], chunk["created"], chunk["model"])
                return chat.chat_completion(head, message, reason, chunk["usage"], choice.get("unparsed"))
        raise AssertionError("the stream of chunks ends with a message")

    def _chat_chunks(
        self,
        prompt: ChatPrompt,
        ids: list[int],
        params: SamplingParams,
        max_tokens: int | None,
        stops: list[str],
    ) -> Iterator[tuple[chat.ChatCompletionChunk, chat.AssistantMessage | None]]:
        head = chat.ResponseHead.new("chatcmpl", self._model.path.name)
        assert self._engine is not None  # made by _format
        reader = self._engine.reader(prompt)
        sampled: list[int] = []
        content = ""
        yield chat.chat_completion_chunk(head, {"role": "assistant", "content": ""}), None
        try:
            pieces = self._pieces(
                ids,
                params,
                max_tokens=max_tokens,
                stops=[*stops, *prompt.stops],
                shown=frozenset(prompt.preserved_tokens),
            )
            for piece in pieces:
                if piece.token is not None:
                    sampled.append(piece.token)
                delta = reader.feed(piece.text)
                content += delta.get("content", "")
                if delta:
                    yield chat.chat_completion_chunk(head, delta), None
                if piece.finish is not None:
                    delta, message, finish, is_complete = reader.finish(piece.finish)
                    content += delta.get("content", "")
                    if delta:
                        yield chat.chat_completion_chunk(head, delta), None
                    unparsed = None if is_complete else reader.raw
                    last = chat.chat_completion_chunk(head, {}, finish, self._usage(), unparsed)
                    yield last, message
        finally:
            self._remember(sampled, content)
