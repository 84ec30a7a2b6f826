"""The command ``pyllama-dsv4 verify``: options, progress and the report; the work is ``pyllama_dsv4.verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pyllama_dsv4.verify import VerifyReport
from pyllama_dsv4.verify import verify as verify_file

from .exit_codes import ExitCode
from .help import Command, option
from .progress import byte_progress, threads_option
from .terminal import Ui, clean

__all__ = ["verify"]

CHECKS = "What to compare with"
OUTPUT = "Output"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 verify flash.gguf",
        "pyllama-dsv4 verify flash.gguf --against DeepSeek-V4-Flash",
        "pyllama-dsv4 verify flash.gguf --manifest flash.sums.json",
        "pyllama-dsv4 verify copy.gguf --check-manifest flash.sums.json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    section=CHECKS,
    is_brief=True,
    has_env=False,
    help="Compare every tensor with this checkpoint, bit for bit, both ways.",
)
@option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="SUMS",
    section=CHECKS,
    is_brief=True,
    has_env=False,
    help="Write the SHA-256 of every tensor to this file, if nothing is wrong.",
)
@option(
    "--check-manifest",
    type=click.Path(path_type=Path),
    metavar="SUMS",
    section=CHECKS,
    is_brief=True,
    has_env=False,
    help="Compare every tensor with such a file; needs no checkpoint.",
)
@threads_option(section=OUTPUT)
@option("--json", "as_json", is_flag=True, section=OUTPUT, has_env=False, help="Print one JSON object.")
@option("-q", "--quiet", is_flag=True, section=OUTPUT, help="No progress; only what was found.")
def verify(
    file: Path,
    against: Path | None,
    manifest: Path | None,
    check_manifest: Path | None,
    n_threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check every byte of a GGUF file.

    FILE is a GGUF file, or the first shard of a split model. Structure: sizes, padding, keys, names, shards. Values:
    scales and codes that are no numbers, scales that differ within a tile, experts that do not exist, holes
    of interrupted downloads. What is wrong is named by tensor and byte; the exit code is then 1. A file whose
    header cannot be read, or that is missing, ends with exit code 3.
    """
    ui = Ui(is_quiet=quiet)
    with byte_progress(ui, is_shown=not quiet) as progress:
        report = verify_file(
            file,
            against=against,
            manifest=manifest,
            check_manifest=check_manifest,
            n_threads=n_threads,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report, manifest, is_quiet=quiet)
    return ExitCode.OK if report.ok else ExitCode.FAILED


def _print(report: VerifyReport, manifest: Path | None, *, is_quiet: bool) -> None:
    for finding in report.findings:
        click.echo(clean(str(finding)))
    n_errors = sum(finding.severity == "error" for finding in report.findings)
    n_warnings = len(report.findings) - n_errors
    if not is_quiet:
        for note in report.notes:
            click.echo(f"note: {clean(note)}")
        speed = report.n_bytes / 1e9 / max(report.duration_s, 1e-9)
        click.echo(
            f"read {report.n_bytes:,} bytes of {report.n_tensors:,} tensors"
            f" in {report.duration_s:.1f} s, {speed:.2f} GB/s"
        )
        if report.n_bytes_checkpoint:
            click.echo(
                f"compared {report.n_tensors_compared:,} tensors with {report.n_bytes_checkpoint:,} bytes"
                " of the checkpoint"
            )
        if manifest is not None:
            written = (
                f"wrote {clean(str(manifest))}" if report.ok else "no sums were written: something is wrong"
            )
            click.echo(written)
    path = clean(report.path)
    if report.ok:
        click.echo(f"{path}: sound" + (f", {n_warnings} warnings" if n_warnings else ""))
    else:
        click.echo(f"{path}: {n_errors} errors" + (f", {n_warnings} warnings" if n_warnings else ""))
