"""What a model sees: the tokens of a text or a conversation, each with what it is. Loads the vocabulary only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from .chat import ChatPrompt, ChatRequest, ReasoningEffort
from .chat_engine import ChatEngine
from .model import Model, check_model
from .tokenizer import Tokenizer

__all__ = ["Explanation", "Token", "Vocabulary"]

Kind = Literal["special", "template", "text"]


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        id: Its number.
        piece: The bytes it stands for.
        kind: ``special`` (also ``</think>`` where the template put it), ``template`` (other text of the chat template)
            or ``text`` (of a message, or simply text).
        is_shared: The conversation before its last message begins with it too, so a chat that goes on has it cached.
    """

    id: int
    piece: bytes
    kind: Kind
    is_shared: bool = False


@dataclass(frozen=True)
class Explanation:
    """The prompt of a conversation.

    Attributes:
        tokens: The ids are those that ``Llama.create_chat_completion`` evaluates.
        dropped: For each message whose reasoning the prompt leaves out: its number from 0, and the reasoning.
    """

    tokens: list[Token]
    dropped: list[tuple[int, str]]

    @property
    def n_shared(self) -> int:
        return sum(token.is_shared for token in self.tokens)


class Vocabulary:
    """The vocabulary and the chat template of a model file.

    Args:
        path: GGUF file.
        chat_template: Jinja text instead of the file's template.

    Raises:
        ModelFileError, FormatError, ModelLoadError: The file.
    """

    def __init__(self, path: str | os.PathLike[str], *, chat_template: str | None = None) -> None:
        check_model(path)
        self._model = Model(path, vocab_only=True)
        self._template = chat_template
        self.tokenizer = Tokenizer(self._model)

    def tokens(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[Token]:
        """Return the tokens of a text; arguments and errors as ``Tokenizer.tokenize``."""
        return [
            self._token(i, "text") for i in self.tokenizer.tokenize(text, add_bos=add_bos, special=special)
        ]

    def explain(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        reasoning_effort: ReasoningEffort | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Explanation:
        """Return the prompt of a conversation, explained; arguments and errors as ``Llama.format_chat_tokens``."""
        engine = ChatEngine(self._model, self._template)
        try:

            def prompt(kept: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> ChatPrompt:
                request = ChatRequest.create(
                    kept,
                    thinking=thinking,
                    reasoning_effort=reasoning_effort,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                )
                return engine.format(request)

            whole = prompt(messages, True)
            before = prompt(messages[:-1], False).tokens if len(messages) > 1 else []
        finally:
            engine.close()
        n_shared = 0
        while n_shared < min(len(before), len(whole.tokens)) and before[n_shared] == whole.tokens[n_shared]:
            n_shared += 1
        kinds = self._kinds(whole)
        tokens = [self._token(token, kinds[i], i < n_shared) for i, token in enumerate(whole.tokens)]
        return Explanation(tokens, _dropped(messages, whole.text))

    def _token(self, token: int, kind: Kind, is_shared: bool = False) -> Token:
        is_special = self.tokenizer.is_special(token) or (
            kind == "template" and self.tokenizer.is_added(token)
        )
        return Token(
            token, self.tokenizer.token_to_bytes(token), "special" if is_special else kind, is_shared
        )

    def _kinds(self, prompt: ChatPrompt) -> list[Kind]:
        """Return for every token whose text it is, by where its bytes begin among the parts of the prompt."""
        pieces = [self.tokenizer.token_to_bytes(token) for token in prompt.tokens]
        parts = [(len(part.text.encode("utf-8")), part.is_input) for part in prompt.parts]
        left = sum(len(piece) for piece in pieces) - sum(n for n, _ in parts)  # a BOS that no part spells
        kinds: list[Kind] = []
        i = 0
        for piece in pieces:
            if left > 0:
                left -= len(piece)
                kinds.append("template")
                continue
            while i < len(parts) and parts[i][0] <= 0:
                carry = parts[i][0]
                i += 1
                if i < len(parts):
                    parts[i] = (parts[i][0] + carry, parts[i][1])
            kinds.append("text" if i < len(parts) and parts[i][1] else "template")
            if i < len(parts):
                parts[i] = (parts[i][0] - len(piece), parts[i][1])
        return kinds

    def close(self) -> None:
        """Free the vocabulary. Idempotent."""
        self._model.close()

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _dropped(messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for i, message in enumerate(messages):
        reasoning = message.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip() and reasoning.strip() not in text:
            found.append((i, reasoning))
    return found
