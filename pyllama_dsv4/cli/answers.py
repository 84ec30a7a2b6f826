"""Options of ``chat`` and ``run`` about one answer: what it must follow, how long it may take, what helps it along."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .help import option

if TYPE_CHECKING:
    from pyllama_dsv4.grammar import Grammar

__all__ = ["SPEED", "AnswerOptions", "answer_options", "draft_options"]

F = TypeVar("F", bound=Callable[..., Any])

ANSWER: Final = "Answers"
SPEED: Final = "Speed"


def answer_options(function: F) -> F:
    """Add the options; ``AnswerOptions.take`` takes their values."""
    path = click.Path(path_type=Path)
    options = (
        option(
            "-j", "--json-schema", "json_schema", metavar="SCHEMA", section=ANSWER, has_env=False,
            help="The answer is JSON that follows this schema; {} allows any.",
        ),
        option(
            "-jf", "--json-schema-file", "json_schema_file", type=path, metavar="PATH", section=ANSWER, has_env=False,
            help="The same, from a file.",
        ),
        option(
            "--grammar-file", "grammar_file", type=path, metavar="PATH", section=ANSWER, has_env=False,
            help="The answer follows this grammar (GBNF).",
        ),
        option(
            "--timeout", "timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", section=ANSWER,
            help="End an answer after this time, reading the prompt included.",
        ),
        option(
            "--loop-guard", "loop_guard", type=click.IntRange(0, 65536), metavar="N", default=0, section=ANSWER,
            help="End an answer whose last N tokens repeat; 8 or more, 0 is off.",
        ),
        option(
            "--prefix-cache", "prefix_cache", type=path, metavar="FOLDER", section=SPEED,
            help="Keep evaluated prompts there, for later runs too.",
        ),
    )  # fmt: skip
    function = draft_options(SPEED)(function)
    for add in reversed(options):
        function = add(function)
    return function


def draft_options(section: str, *, has_env: bool = True) -> Callable[[F], F]:
    """Return a decorator that adds the options of a draft model: `draft_model` and `n_draft`."""

    def add(function: F) -> F:
        model = option(
            "-md", "--model-draft", "draft_model", type=click.Path(path_type=Path), metavar="FILE", section=section,
            has_env=has_env, help="Draft model of convert --draft: several tokens at once, and the same text.",
        )  # fmt: skip
        n_max = option(
            "--draft-max", "n_draft", type=click.IntRange(1, 16), metavar="N", default=3, section=section,
            has_env=has_env, help="Tokens that the draft model proposes at most.",
        )  # fmt: skip
        return model(n_max(function))

    return add


@dataclass(frozen=True)
class AnswerOptions:
    """The options of one call.

    Attributes:
        load: Keywords for ``Llama``.
        generation: Keywords for every generation: `timeout`, `loop_guard`.
        schema: What answers must follow, or None.
        grammar: Likewise, as GBNF.
    """

    load: dict[str, Any]
    generation: dict[str, Any]
    schema: dict[str, Any] | None
    grammar: str | None

    @classmethod
    def take(cls, ctx: click.Context, values: dict[str, Any]) -> AnswerOptions:
        """Take the options out of a command's parameters.

        Raises:
            click.UsageError: Two of them contradict each other, or the schema is not JSON.
        """
        text, file, grammar_file = (
            values.pop(name) for name in ("json_schema", "json_schema_file", "grammar_file")
        )
        if sum(value is not None for value in (text, file, grammar_file)) > 1:
            raise click.UsageError(
                "two formats of answers: give --json-schema, --json-schema-file or --grammar-file.", ctx=ctx
            )
        if file is not None:
            text = file.read_text(encoding="utf-8", errors="replace")
        schema = None
        if text is not None:
            try:
                schema = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise click.UsageError(f"the schema is not JSON: {error}", ctx=ctx) from None
            if not isinstance(schema, dict):
                raise click.UsageError("the schema is no JSON object.", ctx=ctx)
        loop_guard = values.pop("loop_guard")
        if 0 < loop_guard < 8:
            raise click.UsageError("--loop-guard takes 0 (off), or 8 and more.", ctx=ctx)
        load = {name: v for name in ("prefix_cache", "draft_model") if (v := values.pop(name)) is not None}
        n_draft = values.pop("n_draft")
        return cls(
            load={**load, "n_draft": n_draft} if "draft_model" in load else load,
            generation={"timeout": values.pop("timeout"), "loop_guard": loop_guard},
            schema=schema,
            grammar=None
            if grammar_file is None
            else grammar_file.read_text(encoding="utf-8", errors="replace"),
        )

    def gbnf(self) -> Grammar | None:
        """Return the grammar of a plain completion."""
        from pyllama_dsv4.grammar import Grammar

        if self.schema is not None:
            return Grammar.from_json_schema(self.schema)
        return None if self.grammar is None else Grammar(self.grammar)

    def of_chat(self) -> dict[str, Any]:
        """Return the keywords that make answers of a chat follow the format."""
        if self.schema is not None:
            format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema}}
            return {"response_format": format_}
        return {} if self.grammar is None else {"grammar": self.grammar}
