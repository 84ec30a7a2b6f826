"""Commands and options with help in sections: ``--help`` shows all of it, ``-h`` what one needs first.

Owns the look of help and the refusal of unknown names. Knows nothing about models.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Final, NoReturn, TypeVar

import click

from .config import config_path, defaults

__all__ = ["Command", "LazyGroup", "Option", "option"]

F = TypeVar("F", bound=Callable[..., Any])

ENV_PREFIX: Final = "PYLLAMA_DSV4_"
ENV_NOTE: Final = (
    f"Options can be set in the environment too, --top-k as {ENV_PREFIX}TOP_K, or in "
    "~/.config/pyllama-dsv4/config.toml. The command line wins, then the environment."
)
MAX_WIDTH: Final = 80


class Option(click.Option):
    """An option that belongs to a section of the help.

    Args:
        section: Title of the section.
        metavar: What its value is called; needed unless it is a flag.
        default_text: The default in words, where showing the value itself would not help.
        is_brief: Shown by ``-h`` too.
        has_env: Read from the environment, under the name of its first ``--`` spelling.
    """

    def __init__(
        self,
        *args: Any,
        section: str,
        default_text: str | None = None,
        is_brief: bool = False,
        has_env: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if default_text is None and kwargs.get("default") is not None and not self.is_flag:
            default_text = str(kwargs["default"])
        self.section = section
        self.is_brief = is_brief
        self._default_text = default_text
        long_names = [name for name in self.opts if name.startswith("--")]
        if has_env and long_names:
            self.envvar = ENV_PREFIX + long_names[0][2:].upper().replace("-", "_")

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        names = ", ".join((*self.opts, *self.secondary_opts))
        if not self.is_flag:
            names += f" {self.metavar}"
        text = self.help or ""
        return names, f"{text}  [default: {self._default_text}]" if self._default_text else text


def option(*names: str, section: str, **kwargs: Any) -> Callable[[F], F]:
    """Return the decorator for an ``Option``."""
    return click.option(*names, cls=Option, section=section, **kwargs)


def _show_brief_help(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        command = ctx.command
        assert isinstance(command, (Command, LazyGroup))
        formatter = ctx.make_formatter()
        command.format_brief_help(ctx, formatter)
        click.echo(formatter.getvalue().rstrip("\n"), color=ctx.color)
        ctx.exit()


def _brief_help_option() -> click.Option:
    return click.Option(
        ["-h"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_show_brief_help,
        help="Show a short help and exit.",
    )


def _refuse(kind: str, name: str, known: Iterable[str], ctx: click.Context) -> NoReturn:
    near = difflib.get_close_matches(name, list(known), n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise click.UsageError(f"No such {kind}: {name}.{hint}", ctx=ctx)


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(click.Command):
    """A command whose help is in sections.

    Args:
        examples: Command lines for the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params.append(_brief_help_option())

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["--help"]  # -h is another

    def _sections(self, ctx: click.Context, *, is_brief: bool) -> dict[str, list[tuple[str, str]]]:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, Option) and (param.is_brief or not is_brief):
                sections.setdefault(param.section, []).append(param.get_help_record(ctx))
        return sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self._sections(ctx, is_brief=False)
        sections["Help"] = [("-h", "The most used options."), ("--help", "This text.")]
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
        _write_examples(formatter, self.examples)
        formatter.write_paragraph()
        formatter.write_text(ENV_NOTE)

    def format_brief_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, what the command does in a line, and the most used options."""
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(self.get_short_help_str(1000))  # the first sentence, not cut short
        records = [r for group in self._sections(ctx, is_brief=True).values() for r in group]
        with formatter.section("Most used options"):
            formatter.write_dl(records)
        formatter.write_paragraph()
        formatter.write_text(f"{ctx.command_path} --help shows all options.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        self._refuse_unknown_options(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_unknown_options(self, ctx: click.Context, args: Sequence[str]) -> None:
        """Refuse unknown names before click parses: it would read ``-nlg 8`` as ``-n`` with the value ``lg``."""
        takes_value: dict[str, bool] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option):
                takes_value |= dict.fromkeys((*param.opts, *param.secondary_opts), not param.is_flag)
        is_value = False
        for arg in args:
            if arg == "--":
                return
            if is_value:
                is_value = False
            elif arg in takes_value:
                is_value = takes_value[arg]
            elif arg.startswith("--"):
                name = arg.partition("=")[0]
                if name not in takes_value:
                    _refuse("option", name, takes_value, ctx)
            elif len(arg) > 2 and arg[0] == "-" and arg[1:].isalpha():  # not -n64, which is -n with its value
                is_flags = all(takes_value.get(f"-{letter}") is False for letter in arg[1:])
                if not is_flags:
                    _refuse("option", arg, takes_value, ctx)


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called.

    Args:
        commands: By section of the help: name of a command, its module, and what it does in a line.
        examples: Command lines for the help.
        notes: Terms and texts for the end of the help, by section.
    """

    def __init__(
        self,
        *args: Any,
        lazy_commands: Mapping[str, Mapping[str, tuple[str, str]]],
        examples: Sequence[str] = (),
        notes: Mapping[str, Sequence[tuple[str, str]]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sections = lazy_commands
        self._modules = {name: entry[0] for group in lazy_commands.values() for name, entry in group.items()}
        self._examples = examples
        self._notes = notes
        self.params.append(_brief_help_option())

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["--help"]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        command = getattr(import_module(self._modules[cmd_name]), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self._modules and not ctx.resilient_parsing:
            _refuse("command", args[0], self._modules, ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None and not ctx.resilient_parsing:
            path = config_path()
            if path is not None and not {"-h", "--help"} & set(rest):
                values = defaults(path, name, command, list(self._modules), ctx)
                ctx.default_map = {**(ctx.default_map or {}), name: values}
        return name, command, rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._write_commands(formatter)
        with formatter.section("Options"):
            formatter.write_dl([r for p in self.get_params(ctx) if (r := p.get_help_record(ctx))])
        _write_examples(formatter, self._examples)
        for title, rows in self._notes.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: ``format_options`` puts the commands first."""

    def _write_commands(self, formatter: click.HelpFormatter) -> None:
        for title, group in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in group.items()])

    def format_brief_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage and the commands."""
        self.format_usage(ctx, formatter)
        self._write_commands(formatter)
        formatter.write_paragraph()
        formatter.write_text(f"{ctx.command_path} COMMAND -h explains a command; --help says everything.")
