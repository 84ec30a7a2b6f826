"""The command ``pyllama-dsv4 score``: how likely a model finds a text, and how far two runs of it differ."""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import CACHE_TYPES, Options, load_options, model_argument, open_model, output_options
from .help import Command, option

if TYPE_CHECKING:
    from pyllama_dsv4.score import Comparison, Score

__all__ = ["score"]

TEXT: Final = "Text"
COMPARE: Final = "Comparison"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 score flash.gguf -f book.txt",
        "pyllama-dsv4 score flash.gguf --vs flash-q8.gguf -f book.txt",
        "pyllama-dsv4 score flash.gguf --vs-act-quant full -f book.txt",
        "pyllama-dsv4 score flash.gguf -f book.txt --record here.jsonl",
        "pyllama-dsv4 score flash.gguf -f book.txt --against there.jsonl",
    ),
)
@option(
    "-f", "--file", "text_file", type=click.Path(path_type=Path), metavar="PATH", section=TEXT, is_brief=True,
    has_env=False, help="The text; without it and --text, standard input.",
)  # fmt: skip
@option("--text", metavar="TEXT", section=TEXT, is_brief=True, has_env=False, help="The text itself.")
@option(
    "--ids", "are_ids", is_flag=True, section=TEXT, has_env=False,
    help="The text consists of token ids; for files without a vocabulary.",
)  # fmt: skip
@option(
    "--vs", "other", type=click.Path(path_type=Path), metavar="FILE2", section=COMPARE, is_brief=True,
    has_env=False, help="A second model with the same vocabulary.",
)  # fmt: skip
@option(
    "--vs-act-quant", type=click.Choice(("none", "cache", "full")), metavar="LEVEL", section=COMPARE,
    is_brief=True, has_env=False, help="The second run rounds activations at this level.",
)  # fmt: skip
@option(
    "--vs-cache-type-k", "vs_cache_type", type=click.Choice(CACHE_TYPES), metavar="TYPE", section=COMPARE,
    has_env=False, help="The second run's type of the KV cache.",
)  # fmt: skip
@option(
    "--record", "record_path", type=click.Path(path_type=Path), metavar="PATH", section=COMPARE, has_env=False,
    help="Write the predictions to a file of JSON lines.",
)  # fmt: skip
@option(
    "--against", type=click.Path(path_type=Path), metavar="PATH", section=COMPARE, has_env=False,
    help="Compare with predictions that --record wrote, here or elsewhere.",
)  # fmt: skip
@option("--json", "is_json", is_flag=True, section=COMPARE, has_env=False, help="The numbers as JSON.")
@model_argument
@load_options
@output_options
@click.pass_context
def score(ctx: click.Context, /, **values: Any) -> None:
    """Measure how likely a model finds a text.

    Prints the mean negative log-likelihood per token in nats and the perplexity. With a second run (another file,
    level of rounding, cache type, or a record) also the Kullback-Leibler divergence and how often both name the same
    most likely tokens. Text longer than the context is cut into windows of -c tokens.
    """
    own = {
        name: values.pop(name)
        for name in (
            "text_file", "text", "are_ids", "other", "vs_act_quant", "vs_cache_type", "record_path", "against",
            "is_json",
        )
    }  # fmt: skip
    options = Options.take(ctx, values)
    if options.path is None:
        raise click.UsageError("no model: give a GGUF file.", ctx=ctx)
    has_second = own["other"] or own["vs_act_quant"] or own["vs_cache_type"]
    if bool(has_second) + bool(own["record_path"]) + bool(own["against"]) > 1:
        raise click.UsageError("give one of: a second run (--vs...), --record, --against.", ctx=ctx)
    text = _read_text(ctx, own["text"], own["text_file"])

    from pyllama_dsv4 import score as scoring

    with ExitStack() as stack:
        first, _ = stack.enter_context(open_model(options, options.path))
        ids = _ids(ctx, text) if own["are_ids"] else first.tokenize(text, add_bos=True)
        progress = _Progress(options)
        result: Score | Comparison
        if has_second:
            load = dict(options.load)
            load["act_quant"] = own["vs_act_quant"] or load["act_quant"]
            load["cache_type"] = own["vs_cache_type"] or load["cache_type"]
            second, _ = stack.enter_context(
                open_model(replace(options, load=load), own["other"] or options.path)
            )
            result = scoring.compare(first, second, ids, progress=progress)
        elif own["against"]:
            result = scoring.compare(first, scoring.read_record(own["against"]), ids, progress=progress)
        elif own["record_path"]:
            result = scoring.record(first, ids, own["record_path"], progress=progress)
        else:
            result = scoring.score(first, ids, progress=progress)
        progress.end()
    facts = _facts(result)
    if own["is_json"]:
        # JSON has no NaN
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        click.echo(json.dumps(finite))
    else:
        for line in _lines(facts):
            click.echo(line)


class _Progress:
    """One line that is overwritten on a terminal; nothing elsewhere."""

    def __init__(self, options: Options) -> None:
        self._is_shown = options.ui.is_animated

    def __call__(self, n_done: int, n_all: int) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r{n_done} of {n_all} tokens\x1b[K")
            sys.stderr.flush()

    def end(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _read_text(ctx: click.Context, text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise click.UsageError("two texts: give --text or -f, not both.", ctx=ctx)
    if text is not None:
        return text
    if file is not None:
        return file.read_bytes().decode("utf-8", "replace")
    if sys.stdin.isatty():
        raise click.UsageError("no text: give --text TEXT, -f FILE, or a text in a pipe.", ctx=ctx)
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _ids(ctx: click.Context, text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise click.UsageError(f"--ids: {error}.", ctx=ctx) from error


def _facts(result: Score | Comparison) -> dict[str, Any]:
    from pyllama_dsv4.score import Score

    if isinstance(result, Score):
        return {
            "n_tokens": result.n_tokens,
            "nll": result.nll,
            "nll_error": result.nll_error,
            "perplexity": result.perplexity,
        }
    second = {f"second_{k}": v for k, v in _facts(result.second).items() if k != "n_tokens"}
    return {
        **_facts(result.first),
        **second,
        "kl": result.kl,
        "kl_max": result.kl_max,
        "nmse": result.nmse,
        "top_k": {str(k): share for k, share in result.top_k.items()},
        "max_logprob_error": result.max_logprob_error,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    def run(name: str, prefix: str) -> str:
        return (
            f"{name:<12}nll {facts[f'{prefix}nll']:.5f} +- {facts[f'{prefix}nll_error']:.5f} nats, "
            f"perplexity {facts[f'{prefix}perplexity']:.4f}"
        )

    if "second_nll" not in facts:
        return [f"{run('', '').strip()}, {facts['n_tokens']} tokens"]
    lines = [f"{facts['n_tokens']} tokens", run("first", ""), run("second", "second_")]
    if facts["kl"] is not None:
        lines.append(
            f"{'KL':<12}{facts['kl']:.3g} nats, at most {facts['kl_max']:.3g}; NMSE {facts['nmse']:.3g}"
        )
    shares = ", ".join(f"top {k} {share:.2%}" for k, share in facts["top_k"].items())
    lines.append(f"{'same':<12}{shares}; log p differs by {facts['max_logprob_error']:.3g} at most")
    return lines
