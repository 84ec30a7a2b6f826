"""Text completion: a prompt, and what follows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from . import responses
from ._native import lib
from .batch import generate_batch
from .context import Context
from .draft import Draft
from .embeddings import embed
from .errors import ArgumentError, ClosedError, ThreadError
from .generate import GenerationOptions, Piece, Request, stream
from .llama_base import LlamaBase
from .logprobs import TokenLogprobs, completion_logprobs
from .plan import plan_model
from .sampler import Sampler, SamplingParams
from .stats import Stats
from .watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Completions", "check_n", "seeded"]

N_CHOICES_MAX = 128
N_SEQUENCES_MAX = 64


class Completions(LlamaBase):
    """Generating text from a prompt."""

    def _prompt_ids(self, prompt: str | Sequence[int], suffix: str | None = None) -> list[int]:
        if suffix is not None:
            return self._infill_ids(prompt, suffix)
        if not isinstance(prompt, str):
            ids = [int(i) for i in prompt]
        else:
            ids = self._tokenizer.tokenize(prompt, special=True)
            if self._tokenizer.bos >= 0 and ids[:1] != [self._tokenizer.bos]:
                ids.insert(0, self._tokenizer.bos)
        if not ids:
            raise ArgumentError("generating", key="prompt", found="no tokens", expected="at least one token")
        return ids

    def _infill_ids(self, prompt: str | Sequence[int], suffix: str) -> list[int]:
        """Return the prompt that asks for what stands between two texts."""
        vocab = self._model.vocab
        marks = [
            int(f(vocab)) for f in (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        ]
        if min(marks) < 0:
            raise ArgumentError(
                "generating",
                key="suffix",
                found="a vocabulary without fill-in-the-middle tokens",
                expected="None",
            )
        if not isinstance(prompt, str) or not isinstance(suffix, str):
            raise ArgumentError("generating", key="suffix", expected="text, and a prompt that is text")
        tokenizer = self._tokenizer
        head = [tokenizer.bos] if tokenizer.bos >= 0 else []
        before, after = tokenizer.tokenize(prompt), tokenizer.tokenize(suffix)
        return [*head, marks[0], *before, marks[1], *after, marks[2]]

    def _prompted_sampler(self, ids: Sequence[int], params: SamplingParams, request: Request) -> Sampler:
        """Return a sampler that knows the prompt."""
        sampler = Sampler(params, self._model, self.n_ctx, request.grammar)
        n_last = params.repeat_last_n
        if params.dry_multiplier > 0:
            n_last = self.n_ctx if -1 in (n_last, params.dry_last_n) else max(n_last, params.dry_last_n)
        for token in ids[-n_last if n_last > 0 else 0 :]:
            sampler.accept(token)
        return sampler

    def _pieces(
        self, ids: list[int], params: SamplingParams, request: Request | None = None
    ) -> Iterator[Piece]:
        """Evaluate a prompt and stream what follows it; ``stats`` counts along."""
        request = request or Request()
        watch = request.watch
        self._check_fits(len(ids))
        last: Piece | None = None
        with self._turns.take(watch):
            stats = Stats(len(ids))
            sampler: Sampler | None = None
            steps: Iterator[Piece] | None = None
            try:
                with self._use():
                    # before the prompt is evaluated: a grammar that cannot be read is told at once
                    sampler = self._prompted_sampler(ids, params, request)
                    start_s = time.monotonic()
                    stats.n_tokens_cached = self._session.prefill(ids, watch=watch)
                    stats.prefill_s = time.monotonic() - start_s
                    self.stats = stats
                    steps = stream(self._context, self._session, self._tokenizer, sampler, request, stats)
                while last is None:
                    start_s = time.monotonic()
                    with self._use():
                        piece = next(steps)
                    stats.decode_s += time.monotonic() - start_s
                    if piece.finish is not None:
                        last = piece
                    else:
                        stats.n_tokens_generated += 1
                        yield piece
            finally:
                if isinstance(steps, Generator):
                    with suppress(ClosedError, ThreadError), self._use():
                        steps.close()  # drops what a draft model proposed
                if sampler is not None:
                    sampler.close()
        # the turn is over: whoever reads the last piece may take his time
        yield Piece(None, last.text, last.finish, None, stats)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[str]:
        """Continue a prompt; yield pieces of text that never split a character.

        Args:
            prompt: Text (the text of special tokens becomes their ids, and BOS is put in front once), or ids,
                taken as they are.
            max_tokens: Tokens at most; None means until the model ends or the context is full.
            options: See ``GenerationOptions`` and ``SamplingOptions``.

        Raises:
            ContextFullError: The prompt does not fit.
            TokenizeError: Text for a file without a vocabulary.
            CancelledError: by `timeout`, `stop_event` or `on_prefill`.

        Closing the iterator stops the generation; what was evaluated stays in the cache.
        """
        request, sampling = Request.create("generate", ("max_tokens",), options, max_tokens=max_tokens)
        params = self._params(sampling)
        with self._use():
            ids = self._prompt_ids(prompt)
        self._check_fits(len(ids))
        return (p.text for p in self._pieces(ids, params, request) if p.text)

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        suffix: str | None = ...,
        max_tokens: int | None = ...,
        n: int = ...,
        echo: bool = ...,
        logprobs: int | None = ...,
        stream: Literal[False] = ...,
        **options: Unpack[GenerationOptions],
    ) -> responses.Completion: ...
    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        suffix: str | None = ...,
        max_tokens: int | None = ...,
        n: int = ...,
        echo: bool = ...,
        logprobs: int | None = ...,
        stream: Literal[True],
        **options: Unpack[GenerationOptions],
    ) -> Iterator[responses.Completion]: ...

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        suffix: str | None = None,
        max_tokens: int | None = None,
        n: int = 1,
        echo: bool = False,
        logprobs: int | None = None,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> responses.Completion | Iterator[responses.Completion]:
        """Continue a prompt; return OpenAI's ``text_completion``, or an iterator of its pieces with `stream`.

        Args:
            prompt: As in ``generate``.
            suffix: Text that comes after: the completion is what stands between (if the vocabulary has the tokens).
            max_tokens: As in ``generate``.
            n: How many continuations; with a `seed`, the next ones take the next numbers.
            echo: Put the prompt in front of the text.
            logprobs: Give the log-probability of every token and of so many alternatives.
            stream: Yield pieces.
            options: See ``GenerationOptions`` and ``SamplingOptions``.

        Errors as ``generate``.
        """
        own = ("suffix", "max_tokens", "n", "echo", "logprobs", "stream")
        request, sampling = Request.create(
            "create_completion", own, options, max_tokens=max_tokens, n_logprobs=logprobs
        )
        params = self._params(sampling)
        check_n(n)
        with self._use():
            ids = self._prompt_ids(prompt, suffix)
            echoed = (prompt if isinstance(prompt, str) else self._tokenizer.detokenize(ids)) if echo else ""
        self._check_fits(len(ids))
        chunks = self._completion_chunks(ids, params, request, n, echoed)
        if stream:
            return chunks
        head: responses.Completion | None = None
        choices: dict[int, responses.CompletionChoice] = {}
        texts: dict[int, list[str]] = {}
        for chunk in chunks:
            head = chunk
            piece = chunk["choices"][0]
            choice = choices.setdefault(piece["index"], {**piece, "text": "", "logprobs": None})
            texts.setdefault(piece["index"], []).append(piece["text"])
            choice["finish_reason"] = piece["finish_reason"]
            responses.add_logprobs(choice, piece["logprobs"])
        assert head is not None  # every choice ends with a chunk
        for index, parts in texts.items():
            choices[index]["text"] = "".join(parts)
        head["choices"] = [choices[i] for i in sorted(choices)]
        return head

    __call__ = create_completion

    def _completion_chunks(
        self, ids: list[int], params: SamplingParams, request: Request, n: int, echoed: str
    ) -> Iterator[responses.Completion]:
        head = responses.ResponseHead.new("cmpl", self._model.path.name, self.system_fingerprint)
        total = Stats(len(ids))
        for index in range(n):
            offset = len(echoed)
            if echoed:
                yield responses.completion(head, index, echoed)
            held: list[TokenLogprobs] = []
            offsets: list[int] = []
            for piece in self._pieces(ids, seeded(params, index), request):
                if piece.logprobs is not None:
                    held.append(piece.logprobs)
                    offsets.append(offset)
                offset += len(piece.text)
                if not piece.text and piece.finish is None:
                    continue
                logprobs = (
                    completion_logprobs(held, offsets, self._tokenizer.token_to_bytes) if held else None
                )
                held, offsets = [], []
                usage = None
                if piece.stats is not None:
                    total.n_tokens_generated += piece.stats.n_tokens_generated
                    if index == 0:
                        total.n_tokens_cached = piece.stats.n_tokens_cached
                    if index == n - 1:
                        usage = responses.usage(len(ids), total.n_tokens_generated, total.n_tokens_cached)
                yield responses.completion(head, index, piece.text, piece.finish, usage, logprobs)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = None,
        n_parallel: int = 8,
        **options: Unpack[GenerationOptions],
    ) -> list[responses.Completion]:
        """Continue several prompts at once, a token of each in every step; return one completion for each, in order.

        Uses a cache of its own for `n_parallel` sequences, as long as the call lasts, and leaves this object's alone.
        A draft model proposes for all of them; ``stats`` counts the whole batch.

        Args:
            prompts: Each as in ``generate``.
            max_tokens: As in ``generate``, for each.
            n_parallel: Sequences in a batch at most.
            options: As in ``generate``; the seed of the prompt number i is ``seed + i``.

        Errors as ``generate``, and MemoryLimitError for the cache.
        """
        own = ("max_tokens", "n_parallel")
        request, sampling = Request.create("generate_batch", own, options, max_tokens=max_tokens)
        params = self._params(sampling)
        if not isinstance(n_parallel, int) or not 1 <= n_parallel <= N_SEQUENCES_MAX:
            raise ArgumentError(
                "generating", key="n_parallel", found=repr(n_parallel), expected=f"1 to {N_SEQUENCES_MAX}"
            )
        if request.processors:
            raise ArgumentError("generating a batch", key="logits_processor", expected="None")
        with self._use():
            all_ids = [self._prompt_ids(prompt) for prompt in prompts]
        for ids in all_ids:
            self._check_fits(len(ids))
        if not all_ids:
            return []
        room = self.n_ctx if max_tokens is None else max(map(len, all_ids)) + max_tokens
        room = max(room, 2 * self._n_rollback)  # a proposal is evaluated at once
        sizes: dict[str, Any] = {"n_ctx": min(self.n_ctx, room), "n_seq": min(n_parallel, len(all_ids))}
        plan_model(
            self._report,
            **{
                name: self._context_options[name]
                for name in ("n_batch", "n_ubatch", "cache_type", "act_quant")
            },
            **sizes,
            draft=None if self._draft_model is None else self._draft_model.model.path,
            n_draft=self._n_rollback,
        ).check()
        options_of_batch = {**self._context_options, "n_ctx": sizes["n_ctx"], "n_seq_max": sizes["n_seq"]}
        draft: Draft | None = None
        with self._turns.take(request.watch), self._use():
            context = Context(
                self._model,
                **options_of_batch,
                n_rollback=self._n_rollback,
            )
            try:
                context.set_loras(list(self._loras.items()))
                if self._draft_model is not None:
                    draft = Draft(self._draft_model, context, self._n_rollback, options_of_batch)
                    context.draft = draft
                results = generate_batch(
                    context,
                    self._tokenizer,
                    all_ids,
                    lambda i: self._prompted_sampler(all_ids[i], seeded(params, i), request),
                    request,
                )
            finally:
                if draft is not None:
                    draft.close()
                context.close()
        self.stats = Stats(
            n_tokens_prompt=sum(map(len, all_ids)),
            n_tokens_generated=sum(r.n_tokens for r in results),
            n_tokens_drafted=sum(r.n_tokens_drafted for r in results),
            n_tokens_accepted=sum(r.n_tokens_accepted for r in results),
        )
        head = responses.ResponseHead.new("cmpl", self._model.path.name, self.system_fingerprint)
        return [
            responses.completion(head, 0, r.text, r.finish, responses.usage(len(ids), r.n_tokens))
            for ids, r in zip(all_ids, results, strict=True)
        ]

    @overload
    def embed(  # type: ignore[overload-overlap]  # text is a sequence of texts
        self,
        input: str,
        *,
        normalize: bool = ...,
        timeout: float | None = ...,
        stop_event: threading.Event | None = ...,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def embed(
        self,
        input: Sequence[str | Sequence[int]],
        *,
        normalize: bool = ...,
        timeout: float | None = ...,
        stop_event: threading.Event | None = ...,
    ) -> list[npt.NDArray[np.float32]]: ...

    def embed(
        self,
        input: str | Sequence[str | Sequence[int]],
        *,
        normalize: bool = False,
        timeout: float | None = None,
        stop_event: threading.Event | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Return the embedding of a text, or those of several.

        Needs ``Llama(embedding=True)``. Uses a cache of its own for each text and leaves this object's alone.

        Args:
            input: Text, or a list of texts or of lists of token ids.
            normalize: Make vectors of length 1.
            timeout: As in ``GenerationOptions``.
            stop_event: As in ``GenerationOptions``.

        Returns:
            ``(n_embd,) float32`` for a text, ``(n_tokens, n_embd)`` with ``pooling_type="none"``; a list of them for a
            list.

        Raises:
            ArgumentError: Opened without `embedding`, or an empty text.
            ContextFullError: A text is longer than the context.
            CancelledError: by `timeout` or `stop_event`.
        """
        if not self._is_embedding:
            raise ArgumentError(
                "embedding", key="embedding", found="False", expected="Llama(..., embedding=True)"
            )
        watch = Watch(timeout, stop_event)
        with self._use():
            all_ids = [self._prompt_ids(text) for text in ([input] if isinstance(input, str) else input)]
        rows = []
        for ids in all_ids:
            self._check_fits(len(ids))
            watch.check()
            with self._turns.take(watch), self._use():
                rows.append(
                    embed(
                        self._model,
                        self._context_options,
                        ids,
                        pooling=self._pooling,
                        is_normalized=normalize,
                        loras=list(self._loras.items()),
                        watch=watch,
                    )
                )
        return rows[0] if isinstance(input, str) else rows

    def create_embedding(
        self,
        input: str | Sequence[str | Sequence[int]],
        *,
        timeout: float | None = None,
        stop_event: threading.Event | None = None,
    ) -> responses.Embeddings:
        """Return embeddings in OpenAI's shape, normalised; arguments and errors as ``embed``."""
        texts: list[str | Sequence[int]] = [input] if isinstance(input, str) else list(input)
        rows = self.embed(texts, normalize=True, timeout=timeout, stop_event=stop_event)
        with self._use():
            n_tokens = sum(len(self._prompt_ids(text)) for text in texts)
        return responses.embeddings(self._model.path.name, [row.tolist() for row in rows], n_tokens)


def check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= N_CHOICES_MAX:
        raise ArgumentError("generating", key="n", found=repr(n), expected=f"1 to {N_CHOICES_MAX}")


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of choice number `index`: a given seed counts up."""
    return params if params.seed is None or index == 0 else replace(params, seed=params.seed + index)
