"""The command ``pyllama-dsv4 serve``: options, the plan, and how it ends; the work is ``pyllama_dsv4.server``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from .answers import SPEED, draft_options
from .common import Options, load_options, model_argument, model_or_demo, output_options
from .exit_codes import ExitCode
from .help import Command, option

__all__ = ["serve"]

SERVER: Final = "Server"
_ARGS: Final = "pyllama_dsv4.serve.args"
_OURS: Final = {
    "--version": "pyllama-dsv4 --version",
    "-m": "FILE",
    "--model": "FILE",
    "--act-quant": "it before --",
    **dict.fromkeys(
        ("-md", "--model-draft", "--spec-draft-model"), "it before --"
    ),  # what fits is checked there
}


class _Serve(Command):
    """Keeps what follows ``--`` for the server: click would take its first word for FILE after ``-m FILE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            i = args.index("--")
            ctx.meta[_ARGS] = args[i + 1 :]
            args = args[:i]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ARGS]"]


@click.command(
    cls=_Serve,
    examples=(
        "pyllama-dsv4 serve flash.gguf",
        "pyllama-dsv4 serve flash.gguf --sessions ~/sessions",
        "pyllama-dsv4 serve flash.gguf -c 65536 -np 2 -- --temp 0.6",
        "PYLLAMA_DSV4_API_KEY=... pyllama-dsv4 serve flash.gguf --host 0.0.0.0",
        "pyllama-dsv4 serve flash.gguf -- --help",
    ),
)
@option(
    "--host", metavar="HOST", default="127.0.0.1", section=SERVER, is_brief=True,
    help="Addresses to listen on, separated by commas; 0.0.0.0 for everybody in the network.",
)  # fmt: skip
@option(
    "--port", type=click.IntRange(0, 65535), metavar="PORT", default=8080, section=SERVER, is_brief=True,
    help="Port to listen on; 0 takes a free one.",
)  # fmt: skip
@option(
    "--api-key", metavar="KEY", section=SERVER, is_brief=True,
    help="What clients must send. Better set in the environment, where other users do not see it.",
)  # fmt: skip
@option(
    "-np", "--parallel", "n_slots", type=click.IntRange(1, 256), metavar="N", default_text="4", section=SERVER,
    is_brief=True, help="Requests answered at the same time; they share the context.",
)  # fmt: skip
@option(
    "--max-requests", "n_requests_max", type=click.IntRange(1, 1000), metavar="N", default=256, section=SERVER,
    help="Requests that are answered or wait; further ones are told that the server is busy (503).",
)  # fmt: skip
@option(
    "--sessions", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", section=SERVER,
    help="Let clients save and restore slots there: POST /slots/N?action=save. Off unless given.",
)  # fmt: skip
@draft_options(SPEED)
@model_argument
@load_options
@output_options
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    host: str,
    port: int,
    api_key: str | None,
    n_slots: int | None,
    draft_model: Path | None,
    n_draft: int,
    n_requests_max: int,
    sessions: Path | None,
    **values: Any,
) -> int:
    """Serve a model to OpenAI and Anthropic clients over HTTP; without FILE, the demo model.

    POST /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages, with streaming, tools and thinking;
    GET /health, /metrics, /slots, /v1/models. Pages of other origins may not read answers (CORS is off). ARGS are
    options of llama.cpp's server and win over those before --; -- --help shows them. Ctrl-C ends it.
    """
    args: list[str] = ctx.meta.get(_ARGS, [])
    for arg in args:
        if arg in _OURS:
            raise click.UsageError(f"{arg} is not the server's here: use {_OURS[arg]}.", ctx=ctx)
    options = Options.take(ctx, values)
    path, _ = model_or_demo(options)
    from pyllama_dsv4.server import run_server

    sys.stdout.flush()
    sent = run_server(
        path,
        host=host,
        port=port,
        api_key=api_key,
        n_slots=n_slots,
        draft_model=draft_model,
        n_draft=n_draft,
        n_requests_max=n_requests_max,
        sessions=sessions,
        **options.load,
        log="quiet" if options.ui.is_quiet else "verbose" if options.is_verbose else "normal",
        use_color=options.ui.is_color,
        args=args,
        on_plan=lambda plan: options.ui.note(plan.with_bandwidth().line()),
    )
    return ExitCode.OK if sent is None else 128 + sent
