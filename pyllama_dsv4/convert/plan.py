"""Decides what a conversion writes: every output tensor with its sources, every key, every offset.

All checks that need no tensor data happen here, before a byte is written: names, dtypes, shapes and scales of
the checkpoint against the one table of tensors. The data is made in ``repack``, the file in ``writer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pyllama_dsv4.checkpoint import Checkpoint, SourceTensor
from pyllama_dsv4.errors import (
    ArgumentError,
    CheckpointError,
    MissingScaleError,
    TileShapeError,
    UnsupportedModelError,
)
from pyllama_dsv4.tensors import HParams, Kind, TensorSpec, tensor_table

from .metadata import model_keys, read_model_card, size_label
from .template import Generation, chat_template, generation_of
from .tokenizer import read_vocabulary, vocabulary_keys
from .writer import MetadataEntry, OutputTensor, header_bytes, lay_out, padded

__all__ = [
    "DRAFT_PREFIX",
    "SCALE_DTYPES",
    "SOURCE_DTYPES",
    "Plan",
    "PlannedFile",
    "check_dims",
    "check_rest",
    "check_source",
    "lay_out_files",
    "make_plan",
    "read_table",
    "sources",
]

HF_MODEL_TYPE: Final = "deepseek_v4"

TILE: Final = 128
"""Rows and columns that share one FP8 scale in a checkpoint."""
GROUP: Final = 32
"""Columns that share one FP4 scale in a checkpoint."""

DRAFT_PREFIX: Final = "mtp."

SOURCE_DTYPES: Final[dict[Kind, tuple[str, ...]]] = {
    "f32": ("F32", "BF16"),
    "bf16": ("BF16",),
    "i32": ("I64", "I32"),
    "f8": ("F8_E4M3",),
    "mxfp4": ("I8",),
}
"""dtypes from which each kind can be made without changing a value."""

SCALE_DTYPES: Final = ("F8_E8M0", "F32")


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output.

    Attributes:
        header: Bytes of the header, up to the data section.
        specs: Its tensors, in file order.
        infos: The same tensors as the header describes them.
    """

    header: bytes
    specs: Sequence[TensorSpec]
    infos: Sequence[OutputTensor]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(padded(info.n_bytes) for info in self.infos)


