"""The command line: the commands, ``--version``, and how every error ends the process.

One module per command; ``LazyGroup`` imports a command's module when it is called, so that help costs no engine. The
only place that turns errors into messages and exit codes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn

import click

from .exit_codes import ExitCode, exit_code
from .help import MAX_WIDTH, LazyGroup

__all__ = ["main"]

PROG_NAME: Final = "pyllama-dsv4"
COMPLETE_VARIABLE: Final = "_PYLLAMA_DSV4_COMPLETE"

_COMMANDS: Final = {
    "Talk": {
        "chat": ("pyllama_dsv4.cli.chat", "Talk with a model; without a file, with a tiny random one."),
        "run": ("pyllama_dsv4.cli.run", "Complete one prompt and exit."),
        "serve": ("pyllama_dsv4.cli.serve", "Serve a model to OpenAI and Anthropic clients over HTTP."),
        "rpc-server": ("pyllama_dsv4.cli.rpc_server", "Lend this machine to another that runs a model."),
    },
    "Text": {
        "tokenize": ("pyllama_dsv4.cli.tokenize", "Show the tokens of a text, or the text of tokens."),
        "explain": ("pyllama_dsv4.cli.explain", "Show the prompt of a conversation, token by token."),
    },
    "Files": {
        "inspect": ("pyllama_dsv4.cli.inspect", "Show what a model file contains, without loading it."),
        "plan": (
            "pyllama_dsv4.cli.plan",
            "Say what a model needs and how fast it can be, before loading it.",
        ),
        "convert": ("pyllama_dsv4.cli.convert", "Convert a checkpoint to a native GGUF file."),
        "restore": ("pyllama_dsv4.cli.restore", "Rebuild a checkpoint from its native GGUF file."),
        "verify": ("pyllama_dsv4.cli.verify", "Check every byte of a model file."),
        "translate": ("pyllama_dsv4.cli.translate", "Rewrite a model file for other engines."),
        "quantize": ("pyllama_dsv4.cli.quantize", "Write a model in another type."),
    },
    "Proof": {
        "doctor": ("pyllama_dsv4.cli.doctor", "Check this machine and installation, and say what to do."),
        "selftest": ("pyllama_dsv4.cli.selftest", "Check that this build computes what it should."),
        "bench": ("pyllama_dsv4.cli.bench", "Measure prefill and decode, beside what memory allows."),
        "score": (
            "pyllama_dsv4.cli.score",
            "Measure how likely a model finds a text, and how two runs differ.",
        ),
    },
}

_EXAMPLES: Final = (
    f"{PROG_NAME} chat",
    f"{PROG_NAME} chat flash.gguf -c 32768 --temp 0.6",
    f"{PROG_NAME} run flash.gguf -p 'Once upon a time' -n 64",
    f"{PROG_NAME} serve flash.gguf --port 8080",
    f"{PROG_NAME} inspect flash.gguf",
    f"{PROG_NAME} plan flash.gguf -c 131072 --gpu 24",
    f"{PROG_NAME} convert DeepSeek-V4-Flash --outfile flash.gguf",
)

_NOTES: Final = {
    "Exit codes": (
        ("0, 1", "done; a run or check failed"),
        ("2", "wrong usage"),
        ("3", "an input file is missing or malformed"),
        ("4", "not enough memory"),
        ("130, 143", "ended by Ctrl-C or SIGTERM"),
    ),
}


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from pyllama_dsv4 import __version__

    click.echo(f"{PROG_NAME} {__version__}")
    from pyllama_dsv4._native import build_info  # after the first line: the engine may be missing

    for label, text in build_info().items():
        click.echo(f"  {label:<10}{text}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy_commands=_COMMANDS,
    examples=_EXAMPLES,
    notes=_NOTES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show version, pinned llama.cpp, patches and CPU features, and exit.",
)
@click.pass_context
def _cli(ctx: click.Context) -> None:
    """Run DeepSeek-V4 from its native FP4/FP8 GGUF file, exactly as released."""
    if ctx.invoked_subcommand is None:
        formatter = ctx.make_formatter()
        assert isinstance(ctx.command, LazyGroup)
        ctx.command.format_brief_help(ctx, formatter)
        click.echo(formatter.getvalue().rstrip("\n"))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code, see ``ExitCode``.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # text that the terminal's encoding lacks must not end a chat
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _run(sys.argv[1:] if args is None else list(args))
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_broken_pipe()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # after the terminal's ^C
        return ExitCode.INTERRUPTED
    except Exception as error:
        return _report(error)
    return code


def _run(args: list[str]) -> int:
    if COMPLETE_VARIABLE in os.environ:  # a shell asks for completions
        _cli.main(args, PROG_NAME, COMPLETE_VARIABLE)
    try:
        # not _cli.main(), which has its own ideas of interrupts and broken pipes
        with _cli.make_context(PROG_NAME, args) as ctx:
            result = _cli.invoke(ctx)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else ExitCode.OK


def _leave_broken_pipe() -> ExitCode:
    """Let the interpreter's last flush go nowhere: the reader has left, which is no error worth a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.BROKEN_PIPE


def _terminate(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(
        ExitCode.TERMINATED
    )  # unwinds: conversions remove their partial output, terminals recover


def _report(error: Exception) -> ExitCode:
    """Print an error for people, and return its exit code."""
    import logging

    from pyllama_dsv4.errors import ContextFullError, MemoryLimitError, PyllamaError

    from .terminal import Ui

    ui = Ui()
    is_verbose = logging.getLogger("pyllama_dsv4").isEnabledFor(logging.DEBUG)
    if isinstance(error, (PyllamaError, ImportError)):
        ui.error(str(error))
        if isinstance(error, (ContextFullError, MemoryLimitError)):
            ui.say("The option -c sets n_ctx.")
    elif isinstance(error, OSError):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        ui.error(f"{place}{error.strerror or error}")
    elif isinstance(error, MemoryError):
        ui.error("out of memory")
    else:
        hint = "" if is_verbose else " (-v shows where)"
        ui.error(f"this is a bug: {type(error).__name__}: {error}{hint}")
    if is_verbose:
        import traceback

        traceback.print_exception(error)
    return exit_code(error)
