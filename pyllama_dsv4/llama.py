"""``Llama``: one model, one context, one conversation, as most programs want it.

A thin front: every noun has its own module (model, context, tokenizer, sampler, session, chat_engine, warmup), and
this one checks arguments, keeps them together and closes them in order.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, overload

import numpy as np
import numpy.typing as npt

from . import chat
from ._native import build_info, lib, logger, series_digest
from .chat import ChatPrompt, ChatRequest
from .chat_engine import ChatEngine
from .context import Context
from .errors import ArgumentError, ClosedError, ContextFullError, ThreadError
from .generate import Piece, stop_list, stream
from .header import HeaderReport
from .machine import working_set_bytes
from .model import Model, check_model
from .options import keyword_names, refuse_unknown
from .plan import N_CTX_DEFAULT, Plan, plan_model
from .sampler import Sampler, SamplingParams
from .session import Session
from .state import State, model_fingerprint, read_state, write_state
from .tokenizer import Tokenizer
from .warmup import Progress, Warmup

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Llama", "SamplingOptions", "Stats"]

N_REPLAYED_MAX = 256  # answers whose sampled ids are remembered


class SamplingOptions(TypedDict, total=False):
    """Keywords of every generating method; meaning and ranges as in ``SamplingParams``.

    What is left out comes from the file's ``general.sampling.*`` keys (for V4: temperature 1, top_p 1), the seed
    from ``Llama(seed=...)``.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    seed: int | None


@dataclass
class Stats:
    """Counts of the last prompt and its answer.

    Attributes:
        n_tokens_prompt: Length of the prompt.
        n_tokens_cached: How many of its tokens were in the cache.
        n_tokens_generated: Tokens sampled since.
        prefill_s: Seconds spent on the prompt.
        decode_s: Seconds spent on the answer.
    """

    n_tokens_prompt: int = 0
    n_tokens_cached: int = 0
    n_tokens_generated: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.n_tokens_prompt - self.n_tokens_cached) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        # the first token comes of the prompt's logits
        return max(self.n_tokens_generated - 1, 0) / self.decode_s if self.decode_s else 0.0