@dataclass(frozen=True)
class Plan:
    """Everything about the output but the tensor data.

    Attributes:
        hparams: The model.
        generation: Release of the weights.
        metadata: Keys in file order, without those that number the files of a split model.
        files: The output files; more than one if the model is split.
        skipped: Tensors of the checkpoint that are left out on purpose.
        notes: What the user should know, one sentence each.
    """

    hparams: HParams
    generation: Generation
    metadata: Sequence[MetadataEntry]
    files: Sequence[PlannedFile]
    skipped: Sequence[SourceTensor]
    notes: Sequence[str]

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors, in file order."""
        return [spec for file in self.files for spec in file.specs]

    @property
    def infos(self) -> list[OutputTensor]:
        """The same tensors as the headers describe them; offsets count from the data section of each file."""
        return [info for file in self.files for info in file.infos]

    @property
    def n_bytes_header(self) -> int:
        """Bytes of all headers."""
        return sum(len(file.header) for file in self.files)

    @property
    def n_bytes_payload(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(info.n_bytes for info in self.infos)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)


def make_plan(
    checkpoint: Checkpoint,
    *,
    name: str | None = None,
    template: str | None = None,
    max_file_bytes: int | None = None,
) -> Plan:
    """Check a checkpoint and lay the output out.

    Args:
        checkpoint: The checkpoint.
        name: ``general.name``; by default made from the folder's name.
        template: Chat template; by default upstream's for the checkpoint's generation.
        max_file_bytes: Split the output into files of at most this size; by default write one. A tensor that is
            larger gets a file to itself.

    Raises:
        UnsupportedModelError: The checkpoint is of another architecture.
        MissingScaleError: A quantised weight has no scale.
        TileShapeError: A scale or a weight does not have the shape that the tiles need.
        CheckpointError: Anything else in the checkpoint that cannot be converted without loss.
    """
    hp, specs = read_table(checkpoint)
    for spec in specs:
        check_source(checkpoint, spec)
    skipped = check_rest(checkpoint, specs)

    vocabulary = read_vocabulary(checkpoint, hp.n_vocab)
    generation = generation_of(checkpoint.tensors)
    if vocabulary is None:
        template = None
    elif template is None:
        template = chat_template(generation)
    metadata = model_keys(
        hp,
        read_model_card(checkpoint, name),
        label=size_label(specs),
        template=template,
        generation=generation,
    )
    metadata += vocabulary_keys(vocabulary)
    files = lay_out_files(metadata, specs, max_file_bytes)

    notes = []
    if skipped:
        kind = "DSpark" if generation == "0731" else "MTP"
        notes.append(
            f"left out {len(skipped)} {kind} tensors"
            f" ({DRAFT_PREFIX}*, {sum(t.n_bytes for t in skipped):,} bytes), which serve speculative decoding"
            " only: --draft writes them to a file of their own"
        )
    if vocabulary is None:
        notes.append(
            "the checkpoint has no tokenizer.json: the file gets no vocabulary"
            " and can be evaluated on token ids only"
        )
    return Plan(hp, generation, metadata, files, skipped, notes)


def read_table(checkpoint: Checkpoint) -> tuple[HParams, list[TensorSpec]]:
    """Return the model that a checkpoint's configuration describes, and the tensors it must have.

    Raises:
        UnsupportedModelError: The checkpoint is of another architecture.
        TileShapeError: The block formats have no layout for its dimensions.
        CheckpointError: The configuration is not one of a DeepSeek-V4.
    """
    config_path = checkpoint.folder / "config.json"
    model_type = checkpoint.config.get("model_type", HF_MODEL_TYPE)
    if model_type != HF_MODEL_TYPE:
        raise UnsupportedModelError(
            "not a checkpoint of DeepSeek-V4",
            path=config_path,
            key="model_type",
            found=ascii(model_type),
            expected=repr(HF_MODEL_TYPE),
        )
    hp = HParams.from_hf_config(checkpoint.config, path=str(config_path))
    specs = tensor_table(hp)
    for spec in specs:
        check_dims(spec, str(config_path))
    return hp, specs


def check_source(checkpoint: Checkpoint, spec: TensorSpec) -> None:
    """Check names, dtypes and shapes of the checkpoint tensors that an output tensor is made of.

    Raises:
        MissingScaleError: A quantised weight has no scale.
        TileShapeError: A scale does not have the shape that the tiles need.
        CheckpointError: Anything else that cannot be converted without loss.
    """
    for part in spec.parts:
        for weight, scale in sources(part):
            _check_source(checkpoint, part, weight, scale)


MAX_FILES: Final = 65535
"""``split.count`` has 16 bits."""


def lay_out_files(
    metadata: Sequence[MetadataEntry], specs: Sequence[TensorSpec], max_bytes: int | None
) -> list[PlannedFile]:
    """Lay tensors out in one file, or in several that are as large as they may be.

    Args:
        metadata: Keys, without those that number the files.
        specs: Tensors in file order.
        max_bytes: Size that no file exceeds unless it holds a single tensor; None for one file.

    Raises:
        ArgumentError: There would be too many files.

    Source: upstream ``tools/gguf-split/gguf-split.cpp:split_strategy`` for the keys and their types.
    """
    whole = _file(metadata, specs)
    if max_bytes is None or whole.n_bytes <= max_bytes:
        return [whole]
    # the header's length does not depend on the numbers in it
    parts: list[list[TensorSpec]] = []
    n_bytes = 0
    for spec in specs:
        n_more = padded(spec.n_bytes) + len(_file([], [spec]).header)  # no less than what it adds
        if not parts or n_bytes + n_more > max_bytes:
            parts.append([])
            keys = _split_keys(0, 0, 0)
            n_bytes = len(header_bytes([*metadata, *keys] if len(parts) == 1 else keys, []))
        parts[-1].append(spec)
        n_bytes += n_more
    if len(parts) > MAX_FILES:
        raise ArgumentError(
            "the model would be split into too many files",
            key="max_file_bytes",
            found=f"{len(parts)} files of at most {max_bytes:,} bytes",
            expected=f"at most {MAX_FILES}",
        )
    return [
        _file([*(metadata if i == 0 else []), *_split_keys(i, len(parts), len(specs))], part)
        for i, part in enumerate(parts)
    ]


def _file(metadata: Sequence[MetadataEntry], specs: Sequence[TensorSpec]) -> PlannedFile:
    infos = lay_out((s.native, s.dims, s.file_type.id, s.n_bytes) for s in specs)
    return PlannedFile(header_bytes(metadata, infos), specs, infos)


def _split_keys(i: int, n_files: int, n_tensors: int) -> list[MetadataEntry]:
    return [
        MetadataEntry("split.no", "u16", i),
        MetadataEntry("split.count", "u16", n_files),
        MetadataEntry("split.tensors.count", "i32", n_tensors),
    ]


def sources(spec: TensorSpec) -> Iterator[tuple[str, str | None]]:
    """Yield the checkpoint's weight and scale names of a tensor: one pair, or one per expert or part."""
    for part in spec.parts:
        weight, scale = part.hf if len(part.hf) == 2 else (part.hf[0], None)
        if not part.is_expert_stack:
            yield weight, scale
            continue
        for e in range(part.dims[2]):
            yield weight.format(e=e), None if scale is None else scale.format(e=e)


