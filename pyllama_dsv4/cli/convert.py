"""The command ``pyllama-dsv4 convert``: options, progress and the report; the work is ``pyllama_dsv4.convert``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from pyllama_dsv4.convert import OUTTYPES, ConvertResult
from pyllama_dsv4.convert import convert as convert_checkpoint
from pyllama_dsv4.convert.run import not_enough_space

from .help import Command, option
from .terminal import Ui, clean

__all__ = ["convert"]

CONVERSION: Final = "Conversion"
OUTPUT: Final = "Output"

LINE_INTERVAL_S: Final = 5.0
"""Seconds between progress lines when stderr is not a terminal."""

Report = Callable[[int, int, str], None]


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf",
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf --dry-run",
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
    verbose: bool,
    quiet: bool,
) -> None:
    """Convert a DeepSeek-V4 checkpoint to a native GGUF file.

    CHECKPOINT is a folder as downloaded from the hub: config.json, safetensors shards with their index, and
    the tokenizer files. FP8 and FP4 weights are copied code by code, never recomputed. Until it is complete,
    the file is called FILE.partial.
    """
    ui = Ui(is_quiet=quiet)
    template = None if chat_template_file is None else chat_template_file.read_text(encoding="utf-8")
    with _progress(ui, is_shown=not (quiet or dry_run)) as report:
        result = convert_checkpoint(
            checkpoint,
            outfile,
            outtype=outtype,
            n_threads=n_threads,
            progress=report,
            dry_run=dry_run,
            name=model_name,
            chat_template=template,
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
def _progress(ui: Ui, *, is_shown: bool) -> Iterator[Report | None]:
    """Give a callback that shows progress on stderr: a bar on a terminal, a line now and then elsewhere."""
    if not is_shown:
        yield None
    elif ui.is_animated:
        with _bar(ui) as report:
            yield report
    else:
        yield _Lines(ui)


@contextmanager
def _bar(ui: Ui) -> Iterator[Report]:
    from rich import progress as rich

    columns = (
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}", markup=False),
    )
    with rich.Progress(*columns, console=ui.console()) as progress:
        task = progress.add_task("")

        def report(n_done: int, n_total: int, tensor: str) -> None:
            progress.update(task, completed=n_done, total=n_total, description=tensor)

        yield report


class _Lines:
    """Progress for logs and pipes."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self._start_s = self._last_s = time.monotonic()

    def __call__(self, n_done: int, n_total: int, tensor: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < LINE_INTERVAL_S and n_done < n_total:
            return
        self._last_s = now_s
        per_s = n_done / max(now_s - self._start_s, 1e-9)
        left_s = round((n_total - n_done) / per_s)
        self._ui.note(
            f"{100 * n_done / n_total:5.1f} %  {n_done / 1e9:.2f} of {n_total / 1e9:.2f} GB"
            f"  {per_s / 1e9:.2f} GB/s  {left_s // 60}:{left_s % 60:02d} left  {tensor}"
        )


def _print_tensors(result: ConvertResult) -> None:
    for spec, info in zip(result.plan.specs, result.plan.infos, strict=True):
        dims = " x ".join(str(dim) for dim in info.dims)
        click.echo(
            f"{info.offset:>16,} {info.n_bytes:>14,}  {spec.file_type.name:<12}  {dims:<18}  {info.name}"
        )


def _print_result(result: ConvertResult) -> None:
    verb = "would write" if result.is_dry_run else "wrote"
    click.echo(f"{verb} {clean(str(result.path))}")
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
        speed = result.n_bytes / 1e9 / max(result.duration_s, 1e-9)
        rows.append(("time", f"{result.duration_s:.1f} s, {speed:.2f} GB/s"))
    for label, text in rows:
        click.echo(f"  {label:<16}{text}")
