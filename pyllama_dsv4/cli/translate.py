"""The command ``pyllama-dsv4 translate``: options, progress and the report; the work is ``pyllama_dsv4.translate``."""

from __future__ import annotations

from pathlib import Path

import click

from pyllama_dsv4.translate import DENSE_TYPES, DIALECTS, Dense, Target, TranslateResult
from pyllama_dsv4.translate import translate as translate_file

from .help import Command, option
from .progress import byte_progress, print_rows, quiet_option, threads_option
from .terminal import Ui, clean

__all__ = ["translate"]

TRANSLATION = "Translation"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 translate flash.gguf flash-q8.gguf --to upstream --dense q8_0",
        "pyllama-dsv4 translate flash-q8.gguf native.gguf --to native",
    ),
)
@click.argument("infile", metavar="IN", type=click.Path(path_type=Path))
@click.argument("outfile", metavar="OUT", type=click.Path(path_type=Path))
@option(
    "--to",
    "to",
    type=click.Choice(DIALECTS),
    required=True,
    metavar="DIALECT",
    section=TRANSLATION,
    is_brief=True,
    has_env=False,
    help="upstream: names and keys of stock llama.cpp. native: those of native files.",
)
@option(
    "--dense",
    type=click.Choice(DENSE_TYPES),
    metavar="TYPE",
    default_text="keep FP8",
    section=TRANSLATION,
    is_brief=True,
    has_env=False,
    help="Re-encode the FP8 weights for engines without FP8: q8_0 (rounds) or bf16 (exact, larger). Experts"
    " stay MXFP4.",
)
@threads_option(section=TRANSLATION)
@option(
    "--dry-run",
    is_flag=True,
    section=TRANSLATION,
    has_env=False,
    help="Check everything and show what would change; write nothing.",
)
@quiet_option
def translate(
    infile: Path,
    outfile: Path,
    to: Target,
    dense: Dense | None,
    n_threads: int | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Rewrite a DeepSeek-V4 file in another dialect.

    IN is a GGUF file of either dialect, or the first shard of a split model; OUT is one file. Names and keys change,
    weights are copied byte for byte unless --dense says otherwise. Translating back gives the original's bytes
    again, except after --dense. Until it is complete, the file is called OUT.partial.
    """
    ui = Ui(is_quiet=quiet)
    with byte_progress(ui, is_shown=not (quiet or dry_run)) as progress:
        result = translate_file(
            infile, outfile, to=to, dense=dense, n_threads=n_threads, progress=progress, dry_run=dry_run
        )
    for note in result.notes:
        ui.note(f"note: {note}")
    if not quiet:
        _print(result)


def _print(result: TranslateResult) -> None:
    click.echo(f"{'would write' if result.is_dry_run else 'wrote'} {clean(str(result.path))}")
    rows = [
        ("size", f"{result.n_bytes:,} bytes ({result.n_bytes / 2**30:.2f} GiB)"),
        (
            "tensors",
            f"{result.n_tensors:,}: {result.n_renamed:,} renamed, {result.n_reencoded:,} re-encoded, "
            f"{result.n_tensors - result.n_reencoded:,} copied",
        ),
        ("keys added", ", ".join(result.added) or "none"),
        ("keys replaced", ", ".join(result.replaced) or "none"),
        ("keys removed", ", ".join(result.removed) or "none"),
    ]
    if not result.is_dry_run:
        rows.append(
            (
                "time",
                f"{result.duration_s:.1f} s, {result.n_bytes / 1e9 / max(result.duration_s, 1e-9):.2f} GB/s",
            )
        )
    print_rows(rows)