def check_dims(spec: TensorSpec, config_path: str) -> None:
    """Refuse dimensions for which the block formats have no layout.

    Raises:
        TileShapeError: Rows or columns are not multiples of a tile or group.
    """
    cols, rows = (*spec.dims, 1)[:2]
    if spec.kind == "f8" and (cols % TILE or rows % TILE):
        raise TileShapeError(
            "cannot store a weight in tiles",
            path=config_path,
            tensor=spec.hf[0],
            found=f"{rows} rows of {cols}",
            expected=f"multiples of {TILE}, the FP8 tile",
        )
    if spec.kind == "mxfp4" and cols % GROUP:
        raise TileShapeError(
            "cannot store a weight in groups",
            path=config_path,
            tensor=spec.hf[0].format(e=0),
            found=f"rows of {cols}",
            expected=f"a multiple of {GROUP}, the FP4 group",
        )


def _check_source(checkpoint: Checkpoint, spec: TensorSpec, weight_name: str, scale_name: str | None) -> None:
    weight = checkpoint.tensors.get(weight_name)
    if weight is None:
        raise CheckpointError(
            "the checkpoint lacks a tensor",
            path=checkpoint.folder,
            tensor=weight_name,
            found="no such tensor",
            expected=f"it, for {spec.native}",
            hint="Download the checkpoint again, or check that config.json belongs to it",
        )
    dtypes = SOURCE_DTYPES[spec.kind]
    if weight.dtype not in dtypes:
        raise CheckpointError(
            "a tensor cannot be converted without loss",
            path=weight.path,
            tensor=weight_name,
            found=weight.dtype,
            expected=" or ".join(dtypes),
            hint=_dtype_hint(spec, weight.dtype),
        )
    shape = tuple(reversed(spec.dims[:2]))
    if spec.kind == "mxfp4":
        shape = (shape[0], shape[1] // 2)  # two codes per byte
    if weight.shape != shape:
        raise CheckpointError(
            "a tensor has another shape than config.json says",
            path=weight.path,
            tensor=weight_name,
            found=list(weight.shape),
            expected=list(shape),
        )
    if scale_name is None:
        return
    scale = checkpoint.tensors.get(scale_name)
    if scale is None:
        raise MissingScaleError(
            "a quantised weight has no scale",
            path=weight.path,
            tensor=weight_name,
            found=f"no {scale_name}",
            expected="one",
            hint="Download the checkpoint again; other ways of storing scales are not supported",
        )
    cols, rows = spec.dims[:2]
    scale_shape = (rows // TILE, cols // TILE) if spec.kind == "f8" else (rows, cols // GROUP)
    unit = f"{TILE}x{TILE} tile" if spec.kind == "f8" else f"{GROUP} columns"
    if scale.shape != scale_shape:
        raise TileShapeError(
            "a scale does not fit its weight",
            path=scale.path,
            tensor=scale_name,
            found=list(scale.shape),
            expected=f"{list(scale_shape)}, one per {unit} of a weight of {rows} x {cols}",
            hint="Scales of other tiles have no place in this format",
        )
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            "a scale cannot be converted without loss",
            path=scale.path,
            tensor=scale_name,
            found=scale.dtype,
            expected=" or ".join(SCALE_DTYPES),
        )


def _dtype_hint(spec: TensorSpec, dtype: str) -> str | None:
    if spec.kind == "mxfp4" and dtype.startswith("F8"):
        return "Experts in FP8 (base models, FP8 repacks) have no place in this format"
    if spec.kind in ("f8", "mxfp4") and dtype in ("BF16", "F16", "F32"):
        return "The weights were dequantised; convert the checkpoint as released"
    return None


def check_rest(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> list[SourceTensor]:
    """Return the tensors of a draft model that no specification names; refuse any other that none names.

    Raises:
        CheckpointError: The checkpoint has a tensor that is not known.
    """
    known = {name for spec in specs for pair in sources(spec) for name in pair}
    skipped = []
    for name, tensor in checkpoint.tensors.items():
        if name in known:
            continue
        if not name.startswith(DRAFT_PREFIX):
            raise CheckpointError(
                "the checkpoint has a tensor that DeepSeek-V4 does not have",
                path=tensor.path,
                tensor=name,
                found=f"{tensor.dtype} {list(tensor.shape)}",
                expected="only the tensors that config.json implies, and mtp.*",
                hint="This may be another variant (vision, V4.1), which is not supported",
            )
        skipped.append(tensor)
    return skipped
