"""The command ``pyllama-dsv4 convert``: options, progress and the report; the work is ``pyllama_dsv4.convert``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from pyllama_dsv4.convert import OUTTYPES, ConvertResult
from pyllama_dsv4.convert import convert as convert_checkpoint
from pyllama_dsv4.convert.output import journal_path
from pyllama_dsv4.convert.run import not_enough_space
from pyllama_dsv4.convert.writer import PARTIAL_SUFFIX

from .help import Command, option
from .progress import progress, size
from .terminal import Ui, clean

__all__ = ["convert"]

CONVERSION: Final = "Conversion"
OUTPUT: Final = "Output"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf",
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf --dry-run",
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf --resume",
    ),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@option(
    "--outfile",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    section=CONVERSION,
    is_brief=True,
    has_env=False,
    help="The GGUF file to write.",
)
@option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default=OUTTYPES[0],
    metavar="TYPE",
    section=CONVERSION,
    help="FP8 dense weights and MXFP4 experts, as released; there is no other yet.",
)
@option(
    "-t",
    "--threads",
    "--torch-threads",
    "n_threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    default_text="all cores",
    section=CONVERSION,
    is_brief=True,
    help="Worker threads.",
)
@option(
    "--model-name",
    metavar="TEXT",
    default_text="from the folder",
    section=CONVERSION,
    has_env=False,
    help="Name in the file's metadata.",
)
@option(
    "--chat-template-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    default_text="upstream's for this model",
    section=CONVERSION,
    has_env=False,
    help="Jinja template to write.",
)
@option(
    "--dry-run",
    is_flag=True,
    section=CONVERSION,
    is_brief=True,
    has_env=False,
    help="Check everything and print the plan; write nothing.",
)
@option(
    "--resume",
    is_flag=True,
    section=CONVERSION,
    is_brief=True,
    has_env=False,
    help="Go on with an interrupted conversion to the same FILE, if there is one.",
)
@option(
    "--split-max-size",
    callback=size,
    metavar="N(K|M|G)",
    default_text="one file",
    section=CONVERSION,
    has_env=False,
    help="Split the output into files of at most this size (powers of 1000).",
)
@option("-v", "--verbose", is_flag=True, section=OUTPUT, help="List every tensor.")
@option("-q", "--quiet", is_flag=True, section=OUTPUT, help="No progress and no report, only errors.")
def convert(
    checkpoint: Path,
    outfile: Path,
    outtype: str,
    n_threads: int | None,
    model_name: str | None,
    chat_template_file: Path | None,
    dry_run: bool,
    resume: bool,
    split_max_size: int | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Convert a DeepSeek-V4 checkpoint to a native GGUF file.

    CHECKPOINT is a folder as downloaded from the hub: config.json, safetensors shards with their index, and
    the tokenizer files. FP8 and FP4 weights are copied code by code, never recomputed. Until it is complete,
    the file is called FILE.partial; --resume goes on with one that was interrupted, by whatever.
    """
    ui = Ui(is_quiet=quiet)
    template = None if chat_template_file is None else chat_template_file.read_text(encoding="utf-8")
    with _saying_what_is_kept(ui, outfile), progress(ui, is_shown=not (quiet or dry_run)) as report:
        result = convert_checkpoint(
            checkpoint,
            outfile,
            outtype=outtype,
            n_threads=n_threads,
            progress=report,
            dry_run=dry_run,
            resume=resume,
            name=model_name,
            chat_template=template,
            max_file_bytes=split_max_size,
        )
    for note in result.notes:
        ui.note(f"note: {note}")
    if not quiet:
        if verbose:
            _print_tensors(result)
        _print_result(result)
    if dry_run and not result.fits:
        raise not_enough_space(result.path, result.n_bytes, result.n_bytes_free)


@contextmanager
def _saying_what_is_kept(ui: Ui, outfile: Path) -> Iterator[None]:
    """After a conversion that ended early, say that it can be resumed if it can."""
    try:
        yield
    except BaseException:
        journal = journal_path(Path(os.path.realpath(outfile)))
        if journal.exists():
            ui.note(
                f"What was written is kept beside {outfile}: convert again with --resume to go on, or delete"
                f" the files whose names contain {PARTIAL_SUFFIX}"
            )
        raise


def _print_tensors(result: ConvertResult) -> None:
    for path, file in zip(result.paths, result.plan.files, strict=True):
        if len(result.paths) > 1:
            click.echo(f"{clean(path.name)}, {file.n_bytes:,} bytes:")
        for spec, info in zip(file.specs, file.infos, strict=True):
            dims = " x ".join(str(dim) for dim in info.dims)
            click.echo(
                f"{info.offset:>16,} {info.n_bytes:>14,}  {spec.file_type.name:<12}  {dims:<18}  {info.name}"
            )


def _print_result(result: ConvertResult) -> None:
    verb = "would write" if result.is_dry_run else "wrote"
    n_more = len(result.paths) - 1
    click.echo(f"{verb} {clean(str(result.path))}" + (f" and {n_more} more files" if n_more else ""))
    rows = [
        ("size", f"{result.n_bytes:,} bytes ({result.n_bytes / 2**30:.2f} GiB)"),
        ("header", f"{result.n_bytes_header:,} bytes, {result.n_keys} keys"),
        ("tensors", f"{result.n_tensors}, {result.n_bytes_payload:,} bytes"),
    ]
    rows += [
        (f"  {name}", f"{n}, {result.n_bytes_by_type[name]:,} bytes")
        for name, n in sorted(result.n_tensors_by_type.items())
    ]
    if result.is_dry_run:
        rows.append(("free space", f"{result.n_bytes_free:,} bytes"))
    else:
        if result.n_bytes_resumed:
            rows.append(("resumed after", f"{result.n_bytes_resumed:,} bytes"))
        speed = (result.n_bytes_payload - result.n_bytes_resumed) / 1e9 / max(result.duration_s, 1e-9)
        rows.append(("time", f"{result.duration_s:.1f} s, {speed:.2f} GB/s"))
    for label, text in rows:
        click.echo(f"  {label:<16}{text}")
