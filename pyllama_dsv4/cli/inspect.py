"""The command ``pyllama-dsv4 inspect``: a model file in tables or as JSON; the work is ``pyllama_dsv4.inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from pyllama_dsv4.inspect import inspect_file

from .help import Command, option

__all__ = ["inspect"]

OUTPUT: Final = "Output"
ALL_TENSORS: Final = "*"
N_DERIVED_ITEMS: Final = 8
"""Entries of a derived list that are shown before it is cut."""


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 inspect flash.gguf",
        "pyllama-dsv4 inspect flash.gguf --json",
        "pyllama-dsv4 inspect flash.gguf --tensors blk.0.",
        "pyllama-dsv4 inspect flash.gguf --tensors '*.attn_q_?.weight'",
        "pyllama-dsv4 inspect flash.gguf --histogram output.weight --plot out.png",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--json", "as_json", is_flag=True, section=OUTPUT, is_brief=True, has_env=False,
    help="Print one JSON object instead of tables.",
)  # fmt: skip
@option(
    "--tensors", is_flag=False, flag_value=ALL_TENSORS, metavar="[PATTERN]", section=OUTPUT, is_brief=True,
    has_env=False, help="List tensors: all, those whose name contains PATTERN, or matches it if it has * ? or [].",
)  # fmt: skip
@option(
    "--histogram", "histogram_of", metavar="TENSOR", section=OUTPUT, is_brief=True, has_env=False,
    help="Count scales and codes of one tensor; reads its data.",
)  # fmt: skip
@option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="NAME.png", section=OUTPUT,
    has_env=False, help="Draw the histogram into a picture; needs matplotlib.",
)  # fmt: skip
def inspect(
    file: Path, as_json: bool, tensors: str | None, histogram_of: str | None, plot: Path | None
) -> None:
    """Show what a GGUF file contains, without loading it.

    FILE is a GGUF file, or the first shard of a split model. Its header is checked as before a load: what a load
    would refuse ends in a message that names the tensor or key, and exit code 3. Known forms of DeepSeek-V4
    that this package does not run are described all the same. Tensor data is read for --histogram only.
    """
    if histogram_of is not None:
        _show_histogram(file, histogram_of, plot, as_json=as_json)
        return
    if plot is not None:
        raise click.UsageError("--plot draws a histogram: say of which tensor with --histogram TENSOR.")
    info = inspect_file(file, tensors=tensors)
    if as_json:
        click.echo(json.dumps(info, indent=2))
        return
    tables = _tables(info)
    if sys.stdout.isatty():
        _print_rich(tables)
    else:
        click.echo("\n\n".join(_plain(table) for table in tables))


def _show_histogram(file: Path, tensor: str, plot: Path | None, *, as_json: bool) -> None:
    from pyllama_dsv4 import histogram

    counts = histogram.histogram(file, tensor)
    if plot is not None:
        histogram.plot(counts, plot)
    if as_json:
        click.echo(json.dumps(counts.to_json(), indent=2))
    else:
        click.echo("\n".join(_printable(line) for line in histogram.render_text(counts).splitlines()))
        if plot is not None:
            click.echo(f"\nwrote {_printable(str(plot))}")


class _Table(NamedTuple):
    title: str
    columns: tuple[str, ...]  # a leading '>' right-aligns; all empty: no heading
    rows: Sequence[tuple[str, ...]]

    def narrowed(self, width: int) -> _Table:
        """Return the table without columns that its width of `width` has no room for."""
        left_out = [i for i, column in enumerate(self.columns) if column in _LEFT_OUT]
        if not left_out or sum(max(map(len, cells)) + 2 for cells in zip(*self.rows, strict=True)) <= width:
            return self
        kept = [i for i in range(len(self.columns)) if i not in left_out]
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        return _Table(self.title, tuple(self.columns[i] for i in kept), rows)


_LEFT_OUT: Final = (">id", ">parameters")
"""Headings of columns that a narrow terminal does without."""


def _tables(info: dict[str, Any]) -> list[_Table]:
    tables = [_summary(info), _engines(info["engines"]), _types(info)]
    if info["type_42"] is not None:
        tables.append(_type_42(info["type_42"]))
    if info["hparams"] is not None:
        tables.append(_hparams(info["hparams"]))
    if info["keys"]["derived"]:
        prefix = f"{info['architecture']}."
        rows = [(key.removeprefix(prefix), _short(value)) for key, value in info["keys"]["derived"].items()]
        tables.append(_Table("Keys that the file lacks, derived", ("", ""), rows))
    if "tensors" in info:
        tables.append(_tensors(info["tensors"]))
    return tables


def _summary(info: dict[str, Any]) -> _Table:
    n_shards = len(info["shards"])
    vocabulary = info["vocabulary"]
    rows = [
        ("file", info["path"] + (f" and {n_shards - 1} more shards" if n_shards > 1 else "")),
        ("size", _size(info["n_file_bytes"])),
        ("architecture", _text(info["architecture"])),
        (
            "dialect",
            info["dialect"] if info["dialect"] != "other" else "none (this package runs deepseek4 only)",
        ),
        *_form(info),
        ("context length", _number(info["context_length"])),
        ("parameters", f"{info['n_params']:,} in {info['n_tensors']:,} tensors"),
        ("file type", _file_type(info)),
        ("metadata", f"{info['keys']['n_present']} keys, {len(info['keys']['derived'])} more derived"),
        (
            "vocabulary",
            f"{_text(vocabulary['model'])}, {_number(vocabulary['n_tokens'])} tokens, pre-tokeniser "
            f"{_text(vocabulary['pre'])}",
        ),
        ("chat template", _chat_template(info["chat_template"])),
        (
            "GGUF",
            f"version {info['gguf_version']}, data from byte {info['data_start']:,}, "
            f"alignment {info['alignment']}",
        ),
    ]
    if info["n_trailing_bytes"]:
        rows.append(("unused", f"{info['n_trailing_bytes']:,} bytes behind the last tensor"))
    return _Table(_text(info["name"], "(no name)"), ("", ""), rows)


def _form(info: dict[str, Any]) -> list[tuple[str, str]]:
    form = info["form"]
    if form is None:
        return []
    runs = "" if form["is_runnable"] else "; this package does not run it"
    rows = [("form", f"{form['name']}: {form['description']}{runs}")]
    return rows + ([("generation", info["generation"])] if info["generation"] is not None else [])


def _engines(engines: Sequence[dict[str, Any]]) -> _Table:
    words = {True: "opens it", False: "does not open it", None: "not known"}
    rows = []
    for engine in engines:
        why = engine["why"] or [""]
        rows.append((engine["engine"], words[engine["opens"]], why[0]))
        rows += [("", "", reason) for reason in why[1:]]
    return _Table("Engines", ("", "", ""), rows)


def _types(info: dict[str, Any]) -> _Table:
    total = max(1, info["n_tensor_bytes"])
    rows = [
        (
            type_["name"],
            str(type_["id"]),
            f"{type_['n_tensors']:,}",
            f"{type_['n_params']:,}",
            f"{type_['n_bytes']:,}",
            f"{100 * type_['n_bytes'] / total:.2f} %",
        )
        for type_ in info["types"]
    ]
    rows.append(
        (
            "total",
            "",
            f"{info['n_tensors']:,}",
            f"{info['n_params']:,}",
            f"{info['n_tensor_bytes']:,}",
            "",
        )
    )
    return _Table("Types", ("type", ">id", ">tensors", ">parameters", ">bytes", ">share"), rows)


def _type_42(type_42: dict[str, Any]) -> _Table:
    example = type_42["example"]
    verdicts = ", ".join(f"{name} ({n:,} tensors)" for name, n in type_42["verdicts"].items())
    rows = [
        ("verdict", verdicts),
        ("example", f"{example['tensor']}: {example['n_elements']:,} elements"),
        ("bytes up to the next tensor", _number(example["n_bytes_available"])),
        *((f"bytes as {name}", _number(size, "impossible")) for name, size in example["sizes"].items()),
    ]
    return _Table("Type 42, claimed by three formats, told apart by stride", ("", ""), rows)


def _hparams(hparams: dict[str, Any]) -> _Table:
    ratios = hparams["compress_ratios"][: hparams["n_layer"]]
    counts = ", ".join(f"{ratios.count(ratio)} of ratio {ratio}" for ratio in sorted(set(ratios)))
    h = hparams
    return _Table(
        "Model",
        ("", ""),
        [
            ("layers", f"{h['n_layer']}: {counts}; {h['n_hash_layer']} route by token"),
            ("width", f"{h['n_embd']:,} in {h['hc_count']} streams"),
            (
                "attention",
                f"{h['n_head']} heads of {h['head_dim']}, {h['n_rot']} rotated, window {h['n_swa']}",
            ),
            ("low ranks", f"queries {h['q_lora_rank']:,}, outputs {h['o_groups']} x {h['o_lora_rank']:,}"),
            (
                "indexer",
                f"{h['indexer_n_head']} heads of {h['indexer_head_dim']}, {h['indexer_top_k']:,} rows selected",
            ),
            (
                "experts",
                f"{h['n_expert_used']} of {h['n_expert']} and {h['n_expert_shared']} shared, "
                f"{h['n_ff_exp']:,} wide",
            ),
        ],
    )


def _tensors(tensors: Sequence[dict[str, Any]]) -> _Table:
    is_split = len({tensor["shard"] for tensor in tensors}) > 1
    columns: tuple[str, ...] = (
        "name",
        "dims",
        "type",
        *((">shard",) if is_split else ()),
        ">offset",
        ">bytes",
    )
    rows: list[tuple[str, ...]] = [
        (
            tensor["name"],
            " x ".join(map(str, tensor["dims"])),
            tensor["type"],
            *((str(tensor["shard"]),) if is_split else ()),
            f"{tensor['offset']:,}",
            f"{tensor['n_bytes']:,}",
        )
        for tensor in tensors
    ]
    return _Table(f"Tensors ({len(rows):,})", columns, rows)


def _size(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit} ({n:,} bytes)"
    return f"{n:,} bytes"


def _file_type(info: dict[str, Any]) -> str:
    number = _number(info["file_type"])
    return number if info["file_type_name"] is None else f"{number}, {info['file_type_name']}"


def _chat_template(template: dict[str, Any]) -> str:
    if not template["is_present"]:
        text = "none"
    else:
        text = f"{template['n_chars']:,} characters" + (", DeepSeek-V4's" if template["is_v4"] else "")
    return text + ("; a load uses DeepSeek-V4's own instead" if template["is_replaced"] else "")


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    shown = ", ".join(map(str, value[:N_DERIVED_ITEMS]))
    return f"[{shown}{', ...' if len(value) > N_DERIVED_ITEMS else ''}] ({len(value)} entries)"


def _number(n: int | None, absent: str = "unknown") -> str:
    return absent if n is None else f"{n:,}"


def _text(text: str | None, absent: str = "none") -> str:
    return absent if text is None else text


def _printable(text: str) -> str:
    """Escape what a file's names could do to a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()


def _plain(table: _Table) -> str:
    heading = [tuple(column.removeprefix(">") for column in table.columns)] if any(table.columns) else []
    cells = [[_printable(cell) for cell in row] for row in (*heading, *table.rows)]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(table.columns))]
    lines = [_printable(table.title)]
    for row in cells:
        aligned = (
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        )
        lines.append("  " + "  ".join(aligned).rstrip())
    return "\n".join(lines)


def _print_rich(tables: Sequence[_Table]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for i, table in enumerate(tables):
        if i > 0:
            console.print()
        table = table.narrowed(console.width)
        has_heading = any(table.columns)
        grid = Table(
            title=Text(_printable(table.title), style="bold"),
            title_justify="left",
            box=None,
            show_header=has_heading,
            header_style="dim",
            pad_edge=False,
        )
        for j, column in enumerate(table.columns):
            style = "cyan" if j == 0 and not has_heading else None
            grid.add_column(
                column.removeprefix(">"),
                justify="right" if column.startswith(">") else "left",
                style=style,
                overflow="fold",
            )
        for row in table.rows:
            grid.add_row(*(Text(_printable(cell)) for cell in row))
        console.print(grid)
