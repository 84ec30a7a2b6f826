"""The command ``pyllama-dsv4 plan``: memory and speed of a model before a load; ``pyllama_dsv4.plan`` in tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import click

from pyllama_dsv4.header import HeaderReport, check_header
from pyllama_dsv4.plan import CACHE_BYTES, Place, Plan, plan_model

from .answers import draft_options
from .common import LayerCount
from .exit_codes import ExitCode
from .help import Command, option
from .terminal import clean, folded_row

__all__ = ["plan"]

MODEL: Final = "Model and memory"
MACHINE: Final = "The machine"
GIB: Final = 1 << 30
GB: Final = 10**9
CONTEXTS: Final = (8192, 32768, 131072, 524288, 1048576)

_Rows = list[tuple[str, ...]]


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 plan flash.gguf",
        "pyllama-dsv4 plan flash.gguf -c 131072 -ctk q8_0",
        "pyllama-dsv4 plan flash.gguf --gpu 24 --gpu 24 --gpu-bandwidth 900",
        "pyllama-dsv4 plan flash.gguf --ram 192 --bandwidth 80 --json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "-c", "--ctx", "--ctx-size", "n_ctx", type=click.IntRange(1), metavar="N", default=8192, section=MODEL,
    is_brief=True, has_env=False, help="Tokens that prompt and answers may hold together.",
)  # fmt: skip
@option(
    "-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(1), metavar="N", default=512, section=MODEL,
    has_env=False, help="Tokens evaluated at once.",
)  # fmt: skip
@option(
    "-ctk", "--cache-type-k", "cache_type", type=click.Choice(tuple(CACHE_BYTES)), metavar="TYPE", default="f16",
    section=MODEL, has_env=False, help=f"Type of the KV cache: {', '.join(CACHE_BYTES)}.",
)  # fmt: skip
@option(
    "-fa", "--flash-attn", "flash_attn", type=click.Choice(("auto", "on", "off")), metavar="on|off|auto",
    default="auto", section=MODEL, has_env=False, help="Attention in one operation; off needs far more memory.",
)  # fmt: skip
@draft_options(MODEL, has_env=False)
@option(
    "--no-mmap", is_flag=True, section=MODEL, has_env=False,
    help="As for a load with --no-mmap or --mlock: all weights stay in memory.",
)  # fmt: skip
@option(
    "-ngl", "--n-gpu-layers", "n_gpu_layers", type=LayerCount(), metavar="N|auto|all", default="auto", section=MODEL,
    is_brief=True, has_env=False, help="Layers on GPUs; auto takes as many as fit.",
)  # fmt: skip
@option(
    "-ncmoe", "--n-cpu-moe", "n_cpu_moe", type=click.IntRange(0), metavar="N", default_text="as few as fit",
    section=MODEL, has_env=False, help="First layers whose experts stay in host memory.",
)  # fmt: skip
@option(
    "--gpu", "gpus", type=click.FloatRange(0, min_open=True), metavar="GIB", multiple=True, section=MACHINE,
    is_brief=True, has_env=False, help="Memory of a GPU; once for each.",
)  # fmt: skip
@option(
    "--ram", type=click.FloatRange(0, min_open=True), metavar="GIB", default_text="what is free here",
    section=MACHINE, is_brief=True, has_env=False, help="Host memory.",
)  # fmt: skip
@option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", default_text="measured",
    section=MACHINE, is_brief=True, has_env=False, help="What host memory is read at.",
)  # fmt: skip
@option(
    "--gpu-bandwidth", type=click.FloatRange(0, min_open=True), metavar="GB/S", default_text="no limit",
    section=MACHINE, has_env=False, help="What the memory of each GPU is read at.",
)  # fmt: skip
@option(
    "--disk", type=click.FloatRange(0, min_open=True), metavar="GB/S", default_text="no limit", section=MACHINE,
    has_env=False, help="What the disk is read at.",
)  # fmt: skip
@option(
    "--rpc", metavar="HOST:PORT,...", section=MACHINE, has_env=False,
    help="Workers on other machines, asked for their memory; they count as GPUs.",
)  # fmt: skip
@option("--json", "as_json", is_flag=True, section="Output", has_env=False, help="Print one JSON object.")
def plan(
    file: Path,
    n_gpu_layers: int | str,
    no_mmap: bool,
    gpus: tuple[float, ...],
    ram: float | None,
    bandwidth: float | None,
    gpu_bandwidth: float | None,
    disk: float | None,
    rpc: str | None,
    draft_model: Path | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Say what a model needs and how fast it can be, before loading it.

    FILE is a GGUF file, or the first shard of a split model. Only its header is read. The speed is a bound: the bytes
    that a token reads, divided by the bandwidth. Exit code 4 when the model does not fit.
    """
    report = check_header(file, any_architecture=True)
    options = {
        **values,
        "draft": draft_model,
        "is_mapped": not no_mmap,
        "gpu_bytes": [int(gpu * GIB) for gpu in gpus],
        "n_gpu_layers": None if n_gpu_layers == "auto" else n_gpu_layers,
        "host_bytes": None if ram is None else int(ram * GIB),
        "gpu_bandwidth": None if gpu_bandwidth is None else gpu_bandwidth * GB,
        "disk_bandwidth": None if disk is None else disk * GB,
    }
    if rpc is not None:
        if gpus:
            raise click.UsageError("--rpc asks what there is, --gpu says it: give one of them.")
        from pyllama_dsv4.rpc import device_plan, rpc_devices  # loads the engine

        options.update(device_plan(rpc_devices(rpc), n_gpu_layers, values["n_cpu_moe"] or 0))
    result = plan_model(report, **options).with_bandwidth(None if bandwidth is None else bandwidth * GB)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        click.echo(_text(result, report, options, is_measured=bandwidth is None))
    return ExitCode.OK if result.fits else ExitCode.MEMORY


