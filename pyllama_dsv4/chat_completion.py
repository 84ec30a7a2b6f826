"""Chat completion: a conversation, and the answer to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

from . import chat
from ._native import logger
from .chat import ChatPrompt, ChatRequest
from .chat_engine import ChatEngine
from .chat_request import TASKS
from .completion import Completions, check_n, seeded
from .errors import ArgumentError
from .generate import GenerationOptions, Request
from .grammar import Grammar
from .logprobs import ChatLogprobs, TokenLogprobs, chat_logprobs
from .replay import Marks, Replay
from .responses import (
    AssistantMessage,
    ChatChoice,
    ChatDelta,
    CompletionUsage,
    FinishReason,
    ResponseHead,
    chat_choice,
    chat_completion,
    chat_completion_chunk,
    usage,
)
from .sampler import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ChatCompletions"]

OnContextFull = Literal["error", "drop_oldest"]

N_ANSWER_ROOM = 256  # tokens kept free for an answer without a bound
_OWN_NAMES = (
    "thinking",
    "reasoning_effort",
    "drop_thinking",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "max_tokens",
    "n",
    "logprobs",
    "top_logprobs",
    "on_context_full",
    "stream",
)


class ChatCompletions(Completions):
    """Answering conversations."""

    @cached_property
    def _replay(self) -> Replay:
        def mark(text: str) -> int:
            ids = self._tokenizer.tokenize(text, special=True)
            return ids[0] if len(ids) == 1 else -1

        tasks = frozenset(mark(f"<｜{task}｜>") for task in TASKS)
        return Replay(
            Marks(
                end=mark("<｜end▁of▁sentence｜>"),
                think=mark("<think>"),
                think_end=self._think_end,
                tasks=tasks - {-1},
                reminder=mark("<｜latest_reminder｜>"),
            )
        )

    def _format(self, request: ChatRequest) -> ChatPrompt:
        with self._use():
            if self._engine is None:
                self._engine = ChatEngine(self._model, self._chat_template)
            return self._engine.format(request)

    def format_chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        drop_thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the exact prompt of a conversation, the one that ``create_chat_completion`` evaluates.

        Message text never becomes special tokens, whatever it spells. Answers that this object generated, with their
        reasoning and calls, are put back with the very ids that were sampled.

        Args:
            messages: OpenAI messages; see ``ChatRequest.create``.
            thinking: Let the model reason before it answers.
            reasoning_effort: None, ``"high"`` or ``"max"``; needs `thinking`.
            drop_thinking: Leave out the reasoning of past turns, as DeepSeek does where no tools are in use.
            tools: OpenAI function tools.
            add_generation_prompt: End where the assistant's answer begins.

        Raises:
            ChatError: The messages cannot be formatted.
        """
        request = ChatRequest.create(
            messages,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            drop_thinking=drop_thinking,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
        return self._prompt_of(request)[1]

    def format_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        drop_thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt of a conversation as text, for display; arguments as ``format_chat_tokens``.

        Tokenising this text again would let message text become special tokens: use the ids for generating.
        """
        request = ChatRequest.create(
            messages,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            drop_thinking=drop_thinking,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
        return self._format(request).text

    def _prompt_of(self, request: ChatRequest) -> tuple[ChatPrompt, list[int]]:
        """Return a formatted conversation, and its ids with those that were sampled."""
        prompt = self._format(request)
        return prompt, self._replay.put_back(prompt.tokens, request.messages)

    def _remember(
        self, sampled: list[int], content: str, message: AssistantMessage | None, has_reasoning: bool
    ) -> None:
        """Remember the ids of an answer: of a whole one, or of a text that was stopped half-way.

        Control tokens spell nothing; a character that was incomplete when the answer was stopped has not been shown.
        """
        if message is None:
            start = sampled.index(self._think_end) + 1 if self._think_end in sampled and has_reasoning else 0
            text = self._tokenizer.detokenize(sampled[start:])
            if not content or not text.startswith(content) or text[len(content) :].strip("\ufffd"):
                return
            message = {"role": "assistant", "content": content}
        self._replay.remember(message, sampled, has_reasoning)

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = ...,
        reasoning_effort: chat.ReasoningEffort | None = ...,
        drop_thinking: bool = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        tool_choice: chat.ToolChoice = ...,
        parallel_tool_calls: bool = ...,
        response_format: Mapping[str, Any] | None = ...,
        max_tokens: int | None = ...,
        n: int = ...,
        logprobs: bool = ...,
        top_logprobs: int | None = ...,
        on_context_full: OnContextFull = ...,
        stream: Literal[False] = ...,
        **options: Unpack[GenerationOptions],
    ) -> chat.ChatCompletion: ...
    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = ...,
        reasoning_effort: chat.ReasoningEffort | None = ...,
        drop_thinking: bool = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        tool_choice: chat.ToolChoice = ...,
        parallel_tool_calls: bool = ...,
        response_format: Mapping[str, Any] | None = ...,
        max_tokens: int | None = ...,
        n: int = ...,
        logprobs: bool = ...,
        top_logprobs: int | None = ...,
        on_context_full: OnContextFull = ...,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Iterator[chat.ChatCompletionChunk]: ...

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: chat.ReasoningEffort | None = None,
        drop_thinking: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: chat.ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        n: int = 1,
        logprobs: bool = False,
        top_logprobs: int | None = None,
        on_context_full: OnContextFull = "error",
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> chat.ChatCompletion | Iterator[chat.ChatCompletionChunk]:
        """Answer a conversation; return OpenAI's ``chat.completion``, or an iterator of chunks with `stream`.

        The part of the prompt that is in the cache already is not evaluated again
        (``usage.prompt_tokens_details.cached_tokens``).

        Args:
            messages: OpenAI messages; answers of this method can be put back as they are.
            thinking: Let the model reason first; the reasoning comes as ``reasoning_content``.
            reasoning_effort: None, ``"high"`` or ``"max"``; needs `thinking`.
            drop_thinking: Leave out the reasoning of past turns, as DeepSeek does where no tools are in use.
            tools: OpenAI function tools; calls come as ``tool_calls``, and a grammar keeps them to the schemas.
            tool_choice: ``"auto"``, ``"none"``, ``"required"``, or OpenAI's form of a function that must be called.
            parallel_tool_calls: Whether one answer may call several tools.
            response_format: OpenAI's: text, any JSON object, or JSON of a schema; a grammar enforces it.
            max_tokens: Tokens at most; None means until the model ends or the context is full.
            n: How many answers; with a `seed`, the next ones take the next numbers.
            logprobs: Give the log-probability of every token.
            top_logprobs: And of so many alternatives; needs `logprobs`.
            on_context_full: ``"error"``, or ``"drop_oldest"``: leave out the oldest turns, system messages apart, until
                the prompt and `max_tokens` (None counts as 256) fit.
            stream: Yield chunks as they are generated.
            options: See ``GenerationOptions`` and ``SamplingOptions``. A `grammar` holds after the reasoning.

        Raises:
            ChatError: The messages cannot be formatted.
            ArgumentError: Options that contradict each other, or a schema that a grammar cannot express.
            ContextFullError: The prompt does not fit.
            CancelledError: by `timeout`, `stop_event` or `on_prefill`.
        """
        if top_logprobs is not None and not logprobs:
            raise ArgumentError("'top_logprobs' needs logprobs=True", key="top_logprobs", found=top_logprobs)
        request, sampling = Request.create(
            "create_chat_completion",
            _OWN_NAMES,
            options,
            max_tokens=max_tokens,
            n_logprobs=(top_logprobs or 0) if logprobs else None,
        )
        params = self._params(sampling)
        check_n(n)
        if on_context_full not in ("error", "drop_oldest"):
            raise ArgumentError(
                "answering",
                key="on_context_full",
                found=repr(on_context_full),
                expected="error or drop_oldest",
            )

        def make(kept: Sequence[Mapping[str, Any]]) -> ChatRequest:
            return ChatRequest.create(
                kept,
                thinking=thinking,
                reasoning_effort=reasoning_effort,
                drop_thinking=drop_thinking,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                response_format=response_format,
            )

        asked, prompt, ids = self._chat_prompt(make, messages, on_context_full, max_tokens)
        request = request.but(
            stops=(*request.stops, *prompt.stops),
            shown=frozenset(prompt.preserved_tokens),
            grammar=self._chat_grammar(prompt, request.grammar, asked.has_reasoning),
        )
        chunks = self._chat_chunks(prompt, ids, params, request, n, asked.has_reasoning)
        if stream:
            return (chunk for chunk, _ in chunks)
        return _collected(chunks)

    def _chat_prompt(
        self,
        make: Callable[[Sequence[Mapping[str, Any]]], ChatRequest],
        messages: Sequence[Mapping[str, Any]],
        on_context_full: OnContextFull,
        max_tokens: int | None,
    ) -> tuple[ChatRequest, ChatPrompt, list[int]]:
        """Format the messages, without the oldest turns if they do not fit and that is wanted."""
        while True:
            request = make(messages)
            prompt, ids = self._prompt_of(request)
            if on_context_full == "error":
                self._check_fits(len(ids))
                return request, prompt, ids
            room = N_ANSWER_ROOM if max_tokens is None else max_tokens
            if len(ids) + room <= self.n_ctx:
                return request, prompt, ids
            shorter = _without_oldest_turn(messages)
            if shorter is None:
                self._check_fits(len(ids) + room)
            else:
                messages = shorter

    def _chat_grammar(
        self, prompt: ChatPrompt, grammar: Grammar | None, has_reasoning: bool
    ) -> Grammar | None:
        """Return what the answer must follow: the caller's grammar, or that of tools or a response format."""
        start = self._think_end if has_reasoning else -1
        if grammar is not None:
            if prompt.grammar:
                raise ArgumentError(
                    "'grammar' contradicts tools and response_format, which have grammars of their own",
                    key="grammar",
                )
            return replace(grammar, start=start)
        if not prompt.grammar:
            return None
        if not prompt.grammar_lazy:
            return Grammar(prompt.grammar, prefix=tuple(prompt.generation_tokens))
        words = tuple(text for kind, text in prompt.grammar_triggers if kind == "word")
        if len(words) < len(prompt.grammar_triggers) or not words:
            logger.warning("tool calls of this chat template are parsed, but not enforced by a grammar")
            return None
        return Grammar(prompt.grammar, words=words, start=start)

    @cached_property
    def _think_end(self) -> int:
        """Id of the end of reasoning; -1 if the vocabulary has none."""
        ids = self._tokenizer.tokenize("</think>", special=True)
        return ids[0] if len(ids) == 1 else -1

    def _chat_chunks(
        self,
        prompt: ChatPrompt,
        ids: list[int],
        params: SamplingParams,
        request: Request,
        n: int,
        has_reasoning: bool,
    ) -> Iterator[tuple[chat.ChatCompletionChunk, chat.AssistantMessage | None]]:
        head = ResponseHead.new("chatcmpl", self._model.path.name, self.system_fingerprint)
        counts = _Counts()
        for index in range(n):
            is_last = index == n - 1
            yield from self._choice_chunks(
                head, index, prompt, ids, seeded(params, index), request, has_reasoning, counts, is_last
            )

    def _choice_chunks(
        self,
        head: ResponseHead,
        index: int,
        prompt: ChatPrompt,
        ids: list[int],
        params: SamplingParams,
        request: Request,
        has_reasoning: bool,
        counts: _Counts,
        is_last: bool,
    ) -> Iterator[tuple[chat.ChatCompletionChunk, chat.AssistantMessage | None]]:
        assert self._engine is not None  # made by _format
        reader = self._engine.reader(prompt)
        sampled: list[int] = []
        content = ""
        whole: AssistantMessage | None = None  # an answer that follows the format to its end
        held: list[TokenLogprobs] = []

        def chunk(
            delta: ChatDelta,
            finish: FinishReason | None = None,
            counted: CompletionUsage | None = None,
            unparsed: str | None = None,
        ) -> chat.ChatCompletionChunk:
            logprobs = chat_logprobs(held, self._tokenizer.token_to_bytes) if held else None
            held.clear()
            return chat_completion_chunk(head, index, delta, finish, counted, unparsed, logprobs)

        yield chunk({"role": "assistant", "content": ""}), None
        try:
            for piece in self._pieces(ids, params, request):
                if piece.token is not None:
                    sampled.append(piece.token)
                if piece.logprobs is not None:
                    held.append(piece.logprobs)
                delta = reader.feed(piece.text)
                content += delta.get("content", "")
                if delta:
                    yield chunk(delta), None
                if piece.finish is not None and piece.stats is not None:
                    delta, message, finish, is_complete = reader.finish(piece.finish)
                    content += delta.get("content", "")
                    if delta:
                        yield chunk(delta), None
                    if index == 0:
                        counts.n_cached = piece.stats.n_tokens_cached
                    counts.n_generated += len(sampled)
                    counts.n_reasoning += self._n_reasoning(sampled) if has_reasoning else 0
                    totals = usage(len(ids), counts.n_generated, counts.n_cached, counts.n_reasoning)
                    unparsed = None if is_complete else reader.raw
                    whole = message if is_complete and finish in ("stop", "tool_calls") else None
                    yield chunk({}, finish, totals if is_last else None, unparsed), message
        finally:
            self._remember(sampled, content, whole, has_reasoning)

    def _n_reasoning(self, sampled: Sequence[int]) -> int:
        return sampled.index(self._think_end) + 1 if self._think_end in sampled else len(sampled)


@dataclass
class _Counts:
    """Tokens of all answers to one request."""

    n_cached: int = 0
    n_generated: int = 0
    n_reasoning: int = 0


def _without_oldest_turn(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """Return the messages without the oldest turn that is not the system's; None if only the last turn is left."""
    first = next((i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages))
    users = [i for i, m in enumerate(messages) if m.get("role") == "user" and i > first]
    return [*messages[:first], *messages[users[0] :]] if users else None


def _collected(
    chunks: Iterator[tuple[chat.ChatCompletionChunk, chat.AssistantMessage | None]],
) -> chat.ChatCompletion:
    """Return the whole answers that chunks add up to."""
    choices: list[ChatChoice] = []
    entries: dict[int, list[Any]] = {}
    for chunk, message in chunks:
        piece = chunk["choices"][0]
        if piece["logprobs"] is not None:
            entries.setdefault(piece["index"], []).extend(piece["logprobs"]["content"])
        if message is not None:
            reason = piece["finish_reason"]
            assert reason is not None  # the chunk with the message is the answer's last
            found = entries.get(piece["index"])
            logprobs: ChatLogprobs | None = None if found is None else {"content": found}
            choices.append(chat_choice(piece["index"], message, reason, piece.get("unparsed"), logprobs))
    head = ResponseHead(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"])
    return chat_completion(head, choices, chunk["usage"])
