"""The command ``pyllama-dsv4 quantize``: options, progress and the report; the work is ``pyllama_dsv4.quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from .help import Command, option
from .progress import byte_progress, quiet_option, threads_option
from .terminal import Ui, clean

__all__ = ["quantize"]

QUANTIZING: Final = "Quantising"
OUTPUT: Final = "Output"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 quantize flash.gguf flash-q4.gguf Q4_K_M",
        "pyllama-dsv4 quantize flash-f16.gguf flash-native.gguf F8_E4M3_MXFP4 --dialect native",
        "pyllama-dsv4 quantize flash.gguf small.gguf IQ2_XXS --imatrix imatrix.gguf --dry-run",
    ),
)
@click.argument("infile", metavar="IN", type=click.Path(path_type=Path))
@click.argument("outfile", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("type_name", metavar="TYPE")
@option(
    "--dialect", type=click.Choice(("keep", "native", "upstream")), metavar="NAME", default="keep",
    section=QUANTIZING, has_env=False, help="Names and keys of a DeepSeek-V4 output: native, upstream, or keep.",
)  # fmt: skip
@threads_option(section=QUANTIZING, is_brief=True)
@option(
    "--imatrix", type=click.Path(path_type=Path), metavar="FILE", section=QUANTIZING, has_env=False,
    help="Importance matrix (GGUF); types below three bits need one.",
)  # fmt: skip
@option(
    "--allow-requantize", is_flag=True, section=QUANTIZING, has_env=False,
    help="Take tensors that are quantised already; those of the released checkpoint always are.",
)  # fmt: skip
@option(
    "--dry-run", is_flag=True, section=QUANTIZING, is_brief=True, has_env=False,
    help="Check everything and print the sizes; write nothing.",
)  # fmt: skip
@option("-v", "--verbose", is_flag=True, section=OUTPUT, help="List every tensor.")
@quiet_option
def quantize(
    infile: Path,
    outfile: Path,
    type_name: str,
    imatrix: Path | None,
    allow_requantize: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Write a model in another type.

    IN is a GGUF file, or the first shard of a split model; TYPE one of llama.cpp's names (Q4_K_M, Q8_0, IQ4_XS, BF16,
    ...), or F8_E4M3_MXFP4: dense weights FP8, experts MXFP4, as in the native file. A wrong TYPE lists all. Until it is
    complete, the output is called OUT.partial.
    """
    from pyllama_dsv4.convert.run import not_enough_space
    from pyllama_dsv4.quantize import quantize as quantize_file

    ui = Ui(is_quiet=quiet)
    with byte_progress(ui, is_shown=not (quiet or dry_run)) as report:
        result = quantize_file(
            infile,
            outfile,
            type_name,
            imatrix=imatrix,
            allow_requantize=allow_requantize or None,
            progress=report,
            dry_run=dry_run,
            **values,
        )
    if not quiet:
        if verbose:
            for tensor in result.tensors:
                sizes = f"{tensor.n_bytes_in:>15,} {tensor.n_bytes_out:>15,}"
                click.echo(f"{sizes}  {tensor.type_in:<12}  {tensor.type_out:<12}  {clean(tensor.name)}")
        click.echo(f"{'would write' if dry_run else 'wrote'} {clean(str(result.path))}")
        for label, text in _rows(result):
            click.echo(f"  {label:<16}{text}")
    if dry_run and result.needs_imatrix:
        ui.note(f"note: {result.type} needs an importance matrix: give --imatrix")
    if dry_run and not result.fits:
        raise not_enough_space(result.path, result.n_bytes, result.n_bytes_free)


def _rows(result: Any) -> list[tuple[str, str]]:
    rows = [
        ("type", result.type),
        ("size", f"{result.n_bytes:,} bytes, {100 * result.n_bytes / result.n_bytes_in:.1f} % of the input"),
        ("tensors", f"{len(result.tensors):,}"),
    ]
    if result.dialect is not None:
        kept = (
            "as the input"
            if result.dialect == result.input_dialect
            else f"the input is {result.input_dialect}"
        )
        rows.insert(1, ("dialect", f"{result.dialect}, {kept}"))
    n_bytes = result.n_bytes_by_type
    rows += [
        (f"  {name}", f"{n:,}, {n_bytes[name]:,} bytes")
        for name, n in sorted(result.n_tensors_by_type.items())
    ]
    if result.is_dry_run:
        rows.append(("free space", f"{result.n_bytes_free:,} bytes"))
    else:
        speed = result.n_bytes_in / 1e9 / max(result.duration_s, 1e-9)
        rows.append(("time", f"{result.duration_s:.1f} s, {speed:.2f} GB/s of input"))
    return rows
