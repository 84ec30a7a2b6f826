"""The conversion itself: opens the checkpoint, plans, writes, and says what was done."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyllama_dsv4.checkpoint import Checkpoint
from pyllama_dsv4.errors import ArgumentError, DiskFullError

from .plan import Plan, make_plan
from .writer import PARTIAL_SUFFIX, OutputFile, Progress, check_output_path, write_tensors

__all__ = ["OUTTYPES", "ConvertResult", "convert"]

OUTTYPES: Final = ("moe-f8-e4m3-mxfp4",)
"""What can be written: FP8 dense weights and MXFP4 experts, as released."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion wrote, or a dry run would write.

    Attributes:
        path: The output file.
        n_bytes: Its size.
        n_bytes_payload: Bytes of tensor data in it, without header and padding.
        n_bytes_header: Bytes before the data section.
        n_tensors: Tensors in it.
        n_tensors_by_type: Tensors per file type name.
        n_bytes_by_type: Payload bytes per file type name.
        n_keys: Metadata keys in it.
        n_bytes_free: Free space for it where it goes, measured before it was written.
        notes: What the user should know, one sentence each.
        duration_s: Seconds spent reading, converting and writing tensor data; 0 for a dry run.
        is_dry_run: Whether nothing was written.
        plan: Keys and tensors in file order.
    """

    path: Path
    n_bytes: int
    n_bytes_payload: int
    n_bytes_header: int
    n_tensors: int
    n_tensors_by_type: Mapping[str, int]
    n_bytes_by_type: Mapping[str, int]
    n_keys: int
    n_bytes_free: int
    notes: Sequence[str]
    duration_s: float
    is_dry_run: bool
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether the disk had room for the file."""
        return self.n_bytes <= self.n_bytes_free


def convert(
    checkpoint: str | os.PathLike[str],
    outfile: str | os.PathLike[str],
    *,
    outtype: str = OUTTYPES[0],
    n_threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    name: str | None = None,
    chat_template: str | None = None,
) -> ConvertResult:
    """Convert a DeepSeek-V4 checkpoint in hub form into one native-dialect GGUF file.

    FP8 and FP4 codes and their scales are moved, never recomputed; the same input gives the same bytes.
    Memory stays at a few pieces of 4 MiB per thread. The file appears under its name when it is complete;
    an existing file is replaced at that moment.

    Args:
        checkpoint: Folder with ``config.json``, the safetensors shards and, for text, the tokenizer files.
        outfile: The file to write.
        outtype: One of ``OUTTYPES``.
        n_threads: Worker threads; by default one per core this process may use.
        progress: Called as ``progress(bytes_done, bytes_total, tensor_name)`` after each piece; returning
            False cancels.
        dry_run: Check everything and compute all sizes, but write nothing.
        name: ``general.name``; by default made from the folder's name.
        chat_template: Template text; by default upstream's for this generation of the model.

    Raises:
        ArgumentError: An argument is out of range, or ``outfile`` cannot be the name of a regular file.
        ModelNotFoundError: The checkpoint folder, or the folder of ``outfile``, does not exist.
        MissingShardError: A file of the checkpoint is absent.
        MissingScaleError: A quantised weight has no scale.
        TileShapeError: A scale has another shape than the tiles need.
        CheckpointError: The checkpoint is malformed or cannot be converted without loss.
        UnsupportedModelError: It is not a DeepSeek-V4 checkpoint.
        DiskFullError: There is not enough space; nothing is left of the file.
        CancelledError: ``progress`` returned False.
        ModelFileError: Another I/O error.
        ConvertError: Another process is writing the same file.
    """
    if outtype not in OUTTYPES:
        raise ArgumentError(
            "unknown output type", key="outtype", found=repr(outtype), expected=" or ".join(OUTTYPES)
        )
    n_threads = _default_n_threads() if n_threads is None else n_threads
    if not 1 <= n_threads <= 1024:
        raise ArgumentError(
            "cannot use so many threads", key="n_threads", found=n_threads, expected="1 to 1024"
        )
    path = check_output_path(outfile)
    with Checkpoint(checkpoint) as source:
        if any(path.exists() and path.samefile(shard) for shard in source.shards):
            raise ArgumentError(
                "the output file is a shard of the checkpoint",
                key="outfile",
                found=str(path),
                expected="another name",
            )
        plan = make_plan(source, name=name, template=chat_template)
        n_bytes_free = _free_bytes(path)
        duration_s = 0.0
        if not dry_run:
            if plan.n_bytes > n_bytes_free:
                raise not_enough_space(path, plan.n_bytes, n_bytes_free)
            start_s = time.monotonic()
            _write(source, plan, path, n_threads, progress)
            duration_s = time.monotonic() - start_s
    types = [(spec.file_type.name, spec.n_bytes) for spec in plan.specs]
    n_bytes_by_type: Counter[str] = Counter()
    for type_name, n_bytes in types:
        n_bytes_by_type[type_name] += n_bytes
    return ConvertResult(
        path=path,
        n_bytes=plan.n_bytes,
        n_bytes_payload=plan.n_bytes_payload,
        n_bytes_header=len(plan.header),
        n_tensors=len(plan.infos),
        n_tensors_by_type=Counter(type_name for type_name, _ in types),
        n_bytes_by_type=n_bytes_by_type,
        n_keys=len(plan.metadata),
        n_bytes_free=n_bytes_free,
        notes=plan.notes,
        duration_s=duration_s,
        is_dry_run=dry_run,
        plan=plan,
    )


def _write(source: Checkpoint, plan: Plan, path: Path, n_threads: int, progress: Progress | None) -> None:
    from .repack import tensor_jobs  # needs the compiled codecs, which a dry run does without

    with OutputFile(path, plan.header) as out:
        write_tensors(
            out,
            ((info, tensor_jobs(source, spec)) for info, spec in zip(plan.infos, plan.specs, strict=True)),
            n_threads=n_threads,
            n_bytes_total=plan.n_bytes_payload,
            progress=progress,
        )
        out.commit()


def not_enough_space(path: Path, n_bytes: int, n_bytes_free: int) -> DiskFullError:
    """Return the error for a file that will not fit."""
    return DiskFullError(
        "there is not enough space for the output file",
        path=path,
        found=f"{n_bytes_free:,} bytes free",
        expected=f"{n_bytes:,}",
        hint="Free some space, or write to another disk; nothing was written",
    )


def _free_bytes(path: Path) -> int:
    free = shutil.disk_usage(path.parent).free
    # what an interrupted conversion to the same name left behind is overwritten
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    return free + (partial.stat().st_size if partial.exists() else 0)


def _default_n_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
