"""Choosing the next token from logits: parameters, and the owner of one sampler."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ._native import check, check_ptr, ffi, lib, log_tail
from .errors import ArgumentError
from .grammar import Grammar
from .model import Model

__all__ = ["SAMPLING_NAMES", "Sampler", "SamplingOptions", "SamplingParams"]

_SEED_MAX = 2**32 - 2  # upstream reads 2^32-1 as "random"
_INF = math.inf

# name, lowest and highest value, whether the lowest is allowed, words for the message
_RANGES: tuple[tuple[str, float, float, bool, str], ...] = (
    ("temperature", 0, _INF, True, "a number, 0 or more"),
    ("top_k", 0, _INF, True, "0 (all) or more"),
    ("top_p", 0, 1, False, "above 0, at most 1"),
    ("min_p", 0, 1, True, "0 to 1"),
    ("typical_p", 0, 1, False, "above 0, at most 1"),
    ("top_n_sigma", -_INF, _INF, True, "a number; 0 or less is off"),
    ("xtc_probability", 0, 1, True, "0 (off) to 1"),
    ("xtc_threshold", 0, 1, True, "0 to 1"),
    ("dynatemp_range", 0, _INF, True, "0 (off) or more"),
    ("dynatemp_exponent", 0, _INF, True, "0 or more"),
    ("repeat_penalty", 0, _INF, False, "above 0"),
    ("repeat_last_n", -1, _INF, True, "-1 (the context) or more"),
    ("frequency_penalty", -_INF, _INF, True, "a number"),
    ("presence_penalty", -_INF, _INF, True, "a number"),
    ("dry_multiplier", 0, _INF, True, "0 (off) or more"),
    ("dry_base", 1, _INF, True, "1 or more"),
    ("dry_allowed_length", 0, _INF, True, "0 or more"),
    ("dry_last_n", -1, _INF, True, "-1 (the context) or more"),
    ("mirostat", 0, 2, True, "0 (off), 1 or 2"),
    ("mirostat_tau", 0, _INF, True, "0 or more"),
    ("mirostat_eta", 0, 1, True, "0 to 1"),
    ("adaptive_target", -_INF, 1, True, "0 to 1; below 0 is off"),
    ("adaptive_decay", 0, 0.99, True, "0 to 0.99"),
)
_WHOLE = frozenset({"top_k", "repeat_last_n", "dry_allowed_length", "dry_last_n", "mirostat"})
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are DeepSeek's for V4: temperature 1, no truncation.

    The stages run in the order of upstream's command line: bias, penalties, DRY, top-n-sigma, top-k, typical, top-p,
    min-p, XTC, temperature.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability together; 1 keeps all.
        min_p: Drop tokens less likely than this share of the most likely one; 0 keeps all.
        typical_p: Locally typical sampling; 1 keeps all.
        top_n_sigma: Keep logits within this many standard deviations of the largest; 0 or less keeps all.
        xtc_probability: Chance of dropping all but the least likely of the tokens above `xtc_threshold`.
        xtc_threshold: A probability.
        dynatemp_range: The temperature follows the entropy within plus or minus this; 0 is off.
        dynatemp_exponent: How it follows.
        repeat_penalty: Divides the logits of recent tokens; 1 is off.
        repeat_last_n: How many tokens count as recent; -1 means the whole context.
        frequency_penalty: Subtracted once per occurrence among the recent tokens.
        presence_penalty: Subtracted once if a token is among the recent ones.
        dry_multiplier: Penalty for tokens that would prolong a repetition; 0 is off.
        dry_base: The penalty grows with this power of the repetition's length.
        dry_allowed_length: Repetitions up to this length go free.
        dry_last_n: How far back repetitions are looked for; -1 means the whole context.
        dry_sequence_breakers: Strings across which nothing is a repetition.
        mirostat: 1 or 2 replace top_k, top_p and the like by Mirostat; 0 is off.
        mirostat_tau: Mirostat's target entropy.
        mirostat_eta: Mirostat's learning rate.
        adaptive_target: Prefer tokens around this probability; below 0 is off.
        adaptive_decay: How slowly that adapts.
        logit_bias: Added to the logits, by token id; -inf forbids a token.
        seed: Of the random numbers; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high, is_low_allowed, expected in _RANGES:
            value = getattr(self, name)
            is_number = (
                isinstance(value, int if name in _WHOLE else (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
            )
            if not is_number or not low <= value <= high or (value == low and not is_low_allowed):
                raise ArgumentError("sampling", key=name, found=repr(value), expected=expected)
            if name in _WHOLE and value > _INT_MAX:
                raise ArgumentError("sampling", key=name, found=repr(value), expected=f"at most {_INT_MAX}")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed <= _SEED_MAX):
            raise ArgumentError("sampling", key="seed", found=repr(self.seed), expected=f"0 to {_SEED_MAX}")
        breakers = self.dry_sequence_breakers
        if isinstance(breakers, str) or not all(isinstance(b, str) and b and "\0" not in b for b in breakers):
            raise ArgumentError(
                "sampling", key="dry_sequence_breakers", found=repr(breakers), expected="a list of strings"
            )
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError(
                "sampling",
                key="logit_bias",
                found=type(self.logit_bias).__name__,
                expected="a dictionary from token ids to numbers",
            )
        for token, bias in self.logit_bias.items():
            is_bias = isinstance(bias, (int, float)) and not isinstance(bias, bool) and not math.isnan(bias)
            if not isinstance(token, int) or isinstance(token, bool) or not is_bias or bias == _INF:
                raise ArgumentError(
                    "sampling",
                    key="logit_bias",
                    found=f"{token!r}: {bias!r}",
                    expected="a token id and a number, or -inf",
                )


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
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_last_n: int
    dry_sequence_breakers: Sequence[str]
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    adaptive_target: float
    adaptive_decay: float
    logit_bias: Mapping[int, float]
    seed: int | None


SAMPLING_NAMES = tuple(SamplingOptions.__annotations__)


class Sampler:
    """Owner of one sampler: a grammar if there is one, and a chain of stages in the order of upstream's command line.

    Args:
        params: The parameters.
        model: For its vocabulary; stays referenced.
        n_ctx: Stands for ``-1`` in `repeat_last_n` and `dry_last_n`.
        grammar: What the text must follow.

    Raises:
        ArgumentError: A biased token is out of range, or the grammar cannot be used.
    """

    def __init__(
        self, params: SamplingParams, model: Model, n_ctx: int, grammar: Grammar | None = None
    ) -> None:
        self.params = params
        self.seed = random.SystemRandom().randint(0, _SEED_MAX) if params.seed is None else params.seed
        self._model = model
        self._n_vocab = model.n_vocab
        pointer = check_ptr(lib.pyl_sampler_init(model.vocab, self._n_vocab), "making a sampler")
        self._pointer: Any = ffi.gc(pointer, lib.pyl_sampler_free)
        for stage in self._stages(params, n_ctx):
            check(lib.pyl_sampler_add(self._pointer, stage), "making a sampler")
        if grammar is not None:
            self._set_grammar(grammar)

    def _stages(self, p: SamplingParams, n_ctx: int) -> list[Any]:
        stages: list[Any] = []
        if p.logit_bias:
            stages.append(self._bias(p.logit_bias))
        if p.repeat_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0:
            last_n = n_ctx if p.repeat_last_n < 0 else p.repeat_last_n
            stages.append(
                lib.llama_sampler_init_penalties(
                    self._n_vocab, last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
                )
            )
        if p.dry_multiplier > 0:
            stages.append(self._dry(p, n_ctx))
        if p.temperature == 0:
            return [*stages, lib.llama_sampler_init_greedy()]
        temperature = lib.llama_sampler_init_temp_ext(p.temperature, p.dynatemp_range, p.dynatemp_exponent)
        if p.mirostat == 1:
            mirostat = lib.llama_sampler_init_mirostat(
                self._n_vocab, self.seed, p.mirostat_tau, p.mirostat_eta, 100
            )
            return [*stages, temperature, mirostat]
        if p.mirostat == 2:
            mirostat = lib.llama_sampler_init_mirostat_v2(self.seed, p.mirostat_tau, p.mirostat_eta)
            return [*stages, temperature, mirostat]
        if p.top_n_sigma > 0:
            stages.append(lib.llama_sampler_init_top_n_sigma(p.top_n_sigma))
        if p.top_k > 0:
            stages.append(lib.llama_sampler_init_top_k(p.top_k))
        if p.typical_p < 1:
            stages.append(lib.llama_sampler_init_typical(p.typical_p, 1))
        if p.top_p < 1:
            stages.append(lib.llama_sampler_init_top_p(p.top_p, 1))
        if p.min_p > 0:
            stages.append(lib.llama_sampler_init_min_p(p.min_p, 1))
        if p.xtc_probability > 0:
            stages.append(lib.llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, 1, self.seed))
        if p.temperature != 1 or p.dynatemp_range > 0:
            stages.append(temperature)
        if p.adaptive_target >= 0:
            return [
                *stages,
                lib.llama_sampler_init_adaptive_p(p.adaptive_target, p.adaptive_decay, self.seed),
            ]
        return [*stages, lib.llama_sampler_init_dist(self.seed)]

    def _bias(self, bias: Mapping[int, float]) -> Any:
        entries = ffi.new("llama_logit_bias[]", len(bias))
        for entry, (token, value) in zip(entries, bias.items(), strict=True):
            if not 0 <= token < self._n_vocab:
                raise ArgumentError(
                    "sampling", key="logit_bias", found=token, expected=f"token ids 0 to {self._n_vocab - 1}"
                )
            entry.token, entry.bias = token, value
        return lib.llama_sampler_init_logit_bias(self._n_vocab, len(bias), entries)

    def _dry(self, p: SamplingParams, n_ctx: int) -> Any:
        has_vocab = (
            lib.llama_vocab_type(self._model.vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        )  # upstream looks them up
        breakers = p.dry_sequence_breakers if has_vocab else ()
        texts = [ffi.new("char[]", b.encode("utf-8")) for b in breakers]
        last_n = n_ctx if p.dry_last_n < 0 else p.dry_last_n
        return lib.llama_sampler_init_dry(
            self._model.vocab,
            p.dry_multiplier,
            p.dry_base,
            p.dry_allowed_length,
            last_n,
            ffi.new("char *[]", texts) if texts else ffi.NULL,
            len(texts),
        )

    def _set_grammar(self, grammar: Grammar) -> None:
        words = [ffi.new("char[]", w.encode("utf-8")) for w in grammar.words]
        log_tail(clear=True)
        status = lib.pyl_sampler_set_grammar(
            self._pointer,
            grammar.text.encode("utf-8"),
            ffi.new("char *[]", words) if words else ffi.NULL,
            len(words),
            grammar.start,
        )
        check(
            status,
            "reading the grammar",
            key="grammar",
            expected="GBNF with a rule 'root' and without left recursion",
        )
        for token in grammar.prefix:
            check(lib.pyl_sampler_prefill(self._pointer, token), "starting the grammar", key="grammar")

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the next token id for ``(n_vocab,) float32`` logits, and remember it for penalties and grammar.

        Raises:
            ArgumentError: Wrong length, or logits without a finite value.
            InferenceError: The grammar allows no token.
        """
        if logits.shape != (self._n_vocab,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise ArgumentError(
                "sampling",
                key="logits",
                found=f"{logits.dtype} {logits.shape}",
                expected=f"({self._n_vocab},) float32",
            )
        token = lib.pyl_sampler_sample(self._pointer, ffi.from_buffer("float[]", logits))
        return check(token, "sampling")

    def accept(self, token: int) -> None:
        """Let the penalties know a token that was not sampled here (the prompt's)."""
        lib.pyl_sampler_accept(self._pointer, token)

    def close(self) -> None:
        """Free the sampler. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
