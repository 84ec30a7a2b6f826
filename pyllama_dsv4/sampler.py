"""Choosing the next token from logits: parameters, and the owner of one sampler chain."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib
from .errors import ArgumentError

__all__ = ["SAMPLING_NAMES", "Sampler", "SamplingOptions", "SamplingParams"]

_SEED_MAX = 2**32 - 2  # upstream reads 2^32-1 as "random"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are DeepSeek's for V4: temperature 1, no truncation.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability together; 1 keeps all.
        min_p: Drop tokens less likely than this share of the most likely one; 0 keeps all.
        typical_p: Locally typical sampling; 1 keeps all.
        repeat_penalty: Divides the logits of recent tokens; 1 is off.
        repeat_last_n: How many tokens count as recent; -1 means the whole context.
        frequency_penalty: Subtracted once per occurrence among the recent tokens.
        presence_penalty: Subtracted once if a token is among the recent ones.
        seed: Of the random numbers; None draws one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        inf = math.inf
        # name, lowest and highest value, whether the lowest is allowed, words for the message
        checks: tuple[tuple[str, float, float, bool, str], ...] = (
            ("temperature", 0, inf, True, "a number, 0 or more"),
            ("top_k", 0, inf, True, "0 (all) or more"),
            ("top_p", 0, 1, False, "above 0, at most 1"),
            ("min_p", 0, 1, True, "0 to 1"),
            ("typical_p", 0, 1, False, "above 0, at most 1"),
            ("repeat_penalty", 0, inf, False, "above 0"),
            ("repeat_last_n", -1, inf, True, "-1 (the context) or more"),
            ("frequency_penalty", -inf, inf, True, "a number"),
            ("presence_penalty", -inf, inf, True, "a number"),
        )
        for name, low, high, is_low_allowed, expected in checks:
            value = getattr(self, name)
            is_number = (
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            )
            if not is_number or not low <= value <= high or (value == low and not is_low_allowed):
                raise ArgumentError("sampling", key=name, found=repr(value), expected=expected)
        if self.seed is not None and not 0 <= self.seed <= _SEED_MAX:
            raise ArgumentError("sampling", key="seed", found=self.seed, expected=f"0 to {_SEED_MAX}")


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


SAMPLING_NAMES = tuple(SamplingOptions.__annotations__)


class Sampler:
    """Owner of one sampler chain, in the order of upstream's command line.

    Args:
        params: The parameters.
        n_vocab: Length of the logits.
        n_ctx: Stands for ``repeat_last_n = -1``.
    """

    def __init__(self, params: SamplingParams, n_vocab: int, n_ctx: int) -> None:
        self.params = params
        self.seed = random.SystemRandom().randint(0, _SEED_MAX) if params.seed is None else params.seed
        self._n_vocab = n_vocab
        self._scratch = ffi.new("llama_token_data[]", n_vocab)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._chain: Any = ffi.gc(chain, lib.llama_sampler_free)
        for stage in self._stages(params, n_ctx):
            lib.llama_sampler_chain_add(self._chain, stage)

    def _stages(self, p: SamplingParams, n_ctx: int) -> list[Any]:
        stages: list[Any] = []
        if p.repeat_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0:
            last_n = n_ctx if p.repeat_last_n < 0 else p.repeat_last_n
            stages.append(
                lib.llama_sampler_init_penalties(
                    self._n_vocab, last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
                )
            )
        if p.temperature == 0:
            return [*stages, lib.llama_sampler_init_greedy()]
        if p.top_k > 0:
            stages.append(lib.llama_sampler_init_top_k(p.top_k))
        if p.typical_p < 1:
            stages.append(lib.llama_sampler_init_typical(p.typical_p, 1))
        if p.top_p < 1:
            stages.append(lib.llama_sampler_init_top_p(p.top_p, 1))
        if p.min_p > 0:
            stages.append(lib.llama_sampler_init_min_p(p.min_p, 1))
        if p.temperature != 1:
            stages.append(lib.llama_sampler_init_temp(p.temperature))
        return [*stages, lib.llama_sampler_init_dist(self.seed)]

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the next token id for ``(n_vocab,) float32`` logits, and remember it for the penalties.

        Raises:
            ArgumentError: Wrong length, or logits without a finite value.
        """
        if logits.shape != (self._n_vocab,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise ArgumentError(
                "sampling",
                key="logits",
                found=f"{logits.dtype} {logits.shape}",
                expected=f"({self._n_vocab},) float32",
            )
        token = lib.pyl_sample(self._chain, ffi.from_buffer("float[]", logits), self._n_vocab, self._scratch)
        return check(token, "sampling")

    def accept(self, token: int) -> None:
        """Let the penalties know a token that was not sampled here (the prompt's)."""
        lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the chain. Idempotent."""
        chain, self._chain = self._chain, None
        if chain is not None:
            ffi.release(chain)
