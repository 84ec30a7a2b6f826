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
from pyllama_dsv4.errors import ArgumentError, CheckpointError, DiskFullError

from .draft import make_draft_plan
from .journal import Identity, Journal, identify
from .output import Output, journal_path, output_paths
from .plan import Plan, make_plan
from .scales import check_fp8_scales
from .writer import Pool, Progress, check_output_path, partial_path, write_tensors

__all__ = ["OUTTYPES", "ConvertResult", "convert"]

OUTTYPES: Final = ("moe-f8-e4m3-mxfp4",)
"""What can be written: FP8 dense weights and MXFP4 experts, as released."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion wrote, or a dry run would write.

    Attributes:
        path: The output file; the first of several.
        paths: All output files.
        n_bytes: Size of the output.
        n_bytes_payload: Bytes of tensor data in it, without headers and padding.
        n_bytes_header: Bytes before the data sections.
        n_bytes_resumed: Bytes of tensor data that an interrupted conversion had written.
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
    paths: Sequence[Path]
    n_bytes: int
    n_bytes_payload: int
    n_bytes_header: int
    n_bytes_resumed: int
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
        """Whether the disk had room for the output."""
        return self.n_bytes <= self.n_bytes_free


def convert(
    checkpoint: str | os.PathLike[str],
    outfile: str | os.PathLike[str],
    *,
    outtype: str = OUTTYPES[0],
    n_threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    resume: bool = False,
    name: str | None = None,
    chat_template: str | None = None,
    max_file_bytes: int | None = None,
    draft: bool = False,
) -> ConvertResult:
    """Convert a DeepSeek-V4 checkpoint in hub form into a native-dialect GGUF file.

    FP8 and FP4 codes and their scales are moved, never recomputed; the same input gives the same bytes.
    Memory stays at a few pieces of 4 MiB per thread. The file appears under its name when it is complete;
    an existing file is replaced at that moment.

    Until then it is called ``NAME.partial``, and ``NAME.partial.journal`` says how far it got. A conversion that
    ends early keeps both, once there are some 256 MiB to keep; a fault of the checkpoint removes them.

    Args:
        checkpoint: Folder with ``config.json``, the safetensors shards and, for text, the tokenizer files.
        outfile: The file to write.
        outtype: One of ``OUTTYPES``.
        n_threads: Worker threads; by default one per core this process may use, and at least 4.
        progress: Called as ``progress(bytes_done, bytes_total, tensor_name)`` after each piece; returning
            False cancels.
        dry_run: Check everything and compute all sizes, but write nothing.
        resume: Go on where an interrupted conversion of the same checkpoint to the same file stopped, if there is
            one. The result is the same file.
        name: ``general.name``; by default made from the folder's name.
        chat_template: Template text; by default upstream's for this generation of the model.
        max_file_bytes: Split the output into files of at most this size, named ``STEM-00001-of-00009.gguf`` and so
            on, of which the first opens the model. A tensor that is larger gets a file to itself.
        draft: Write the checkpoint's draft model for speculative decoding instead of the model: MTP of the preview,
            DSpark of 0731.

    Raises:
        ArgumentError: An argument is out of range or differs from the interrupted conversion's, or ``outfile``
            cannot be the name of a regular file.
        ModelNotFoundError: The checkpoint folder, or the folder of ``outfile``, does not exist.
        MissingShardError: A file of the checkpoint is absent.
        MissingScaleError: A quantised weight has no scale.
        TileShapeError: A scale has another shape than the tiles need.
        CheckpointError: The checkpoint is malformed, cannot be converted without loss, or changed since the
            conversion began.
        UnsupportedModelError: It is not a DeepSeek-V4 checkpoint.
        DiskFullError: There is not enough space.
        CancelledError: ``progress`` returned False.
        ModelFileError: Another I/O error.
        ConvertError: Another process is writing the same file, or the interrupted conversion cannot go on.
    """
    if outtype not in OUTTYPES:
        raise ArgumentError(
            "unknown output type", key="outtype", found=repr(outtype), expected=" or ".join(OUTTYPES)
        )
    n_threads = default_n_threads() if n_threads is None else n_threads
    if not 1 <= n_threads <= 1024:
        raise ArgumentError(
            "cannot use so many threads", key="n_threads", found=n_threads, expected="1 to 1024"
        )
    if max_file_bytes is not None and max_file_bytes < 1:
        raise ArgumentError(
            "cannot write files so small", key="max_file_bytes", found=max_file_bytes, expected="at least 1"
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
        if draft:
            plan = make_draft_plan(source, name=name, max_file_bytes=max_file_bytes)
        else:
            plan = make_plan(source, name=name, template=chat_template, max_file_bytes=max_file_bytes)
        check_fp8_scales(source, plan.specs)
        paths = [check_output_path(p) for p in output_paths(path, len(plan.files))]
        n_bytes_free = _free_bytes(paths)
        n_bytes_resumed, duration_s = 0, 0.0
        if not dry_run:
            if plan.n_bytes > n_bytes_free:
                raise not_enough_space(paths[0], plan.n_bytes, n_bytes_free)
            options = {
                "model-name": name,
                "chat-template-file": chat_template,
                "split-max-size": max_file_bytes,
                "draft": draft,
            }
            start_s = time.monotonic()
            with Journal(journal_path(path)) as journal:
                identity = identify(source, plan, paths, options)
                if not (resume and journal.resume(identity)):
                    journal.begin(identity)
                n_bytes_resumed = _write(source, plan, paths, journal, identity, n_threads, progress)
            duration_s = time.monotonic() - start_s
    types = [(spec.file_type.name, spec.n_bytes) for spec in plan.specs]
    n_bytes_by_type: Counter[str] = Counter()
    for type_name, n_bytes in types:
        n_bytes_by_type[type_name] += n_bytes
    return ConvertResult(
        path=paths[0],
        paths=paths,
        n_bytes=plan.n_bytes,
        n_bytes_payload=plan.n_bytes_payload,
        n_bytes_header=plan.n_bytes_header,
        n_bytes_resumed=n_bytes_resumed,
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


def _write(
    source: Checkpoint,
    plan: Plan,
    paths: Sequence[Path],
    journal: Journal,
    identity: Identity,
    n_threads: int,
    progress: Progress | None,
) -> int:
    """Write what is not there yet; return the bytes that were."""
    from .repack import tensor_jobs  # needs the compiled codecs, which a dry run does without

    with Output(plan.files, paths, journal) as out:
        n_bytes_done = out.n_bytes_done
        pool = Pool()
        todo = list(zip(plan.infos, plan.specs, strict=True))[journal.n_done :]
        write_tensors(
            out,
            ((info, tensor_jobs(source, spec, pool)) for info, spec in todo),
            n_threads=n_threads,
            n_bytes_total=plan.n_bytes_payload,
            n_bytes_done=n_bytes_done,
            progress=progress,
            pool=pool,
        )
        _check_unchanged(source, identity)
        out.commit()
    return n_bytes_done


def _check_unchanged(source: Checkpoint, identity: Identity) -> None:
    for shard in source.shards:
        if source.stamp(shard) != tuple(identity.shards[shard.name][:2]):
            raise CheckpointError(
                "the checkpoint changed while it was converted",
                path=shard,
                found="a shard that was written to",
                expected="the same shard",
                hint="Convert again when it is complete",
            )


def not_enough_space(path: Path, n_bytes: int, n_bytes_free: int) -> DiskFullError:
    """Return the error for a file that will not fit."""
    return DiskFullError(
        "there is not enough space for the output file",
        path=path,
        found=f"{n_bytes_free:,} bytes free",
        expected=f"{n_bytes:,}",
        hint="Free some space, or write to another disk; nothing was written",
    )


def _free_bytes(paths: Sequence[Path]) -> int:
    free = shutil.disk_usage(paths[0].parent).free
    # what an interrupted conversion to the same name left behind is used or overwritten
    for partial in map(partial_path, paths):
        if partial.exists():
            found = partial.stat()
            free += min(found.st_size, getattr(found, "st_blocks", 1 << 62) * 512)
    return free


MIN_THREADS: Final = 4
"""On few cores more threads than those: most of their time goes to waiting for the disk."""


def default_n_threads() -> int:
    """Return the number of worker threads by default."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n_cores, MIN_THREADS)
