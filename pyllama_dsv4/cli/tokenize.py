"""The command ``pyllama-dsv4 tokenize``: text to tokens and back; loads a file's vocabulary only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click

from .common import read_prompt
from .help import Command, option
from .terminal import clean

__all__ = ["tokenize"]

TEXT: Final = "Text"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 tokenize flash.gguf -p 'Hello, world'",
        "pyllama-dsv4 tokenize flash.gguf --ids < book.txt | wc -w",
        "pyllama-dsv4 tokenize flash.gguf --decode '0 19923 14'",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "-p", "--prompt", metavar="TEXT", section=TEXT, is_brief=True, has_env=False,
    help="The text; - reads standard input, as does a pipe without -p.",
)  # fmt: skip
@option(
    "-f", "--file", "prompt_file", type=click.Path(path_type=Path), metavar="PATH", section=TEXT, is_brief=True,
    has_env=False, help="Read the text from a file.",
)  # fmt: skip
@option(
    "--special", is_flag=True, section=TEXT, is_brief=True, has_env=False,
    help="What spells a special token becomes one; else it is text.",
)  # fmt: skip
@option(
    "--bos",
    "add_bos",
    is_flag=True,
    section=TEXT,
    has_env=False,
    help="Begin with the beginning of a sentence.",
)
@option(
    "--decode", metavar="IDS", section=TEXT, is_brief=True, has_env=False,
    help="Show the text of these ids, separated by spaces or commas.",
)  # fmt: skip
@option(
    "--ids", "only_ids", is_flag=True, section="Output", is_brief=True, has_env=False,
    help="Print the ids in one line.",
)  # fmt: skip
@option("--json", "as_json", is_flag=True, section="Output", has_env=False, help="Print one JSON object.")
@click.pass_context
def tokenize(
    ctx: click.Context,
    file: Path,
    prompt: str | None,
    prompt_file: Path | None,
    special: bool,
    add_bos: bool,
    decode: str | None,
    only_ids: bool,
    as_json: bool,
) -> None:
    """Show the tokens of a text, or the text of tokens.

    Prints one token in a line: its id, and its text as a JSON string. FILE is a GGUF file, whose vocabulary is read.
    """
    ids: list[int] | None = None
    text = ""
    if decode is None:
        text = read_prompt(ctx, prompt, prompt_file)
    else:
        try:
            ids = [int(word) for word in decode.replace(",", " ").split()]
        except ValueError as error:
            raise click.BadParameter(f"{error}: ids are numbers.", ctx=ctx, param_hint="--decode") from error
    from pyllama_dsv4.explain import Vocabulary

    with Vocabulary(file) as vocabulary:
        if ids is not None:
            click.echo(clean(vocabulary.tokenizer.detokenize(ids, special=True)))
            return
        tokens = vocabulary.tokens(text, add_bos=add_bos, special=special)
    if as_json:
        rows = [{"id": token.id, "text": token.piece.decode("utf-8", "replace")} for token in tokens]
        click.echo(json.dumps({"n_tokens": len(tokens), "tokens": rows}, ensure_ascii=False))
    elif only_ids:
        click.echo(" ".join(str(token.id) for token in tokens))
    else:
        for token in tokens:
            click.echo(
                f"{token.id:>8}  {json.dumps(token.piece.decode('utf-8', 'replace'), ensure_ascii=False)}"
            )
