"""The TOML file with the user's own defaults: where it is, how it is checked, and what click makes of it.

A table for each command, and ``[all]`` for the options that commands share; keys are the long names of options without
their dashes. The command line wins over the environment, the environment over the file, a command's table over
``[all]``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

__all__ = ["CONFIG_VARIABLE", "config_path", "defaults"]

CONFIG_VARIABLE: Final = "PYLLAMA_DSV4_CONFIG"
SHARED: Final = "all"


def config_path() -> Path | None:
    """Return the file: the environment's, else the user's if it exists; None for no file.

    An empty variable means none.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    path = Path(base) / "pyllama-dsv4" / "config.toml"  # platformdirs' rule on Linux, without its import
    return path if path.exists() else None


def defaults(
    path: Path, name: str, command: click.Command, commands: list[str], ctx: click.Context
) -> dict[str, Any]:
    """Return a command's defaults by parameter name.

    Args:
        path: The file.
        name: The command's.
        command: The command.
        commands: The names of all commands.
        ctx: For errors.

    Raises:
        click.UsageError: naming file and line.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the config file {path} cannot be read: {error}", ctx=ctx) from error
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"the config file {path}: {error}", ctx=ctx) from error
    lines = _Lines(path, text, ctx)
    for table, values in tables.items():
        if table not in (SHARED, *commands) or not isinstance(values, Mapping):
            raise lines.error(table, None, _unknown("table", table, (SHARED, *commands)))
    found: dict[str, Any] = {}
    options = _options(command)
    for table in (SHARED, name):
        values = tables.get(table, {})
        known = _shared_names() if table == SHARED and values else set(options)
        for key, value in values.items():
            if key not in known:
                raise lines.error(table, key, _unknown("option", key, known))
            if key in options:
                found[options[key].name or key] = _converted(lines, table, key, value, options[key], ctx)
    return found


def _unknown(kind: str, name: str, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"no such {kind}: {name}." + (f" Did you mean {near[0]}?" if near else "")


def _options(command: click.Command) -> dict[str, click.Option]:
    return {
        name[2:]: param
        for param in command.params
        if isinstance(param, click.Option) and param.expose_value
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--")
    }


def _shared_names() -> set[str]:
    from .common import load_options, model_argument, output_options, sampling_options

    @click.command()
    @model_argument
    @load_options
    @sampling_options
    @output_options
    def every(**_: Any) -> None: ...

    return set(_options(every))


def _converted(
    lines: _Lines, table: str, key: str, value: Any, option: click.Option, ctx: click.Context
) -> Any:
    if option.is_flag:
        if not isinstance(value, bool):
            raise lines.error(table, key, f"{key} is true or false, not {value!r}.")
        return value != (f"--{key}" in option.secondary_opts)
    if isinstance(value, (bool, Mapping)):
        raise lines.error(table, key, f"{key} takes a value, not {value!r}.")
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        if key != "rpc":
            raise lines.error(table, key, f"{key} takes one value, not a list.")
        values = [",".join(map(str, value))]
    try:
        texts = [option.type.convert(str(one), option, ctx) for one in values]
    except click.BadParameter as error:
        raise lines.error(table, key, f"{key}: {error.message}") from error
    return [str(one) for one in values] if option.multiple else (values[0] if texts else None)


class _Lines:
    """Finds the lines that errors are about."""

    def __init__(self, path: Path, text: str, ctx: click.Context) -> None:
        self._path = path
        self._lines = text.splitlines()
        self._ctx = ctx

    def error(self, table: str, key: str | None, text: str) -> click.UsageError:
        """Return the error about a key of a table, or about the table itself."""
        place = ""
        for number, line in enumerate(self._lines, 1):
            if head := re.match(r"""\s*\[\s*["']?([^\]"']+?)["']?\s*\]""", line):
                place = head[1]
            entry = re.match(r"""\s*["']?([\w.-]+?)["']?\s*=""", line)
            is_table = key is None and (
                place == table or (not place and entry is not None and entry[1] == table)
            )
            if is_table or (place == table and entry is not None and entry[1] == key):
                return click.UsageError(f"the config file {self._path}, line {number}: {text}", ctx=self._ctx)
        return click.UsageError(f"the config file {self._path}: {text}", ctx=self._ctx)
