"""The draft model of a checkpoint, for upstream's speculative decoding: its tensors, its keys, its plan.

Checkpoints carry one in their ``mtp.*`` tensors. The preview's is a prediction block (MTP), which upstream loads from
a deepseek4 file that has that block only (``--spec-type draft-mtp``); 0731's is DSpark, three blocks that upstream
knows as ``dflash`` (``--spec-type draft-dspark``). Both keep their FP8 and FP4 codes here, where upstream's converter
makes Q8_0 of the former. Names are upstream's: the native dialect has none for them.

Source: upstream ``conversion/deepseek.py``, ``src/models/deepseek4.cpp`` and ``src/models/dflash.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from pyllama_dsv4.checkpoint import Checkpoint, SourceTensor
from pyllama_dsv4.errors import CheckpointError
from pyllama_dsv4.tensors import ARCHITECTURE, HParams, Kind, TensorSpec, block_specs

from .metadata import NATIVE_FILE_TYPE, model_keys, read_model_card, size_label, to_upstream
from .plan import DRAFT_PREFIX, Plan, check_dims, check_rest, check_source, lay_out_files, read_table
from .template import generation_of
from .tokenizer import read_vocabulary, vocabulary_keys
from .writer import MetadataEntry

__all__ = ["DSPARK_ARCHITECTURE", "DraftSource", "draft_specs", "make_draft_plan"]

DSPARK_ARCHITECTURE: Final = "dflash"
_CONVERT_WHOLE: Final = "Convert the checkpoint without --draft; the model runs without speculative decoding"


def make_draft_plan(
    checkpoint: Checkpoint, *, name: str | None = None, max_file_bytes: int | None = None
) -> Plan:
    """Check the draft tensors of a checkpoint and lay their file out.

    Args:
        checkpoint: The checkpoint. Of its trunk, only what the draft file repeats is checked.
        name: ``general.name``; by default made from the folder's name.
        max_file_bytes: As in ``make_plan``.

    Raises:
        CheckpointError: There is no draft model, it is of a kind that upstream does not load, or it cannot be
            converted without loss.
    """
    hp, trunk = read_table(checkpoint)
    if not any(name.startswith(DRAFT_PREFIX) for name in checkpoint.tensors):
        raise CheckpointError(
            "the checkpoint has no draft model",
            path=checkpoint.folder,
            found=f"no tensor {DRAFT_PREFIX}*",
            expected="those of MTP or DSpark",
            hint=_CONVERT_WHOLE,
        )
    generation = generation_of(checkpoint.tensors)
    is_dspark = generation == "0731"
    specs = draft_specs(checkpoint, hp)
    for spec in specs:
        check_dims(spec, str(checkpoint.folder / "config.json"))
        check_source(checkpoint, spec)
    unknown = check_rest(checkpoint, [*trunk, *specs])
    if unknown:
        raise _unknown(unknown[0])
    card = read_model_card(checkpoint, name)
    card = replace(card, name=f"{card.name} {'DSpark' if is_dspark else 'MTP'}")
    n_blocks = _n_blocks(checkpoint)
    if is_dspark:
        draft_hp = replace(hp, n_layer=n_blocks, compress_ratios=(0,) * n_blocks, n_hash_layer=0)
    else:
        ratios = (hp.compress_ratios[: hp.n_layer] + (0,) * n_blocks)[: hp.n_layer + n_blocks]
        draft_hp = replace(hp, n_layer=hp.n_layer + n_blocks, compress_ratios=ratios)
    keys = model_keys(draft_hp, card, label=size_label(specs), template=None, generation=generation)
    keys = to_upstream(keys, NATIVE_FILE_TYPE)
    vocabulary = read_vocabulary(checkpoint, hp.n_vocab)
    if is_dspark:
        # rows of deepseek4 are all streams wide, those of dflash are not; with the key upstream reads past them
        keys = [_of_dspark(e) for e in keys if e.key != f"{ARCHITECTURE}.embedding_length_out"]
        keys += _dspark_keys(checkpoint, hp)
    else:
        keys.append(MetadataEntry(f"{ARCHITECTURE}.nextn_predict_layers", "u32", n_blocks))
    keys += vocabulary_keys(vocabulary)
    if is_dspark:
        keys.append(MetadataEntry("tokenizer.ggml.mask_token_id", "u32", _noise_token(checkpoint, hp)))
    kind = "draft-dspark" if is_dspark else "draft-mtp"
    notes = [f"this is a draft model: it runs beside the model it drafts for only (--spec-type {kind})"]
    return Plan(hp, generation, keys, lay_out_files(keys, specs, max_file_bytes), [], notes)


class DraftSource(Protocol):
    """What is asked of a checkpoint here: names and shapes of its tensors, and its configuration."""

    @property
    def folder(self) -> Path:
        """For messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json``."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""


