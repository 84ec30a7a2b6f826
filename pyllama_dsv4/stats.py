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
        n_tokens_drafted: Tokens that a draft model proposed.
        n_tokens_accepted: How many of them were what the sampler chose.
        prefill_s: Seconds spent on the prompt.
        decode_s: Seconds spent on the answer.
    """

    n_tokens_prompt: int = 0
    n_tokens_cached: int = 0
    n_tokens_generated: int = 0
    n_tokens_drafted: int = 0
    n_tokens_accepted: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the proposed tokens that were accepted; None without any."""
        return self.n_tokens_accepted / self.n_tokens_drafted if self.n_tokens_drafted else None

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.n_tokens_prompt - self.n_tokens_cached) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        # the first token comes of the prompt's logits
        return max(self.n_tokens_generated - 1, 0) / self.decode_s if self.decode_s else 0.0
