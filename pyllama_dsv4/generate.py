"""The token loop: sample, decode text, look for stop strings, evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .context import Context
from .errors import ArgumentError, ThreadError
from .sampler import Sampler
from .session import Session
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["Piece", "StopFinder", "stop_list", "stream"]


@dataclass(frozen=True)
class Piece:
    """One step of a generation.

    Attributes:
        token: The sampled id; None in the last piece.
        text: Text that is certain by now: whole characters, no part of a stop string. May be empty.
        finish: In the last piece, why the generation ended.
    """

    token: int | None
    text: str
    finish: Literal["stop", "length"] | None = None


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


def stream(
    context: Context,
    session: Session,
    tokenizer: Tokenizer,
    sampler: Sampler,
    *,
    max_tokens: int | None,
    stops: Sequence[str],
    shown: frozenset[int] = frozenset(),
) -> Iterator[Piece]:
    """Generate from the session's present end until an end token, a stop string, `max_tokens` or a full context.

    Args:
        context: Its logits are those of the last prompt token.
        session: Belongs to `context`; sampled tokens are appended.
        tokenizer: For text and end tokens; without a vocabulary pieces have ids only.
        sampler: Chooses the tokens.
        max_tokens: Upper bound; None means until the context is full.
        stops: Strings that end the text; they are not part of it.
        shown: Control tokens whose text is part of the output (the parser of an answer needs them).

    Raises:
        ThreadError: Something else was evaluated on the session between two steps.
    """
    decoder = StreamDecoder()
    finder = StopFinder(stops)
    n = 0
    pending: int | None = None  # sampled, handed out, not evaluated yet
    version = session.version
    finish: Literal["stop", "length"] = "length"
    while max_tokens is None or n < max_tokens:
        if version != session.version:
            raise ThreadError(
                "this generation was interrupted: other tokens were evaluated on the same Llama",
                hint="Finish or close one generation before starting the next.",
            )
        if pending is not None:
            if session.n_tokens >= context.n_ctx:
                break
            session.eval([pending])
            version = session.version
        token = sampler.sample(context.logits)
        if tokenizer.has_vocab and tokenizer.is_eog(token):
            finish = "stop"
            break
        n += 1
        pending = token
        text = ""
        if tokenizer.has_vocab and (token in shown or not tokenizer.is_special(token)):
            text = finder.feed(decoder.feed(tokenizer.token_to_bytes(token)))
        yield Piece(token, text)
        if finder.is_found:
            finish = "stop"
            break
    rest = "" if finder.is_found else finder.feed(decoder.finish())
    if not finder.is_found:
        rest += finder.finish()
    yield Piece(None, rest, finish)
