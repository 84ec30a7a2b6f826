"""Counts of a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


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
