"""The metadata keys of a converted file: which, in what order, with what values.

The order is the native file's (spec section 4.1), then come the keys that upstream's loader requires and the
native file lacks, so that the file answers to readers of either dialect. The vocabulary's keys are made in
``tokenizer``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import CheckpointError
from pyllama_dsv4.formats import GENERATION_KEY
from pyllama_dsv4.tensors import ARCHITECTURE, HParams, TensorSpec

from .template import Generation
from .writer import MetadataEntry, ValueType

__all__ = [
    "GENERATION_KEY",
    "NATIVE_FILE_TYPE",
    "ModelCard",
    "model_keys",
    "read_model_card",
    "size_label",
    "to_upstream",
]

NATIVE_FILE_TYPE: Final = 41
"""``general.file_type`` of the native file: MOSTLY_F8_E4M3_MXFP4 (spec section 3)."""

QUANTIZATION_VERSION: Final = 2
GATING_SQRT_SOFTPLUS: Final = 4
"""``expert_gating_func``. Source: upstream ``src/llama-hparams.h:llama_expert_gating_func_type``."""

_SAMPLING: Final[tuple[tuple[str, str, ValueType], ...]] = (
    ("top_k", "top_k", "i32"),
    ("top_p", "top_p", "f32"),
    ("min_p", "min_p", "f32"),
    ("temperature", "temp", "f32"),
)
"""Key of ``generation_config.json``, last part of the GGUF key, type; in upstream's order."""


@dataclass(frozen=True)
class ModelCard:
    """What a file says about the model that no tensor depends on.

    Attributes:
        name: For people.
        license: Licence identifier, None if the checkpoint does not name one.
        sampling: Recommended settings as ``general.sampling.*`` entries.
    """

    name: str
    license: str | None
    sampling: Sequence[MetadataEntry]


def read_model_card(checkpoint: Checkpoint, name: str | None = None) -> ModelCard:
    """Collect name, licence and recommended sampling from a checkpoint folder.

    Args:
        checkpoint: The checkpoint.
        name: The name to use instead of the folder's.

    Raises:
        CheckpointError: ``generation_config.json`` has a setting that is not a number.
    """
    return ModelCard(name or _folder_name(checkpoint), _license(checkpoint), _sampling(checkpoint))


def _folder_name(checkpoint: Checkpoint) -> str:
    folder = checkpoint.folder.resolve()
    # the hub's cache keeps a repository as models--OWNER--NAME/snapshots/REVISION
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2].replace("-", " ")
    return folder.name.replace("-", " ")


def _license(checkpoint: Checkpoint) -> str | None:
    """Read ``license`` from the front matter of the model card."""
    front = re.match(r"---\r?\n(.*?)^---\s*$", checkpoint.text("README.md") or "", re.DOTALL | re.MULTILINE)
    if front is None:
        return None
    entry = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", front[1], re.MULTILINE)
    return None if entry is None else entry[1]


def _sampling(checkpoint: Checkpoint) -> list[MetadataEntry]:
    config = checkpoint.json("generation_config.json") or {}
    entries = []
    for source, target, kind in _SAMPLING:
        value = config.get(source)
        if value is None:
            continue
        is_number = isinstance(value, (int, float) if kind == "f32" else int) and not isinstance(value, bool)
        if not is_number or not abs(value) < 2**31:
            raise CheckpointError(
                "cannot use the recommended sampling settings",
                path=checkpoint.folder / "generation_config.json",
                key=source,
                found=ascii(value),
                expected="a number" if kind == "f32" else "an integer",
            )
        entries.append(MetadataEntry(f"general.sampling.{target}", kind, value))
    return entries


def size_label(specs: Sequence[TensorSpec]) -> str:
    """Return ``general.size_label``: experts x parameters of everything shared plus one expert."""
    from gguf.utility import size_label as gguf_size_label

    n_shared = sum(spec.n_elements for spec in specs if not spec.is_expert_stack)
    stacks = [spec for spec in specs if spec.is_expert_stack]
    n_expert = stacks[0].dims[2]
    n_one_expert = sum(spec.n_elements for spec in stacks) // n_expert
    label: str = gguf_size_label(n_shared + n_one_expert * n_expert, n_shared, n_one_expert, n_expert)
    return label


