"""The pictures of docs/terminal.md: real sessions of the command on a pseudo-terminal. terminal_shots.py [NAME ...]

Runs the installed pyllama-dsv4 in a home folder of its own and writes docs/terminal/NAME.svg, text that stays text.
--check compares those that do not depend on the machine with what is there, and writes nothing. --columns, --no-color
and --text are for looking: another width, NO_COLOR, and the screen's text on stdout instead of a file.
``tests/packaging/test_terminal_shots.py`` calls --check.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shlex
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pexpect
import pyte

OUT = Path(__file__).resolve().parent.parent / "docs" / "terminal"
COMMAND = Path(sys.executable).with_name("pyllama-dsv4")
N_ROWS = 400
TIMEOUT_S = 120.0
PROMPT = "> "
CHAT = "pyllama-dsv4 chat -n 80 --temp 0 -t 2"

CONVERSATION = [
    {"role": "user", "content": "Is <think> a token?"},
    {"role": "assistant", "reasoning_content": "They ask about markup.", "content": "Not in a message."},
    {"role": "user", "content": "And <｜User｜>?"},
]
CONFIG = "[chat]\ntemp = 0.6\nctx-sise = 32768\n"


@dataclass(frozen=True)
class Shot:
    """One session.

    Attributes:
        commands: Typed one after the other, as a shell shows them.
        keys: For the last command, what is typed at its prompts.
        is_same: It shows the same on every machine.
        columns: Width of the terminal.
        env: Added to the environment.
    """

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()
    is_same: bool = True
    columns: int = 100
    env: tuple[tuple[str, str], ...] = ()


SHOTS = {
    "help": Shot(("pyllama-dsv4 --help",), columns=80),
    "chat": Shot((CHAT,), ("What is 17 + 25?", "/think", "And 25 + 17?", "/stats", "\x04"), is_same=False),
    "explain": Shot(("pyllama-dsv4 explain flash.gguf -f conversation.json",), columns=80),
    "inspect": Shot(("pyllama-dsv4 inspect flash.gguf",), columns=110),
    "plan": Shot(("pyllama-dsv4 plan flash.gguf --ram 64 --bandwidth 60 --disk 3",), columns=80),
    "doctor": Shot(("pyllama-dsv4 doctor flash.gguf",), is_same=False),
    "errors": Shot(
        (
            "pyllama-dsv4 chta",
            "pyllama-dsv4 run flash.gguf -p Hello --tepm 0",
            "pyllama-dsv4 inspect falsh.gguf",
            "PYLLAMA_DSV4_CONFIG=config.toml pyllama-dsv4 chat flash.gguf",
        )
    ),
}


# --- sessions ---


class _Screen(pyte.Screen):
    """A screen that knows dim text, as italics, which nothing here uses."""

    def select_graphic_rendition(self, *attrs: int, private: bool = False) -> None:
        if private:  # a question to the terminal, no style
            return
        if 22 in attrs:
            attrs = (*attrs, 23)
        is_color = 38 in attrs or 48 in attrs  # 38;2;R;G;B
        super().select_graphic_rendition(*(3 if a == 2 and not is_color else a for a in attrs))


class _Session:
    """A terminal in which one command after another runs."""

    def __init__(self, folder: Path, columns: int, env: dict[str, str]) -> None:
        self.screen = _Screen(columns, N_ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._folder, self._columns, self._env = folder, columns, env

    def _read(self, child: pexpect.spawn[bytes]) -> bool:
        """Read what comes within a moment; return whether the command goes on."""
        try:
            self._stream.feed(child.read_nonblocking(65536, 0.2))
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            return False
        return True

    def run(self, text: str, keys: Sequence[str]) -> None:
        """Run a command line as a shell would, and type `keys` at its prompts."""
        self._stream.feed(f"\x1b[1m$ {text}\x1b[0m\r\n".encode())
        words = shlex.split(text)
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_0-9]+=", word))
        arguments = words[len(given) + 1 :]
        child = pexpect.spawn(
            str(COMMAND), arguments, cwd=str(self._folder), env={**self._env, **given},
            dimensions=(N_ROWS, self._columns), timeout=TIMEOUT_S,
        )  # fmt: skip
        child.delaybeforesend = None
        for key in keys:
            self._wait_for_prompt(child)
            child.send(key if key < " " else f"{key}\r")
            self._read(child)
        end_s = time.monotonic() + TIMEOUT_S
        while self._read(child):
            if time.monotonic() > end_s:
                raise TimeoutError(f"{text} does not end")
        child.close()

    def _wait_for_prompt(self, child: pexpect.spawn[bytes]) -> None:
        end_s = time.monotonic() + TIMEOUT_S
        while True:
            goes_on = self._read(child)
            cursor = self.screen.cursor
            if cursor.x == len(PROMPT) and self.screen.display[cursor.y].rstrip() == PROMPT.rstrip():
                return
            if not goes_on or time.monotonic() > end_s:
                raise TimeoutError("no prompt:\n" + "\n".join(lines(self.screen)))


def lines(screen: pyte.Screen) -> list[str]:
    """Return the text of a screen's rows, without empty ones at the end."""
    rows = [row.rstrip() for row in screen.display]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def prepare(folder: Path) -> None:
    """Write the files that sessions use: a true header of V4-Flash without its weights, and small ones."""
    from pyllama_dsv4 import synth

    synth.write_sparse_native(folder / "flash.gguf")
    (folder / "conversation.json").write_text(json.dumps(CONVERSATION), encoding="utf-8")
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")


