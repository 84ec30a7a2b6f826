"""The command ``pyllama-dsv4 convert``: options, progress and the report; the work is ``pyllama_dsv4.convert``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from pyllama_dsv4.convert import OUTTYPES, ConvertResult, write_recipe
from pyllama_dsv4.convert import convert as convert_checkpoint
from pyllama_dsv4.convert.output import journal_path
from pyllama_dsv4.convert.recipe import is_current
from pyllama_dsv4.convert.run import default_n_threads, not_enough_space
from pyllama_dsv4.convert.writer import PARTIAL_SUFFIX

from .exit_codes import ExitCode
from .help import Command, option
from .progress import byte_progress, print_rows, quiet_option, size, threads_option
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
@threads_option("--torch-threads", section=CONVERSION, default_text="all cores, at least 4", is_brief=True)
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
@option(
    "--draft",
    is_flag=True,
    section=CONVERSION,
    has_env=False,
    help="Write the checkpoint's draft model for speculative decoding (MTP or DSpark) instead of the model.",
)
@option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="R",
    default_text="none",
    section=CONVERSION,
    has_env=False,
    help="Also write R, with which the command restore rebuilds the checkpoint's shards from FILE. Reads the"
    " checkpoint once more.",
)
@option(
    "--tensor",
    metavar="NAME",
    section=CONVERSION,
    has_env=False,
    help="Convert only this tensor, in memory, and back; compare with the checkpoint, and with FILE if given.",
)
@option("-v", "--verbose", is_flag=True, section=OUTPUT, help="List every tensor.")
@quiet_option
@click.pass_context
def convert(
    ctx: click.Context,
    checkpoint: Path,
    outfile: Path | None,
    outtype: str,
    n_threads: int | None,
    model_name: str | None,
    chat_template_file: Path | None,
    dry_run: bool,
    resume: bool,
    split_max_size: int | None,
    draft: bool,
    recipe: Path | None,
    tensor: str | None,
    verbose: bool,
    quiet: bool,
) -> ExitCode:
    """Convert a DeepSeek-V4 checkpoint to a native GGUF file.

    CHECKPOINT is a folder as downloaded from the hub: config.json, safetensors shards with their index, and
    the tokenizer files. FP8 and FP4 weights are copied code by code, never recomputed. Until it is complete,
    the file is called FILE.partial; --resume goes on with one that was interrupted, by whatever.
    """
    ui = Ui(is_quiet=quiet)
    if tensor is not None:
        return _compare(ui, checkpoint, tensor, outfile)
    if outfile is None:
        raise click.UsageError("Missing option '--outfile'.", ctx=ctx)
    template = None if chat_template_file is None else chat_template_file.read_text(encoding="utf-8")
    if recipe is not None and not dry_run and not (resume and is_current(recipe, checkpoint)):
        _write_recipe(ui, checkpoint, recipe, n_threads, is_shown=not quiet)
    with _saying_what_is_kept(ui, outfile), byte_progress(ui, is_shown=not (quiet or dry_run)) as report:
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
            draft=draft,
        )
    for note in result.notes:
        ui.note(f"note: {note}")
    if not quiet:
        if verbose:
            _print_tensors(result)
        _print_result(result)
    if dry_run and not result.fits:
        raise not_enough_space(result.path, result.n_bytes, result.n_bytes_free)
    return ExitCode.OK


def _write_recipe(ui: Ui, checkpoint: Path, path: Path, n_threads: int | None, *, is_shown: bool) -> None:
    ui.note("hashing the checkpoint for the recipe")
    with byte_progress(ui, is_shown=is_shown) as report:
        recipe = write_recipe(checkpoint, path, n_threads=n_threads or default_n_threads(), progress=report)
    if is_shown:
        click.echo(f"wrote {clean(str(recipe.path))}")
        click.echo(
            f"  {'recipe':<16}{recipe.path.stat().st_size:,} bytes, {len(recipe.shards)} shards,"
            f" {len(recipe.files)} other files"
        )


def _compare(ui: Ui, checkpoint: Path, name: str, file: Path | None) -> ExitCode:
    from pyllama_dsv4.convert import compare_tensor

    with ui.waiting(f"converting {name}"):
        found = compare_tensor(checkpoint, name, file=file)
    spec = found.spec
    click.echo(spec.native)
    rows = [
        ("type", f"{spec.file_type.name}, {' x '.join(map(str, spec.dims))}, {spec.n_bytes:,} bytes"),
        ("sha256", found.sha256),
        (
            "checkpoint",
            found.source_difference or f"{found.n_sources} tensors, identical when converted back",
        ),
    ]
    if found.file is not None:
        rows.append(("file", found.file_difference or "identical"))
    print_rows(rows)
    return ExitCode.OK if found.is_equal else ExitCode.FAILED


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
    print_rows(rows)