def model_keys(
    hp: HParams,
    card: ModelCard,
    *,
    label: str,
    template: str | None,
    generation: Generation,
) -> list[MetadataEntry]:
    """Return every key of a native file except the vocabulary's.

    Args:
        hp: The model's hyper-parameters.
        card: Name, licence, sampling.
        label: ``general.size_label``.
        template: Chat template, None for a file without a vocabulary.
        generation: Release of the weights.
    """
    keys: list[MetadataEntry] = []

    def general(key: str, kind: ValueType, value: object) -> None:
        keys.append(MetadataEntry(key, kind, value))

    def model(key: str, kind: ValueType, value: object) -> None:
        keys.append(MetadataEntry(f"{ARCHITECTURE}.{key}", kind, value))

    clamp = [hp.swiglu_limit] * hp.n_layer
    general("general.architecture", "str", ARCHITECTURE)
    general("general.type", "str", "model")
    keys += card.sampling
    general("general.name", "str", card.name)
    general("general.size_label", "str", label)
    if card.license is not None:
        general("general.license", "str", card.license)
    model("block_count", "u32", hp.n_layer)
    model("context_length", "u32", hp.n_ctx_train)
    model("embedding_length", "u32", hp.n_embd)
    model("attention.head_count", "u32", hp.n_head)
    model("attention.head_count_kv", "u32", 1)
    model("rope.scaling.type", "str", "yarn")
    model("rope.scaling.factor", "f32", hp.yarn_factor)
    model("rope.scaling.original_context_length", "u32", hp.yarn_n_ctx_orig)
    model("rope.scaling.yarn_beta_fast", "f32", hp.yarn_beta_fast)
    model("rope.scaling.yarn_beta_slow", "f32", hp.yarn_beta_slow)
    model("rope.freq_base", "f32", hp.rope_theta)
    model("attention.layer_norm_rms_epsilon", "f32", hp.rms_eps)
    model("expert_used_count", "u32", hp.n_expert_used)
    model("attention.key_length", "u32", hp.head_dim)
    model("attention.value_length", "u32", hp.head_dim)
    general("general.file_type", "u32", NATIVE_FILE_TYPE)
    if template is not None:
        general("tokenizer.chat_template", "str", template)
    model("vocab_size", "u32", hp.n_vocab)
    model("attention.q_lora_rank", "u32", hp.q_lora_rank)
    model("rope.dimension_count", "u32", hp.n_rot)
    model("attention.sliding_window", "u32", hp.n_swa)
    # despite its name, the base of the compressed layers
    model("rope.freq_base_swa", "f32", hp.compress_rope_theta)
    model("leading_dense_block_count", "u32", 0)
    model("expert_feed_forward_length", "u32", hp.n_ff_exp)
    model("expert_count", "u32", hp.n_expert)
    model("expert_shared_count", "u32", hp.n_expert_shared)
    model("expert_weights_scale", "f32", hp.expert_weights_scale)
    model("expert_weights_norm", "bool", True)
    model("swiglu_clamp_exp", "f32[]", clamp)
    model("attention.indexer.head_count", "u32", hp.indexer_n_head)
    model("attention.indexer.key_length", "u32", hp.indexer_head_dim)
    model("attention.indexer.top_k", "u32", hp.indexer_top_k)
    general("general.quantization_version", "u32", QUANTIZATION_VERSION)
    # from here on: what upstream's loader wants and the published native file lacks
    model("swiglu_clamp_shexp", "f32[]", clamp)
    model("attention.output_group_count", "u32", hp.o_groups)
    model("attention.output_lora_rank", "u32", hp.o_lora_rank)
    model("attention.compress_rope_freq_base", "f32", hp.compress_rope_theta)
    model("attention.compress_ratios", "i32[]", hp.compress_ratios)
    model("hyper_connection.count", "u32", hp.hc_count)
    model("hyper_connection.sinkhorn_iterations", "u32", hp.hc_sinkhorn_iterations)
    model("hyper_connection.epsilon", "f32", hp.hc_eps)
    model("hash_layer_count", "u32", hp.n_hash_layer)
    model("expert_gating_func", "u32", GATING_SQRT_SOFTPLUS)
    model("embedding_length_out", "u32", hp.hc_count * hp.n_embd)
    if generation != "preview":
        general(GENERATION_KEY, "str", generation)
    return keys


_NATIVE_ONLY: Final = frozenset(
    f"{ARCHITECTURE}.{key}" for key in ("rope.freq_base_swa", "leading_dense_block_count")
)


def to_upstream(keys: Sequence[MetadataEntry], file_type: int) -> list[MetadataEntry]:
    """Return the same metadata as upstream's converter would write it, for tensors of another file type."""
    return [
        MetadataEntry(kv.key, kv.type, file_type) if kv.key == "general.file_type" else kv
        for kv in keys
        if kv.key not in _NATIVE_ONLY
    ]