def draft_specs(checkpoint: DraftSource, hp: HParams) -> list[TensorSpec]:
    """List the tensors of a checkpoint's draft file, in file order.

    Args:
        checkpoint: The checkpoint, which has draft tensors.
        hp: The model that the draft is for.

    Raises:
        CheckpointError: The draft model is of a kind that upstream does not load.
    """
    if generation_of(checkpoint.tensors) == "0731":
        return _dspark_specs(checkpoint, hp)
    return _mtp_specs(checkpoint, hp)


def _unknown(tensor: SourceTensor) -> CheckpointError:
    return CheckpointError(
        "the draft model has a tensor that is not known",
        path=tensor.path,
        tensor=tensor.name,
        found=f"{tensor.dtype} {list(tensor.shape)}",
        expected="the tensors of MTP or DSpark",
        hint=_CONVERT_WHOLE,
    )


def _n_blocks(checkpoint: DraftSource) -> int:
    """Return how many blocks the draft model has: one more than the largest number."""
    n_blocks = 0
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(DRAFT_PREFIX):
            match = re.match(r"mtp\.([0-9]{1,3})\.", name)
            if match is None:
                raise _unknown(tensor)
            n_blocks = max(n_blocks, int(match[1]) + 1)
    return n_blocks


def _plain(name: str, hf: str, dims: tuple[int, ...], kind: Kind, layer: int | None = None) -> TensorSpec:
    return TensorSpec(name, name, (hf,), dims, kind, layer)


def _upstream_block(hp: HParams, il: int, hf_layer: str) -> list[TensorSpec]:
    return [replace(spec, native=spec.upstream) for spec in block_specs(hp, il, hf_layer)]


def _hc_head(hp: HParams, prefix: str) -> list[TensorSpec]:
    n_hc = hp.hc_count
    return [
        _plain("output_hc_base.weight", f"{prefix}.hc_head_base", (n_hc,), "f32"),
        _plain("output_hc_fn.weight", f"{prefix}.hc_head_fn", (n_hc * hp.n_embd, n_hc), "f32"),
        _plain("output_hc_scale.weight", f"{prefix}.hc_head_scale", (1,), "f32"),
    ]


def _mtp_specs(checkpoint: DraftSource, hp: HParams) -> list[TensorSpec]:
    """List the tensors of an MTP file: the block, its own head, and the trunk's tensors that it shares."""
    n_blocks = _n_blocks(checkpoint)
    if n_blocks != 1:
        raise CheckpointError(
            "cannot write the draft model",
            path=checkpoint.folder,
            found=f"{n_blocks} prediction blocks",
            expected="1, as upstream's graph has",
            hint=_CONVERT_WHOLE,
        )
    d, il, mtp = hp.n_embd, hp.n_layer, "mtp.0"
    block = f"blk.{il}.nextn"
    projections = (
        f"{mtp}.e_proj.weight",
        f"{mtp}.e_proj.scale",
        f"{mtp}.h_proj.weight",
        f"{mtp}.h_proj.scale",
    )
    eh_proj = f"{block}.eh_proj.weight"
    return [
        _plain("token_embd.weight", "embed.weight", (d, hp.n_vocab), "bf16"),
        *_upstream_block(hp, il, mtp),
        TensorSpec(eh_proj, eh_proj, projections, (2 * d, d), "f8", il),
        _plain(f"{block}.enorm.weight", f"{mtp}.enorm.weight", (d,), "f32", il),
        _plain(f"{block}.hnorm.weight", f"{mtp}.hnorm.weight", (d,), "f32", il),
        _plain(f"{block}.shared_head_norm.weight", f"{mtp}.norm.weight", (d,), "f32", il),
        *_hc_head(hp, mtp),
        _plain("output.weight", "head.weight", (d, hp.n_vocab), "bf16"),
        _plain("output_norm.weight", "norm.weight", (d,), "f32"),
    ]


# --- DSpark ---------------------------------------------------------------------------------------------


