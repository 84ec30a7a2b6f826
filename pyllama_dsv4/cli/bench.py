"""The command ``pyllama-dsv4 bench``: tokens per second beside what this machine's memory would allow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import CACHE_TYPES, LayerCount
from .help import Command, option
from .terminal import Ui, clean, folded_row

if TYPE_CHECKING:
    from pyllama_dsv4.bench import Bench

__all__ = ["bench"]

WORK: Final = "Work"


class _Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions only
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        numbers = value.split(",")
        if not all(n.strip().isdecimal() and int(n) >= self._least for n in numbers):
            self.fail(f"{value!r} is not a list of numbers from {self._least} on, as 512,2048.", param, ctx)
        return tuple(int(n) for n in numbers)


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 bench flash.gguf",
        "pyllama-dsv4 bench flash.gguf -p 512,2048 -d 0,8192 -t 8,16",
        "pyllama-dsv4 bench flash.gguf --json > here.json",
        "pyllama-dsv4 bench flash.gguf -t 1,2,4,8 --plot threads.png",
    ),
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@option(
    "-p", "--n-prompt", "n_prompt", type=_Numbers(1), metavar="N,N", default="512", section=WORK, is_brief=True,
    has_env=False, help="Tokens of the prefills.",
)  # fmt: skip
@option(
    "-n", "--n-gen", "n_gen", type=click.IntRange(1), metavar="N", default=32, section=WORK, is_brief=True,
    has_env=False, help="Tokens decoded one by one.",
)  # fmt: skip
@option(
    "-d", "--depth", "depths", type=_Numbers(0), metavar="N,N", default="0", section=WORK, is_brief=True,
    has_env=False, help="Tokens in the cache before.",
)  # fmt: skip
@option(
    "-t", "--threads", "n_threads", type=_Numbers(1), metavar="N,N", default_text="physical cores", section=WORK,
    is_brief=True, has_env=False, help="CPU threads.",
)  # fmt: skip
@option(
    "-ub", "--ubatch-size", "n_batch", type=click.IntRange(1), metavar="N", default=512, section=WORK,
    has_env=False, help="Tokens evaluated at once.",
)  # fmt: skip
@option(
    "-r", "--repetitions", type=click.IntRange(1), metavar="N", default=5, section=WORK, has_env=False,
    help="Of each measurement, in turns.",
)  # fmt: skip
@option(
    "-ctk", "--cache-type-k", "cache_type", type=click.Choice(CACHE_TYPES), metavar="TYPE", default="f16",
    section=WORK, has_env=False, help="Type of the KV cache.",
)  # fmt: skip
@option(
    "--act-quant", type=click.Choice(("none", "cache", "full")), metavar="LEVEL", default="cache", section=WORK,
    has_env=False, help="What is rounded as in DeepSeek's code.",
)  # fmt: skip
@option(
    "-fa", "--flash-attn", "flash_attn", type=click.Choice(("auto", "on", "off")), metavar="on|off|auto",
    default="auto", section=WORK, has_env=False, help="Attention in one operation.",
)  # fmt: skip
@option(
    "-ngl", "--n-gpu-layers", "n_gpu_layers", type=LayerCount(), metavar="N|all", default=0, section=WORK,
    has_env=False, help="Layers to place on GPUs.",
)  # fmt: skip
@option(
    "-ncmoe", "--n-cpu-moe", "n_cpu_moe", type=click.IntRange(0), metavar="N", default=0, section=WORK,
    has_env=False, help="First layers whose routed experts stay in host memory.",
)  # fmt: skip
@option("--json", "is_json", is_flag=True, section="Output", has_env=False, help="The numbers as JSON.")
@option(
    "--plot", type=click.Path(path_type=Path), metavar="PNG", section="Output", has_env=False,
    help="Draw rates and the bound; needs the extra 'plot'.",
)  # fmt: skip
def bench(file: Path | None, is_json: bool, plot: Path | None, **options: Any) -> None:
    """Measure prefill and decode; without FILE, of the demo model, and how good its answers are.

    Every measurement is repeated, in turns with the others, and shown as median and range. Beside decode stands its
    bound: the bytes that a token reads, over the bandwidth that was measured in the same run.
    """
    from pyllama_dsv4.bench import bench as run
    from pyllama_dsv4.demo import demo_model

    ui = Ui()

    def progress(n_done: int, n_all: int) -> None:
        if ui.is_animated:
            sys.stderr.write(f"\r{n_done} of {n_all} measurements\x1b[K" if n_done < n_all else "\r\x1b[K")
            sys.stderr.flush()

    result = run(demo_model() if file is None else file, on_progress=progress, **options)
    if plot is not None:
        _draw(result, plot)
    if is_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        click.echo(
            "\n".join(
                folded_row("", text, sys.stdout) if "  " not in text else text for text in lines(result)
            )
        )


def lines(result: Bench) -> list[str]:
    """Return the result for people."""
    from pyllama_dsv4._native import build_info

    out = [
        clean(result.path),
        build_info()["system"].strip(),
        f"load {result.load_s:.2f} s, first token after {result.first_token_s:.2f} s, memory "
        f"{(result.peak_bytes or 0) / 1e9:.2f} GB at most, mapped pages included; memory reads at "
        f"{result.bandwidth / 1e9:.1f} GB/s",
        "",
        # 80 columns
        f"{'work':<7}{'tokens':>7}{'depth':>7}{'threads':>8}{'tokens/s':>9}{'from':>8}{'to':>8}{'bound':>8}{'share':>6}"
        f"{'GB/tok':>7}{'GB/s':>5}",
    ]
    for m in result.measurements:
        row = (
            f"{m.kind:<7}{m.n_tokens:>7}{m.depth:>7}{m.n_threads:>8}{m.median:>9.2f}{min(m.rates):>8.2f}"
            f"{max(m.rates):>8.2f}"
        )
        if m.token is not None and m.bound is not None and m.share is not None and m.bytes_per_s is not None:
            row += f"{m.bound:>8.2f}{m.share:>6.0%}{m.token.total / 1e9:>7.3f}{m.bytes_per_s / 1e9:>5.1f}"
        out.append(row)
    decode = [m.token for m in result.measurements if m.token is not None]
    if decode:
        token = decode[0]
        out += [
            "",
            f"one token reads {token.dense / 1e6:.1f} MB dense, {token.head / 1e6:.1f} MB head, "
            f"{token.experts / 1e6:.1f} MB experts, {token.cache / 1e6:.1f} MB cache",
        ]
    if result.quality is not None:
        out.append(
            "quality: {:.4f} nats per token of answers; {:.4f} in the program that trained it".format(
                *result.quality
            )
        )
    return out


def _draw(result: Bench, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.UsageError("--plot needs matplotlib: pip install 'pyllama-dsv4[plot]'.") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, kind in zip(axes, ("prefill", "decode"), strict=True):
        rows = [m for m in result.measurements if m.kind == kind]
        labels = [f"{m.n_tokens} at {m.depth}\n{m.n_threads} threads" for m in rows]
        medians = [m.median for m in rows]
        spread = [
            [m.median - min(m.rates) for m in rows],
            [max(m.rates) - m.median for m in rows],
        ]
        ax.bar(range(len(rows)), medians, yerr=spread, capsize=3, color="#4878a8")
        for i, m in enumerate(rows):
            if m.bound is not None:
                ax.hlines(
                    m.bound, i - 0.4, i + 0.4, colors="#b04030", label="bandwidth bound" if i == 0 else None
                )
        ax.set_xticks(range(len(rows)), labels)
        ax.set_title(kind)
        ax.set_ylabel("tokens/s")
        if kind == "decode":
            ax.legend(frameon=False)
    figure.savefig(path, dpi=150)
