"""The command ``pyllama-dsv4 explain``: the prompt of a conversation in colours; ``pyllama_dsv4.explain`` finds it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .common import read_prompt
from .help import Command, option
from .terminal import clean, use_color

if TYPE_CHECKING:
    from pyllama_dsv4.explain import Explanation, Token

__all__ = ["explain"]

CONVERSATION: Final = "Conversation"
_RESET: Final = "\x1b[0m"
_COLORS: Final = {"special": "\x1b[35m", "template": "\x1b[33m", "text": "\x1b[36m"}
_SHADES: Final = ("", "\x1b[1m")  # neighbours differ, so that one sees where tokens begin
_SHARED: Final = "\x1b[4m"
_DROPPED: Final = "\x1b[2;9m"


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 explain flash.gguf -p 'Why is the sky blue?' --think",
        "pyllama-dsv4 explain flash.gguf -f conversation.json --json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "-p", "--prompt", metavar="TEXT", section=CONVERSATION, is_brief=True, has_env=False,
    help="One message of a user; - reads standard input.",
)  # fmt: skip
@option(
    "-f", "--file", "messages_file", type=click.Path(path_type=Path), metavar="PATH", section=CONVERSATION,
    is_brief=True, has_env=False,
    help="JSON: a list of messages as OpenAI has them, or a request with messages and tools.",
)  # fmt: skip
@option(
    "-sys", "--system-prompt", "system", metavar="TEXT", section=CONVERSATION, has_env=False,
    help="Instructions in front.",
)  # fmt: skip
@option(
    "--think", "is_thinking", is_flag=True, section=CONVERSATION, is_brief=True, has_env=False,
    help="The model is to reason before it answers.",
)  # fmt: skip
@option(
    "--effort", type=click.Choice(("high", "max")), metavar="high|max", section=CONVERSATION, has_env=False,
    help="How much it reasons.",
)  # fmt: skip
@option(
    "--chat-template-file", "template", type=click.Path(path_type=Path), metavar="PATH", section=CONVERSATION,
    has_env=False, help="Jinja template instead of the file's.",
)  # fmt: skip
@option(
    "--color", type=click.Choice(("auto", "always", "never")), metavar="WHEN", default="auto", section="Output",
    help="auto (on a terminal, unless NO_COLOR is set), always or never.",
)  # fmt: skip
@option("--json", "as_json", is_flag=True, section="Output", has_env=False, help="Print one JSON object.")
@click.pass_context
def explain(
    ctx: click.Context,
    file: Path,
    prompt: str | None,
    messages_file: Path | None,
    system: str | None,
    is_thinking: bool,
    effort: Any,
    template: Path | None,
    color: str,
    as_json: bool,
) -> None:
    """Show the prompt of a conversation, token by token.

    The ids are those that a chat evaluates. Special tokens are magenta, the template's text yellow, message text cyan;
    neighbours differ in weight. Underlined is what the conversation before its last message begins with too: a chat
    that goes on has it in its cache. Reasoning that the prompt leaves out is struck through at the end.
    """
    messages, tools = _conversation(ctx, prompt, messages_file)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    from pyllama_dsv4.explain import Vocabulary

    text = None if template is None else template.read_text(encoding="utf-8", errors="replace")
    with Vocabulary(file, chat_template=text) as vocabulary:
        found = vocabulary.explain(messages, thinking=is_thinking, reasoning_effort=effort, tools=tools)
    if as_json:
        click.echo(json.dumps(_as_dict(found), ensure_ascii=False))
    else:
        click.echo(_shown(found, use_color(color, sys.stdout)), color=True)


def _conversation(
    ctx: click.Context, prompt: str | None, file: Path | None
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    if file is None:
        return [{"role": "user", "content": read_prompt(ctx, prompt, None)}], None
    if prompt is not None:
        raise click.UsageError("two conversations: give -p or -f, not both.", ctx=ctx)
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{file}: {error}", ctx=ctx, param_hint="-f") from error
    tools = body.get("tools") if isinstance(body, dict) else None
    messages = body.get("messages") if isinstance(body, dict) else body
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise click.BadParameter(f"{file}: no list of messages in it.", ctx=ctx, param_hint="-f")
    return messages, tools


def _as_dict(found: Explanation) -> dict[str, Any]:
    return {
        "n_tokens": len(found.tokens),
        "n_shared": found.n_shared,
        "tokens": [
            {"id": t.id, "text": t.piece.decode("utf-8", "replace"), "kind": t.kind, "is_shared": t.is_shared}
            for t in found.tokens
        ],
        "dropped": [{"message": i, "reasoning": text} for i, text in found.dropped],
    }


def _shown(found: Explanation, is_color: bool) -> str:
    text = _colored(found.tokens) if is_color else clean(_text(found.tokens))
    lines = [text]
    for i, reasoning in found.dropped:
        reasoning = clean(reasoning)
        shown = f"{_DROPPED}{reasoning}{_RESET}" if is_color else reasoning
        lines.append(f"reasoning of message {i + 1}, left out: {shown}")
    n_special = sum(token.kind == "special" for token in found.tokens)
    lines.append(
        f"{len(found.tokens)} tokens: {n_special} special, {found.n_shared} shared with the conversation before"
    )
    return "\n".join(lines)


def _text(tokens: list[Token]) -> str:
    return b"".join(token.piece for token in tokens).decode("utf-8", "replace")


def _colored(tokens: list[Token]) -> str:
    """Return the text in colours. A character that several tokens spell takes the colour of the first."""
    out: list[str] = []
    waiting: list[Token] = []
    for i, token in enumerate(tokens):
        waiting.append(token)
        try:
            text = b"".join(part.piece for part in waiting).decode("utf-8")
        except UnicodeDecodeError:
            if len(waiting) < 4:
                continue
            text = _text(waiting)
        first = waiting[0]
        style = _COLORS[first.kind] + _SHADES[i % 2] + (_SHARED if first.is_shared else "")
        out += [f"{style}{line}{_RESET}" if line else "" for line in clean(text).split("\n")[:1]]
        out += [f"\n{style}{line}{_RESET}" if line else "\n" for line in clean(text).split("\n")[1:]]
        waiting = []
    return "".join(out) + clean(_text(waiting))
