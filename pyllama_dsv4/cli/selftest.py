"""The command ``pyllama-dsv4 selftest``: does this build compute what it should, on this machine and file?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .exit_codes import ExitCode
from .help import Command, option
from .terminal import Ui, clean, folded_row

if TYPE_CHECKING:
    from pyllama_dsv4.selftest import Check

__all__ = ["selftest"]


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 selftest",
        "pyllama-dsv4 selftest flash.gguf -t 16",
        "pyllama-dsv4 selftest --json",
    ),
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@option(
    "-t", "--threads", "n_threads", type=click.IntRange(1), metavar="N", default=1, section="Checks",
    is_brief=True, help="CPU threads; a large file needs all cores.",
)  # fmt: skip
@option(
    "--json",
    "is_json",
    is_flag=True,
    section="Checks",
    is_brief=True,
    has_env=False,
    help="The report as JSON.",
)
def selftest(file: Path | None, n_threads: int, is_json: bool) -> int:
    """Check that this build computes what it should.

    Codecs and rounding are held against their definitions. A model is held against itself: splits of a prompt, saved
    states, several sequences, cache types and levels of rounding must give the logits of the plain run. Without FILE
    a tiny random model is made and also compared with the same weights in F32, and the demo model is examined. The exit
    code is 1 if a check fails.
    """
    from pyllama_dsv4.selftest import selftest as run

    def show(check: Check) -> None:
        if not is_json:
            head, text = line(check)
            click.echo(folded_row(head, text, sys.stdout))

    checks = run(file, n_threads=n_threads, on_check=show)
    n_failed = sum(not check.passed for check in checks)
    if is_json:
        report = {
            "passed": n_failed == 0,
            "checks": [
                {
                    "name": c.name,
                    "passed": c.passed,
                    "numbers": c.numbers,
                    "failures": c.failures,
                    "seconds": round(c.seconds, 3),
                }
                for c in checks
            ],
        }
        click.echo(json.dumps(report))
    else:
        Ui().say(f"{len(checks)} checks, {n_failed} failed" if n_failed else f"{len(checks)} checks passed")
    return ExitCode.FAILED if n_failed else ExitCode.OK


def line(check: Check) -> tuple[str, str]:
    """Return one check for people: its verdict and name, and what was found."""
    verdict = "pass" if check.passed else "FAIL"
    if check.failures:
        facts = "; ".join(check.failures)
    else:
        facts = ", ".join(
            f"{name} {value:g}" if value >= 1 or value == 0 else f"{name} {value:.1e}"
            for name, value in check.numbers.items()
            if not name.endswith("_max")
        )
    return f"{verdict}  {check.name:<15} ", f"{clean(facts)}  ({check.seconds:.1f} s)"