def _sampling_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that the file recommends."""
    keys = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in keys.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _n_threads_default() -> int:
    n_cores = int(lib.pyl_n_cores())
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, min(n_cores, len(affinity(0)) if affinity else n_cores))


class Llama:
    """A model that is ready to run.

    Args:
        model_path: GGUF file: DeepSeek-V4 in the native or the upstream dialect, or any other model that the
            pinned llama.cpp runs. The first shard of a split model.
        n_ctx: Tokens the context holds.
        n_batch: Tokens per call to the engine at most.
        n_ubatch: Tokens evaluated at once at most; more is faster for prompts and takes more memory.
        n_threads: CPU threads; None takes the physical cores that this process may use.
        n_gpu_layers: ``"auto"`` places all layers on a GPU if this build supports one, else none; or a number.
        use_mmap: Map the file. Pages are then read when they are needed, and ahead of that by a background thread.
        use_mlock: Keep the model's pages in memory.
        cache_type: Type of the KV cache: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        flash_attn: ``"on"``, ``"off"`` or ``"auto"``: attention in one operation, which needs less memory and is
            faster for long contexts, but rounds to F16 inside.
        act_quant: What is rounded to FP8 and FP4 as DeepSeek's own code does it: ``none``, ``cache`` (rows that are
            kept and the indexer's queries, which the model was trained with) or ``full`` (also the inputs of all
            FP8 and FP4 products). Other models ignore it.
        seed: Of all sampling that gives none itself; None draws one per generation. Equal seeds give equal text on
            the same build, threads and batch sizes.
        chat_template: Jinja text instead of the file's chat template.
        progress: Called with a ``Progress`` during the load (in this thread or a helper's) and the warm-up (from
            the warm-up's thread); returning False cancels the load or stops the warm-up.
        warmup: Read the mapped file into the page cache in the background, as far as memory reaches.
        verbose: Print the engine's log to stderr through ``logging``.

    Attributes:
        plan: What the load takes and yields, made before it.

    Raises:
        ModelNotFoundError, ModelFileError, FormatError and its subclasses: the file, before the engine sees it.
        ModelLoadError: The engine refused the file.
        MemoryLimitError: Not enough memory for the model or the context.
        CancelledError: `progress` returned False.
        ArgumentError, UnknownOptionError: an argument.

    Not safe for use from several threads at once: that raises ``ThreadError``. Close it, or use it as a context
    manager; a forked child must open its own.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = N_CTX_DEFAULT,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int | Literal["auto"] = "auto",
        use_mmap: bool = True,
        use_mlock: bool = False,
        cache_type: str = "f16",
        act_quant: Literal["none", "cache", "full"] = "cache",
        flash_attn: Literal["auto", "on", "off"] = "auto",
        seed: int | None = None,
        chat_template: str | None = None,
        progress: Callable[[Progress], bool | None] | None = None,
        warmup: bool = True,
        verbose: bool = False,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown("Llama", unknown, keyword_names(Llama.__init__))
        if verbose:
            _log_to_stderr()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._warmup: Warmup | None = None
        self._engine: ChatEngine | None = None
        self._sampler: Sampler | None = None
        self._is_closed = False
        self._chat_template = chat_template
        self._cache_type = cache_type
        self._act_quant = act_quant
        self._seed = SamplingParams(seed=seed).seed  # checked there
        self._replay: OrderedDict[bytes, list[int]] = OrderedDict()
        self.stats = Stats()

        self._report: HeaderReport = check_model(model_path)
        self.plan: Plan = plan_model(
            self._report,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            cache_type=cache_type,
            act_quant=act_quant,
            is_mapped=use_mmap and not use_mlock,
        )
        logger.info("%s: %s", self.plan.path, self.plan.line())
        self.plan.check()
        if n_gpu_layers == "auto":
            n_gpu_layers = -1 if lib.llama_supports_gpu_offload() else 0
        self._model = Model(
            model_path,
            n_gpu_layers=n_gpu_layers,
            use_mmap=use_mmap,
            use_mlock=use_mlock,
            on_progress=None if progress is None else lambda f: progress(Progress("load", f)) is not False,
        )
        try:
            self._context = Context(
                self._model,
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_ubatch=n_ubatch,
                n_threads=_n_threads_default() if n_threads is None else n_threads,
                cache_type=cache_type,
                act_quant=act_quant,
                flash_attn=flash_attn,
            )
        except BaseException:
            self._model.close()
            raise
        self._tokenizer = Tokenizer(self._model)
        self._session = Session(self._context)
        self._sampling_defaults = _sampling_defaults(self._report.header.metadata)
        if progress is not None:
            progress(Progress("load", 1.0))
        if use_mmap and warmup and not use_mlock:
            self._warmup = Warmup(_warm_ranges(self._report), progress)
            self._warmup.start()

    # --- lifetime ---

    def close(self) -> None:
        """Stop the warm-up and free everything. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._warmup is not None:
            self._warmup.stop()
        for owner in (self._engine, self._sampler, self._context, self._model):
            if owner is not None:
                owner.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return f"<Llama {self._model.path.name}: closed>"
        return f"<Llama {self._model.path.name}: {self.desc}, n_ctx={self._context.n_ctx}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Llama cannot be pickled; pass its path and open it again in the other process")

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Refuse use after close, after a fork, and from two threads at once."""
        if self._is_closed:
            raise ClosedError("this Llama is closed")
        if os.getpid() != self._pid:
            raise ThreadError(
                "this Llama was opened by the parent of this process",
                hint="Engine threads do not survive a fork; open the model again in the child.",
            )
        if not self._lock.acquire(blocking=False):
            raise ThreadError(
                "this Llama is in use by another thread",
                hint="Use one Llama per thread, or a lock of your own.",
            )
        try:
            yield
        finally:
            self._lock.release()

    # --- facts ---

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata, typed; arrays are read when looked into."""
        return self._report.header.metadata

    @property
    def report(self) -> HeaderReport:
        """What the header check found: dialect, types, derived keys."""
        return self._report

    @property
    def n_vocab(self) -> int:
        return self._context.n_vocab

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was made for."""
        return self._model.n_ctx_train

    @property
    def desc(self) -> str:
        """One line: architecture, size, file type."""
        return self._model.desc

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache."""
        return self._session.n_tokens

    @property
    def working_set_bytes(self) -> int | None:
        """Resident memory of this process, mapped file pages included; None when the system does not say."""
        return working_set_bytes()

    @property
    def warmup(self) -> Warmup | None:
        """The background reader of the file, if one was started."""
        return self._warmup

    # --- saved states ---

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the model's header and tensor table, 16 hex digits."""
        return model_fingerprint((shard.path, shard.data_start) for shard in self._report.header.shards)

    def _state_identity(self) -> dict[str, str]:
        return {
            "model": self.fingerprint,
            "engine": build_info()["llama.cpp"],
            "patches": series_digest(),
            "cache type": self._cache_type,
            "act_quant": self._act_quant,
        }

    def _state(self) -> State:
        logits = self._context.logits if self._context.has_logits else None
        return State(self._state_identity(), list(self._session.ids), logits, self._context.save_state())

    def save_state(self) -> bytes:
        """Return the evaluated tokens, their cache and the logits, for ``load_state``.

        Flash takes about 7 KB a token, and 24 MB for its windows.
        """
        with self._use():
            return self._state().to_bytes()

    def load_state(self, state: bytes | memoryview) -> None:
        """Put back what ``save_state`` returned, here or in another process with the same model, build and settings.

        Raises:
            StateError: Damaged, or of another model, build or cache type; nothing was changed. If the engine itself
                refuses the state, the tokens are forgotten.
            ContextFullError: It holds more tokens than this context; nothing was changed.
        """
        self._load_state(State.from_bytes(state))

    def save_state_file(self, path: str | os.PathLike[str]) -> None:
        """Write ``save_state`` to a file, which appears complete or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        with self._use():
            state = self._state()
        write_state(path, state)

    def load_state_file(self, path: str | os.PathLike[str]) -> None:
        """Put back what ``save_state_file`` wrote; errors as ``load_state`` and ``open``."""
        self._load_state(read_state(path), path)

    def _load_state(self, state: State, path: str | os.PathLike[str] | None = None) -> None:
        with self._use():
            state.check_identity(self._state_identity(), path=path)
            self._check_fits(len(state.ids))
            self._session.restore(state.ids, state.engine, state.logits)
            self._drop_sampler()

    # --- text ---

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the token ids of `text`; see ``Tokenizer.tokenize``."""
        with self._use():
            return self._tokenizer.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; see ``Tokenizer.detokenize``."""
        with self._use():
            return self._tokenizer.detokenize(ids, special=special)

    def token_to_bytes(self, token: int) -> bytes:
        """Return the bytes one token stands for; special tokens give their text."""
        with self._use():
            return self._tokenizer.token_to_bytes(token)

    # --- evaluation ---

    def reset(self) -> None:
        """Forget all evaluated tokens."""
        with self._use():
            self._session.reset()
            self._drop_sampler()

    @overload
    def eval(self, ids: Sequence[int]) -> None: ...
    @overload
    def eval(self, ids: Sequence[int], *, logits: Literal["all"]) -> npt.NDArray[np.float32]: ...

    def eval(
        self, ids: Sequence[int], *, logits: Literal["last", "all"] = "last"
    ) -> npt.NDArray[np.float32] | None:
        """Evaluate token ids after those in the cache.

        Args:
            ids: Token ids.
            logits: ``"all"`` returns the logits of every given position.

        Returns:
            ``(len(ids), n_vocab) float32`` for ``"all"``, else None.

        Raises:
            ArgumentError: An id is out of range, or another value of `logits`.
            ContextFullError: No room; nothing was changed.
        """
        if logits not in ("last", "all"):
            raise ArgumentError(
                "evaluating tokens", key="logits", found=repr(logits), expected="'last' or 'all'"
            )
        with self._use():
            return self._session.eval(ids, all_logits=logits == "all")

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last evaluated token: ``(n_vocab,) float32``, read-only; yours to keep."""
        with self._use():
            return self._context.logits

    def _params(self, options: SamplingOptions) -> SamplingParams:
        values = {**self._sampling_defaults, "seed": self._seed, **options}
        return SamplingParams(**values)

    def _drop_sampler(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()

    def sample(self, **sampling: Unpack[SamplingOptions]) -> int:
        """Return the next token id for the present logits; it is not evaluated.

        Args:
            sampling: See ``SamplingOptions``. Calls with equal options go on with the same random numbers.
        """
        refuse_unknown("sample", [k for k in sampling if k not in _SAMPLING_NAMES], _SAMPLING_NAMES)
        with self._use():
            params = self._params(sampling)
            if self._sampler is None or self._sampler.params != params:
                self._drop_sampler()
                self._sampler = Sampler(params, self.n_vocab, self.n_ctx)
            return self._sampler.sample(self._context.logits)

    # --- completion ---

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

    def _check_fits(self, n_tokens: int) -> None:
        if n_tokens > self.n_ctx:
            raise ContextFullError(
                "the prompt does not fit",
                found=f"{n_tokens} tokens",
                expected=f"at most n_ctx = {self.n_ctx}",
                hint="Open the model with a larger n_ctx, or shorten the prompt.",
            )

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

    @staticmethod
    def _refuse_unknown_sampling(where: str, own: Sequence[str], sampling: Mapping[str, Any]) -> None:
        refuse_unknown(where, [k for k in sampling if k not in _SAMPLING_NAMES], [*own, *_SAMPLING_NAMES])

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[False] = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> chat.Completion: ...
    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[True],
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[chat.Completion]: ...

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> chat.Completion | Iterator[chat.Completion]:
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

    def _completion_chunks(self, pieces: Iterator[Piece]) -> Iterator[chat.Completion]:
        head = chat.ResponseHead.new("cmpl", self._model.path.name)
        for piece in pieces:
            if piece.finish is not None:
                yield chat.completion(head, piece.text, piece.finish, self._usage())
            elif piece.text:
                yield chat.completion(head, piece.text, None)

    def _usage(self) -> chat.CompletionUsage:
        s = self.stats
        return chat.usage(s.n_tokens_prompt, s.n_tokens_generated, s.n_tokens_cached)

    # --- chat ---

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


_SAMPLING_NAMES = tuple(SamplingOptions.__annotations__)


def _warm_ranges(report: HeaderReport) -> list[tuple[Path, int, int]]:
    """Return the file ranges of all tensors, those that every token needs before the routed experts."""
    header = report.header
    dense: list[tuple[Path, int, int]] = []
    experts: list[tuple[Path, int, int]] = []
    for tensor in header.tensors:
        part = (Path(header.shards[tensor.shard].path), tensor.start, tensor.n_bytes)
        (experts if "_exps" in tensor.name else dense).append(part)
    merged: list[tuple[Path, int, int]] = []
    for path, start, n_bytes in dense + experts:
        if merged and merged[-1][0] == path and 0 <= start - (merged[-1][1] + merged[-1][2]) < 4096:
            merged[-1] = (path, merged[-1][1], start + n_bytes - merged[-1][1])
        else:
            merged.append((path, start, n_bytes))
    return merged


def _log_to_stderr() -> None:
    import logging

    if not any(isinstance(h, logging.StreamHandler) for h in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
