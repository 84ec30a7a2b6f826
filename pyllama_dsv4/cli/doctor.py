"""The command ``pyllama-dsv4 doctor``: what is wrong here, and what to do; the checks are ``pyllama_dsv4.doctor``'s."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from .exit_codes import ExitCode, exit_code
from .help import Command, option
from .terminal import clean, folded_row, use_color

if TYPE_CHECKING:
    from pyllama_dsv4.doctor import Finding

__all__ = ["doctor"]

_MARKS: Final = {"ok": ("ok", "\x1b[32m"), "warning": ("!!", "\x1b[33m"), "failure": ("XX", "\x1b[31m")}


@click.command(
    cls=Command,
    examples=("pyllama-dsv4 doctor", "pyllama-dsv4 doctor flash.gguf", "pyllama-dsv4 doctor --json"),
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@option(
    "--json",
    "as_json",
    is_flag=True,
    section="Output",
    is_brief=True,
    has_env=False,
    help="Print one JSON object.",
)
@option("-q", "--quiet", is_flag=True, section="Output", has_env=False, help="Show only what is wrong.")
def doctor(file: Path | None, as_json: bool, quiet: bool) -> int:
    """Check this machine and installation, and say what to do.

    Looks at the build, CPU, memory, folders, GPUs and, with FILE, at a model and whether it fits. ok is fine, !! works
    but could be better, XX is broken. The exit code is 0 unless something is broken: then 3 for FILE, 4 for memory, 1
    for the rest.
    """
    from pyllama_dsv4.doctor import doctor as run

    is_color = use_color("auto", sys.stdout)

    def show(finding: Finding) -> None:
        if not as_json and not (quiet and finding.status == "ok"):
            click.echo(_line(finding, is_color), color=True)

    found = run(file, on_finding=show)
    broken = [finding for finding in found if finding.status == "failure"]
    if as_json:
        rows = [{"name": f.name, "status": f.status, "text": f.text, "fix": f.fix} for f in found]
        click.echo(json.dumps({"is_well": not broken, "findings": rows}, indent=2))
    if not broken:
        return ExitCode.OK
    return exit_code(broken[0].error) if broken[0].error is not None else ExitCode.FAILED


def _line(finding: Finding, is_color: bool) -> str:
    mark, color = _MARKS[finding.status]
    shown = f"{color}{mark}\x1b[0m" if is_color else mark
    width = len(mark) + 15
    text = folded_row(f"{shown}  {finding.name:<13}", clean(finding.text), sys.stdout, indent=width)
    if not finding.fix:
        return text
    return text + "\n" + folded_row(f"{'':{width}}-> ", clean(finding.fix), sys.stdout)
