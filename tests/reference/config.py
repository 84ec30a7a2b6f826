"""The sizes and constants of one model, named as in ``config.json``. Knows no tensor and no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Config"]


@dataclass(frozen=True)
class Config:
    """One model. The defaults are the tiny test model, whose every part does something with random weights.

    ``compress_ratios`` may be longer than the trunk (one more entry per MTP block); the rest is ignored.
    """

    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_hash_layers: int = 3
    num_attention_heads: int = 4
    head_dim: int = 128
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 128
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = (0, 0, 4, 128, 4, 128)
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 16
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    num_experts_per_tok: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 3.0  # lower than any real model's, so that random weights reach it
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    compress_rope_theta: float = 1.6e5
    yarn_factor: float = 16.0
    yarn_original: int = 65536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    vocab_size: int = 320

    def __post_init__(self) -> None:
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ValueError(
                f"{len(self.compress_ratios)} compress_ratios for {self.num_hidden_layers} layers"
            )
        if set(self.compress_ratios) - {0, 4, 128}:
            raise ValueError(f"compress_ratios {self.compress_ratios}: only 0, 4 and 128 are defined")
        if self.num_attention_heads % self.o_groups:
            raise ValueError(f"o_groups {self.o_groups} does not divide {self.num_attention_heads} heads")
        if self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim {self.index_head_dim} is not a power of two")

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Config:
        """Build from a parsed ``config.json``; keys that the trunk does not need are ignored.

        Raises:
            KeyError: a size is missing (nothing falls back to the tiny model's value, except the yarn group,
                which is a constant of the model family).
        """
        yarn = raw.get("rope_scaling") or {}
        known: dict[str, Any] = {
            f.name: raw[f.name]
            for f in fields(cls)
            if not f.name.startswith("yarn_") and f.name != "compress_ratios"
        }
        return cls(
            **known,
            compress_ratios=tuple(raw["compress_ratios"]),
            yarn_factor=yarn.get("factor", cls.yarn_factor),
            yarn_original=yarn.get("original_max_position_embeddings", cls.yarn_original),
            yarn_beta_fast=yarn.get("beta_fast", cls.yarn_beta_fast),
            yarn_beta_slow=yarn.get("beta_slow", cls.yarn_beta_slow),
        )