def _dspark_specs(checkpoint: DraftSource, hp: HParams) -> list[TensorSpec]:
    """List the tensors of a DSpark file; embedding and head are the target's, which lends them at run time."""
    d, n_blocks = hp.n_embd, _n_blocks(checkpoint)
    n_targets = len(_target_layers(checkpoint, hp))
    specs = [spec for il in range(n_blocks) for spec in _upstream_block(hp, il, f"mtp.{il}")]
    main, last = _home(checkpoint, "main_proj.weight"), _home(checkpoint, "markov_head.markov_w1.weight")
    markov = f"{last}.markov_head.markov_"
    rank = _matrix_cols(checkpoint, f"{markov}w1.weight")
    confidence = "confidence_head.proj.weight"

    def plain(name: str, hf: str, *dims: int) -> TensorSpec:
        return _plain(name, hf, dims, _plain_kind(checkpoint, hf))

    fc = plain("fc.weight", f"{main}.main_proj.weight", n_targets * d, d)
    if f"{main}.main_proj.scale" in checkpoint.tensors:
        fc = replace(fc, hf=(f"{main}.main_proj.weight", f"{main}.main_proj.scale"), kind="f8")
    return [
        *specs,
        fc,
        _plain("enc.output_norm.weight", f"{main}.main_norm.weight", (d,), "f32"),
        plain("markov_w1.weight", f"{markov}w1.weight", rank, hp.n_vocab),
        plain("markov_w2.weight", f"{markov}w2.weight", rank, hp.n_vocab),
        plain("conf_proj.weight", f"{_home(checkpoint, confidence)}.{confidence}", d + rank, 1),
        *_hc_head(hp, _home(checkpoint, "hc_head_base")),
        _plain("output_norm.weight", f"{_home(checkpoint, 'norm.weight')}.norm.weight", (d,), "f32"),
    ]


def _plain_kind(checkpoint: DraftSource, name: str) -> Kind:
    """Return how to keep the type that a tensor without a scale has; F32 if it is of neither."""
    tensor = checkpoint.tensors.get(name)
    return "bf16" if tensor is not None and tensor.dtype == "BF16" else "f32"


def _home(checkpoint: DraftSource, suffix: str) -> str:
    """Return the prefix of the one block that holds a tensor of the whole draft model; the first if none does."""
    homes = [f"mtp.{i}" for i in range(_n_blocks(checkpoint)) if f"mtp.{i}.{suffix}" in checkpoint.tensors]
    return homes[0] if homes else "mtp.0"


def _matrix_cols(checkpoint: DraftSource, name: str) -> int:
    tensor = checkpoint.tensors.get(name)
    return tensor.shape[1] if tensor is not None and len(tensor.shape) == 2 else 1


def _of_dspark(entry: MetadataEntry) -> MetadataEntry:
    if entry.key == "general.architecture":
        return replace(entry, value=DSPARK_ARCHITECTURE)
    prefix = f"{ARCHITECTURE}."
    if not entry.key.startswith(prefix):
        return entry
    return replace(entry, key=f"{DSPARK_ARCHITECTURE}.{entry.key.removeprefix(prefix)}")


def _dspark_keys(checkpoint: DraftSource, hp: HParams) -> list[MetadataEntry]:
    block_size = _config(checkpoint, "dspark_block_size", "an integer from 1 to 1024")
    if type(block_size) is not int or not 1 <= block_size <= 1024:
        raise _bad_config(checkpoint, "dspark_block_size", block_size, "an integer from 1 to 1024")
    # upstream counts the embedding as layer 0
    targets = [il + 1 for il in _target_layers(checkpoint, hp)]
    return [
        MetadataEntry(f"{DSPARK_ARCHITECTURE}.block_size", "u32", block_size),
        MetadataEntry(f"{DSPARK_ARCHITECTURE}.target_layers", "i32[]", targets),
    ]


def _target_layers(checkpoint: DraftSource, hp: HParams) -> Sequence[int]:
    expected = f"a list of layers, 0 to {hp.n_layer - 1}"
    value = _config(checkpoint, "dspark_target_layer_ids", expected)
    is_good = isinstance(value, list) and 0 < len(value) <= hp.n_layer
    if not is_good or any(type(il) is not int or not 0 <= il < hp.n_layer for il in value):
        raise _bad_config(checkpoint, "dspark_target_layer_ids", value, expected)
    return list(value)


def _noise_token(checkpoint: DraftSource, hp: HParams) -> int:
    expected = f"a token id, 0 to {hp.n_vocab - 1}"
    value = _config(checkpoint, "dspark_noise_token_id", expected)
    if type(value) is not int or not 0 <= value < hp.n_vocab:
        raise _bad_config(checkpoint, "dspark_noise_token_id", value, expected)
    return value


def _config(checkpoint: DraftSource, key: str, expected: str) -> Any:
    if key not in checkpoint.config:
        raise _bad_config(checkpoint, key, None, expected)
    return checkpoint.config[key]


def _bad_config(checkpoint: DraftSource, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        "cannot write the draft model",
        path=checkpoint.folder / "config.json",
        key=key,
        found="no such key" if found is None else ascii(found)[:80],
        expected=expected,
        hint=_CONVERT_WHOLE,
    )
