"""The command ``pyllama-dsv4 run``: one prompt, one completion; the answer on stdout, everything else on stderr."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, Final

import click

from .answers import AnswerOptions, answer_options
from .common import (
    Options,
    load_options,
    model_argument,
    model_or_demo,
    open_model,
    output_options,
    read_prompt,
    sampling_options,
    stats_line,
)
from .help import Command, option
from .terminal import AnswerWriter

__all__ = ["run"]

PROMPT: Final = "Prompt"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 run flash.gguf -p 'Once upon a time' -n 64",
        "pyllama-dsv4 run flash.gguf --temp 0 < prompt.txt > answer.txt",
    ),
)
@option(
    "-p", "--prompt", metavar="TEXT", section=PROMPT, is_brief=True, has_env=False,
    help="Text to continue; - reads standard input, as does a pipe without -p.",
)  # fmt: skip
@option(
    "-f", "--file", "prompt_file", type=click.Path(path_type=Path), metavar="PATH", section=PROMPT,
    is_brief=True, has_env=False, help="Read the prompt from a file.",
)  # fmt: skip
@model_argument
@sampling_options
@answer_options
@load_options
@output_options
@click.pass_context
def run(ctx: click.Context, /, prompt: str | None, prompt_file: Path | None, **values: Any) -> None:
    """Complete one prompt and exit; without FILE, with the demo model, which answers better in chat.

    The prompt is continued as it is: no chat template, one beginning-of-sentence token in front. Text of special
    tokens in it counts as those tokens. Ctrl-C ends the completion.
    """
    options = Options.take(ctx, values)
    wanted = AnswerOptions.take(ctx, values)
    text = read_prompt(ctx, prompt, prompt_file)
    path, max_tokens = model_or_demo(options)
    writer = AnswerWriter(options.color)
    grammar = wanted.gbnf()
    with open_model(options, path, **wanted.load) as (llm, _):
        try:
            with options.ui.waiting("reading the prompt") as waiting:
                pieces = llm.generate(
                    text,
                    max_tokens=max_tokens,
                    grammar=grammar,
                    on_prefill=waiting.advance,
                    **wanted.generation,
                    **options.sampling,
                )
                with closing(pieces):  # type: ignore[type-var]
                    for piece in pieces:
                        waiting.stop()
                        writer.write(piece)
        finally:
            writer.end_line()
        options.ui.note(stats_line(llm.stats, llm.n_tokens, llm.n_ctx))
