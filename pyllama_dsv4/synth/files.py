"""GGUF files that the converter does not write: in F32 for comparisons, and of full size without data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.convert.metadata import to_upstream
from pyllama_dsv4.convert.plan import GROUP, TILE, make_plan, sources
from pyllama_dsv4.convert.writer import Job, OutputFile, header_bytes, lay_out, write_tensors
from pyllama_dsv4.gguf_types import FILE_TYPES
from pyllama_dsv4.tensors import TensorSpec

from .checkpoints import write_checkpoint
from .configs import flash_config
from .numbers import E2M1_VALUES, e4m3_values
from .shards import Array
from .tokenizers import Tokenizer

__all__ = ["write_sparse_native", "write_upstream_f32"]

ALL_F32: Final = 0
"""``general.file_type``. Source: upstream ``include/llama.h:llama_ftype``."""


def write_upstream_f32(
    checkpoint: str | os.PathLike[str], outfile: str | os.PathLike[str], *, chat_template: str | None = None
) -> Path:
    """Write a checkpoint's weights, dequantised exactly, as an F32 file in the upstream dialect.

    For comparing the native file with stock tensors: dequantisation is done here in numpy, not by the codecs.

    Args:
        checkpoint: Checkpoint folder.
        outfile: The file to write.
        chat_template: Template text; by default upstream's.

    Returns:
        The path of the file.
    """
    with Checkpoint(checkpoint) as source:
        plan = make_plan(source, template=chat_template)
        types = {
            kind: FILE_TYPES[26 if kind == "i32" else 0] for kind in ("f32", "bf16", "i32", "f8", "mxfp4")
        }
        infos = lay_out(
            (s.upstream, s.dims, types[s.kind].id, types[s.kind].n_bytes(s.n_elements)) for s in plan.specs
        )
        with OutputFile(outfile, header_bytes(to_upstream(plan.metadata, ALL_F32), infos)) as out:
            write_tensors(
                out,
                ((info, _plain_jobs(source, spec)) for info, spec in zip(infos, plan.specs, strict=True)),
                n_threads=1,
                n_bytes_total=sum(info.n_bytes for info in infos),
            )
            out.commit()
            return out.path


def _plain_jobs(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[Job]:
    for weight, scale in sources(spec):
        yield lambda weight=weight, scale=scale: (  # type: ignore[misc]
            _plain_values(checkpoint, spec, weight, scale).reshape(-1).view(np.uint8)
        )


def _plain_values(checkpoint: Checkpoint, spec: TensorSpec, weight: str, scale: str | None) -> Array:
    values = checkpoint.read(weight)
    dtype = checkpoint.tensors[weight].dtype
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    if spec.kind == "i32":
        return values.astype("<i4")
    if scale is None:
        return values
    scales = checkpoint.read(scale)
    if checkpoint.tensors[scale].dtype == "F8_E8M0":
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    if spec.kind == "f8":
        magnitudes = np.append(e4m3_values(), np.float32(np.nan))
        values = np.concatenate([magnitudes, -magnitudes])[values]
        scales = scales.repeat(TILE, 0).repeat(TILE, 1)
    else:
        codes = values.view(np.uint8)
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
        values = np.concatenate([E2M1_VALUES, -E2M1_VALUES])[codes]
        scales = scales.repeat(GROUP, 1)
    return np.ascontiguousarray(values * scales, "<f4")


# Multi-turn chats come out malformed with it (spec section 7.3), as with the published file's. The comment
# makes it as long as that one, so that the header has the published length.
SHORT_TEMPLATE: Final = (
    "{#- for single turns: no thinking, no tools, no opening of past answers -#}{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c></think>' }}{% endif %}"
)
LAST_NATIVE_KEY: Final = "general.quantization_version"


def write_sparse_native(
    outfile: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = "deepseek",
    is_published_form: bool = True,
) -> Path:
    """Write a native file with a true header whose tensor data is one hole: all weights read as zero.

    With the defaults it has the size and the keys of the published V4-Flash file, and takes 5 MB on the disk.

    Args:
        outfile: The file to write.
        config: ``config.json``; by default ``flash_config``.
        tokenizer: Vocabulary to put into the header.
        is_published_form: Write only the 50 keys of the published file and a short chat template like its
            own, not the keys that our converter adds.

    Returns:
        The path of the file.
    """
    with tempfile.TemporaryDirectory(dir=Path(outfile).absolute().parent, prefix="sparse-") as folder:
        write_checkpoint(folder, config or flash_config(), seed=0, tokenizer=tokenizer, is_sparse=True)
        with Checkpoint(folder) as checkpoint:
            plan = make_plan(
                checkpoint,
                name="DeepSeek V4 Flash",
                template=SHORT_TEMPLATE if is_published_form else None,
            )
    keys = list(plan.metadata)
    if is_published_form:
        last = next(i for i, entry in enumerate(keys) if entry.key == LAST_NATIVE_KEY)
        keys = keys[: last + 1] + [entry for entry in keys[last + 1 :] if entry.key.startswith("tokenizer.")]
    with OutputFile(outfile, header_bytes(keys, plan.infos)) as out:
        out.skip(plan.n_bytes - plan.n_bytes_header)
        out.commit()
        return out.path