def take(shot: Shot, folder: Path, *, columns: int | None = None, is_colored: bool = True) -> pyte.Screen:
    """Run a session in a folder that was prepared; return the screen at its end."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYLLAMA_DSV4_", "XDG_", "LINES", "COLUMNS"))
    }
    kept.pop("NO_COLOR", None)
    env = {
        **kept, **dict(shot.env), **({} if is_colored else {"NO_COLOR": "1"}), "HOME": str(folder),
        "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1",
    }  # fmt: skip
    session = _Session(folder, columns or shot.columns, env)
    for command in shot.commands:
        session.run(command, shot.keys if command is shot.commands[-1] else ())
    return session.screen


# --- pictures ---

_WIDTH, _HEIGHT, _MARGIN = 8.4, 18, 12
_COLORS = {
    "default": "#d8dee9", "black": "#4c566a", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#eceff4",
}  # fmt: skip
_STYLE = (
    "text{font:14px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#d8dee9;white-space:pre}"
)


def _runs(row: Sequence[pyte.screens.Char]) -> Iterator[tuple[int, str, pyte.screens.Char]]:
    """Yield a row's texts of one style, each with its first column. What is no ASCII stands alone: widths differ."""
    start, text, style = 0, "", row[0]
    for column, char in enumerate(row):
        is_same = char._replace(data="") == style._replace(data="")
        if not text or (is_same and char.data.isascii() and text.isascii()):
            start, style = (column, char) if not text else (start, style)
            text += char.data
        else:
            yield start, text, style
            start, text, style = column, char.data, char
    if text:
        yield start, text, style


def _attributes(style: pyte.screens.Char) -> str:
    color = _COLORS.get(style.fg.removeprefix("bright"), f"#{style.fg}")
    out = "" if style.fg == "default" else f' fill="{color}"'
    if style.bold:
        out += ' font-weight="bold"'
    if style.italics:
        out += ' fill-opacity="0.6"'
    decoration = " ".join(
        name
        for name, is_on in (("underline", style.underscore), ("line-through", style.strikethrough))
        if is_on
    )
    return out + (f' text-decoration="{decoration}"' if decoration else "")


def svg(screen: pyte.Screen, title: str) -> str:
    """Return a screen as an SVG picture without references to anything else."""
    n_rows = len(lines(screen))
    width, height = screen.columns * _WIDTH + 2 * _MARGIN, n_rows * _HEIGHT + 2 * _MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" xml:space="preserve">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" rx="8" fill="#1f2430"/>',
    ]
    for y in range(n_rows):
        row = [screen.buffer[y][x] for x in range(screen.columns)]
        spans = []
        for column, text, style in _runs(row):
            is_plain = not (style.underscore or style.strikethrough)
            shown = text.rstrip() if is_plain else text
            if shown:
                n = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)
                spans.append(
                    f'<tspan x="{_MARGIN + column * _WIDTH:.1f}" textLength="{n * _WIDTH:.1f}"'
                    f"{_attributes(style)}>{html.escape(shown, quote=False)}</tspan>"
                )
        if spans:
            out.append(f'<text y="{_MARGIN + (y + 1) * _HEIGHT - 5}">{"".join(spans)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the pictures of docs/terminal.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHOTS))
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--columns", type=int, help="another width")
    parser.add_argument("--no-color", action="store_true", help="with NO_COLOR")
    parser.add_argument("--text", action="store_true", help="print the screen's text instead")
    parser.add_argument("--out", type=Path, default=OUT, help="another folder")
    args = parser.parse_args()
    unknown = set(args.names) - set(SHOTS)
    if unknown:
        parser.error(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(SHOTS)}")
    different = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for shot_name in args.names or SHOTS:
            shot = SHOTS[shot_name]
            if args.check and not shot.is_same:
                continue
            screen = take(shot, folder, columns=args.columns, is_colored=not args.no_color)
            picture, path = svg(screen, shot.commands[0]), args.out / f"{shot_name}.svg"
            if args.text:
                print("\n".join(lines(screen)))
            elif args.check:
                if not path.exists() or path.read_text(encoding="utf-8") != picture:
                    different.append(shot_name)
            else:
                args.out.mkdir(parents=True, exist_ok=True)
                path.write_text(picture, encoding="utf-8")
    if different:
        print(
            f"not as they are now: {', '.join(different)}; run python tools/terminal_shots.py",
            file=sys.stderr,
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
