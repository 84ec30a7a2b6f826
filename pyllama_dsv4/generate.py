"""The token loop: sample, decode text, look for stop strings, evaluate; and what a caller may ask of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .context import Context
from .errors import ArgumentError, ThreadError
from .grammar import Grammar
from .logprobs import TokenLogprobs, token_logprobs
from .options import refuse_unknown
from .sampler import SAMPLING_NAMES, Sampler, SamplingOptions
from .session import Session
from .stats import Stats
from .tokenizer import StreamDecoder, Tokenizer
from .watch import Watch

__all__ = [
    "FinishReason",
    "GenerationOptions",
    "LogitsProcessor",
    "Piece",
    "Request",
    "StopFinder",
    "TextSteps",
    "stop_list",
    "stream",
]

FinishReason = Literal["stop", "length", "loop"]
LogitsProcessor = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], "npt.NDArray[np.float32] | None"]

N_LOGPROBS_MAX = 1000


class GenerationOptions(SamplingOptions, total=False):
    """Keywords of every generating method, besides those of ``SamplingOptions``.

    Attributes:
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Token ids that end it, likewise.
        grammar: GBNF that the text must follow, or a ``Grammar``.
        logits_processor: Called as ``f(ids, logits)`` before each token with all ids so far, ``int32``, read-only, and
            the logits, ``(n_vocab,) float32``, to be changed in place; or it returns others. One, or a list.
        loop_guard: End with ``finish_reason="loop"`` when the last so many tokens are a piece of at most a quarter of
            them over and over; 0 is off.
        timeout: Seconds after which the call raises ``CancelledError``, waiting for other threads included.
        stop_event: A ``threading.Event``; when it is set, the call raises ``CancelledError``.
        on_prefill: Called with the fraction of the prompt that is evaluated; returning False cancels.
    """

    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    grammar: str | Grammar | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    loop_guard: int
    timeout: float | None
    stop_event: threading.Event | None
    on_prefill: Callable[[float], bool | None] | None


_OWN_NAMES = tuple(k for k in GenerationOptions.__annotations__ if k not in SAMPLING_NAMES)


@dataclass(frozen=True)
class Request:
    """What is asked of one generation, checked; sampling parameters apart.

    Attributes:
        max_tokens: Upper bound; None means until the context is full.
        stops: Strings that end the text.
        stop_ids: Token ids that end it.
        grammar: What it must follow.
        processors: See ``GenerationOptions.logits_processor``.
        loop_guard: See ``GenerationOptions``.
        n_logprobs: Alternatives per token whose log-probabilities are wanted; None wants none.
        shown: Control tokens whose text is part of the output (the parser of an answer needs them).
        watch: Stops the generation from outside.
    """

    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    loop_guard: int = 0
    n_logprobs: int | None = None
    shown: frozenset[int] = frozenset()
    watch: Watch = field(default_factory=Watch)

    @classmethod
    def create(
        cls,
        where: str,
        own: Sequence[str],
        options: Mapping[str, Any],
        *,
        max_tokens: int | None,
        n_logprobs: int | None = None,
    ) -> tuple[Request, SamplingOptions]:
        """Check the keywords of a generating method and part them from those of sampling.

        Args:
            where: The method, for messages.
            own: Names of its other keywords, for messages.
            options: ``GenerationOptions``.
            max_tokens: See the attribute.
            n_logprobs: See the attribute.

        Raises:
            UnknownOptionError, ArgumentError: naming the keyword.
        """
        known = (*_OWN_NAMES, *SAMPLING_NAMES)
        refuse_unknown(where, [k for k in options if k not in known], [*own, *known])
        for key, value, n_max in (
            ("max_tokens", max_tokens, 2**31),
            ("logprobs", n_logprobs, N_LOGPROBS_MAX),
        ):
            is_count = value is None or (isinstance(value, int) and not isinstance(value, bool))
            if not is_count or (value is not None and not 0 <= value <= n_max):
                raise ArgumentError(
                    "generating", key=key, found=repr(value), expected=f"0 to {n_max}, or None"
                )
        loop_guard = options.get("loop_guard", 0)
        if not isinstance(loop_guard, int) or not (loop_guard == 0 or 8 <= loop_guard <= 65536):
            raise ArgumentError(
                "generating", key="loop_guard", found=repr(loop_guard), expected="0 (off), or 8 to 65536"
            )
        grammar = options.get("grammar")
        processors = options.get("logits_processor") or ()
        request = cls(
            max_tokens=max_tokens,
            stops=tuple(stop_list(options.get("stop"))),
            stop_ids=frozenset(int(i) for i in options.get("stop_token_ids") or ()),
            grammar=Grammar(grammar) if isinstance(grammar, str) else grammar,
            processors=(processors,) if callable(processors) else tuple(processors),
            loop_guard=loop_guard,
            n_logprobs=n_logprobs,
            watch=Watch(options.get("timeout"), options.get("stop_event"), options.get("on_prefill")),
        )
        if request.grammar is not None and not isinstance(request.grammar, Grammar):
            raise ArgumentError(
                "generating", key="grammar", found=type(grammar).__name__, expected="GBNF text or a Grammar"
            )
        if not all(callable(p) for p in request.processors):
            raise ArgumentError("generating", key="logits_processor", expected="functions")
        sampling: Any = {k: v for k, v in options.items() if k in SAMPLING_NAMES}
        return request, sampling

    def but(self, **changes: Any) -> Request:
        """Return the same request with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Piece:
    """One step of a generation.

    Attributes:
        token: The sampled id; None in the last piece.
        text: Text that is certain by now: whole characters, no part of a stop string. May be empty.
        finish: In the last piece, why the generation ended.
        logprobs: Of the token, if they were asked for.
        stats: In the last piece, the counts.
    """

    token: int | None
    text: str
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    stats: Stats | None = None


