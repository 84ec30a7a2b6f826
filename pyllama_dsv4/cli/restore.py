"""The command ``pyllama-dsv4 restore``: rebuild a checkpoint from a file; the work is ``convert.rebuild``'s."""

from __future__ import annotations

from pathlib import Path

import click

from pyllama_dsv4.convert import RestoreResult
from pyllama_dsv4.convert import restore as restore_checkpoint

from .exit_codes import ExitCode
from .help import Command, option
from .progress import byte_progress, print_rows, quiet_option, threads_option
from .terminal import Ui, clean

__all__ = ["restore"]

N_NAMES = 3


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 convert DeepSeek-V4-Flash --outfile flash.gguf --recipe flash.recipe",
        "pyllama-dsv4 restore flash.gguf --recipe flash.recipe DeepSeek-V4-Flash-again",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@option(
    "--recipe",
    type=click.Path(path_type=Path),
    required=True,
    metavar="R",
    section="Restoring",
    is_brief=True,
    has_env=False,
    help="What convert --recipe wrote for the checkpoint.",
)
@option(
    "--draft",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default_text="none",
    section="Restoring",
    has_env=False,
    help="What convert --draft wrote: for the shards that hold the draft model.",
)
@threads_option(section="Restoring", default_text="all cores, at least 4", is_brief=True)
@quiet_option
def restore(
    file: Path, out: Path, recipe: Path, draft: Path | None, n_threads: int | None, quiet: bool
) -> ExitCode:
    """Rebuild a checkpoint's safetensors shards from a native GGUF file.

    FILE is what convert wrote, OUT the folder for the shards. A shard appears there only if its SHA-256 is the
    original's. Shards with tensors that no file holds (those of a draft model, without --draft) are named and
    not rebuilt; the exit code is 1 then.
    """
    ui = Ui(is_quiet=quiet)
    with byte_progress(ui, is_shown=not quiet) as report:
        result = restore_checkpoint(file, recipe, out, draft=draft, n_threads=n_threads, progress=report)
    for shard in result.left_out:
        names = ", ".join(shard.missing[:N_NAMES]) + (", ..." if len(shard.missing) > N_NAMES else "")
        ui.say(
            f"not rebuilt: {shard.name}: {len(shard.missing)} of its {shard.n_tensors} tensors are in no"
            f" file: {names}"
        )
    if not quiet:
        _print_result(result)
    return ExitCode.OK if result.is_complete else ExitCode.FAILED


def _print_result(result: RestoreResult) -> None:
    n_all = len(result.recipe.shards)
    click.echo(f"rebuilt {len(result.paths)} of {n_all} shards in {clean(str(result.folder))}")
    others = [file.name for file in result.recipe.files]
    speed = result.n_bytes / 1e9 / max(result.duration_s, 1e-9)
    print_rows(
        [
            ("identical", f"{len(result.paths)} shards, {result.n_bytes:,} bytes, by SHA-256"),
            ("not rebuilt", ", ".join(others) or "no other files"),
            ("time", f"{result.duration_s:.1f} s, {speed:.2f} GB/s"),
        ]
    )
