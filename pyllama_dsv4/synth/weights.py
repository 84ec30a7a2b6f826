"""Random weights of sane size.

Activations stay near 1, logits have an RMS near 4, routing and selection scores differ. Also the tensors of a draft
model, which the table of the model does not list."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, Literal

import numpy as np

from pyllama_dsv4.convert.plan import GROUP, TILE, sources
from pyllama_dsv4.tensors import HParams, TensorSpec, block_specs

from .configs import dspark_config
from .numbers import (
    E2M1_VALUES,
    SCALE_STEPS,
    Random,
    bf16,
    e4m3_values,
    nearest_codes,
    normal_quantiles,
    split_std,
)
from .shards import Array, Source

__all__ = ["Draft", "draft_specs", "random_weights"]

# Checkpoint suffix -> mean, standard deviation; "fan" is 1 / sqrt(inputs). The first match counts.
_DISTRIBUTIONS: Final[tuple[tuple[str, float, float | Literal["fan"], float], ...]] = (
    # suffix, mean, spread, gain
    ("embed.weight", 0, 1.0, 1.0),
    ("head.weight", 0, "fan", 4.0),
    ("norm.weight", 1, 0.1, 1.0),
    ("ffn.gate.weight", 0, "fan", 1.0),
    ("ffn.gate.bias", 0, 0.2, 1.0),
    (".w1.weight", 0, "fan", 1.5),
    (".w3.weight", 0, "fan", 1.5),
    ("attn_sink", 0, 1.0, 1.0),
    (".ape", 0, 1.0, 1.0),
    ("_fn", 0, "fan", 1.0),
    ("_base", 0, 0.5, 1.0),
    ("_scale", 1, 0.1, 1.0),
    (".weight", 0, "fan", 1.0),
)


def _distribution(name: str, n_inputs: int) -> tuple[float, float]:
    for suffix, mean, spread, gain in _DISTRIBUTIONS:
        if name.endswith(suffix):
            return mean, gain * (1 / math.sqrt(n_inputs) if spread == "fan" else spread)
    raise AssertionError(name)


def random_weights(specs: Sequence[TensorSpec], n_expert: int, seed: int) -> Iterator[Source]:
    """Yield the checkpoint tensors of a model, in file order."""
    for spec in specs:
        for part in spec.parts:
            for weight, scale in sources(part):
                yield from _weight(part, weight, scale, n_expert, seed)


def _weight(
    spec: TensorSpec, name: str, scale_name: str | None, n_expert: int, seed: int
) -> Iterator[Source]:
    shape = tuple(reversed(spec.dims[:2]))
    n = math.prod(shape)
    if spec.kind == "i32":
        yield Source(name, "I64", shape, lambda: _expert_choices(Random(seed, name), shape, n_expert))
        return
    mean, std = _distribution(name, spec.dims[0])
    if scale_name is None:
        # in released checkpoints what ends in .weight is BF16, the rest F32
        dtype = "BF16" if name.endswith(".weight") else "F32"
        yield Source(
            name, dtype, shape, lambda: Random(seed, name).lookup(_number_table(mean, std, dtype), n)
        )
        return
    is_f8 = spec.kind == "f8"
    rows, cols = shape
    code_shape = (rows, cols) if is_f8 else (rows, cols // 2)
    scale_shape = (rows // TILE, cols // TILE) if is_f8 else (rows, cols // GROUP)

    def codes() -> Iterator[Array]:
        for piece in Random(seed, name).lookup(_code_tables(std, is_f8)[0], n):
            # FP4 packs element 2i into the low nibble and 2i+1 into the high one
            yield piece if is_f8 else (piece[0::2] | piece[1::2] << 4).view(np.int8)

    def scales() -> Iterator[Array]:
        return Random(seed, scale_name).lookup(_code_tables(std, is_f8)[1], math.prod(scale_shape))

    yield Source(name, "F8_E4M3" if is_f8 else "I8", code_shape, codes)
    yield Source(scale_name, "F8_E8M0", scale_shape, scales)


@lru_cache(maxsize=64)
def _number_table(mean: float, std: float, dtype: str) -> Array:
    """(65536,) numbers by random index, as ``dtype``."""
    table: Array = (mean + std * normal_quantiles()).astype(np.float32)
    return bf16(table) if dtype == "BF16" else table


@lru_cache(maxsize=64)
def _code_tables(std: float, is_f8: bool) -> tuple[Array, Array]:
    """(65536,) codes and (65536,) scale bytes by random index, which together have a standard deviation."""
    # E4M3: codes up to 4.2 times 96 stay below 448. E2M1: the tail saturates at 6, as in real weights.
    code_std, scale_byte = split_std(std, 48.0 if is_f8 else 1.5)
    values = e4m3_values() if is_f8 else E2M1_VALUES
    codes = nearest_codes(normal_quantiles() * code_std, values, 0x80 if is_f8 else 8)
    return codes, (scale_byte + SCALE_STEPS[np.arange(65536) % 3]).astype(np.uint8)


def _expert_choices(random: Random, shape: tuple[int, ...], n_expert: int) -> Iterator[Array]:
    """Yield routing tables: different experts within each row."""
    n_tokens, n_used = shape
    strides = np.array([s for s in range(1, n_expert + 1) if math.gcd(s, n_expert) == 1])
    first = random.u16(n_tokens).astype(np.int64)
    stride = strides[random.u16(n_tokens) % strides.size]
    yield (first[:, None] + np.arange(n_used) * stride[:, None]) % n_expert


Draft = Literal["mtp", "dspark"]
"""Kind of the draft model in a checkpoint: the preview's prediction block, or 0731's three blocks."""

DSPARK_RANK: Final = 256
DSPARK_N_BLOCKS: Final = 3


def draft_specs(hp: HParams, draft: Draft) -> list[TensorSpec]:
    """List the draft tensors of a checkpoint; of each, only its names there and its dimensions count."""
    d = hp.n_embd

    def plain(name: str, *dims: int) -> TensorSpec:
        return TensorSpec(name, name, (name,), dims, "bf16" if name.endswith(".weight") else "f32", None)

    def matrix(name: str, *dims: int) -> TensorSpec:
        return TensorSpec(name, name, (f"{name}.weight", f"{name}.scale"), dims, "f8", None)

    if draft == "mtp":
        first = last = "mtp.0"
        specs = block_specs(hp, 0, first)
        specs += [matrix(f"{first}.{name}", d, d) for name in ("e_proj", "h_proj")]
        specs += [plain(f"{first}.{name}.weight", d) for name in ("enorm", "hnorm")]
    else:
        first, last = "mtp.0", f"mtp.{DSPARK_N_BLOCKS - 1}"
        specs = [spec for i in range(DSPARK_N_BLOCKS) for spec in block_specs(hp, i, f"mtp.{i}")]
        n_targets = len(dspark_config(hp)["dspark_target_layer_ids"])
        specs += [
            matrix(f"{first}.main_proj", n_targets * d, d),
            plain(f"{first}.main_norm.weight", d),
            plain(f"{last}.markov_head.markov_w1.weight", DSPARK_RANK, hp.n_vocab),
            plain(f"{last}.markov_head.markov_w2.weight", DSPARK_RANK, hp.n_vocab),
            plain(f"{last}.confidence_head.proj.weight", d + DSPARK_RANK, 1),
        ]
    return [
        *specs,
        plain(f"{last}.norm.weight", d),
        plain(f"{last}.hc_head_base", hp.hc_count),
        plain(f"{last}.hc_head_fn", hp.hc_count * d, hp.hc_count),
        plain(f"{last}.hc_head_scale", 1),
    ]