def stop_list(stop: str | Sequence[str] | None) -> list[str]:
    """Return stop strings as a list.

    Raises:
        ArgumentError: Something that is not a non-empty string.
    """
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ArgumentError(
                "stop strings", key="stop", found=repr(text), expected="strings that are not empty"
            )
    return stops


class StopFinder:
    """Text in, text out up to the first stop string; a possible beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._pending = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """Return the text that is certain now."""
        if not self._stops:
            return text
        self._pending += text
        hits = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if hits:
            self.is_found = True
            out, self._pending = self._pending[: min(hits)], ""
            return out
        n_held = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(self._pending)), n_held, -1):
                if self._pending.endswith(stop[:n]):
                    n_held = n
                    break
        cut = len(self._pending) - n_held
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out

    def finish(self) -> str:
        """Return what was held back."""
        out, self._pending = self._pending, ""
        return out


class LoopFinder:
    """Tells when the newest tokens are one piece over and over.

    Args:
        n: How many tokens are looked at; the piece is at most a quarter of them.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._ids: npt.NDArray[np.int64] = np.full(n // 4, -1, np.int64)  # newest first
        # for each period, how many tokens in a row equalled the one before
        self._runs: npt.NDArray[np.int64] = np.zeros(n // 4, np.int64)

    def feed(self, token: int) -> bool:
        """Take a token; return whether the last `n` repeat."""
        self._runs = np.where(self._ids == token, self._runs + 1, 0)
        self._ids = np.concatenate(([token], self._ids[:-1]))
        return bool((self._runs + np.arange(1, len(self._runs) + 1) >= self._n).any())


class TextSteps:
    """Sampled tokens in, pieces of text out, until something ends the text.

    Args:
        tokenizer: Without a vocabulary pieces have ids only.
        request: Its stops, bounds and shown tokens.

    Attributes:
        finish: Why the text ended, once it did.
        n_tokens: Tokens taken, the one that ended it left out.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._decoder = StreamDecoder()
        self._finder = StopFinder(request.stops)
        self._loops = LoopFinder(request.loop_guard) if request.loop_guard else None
        self.n_tokens = 0
        self.finish: FinishReason | None = "length" if request.max_tokens == 0 else None

    def feed(self, token: int) -> str | None:
        """Return the text that is certain now; None if the token ends the text and is not part of it."""
        tokenizer, request = self._tokenizer, self._request
        if token in request.stop_ids or (tokenizer.has_vocab and tokenizer.is_eog(token)):
            self.finish = "stop"
            return None
        self.n_tokens += 1
        text = ""
        if tokenizer.has_vocab and (token in request.shown or not tokenizer.is_special(token)):
            text = self._finder.feed(self._decoder.feed(tokenizer.token_to_bytes(token)))
        if self._finder.is_found:
            self.finish = "stop"
        elif self._loops is not None and self._loops.feed(token):
            self.finish = "loop"
        elif request.max_tokens is not None and self.n_tokens >= request.max_tokens:
            self.finish = "length"
        return text

    def rest(self) -> str:
        """Return the text that was held back."""
        if self._finder.is_found:
            return ""
        return self._finder.feed(self._decoder.finish()) + self._finder.finish()


class _Ids:
    """All ids so far, in an array that grows by doubling."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._n = len(ids)
        self._buffer: npt.NDArray[np.int32] = np.empty(max(256, 2 * self._n), np.int32)
        self._buffer[: self._n] = ids

    def append(self, token: int) -> None:
        if self._n == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty(self._n, np.int32)])
        self._buffer[self._n] = token
        self._n += 1

    @property
    def array(self) -> npt.NDArray[np.int32]:
        """``(n,) int32``, read-only; stays as it is when more are appended."""
        view = self._buffer[: self._n]
        view.flags.writeable = False
        return view