def _text(result: Plan, report: HeaderReport, options: dict[str, Any], *, is_measured: bool) -> str:
    parts = [f"{clean(result.path)}: {result.verdict}"]
    if result.is_estimate:
        parts.append("The model is not DeepSeek-V4: caches and buffers are estimates.")
    parts += [_table(place.name, _place(place, result)) for place in (result.host, *result.gpus)]
    if result.draft is not None:
        parts.insert(
            -len(result.gpus) or len(parts),
            _table("draft model, in host memory", _place(result.draft, result)),
        )
    if result.gpus:
        parts[-1] += f"\n  -ngl {result.n_gpu_layers} -ncmoe {result.n_cpu_moe}"
    parts += [
        _table("One token reads", _token(result)),
        _table("Speed", _speed(result, is_measured)),
        _table(f"Contexts, compute for {options['cache_type']}", _contexts(report, options)),
    ]
    return "\n\n".join(parts)


def _place(place: Place, result: Plan) -> _Rows:
    is_mapped = result.is_mapped and place in (result.host, result.draft)
    note = "mapped; memory holds what it can" if is_mapped else ""
    has = "" if place.available is None else f"of {_size(place.available)}"
    return [
        ("weights", _size(place.weights), note),
        (f"KV cache, {result.n_ctx:,} tokens in {result.cache_type}", _size(place.cache), ""),
        ("compute buffers", _size(place.compute), ""),
        ("together", _size(place.total), has),
    ]


def _token(result: Plan) -> _Rows:
    token = result.token
    rows = [
        ("dense weights", _size(token.dense)),
        ("output head", _size(token.head)),
        ("routed experts", _size(token.experts)),
        ("KV cache", _size(token.cache)),
        ("together", _size(token.total)),
    ]
    rows += [
        (f"of it in {gpu.name}", _size(n)) for gpu, n in zip(result.gpus, result.token_on_gpus, strict=True)
    ]
    if result.token_from_disk:
        rows.append(("of it from disk, at least", _size(result.token_from_disk)))
    return list(rows)


def _speed(result: Plan, is_measured: bool) -> _Rows:
    assert result.host.bandwidth is not None  # the command always has one
    rows = [("host memory", _rate(result.host.bandwidth), "measured" if is_measured else "given")]
    rows += [
        (gpu.name, _rate(gpu.bandwidth), "given") for gpu in result.gpus[:1] if gpu.bandwidth is not None
    ]
    if result.disk_bandwidth is not None:
        rows.append(("disk", _rate(result.disk_bandwidth), "given"))
    elif result.token_from_disk:
        rows.append(("disk", "unknown", "give --disk: it decides"))
    if result.tokens_per_s is not None:
        rows.append(("at most", f"{result.tokens_per_s:,.2f}", "tokens/s"))
    return list(rows)


def _contexts(report: HeaderReport, options: dict[str, Any]) -> _Rows:
    limit = report.header.metadata.get(f"{report.header.architecture}.context_length")
    lengths = [n for n in CONTEXTS if not isinstance(limit, int) or n <= limit] or [min(CONTEXTS)]
    rows: _Rows = [("tokens", *(f"KV {name}" for name in CACHE_BYTES), "compute")]
    for n_ctx in lengths:
        plans = {
            name: plan_model(report, n_ctx=n_ctx, n_ubatch=options["n_ubatch"], cache_type=name)
            for name in CACHE_BYTES
        }
        compute = plans[options["cache_type"]].host.compute
        rows.append((f"{n_ctx:,}", *(_size(p.host.cache) for p in plans.values()), _size(compute)))
    return rows


def _table(title: str, rows: _Rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        first, *rest = row
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        head = "  " + "  ".join((first.ljust(widths[0]), *numbers))
        if len(row) == 3:  # the last is a note
            note = rest[-1]
            head = folded_row(head[: len(head) - len(numbers[-1])], note, sys.stdout)
        lines.append(head.rstrip())
    return "\n".join(lines)


def _size(n: int) -> str:
    return f"{n / GB:,.2f} GB" if n >= GB / 10 else f"{n / 1e6:,.2f} MB"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / GB:,.1f} GB/s"
