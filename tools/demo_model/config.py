"""The sizes of the demonstration model, and its parameters: names, shapes and first values.

Parameters are named as the checkpoint names its weights; the matrices of all routed experts are one parameter,
whose name keeps the ``{e}`` of the tensor table. Runs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pyllama_dsv4.synth import flash_config
from pyllama_dsv4.tensors import HParams, TensorSpec, tensor_table

__all__ = ["N_CTX", "N_VOCAB", "demo_config", "file_bytes", "first_values", "parameter_specs"]

N_VOCAB = 1152
N_CTX = 8192


def demo_config(**changes: object) -> dict[str, Any]:
    """Return ``config.json`` of the demonstration model, with ``changes`` applied.

    One window layer, three whose indexer chooses 64 rows, one of ratio 128; the first two route by token id.
    """
    demo: dict[str, object] = {
        "vocab_size": N_VOCAB,
        "max_position_embeddings": N_CTX,
        "num_nextn_predict_layers": 0,
        "num_hidden_layers": 5,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "compress_ratios": [0, 4, 128, 4, 4],
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": 64,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
    }
    return flash_config(**(demo | changes))


def parameter_specs(hp: HParams) -> dict[str, TensorSpec]:
    """Return the matrices and vectors of a model by parameter name; shapes are the reversed ``dims``."""
    return {part.hf[0]: part for spec in tensor_table(hp) for part in spec.parts}


def file_bytes(hp: HParams) -> int:
    """Return the bytes of all tensors in the native file."""
    return sum(spec.n_bytes for spec in tensor_table(hp))


def _streams(hp: HParams, generator: torch.Generator) -> torch.Tensor:
    """Return a base for hyper-connections: each stream is read, written and mixed a little differently."""
    n = hp.hc_count
    noise = torch.randn(n * (n + 2), generator=generator)
    read = math.log(1 / n / (1 - 1 / n)) + 0.5 * noise[:n]  # sigmoid gives 1/n
    write = 0.5 * noise[n : 2 * n]  # 2 * sigmoid gives 1
    mix = (4 * torch.eye(n)).flatten() + 0.3 * noise[2 * n :]  # nearly the identity
    return torch.cat([read, write, mix])


def _expert_table(n_vocab: int, n_expert: int, n_used: int, generator: torch.Generator) -> torch.Tensor:
    """Return different experts for every token, each expert for equally many tokens."""
    order = torch.randperm(n_vocab, generator=generator)
    rows = torch.empty(n_vocab, n_used, dtype=torch.int64)
    for place, token in enumerate(order.tolist()):
        first, stride = place % n_expert, 1 + place // n_expert % (n_expert - 1)
        rows[token] = (first + stride * torch.arange(n_used)) % n_expert
        if len(set(rows[token].tolist())) < n_used:  # a stride that divides the number of experts
            rows[token] = (first + torch.arange(n_used)) % n_expert
    return rows


def first_values(hp: HParams, seed: int) -> dict[str, torch.Tensor]:
    """Return the parameters before training: float32, and int64 tables of experts by token."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, torch.Tensor] = {}
    for name, spec in parameter_specs(hp).items():
        shape = tuple(reversed(spec.dims))
        if spec.kind == "i32":
            values[name] = _expert_table(hp.n_vocab, hp.n_expert, hp.n_expert_used, generator)
        elif name.endswith("norm.weight"):
            values[name] = torch.ones(shape)
        elif name == "hc_head_base":
            values[name] = torch.full(shape, math.log(1 / hp.hc_count / (1 - 1 / hp.hc_count)))
        elif name.endswith("_base"):
            values[name] = _streams(hp, generator)
        elif name.endswith("_scale"):
            values[name] = torch.full(shape, 0.1)
        elif name.endswith((".ape", ".attn_sink", ".gate.bias")):
            values[name] = torch.zeros(shape)
        else:
            gain = {"embed.weight": math.sqrt(hp.n_embd), "head.weight": 0.5}.get(name, 1.0)
            values[name] = gain / math.sqrt(spec.dims[0]) * torch.randn(shape, generator=generator)
    return values