def processed(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], processors: Sequence[LogitsProcessor]
) -> npt.NDArray[np.float32]:
    """Return what `processors` make of the logits.

    Raises:
        ArgumentError: One returned something else than ``(n_vocab,)`` numbers.
    """
    out: npt.NDArray[np.float32] = logits.copy()
    for process in processors:
        returned = process(ids, out)
        if returned is not None:
            out = np.ascontiguousarray(returned, dtype=np.float32)
            if out.shape != logits.shape:
                raise ArgumentError(
                    "a logits processor returned another shape", found=out.shape, expected=logits.shape
                )
    return out


class _Evaluation:
    """Evaluates sampled tokens one by one, or, where a draft model proposes what follows, several at once.

    A proposed token counts when the sampler chooses it; the first that it does not choose, and what came after it, is
    dropped from the cache.
    """

    def __init__(self, context: Context, session: Session, stats: Stats) -> None:
        self._context = context
        self._session = session
        self._stats = stats
        self._proposed: deque[int] = deque()  # evaluated, not chosen yet
        self._rows: deque[npt.NDArray[np.float32]] = deque()
        self._n_accepted = 0
        self._is_open = False  # a proposal was evaluated and not settled
        self._logits = context.logits

    def logits_after(self, token: int, n_more: int, watch: Watch) -> npt.NDArray[np.float32]:
        """Return the logits after `token`.

        Args:
            token: Sampled from the logits before.
            n_more: How many further tokens are wanted at most.
            watch: May stop the call.
        """
        if self._context.draft is None:
            self._session.eval([token], watch=watch)
            return self._context.logits
        if self._proposed and self._proposed[0] == token:
            self._proposed.popleft()
            self._n_accepted += 1
            self._stats.n_tokens_accepted += 1
            self._logits = self._rows.popleft()
            return self._logits
        self.settle()
        proposed = self._session.propose(token, n_more)
        if not proposed:
            self._session.eval([token], watch=watch)
            self._logits = self._context.logits
            return self._logits
        rows = self._session.eval([token, *proposed], all_logits=True, watch=watch)
        assert rows is not None  # all_logits
        rows.flags.writeable = False
        self._proposed.extend(proposed)
        self._rows.extend(rows[1:])
        self._n_accepted = 0
        self._is_open = True
        self._stats.n_tokens_drafted += len(proposed)
        self._logits = rows[0]
        return self._logits

    def settle(self) -> None:
        """Leave in the cache only what was chosen."""
        if self._is_open:
            self._is_open = False
            n_rejected = len(self._proposed)
            self._proposed.clear()
            self._rows.clear()
            self._session.settle(self._n_accepted, n_rejected, self._logits)


def stream(
    context: Context,
    session: Session,
    tokenizer: Tokenizer,
    sampler: Sampler,
    request: Request,
    stats: Stats,
) -> Iterator[Piece]:
    """Generate from the session's present end until something ends the text or the context is full.

    Args:
        context: Its logits are those of the last prompt token.
        session: Belongs to `context`; sampled tokens are appended.
        tokenizer: For text and end tokens.
        sampler: Chooses the tokens.
        request: See ``Request``.
        stats: Counts proposals of a draft model.

    Raises:
        ThreadError: Something else was evaluated on the session between two steps.
        CancelledError: by ``request.watch``.
    """
    steps = TextSteps(tokenizer, request)
    watch = request.watch
    ids = _Ids(session.ids if request.processors else ())
    pending: int | None = None  # sampled, handed out, not evaluated yet
    n_left = context.n_ctx - session.n_tokens
    evaluation = _Evaluation(context, session, stats)
    logits = context.logits
    version = session.version
    try:
        while steps.finish is None:
            if version != session.version:
                raise ThreadError(
                    "this generation was interrupted: other tokens were evaluated on the same Llama",
                    hint="Finish or close one generation before starting the next.",
                )
            watch.check()
            if pending is not None:
                if n_left == 0:
                    break
                n_left -= 1
                n_more = n_left if request.max_tokens is None else request.max_tokens - steps.n_tokens - 1
                logits = evaluation.logits_after(pending, n_more, watch)
                version = session.version
            if request.processors:
                token = sampler.sample(processed(logits, ids.array, request.processors))
                ids.append(token)
            else:
                token = sampler.sample(logits)
            text = steps.feed(token)
            if text is None:
                break
            pending = token
            n_top = request.n_logprobs
            yield Piece(token, text, None, None if n_top is None else token_logprobs(logits, token, n_top))
    finally:
        if version == session.version:
            evaluation.settle()
    yield Piece(None, steps.rest(), steps.finish or "length")
