"""Text completion: a prompt, and what follows it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, overload

from . import responses
from .errors import ArgumentError
from .generate import Piece, stop_list, stream
from .llama_base import LlamaBase
from .sampler import Sampler, SamplingOptions, SamplingParams
from .stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Completions"]


class Completions(LlamaBase):
    """Generating text from a prompt."""

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            ids = [int(i) for i in prompt]
        else:
            ids = self._tokenizer.tokenize(prompt, special=True)
            if self._tokenizer.bos >= 0 and ids[:1] != [self._tokenizer.bos]:
                ids.insert(0, self._tokenizer.bos)
        if not ids:
            raise ArgumentError("generating", key="prompt", found="no tokens", expected="at least one token")
        return ids

    def _pieces(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int | None,
        stops: Sequence[str],
        shown: frozenset[int] = frozenset(),
    ) -> Iterator[Piece]:
        """Evaluate a prompt and stream what follows it; ``stats`` counts along."""
        if max_tokens is not None and max_tokens < 0:
            raise ArgumentError(
                "generating", key="max_tokens", found=max_tokens, expected="0 or more, or None"
            )
        self._check_fits(len(ids))
        with self._use():
            start_s = time.monotonic()
            n_cached = self._session.prefill(ids)
            self.stats = stats = Stats(len(ids), n_cached, prefill_s=time.monotonic() - start_s)
            sampler = Sampler(params, self.n_vocab, self.n_ctx)
            for token in ids[-params.repeat_last_n if params.repeat_last_n > 0 else 0 :]:
                sampler.accept(token)
        try:
            steps = stream(
                self._context,
                self._session,
                self._tokenizer,
                sampler,
                max_tokens=max_tokens,
                stops=stops,
                shown=shown,
            )
            while True:
                start_s = time.monotonic()
                with self._use():
                    piece = next(steps)
                stats.decode_s += time.monotonic() - start_s
                stats.n_tokens_generated += piece.token is not None
                yield piece
                if piece.finish is not None:
                    return
        finally:
            sampler.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Continue a prompt; yield pieces of text that never split a character.

        Args:
            prompt: Text (the text of special tokens becomes their ids, and BOS is put in front once), or ids,
                taken as they are.
            max_tokens: Tokens at most; None means until the model ends or the context is full.
            stop: Strings that end the text; they are not part of it.
            sampling: See ``SamplingOptions``.

        Raises:
            ContextFullError: The prompt does not fit.
            TokenizeError: Text for a file without a vocabulary.

        Closing the iterator stops the generation; what was evaluated stays in the cache.
        """
        self._refuse_unknown_sampling("generate", ("max_tokens", "stop"), sampling)
        stops, params = stop_list(stop), self._params(sampling)
        with self._use():
            ids = self._prompt_ids(prompt)
        self._check_fits(len(ids))
        return (p.text for p in self._pieces(ids, params, max_tokens=max_tokens, stops=stops) if p.text)

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[False] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> responses.Completion: ...
    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[True],
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[responses.Completion]: ...

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> responses.Completion | Iterator[responses.Completion]:
        """Continue a prompt; return OpenAI's ``text_completion``, or an iterator of its pieces with `stream`.

        Args and errors as ``generate``.
        """
        self._refuse_unknown_sampling("create_completion", ("max_tokens", "stop", "stream"), sampling)
        stops, params = stop_list(stop), self._params(sampling)
        with self._use():
            ids = self._prompt_ids(prompt)
        self._check_fits(len(ids))
        pieces = self._pieces(ids, params, max_tokens=max_tokens, stops=stops)
        chunks = self._completion_chunks(pieces)
        if stream:
            return chunks
        texts = []
        for chunk in chunks:
            texts.append(chunk["choices"][0]["text"])
            last = chunk
        last["choices"][0]["text"] = "".join(texts)
        return last

    __call__ = create_completion

    def _completion_chunks(self, pieces: Iterator[Piece]) -> Iterator[responses.Completion]:
        head = responses.ResponseHead.new("cmpl", self._model.path.name)
        for piece in pieces:
            if piece.finish is not None:
                yield responses.completion(head, piece.text, piece.finish, self._usage())
            elif piece.text:
                yield responses.completion(head, piece.text, None)

    def _usage(self) -> responses.CompletionUsage:
        s = self.stats
        return responses.usage(s.n_tokens_prompt, s.n_tokens_generated, s.n_tokens_cached)
