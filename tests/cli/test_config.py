"""The config file: what it sets, who wins, and errors that name the line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]
Configured = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def configured(run: Run, tmp_path: Path) -> Configured:
    """Run the command with a config file."""

    def call(
        text: str, *args: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return run(*args, env={"PYLLAMA_DSV4_CONFIG": str(path), **(env or {})})

    return call


def test_it_sets_options(configured: Configured, model: Path) -> None:
    text = f'[all]\nctx-size = 300\ntemp = 0\nmmap = false\n\n[run]\nn-predict = 3\nmodel = "{model}"\n'
    done = configured(text, "run", "-p", "Once")
    assert done.returncode == 0, done.stderr
    assert b"answer 3" in done.stderr
    assert b"of 300" in done.stderr


def test_who_wins(configured: Configured, model: Path) -> None:
    text = "[all]\nctx-size = 300\n\n[run]\nctx-size = 301\nn-predict = 1\n"
    environment = {"PYLLAMA_DSV4_CTX_SIZE": "302"}
    assert b"of 301" in configured(text, "run", model, "-p", "a").stderr
    assert b"of 302" in configured(text, "run", model, "-p", "a", env=environment).stderr
    assert b"of 303" in configured(text, "run", model, "-p", "a", "-c", 303, env=environment).stderr


def test_tables_of_other_commands_and_options_that_a_command_lacks_are_left_alone(
    configured: Configured, model: Path
) -> None:
    text = "[all]\ntemp = 0\n\n[serve]\nport = 1\n"
    assert configured(text, "tokenize", model, "-p", "a").returncode == 0


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[run]\nctx-sise = 1\n", 2, "no such option: ctx-sise. Did you mean ctx-size?"),
        ("[all]\n\nprompt = 'a'\n", 3, "no such option: prompt."),
        ("[all]\ntemp = 0\n\n[rnu]\n", 4, "no such table: rnu. Did you mean run?"),
        ("temp = 0\n", 1, "no such table: temp."),
        ("[all]\ntop-p = 0.5\n[run]\ntop-p = 3\n", 4, "top-p: 3.0 is not in the range"),
        ("[run]\nmlock = 1\n", 2, "mlock is true or false, not 1."),
        ("[run]\nctx-size = true\n", 2, "ctx-size takes a value"),
        ("[run]\nctx-size = [1]\n", 2, "ctx-size takes one value"),
        ('[run]\nrpc = ["a:1"]\nctx-size = "x"\n', 3, "ctx-size"),
        ("[run]\ntemp = \n", 2, "nvalid value"),
    ],
)
def test_errors_name_the_line(configured: Configured, text: str, line: int, message: str) -> None:
    done = configured(text, "run", "x.gguf", "-p", "a")
    assert done.returncode == 2
    error = done.stderr.decode()
    assert f"line {line}" in error
    assert message in error
    assert "Traceback" not in error


def test_a_file_that_is_named_must_be_there(run: Run) -> None:
    done = run("run", "x.gguf", "-p", "a", env={"PYLLAMA_DSV4_CONFIG": "/no/such.toml"})
    assert done.returncode == 2
    assert b"/no/such.toml" in done.stderr


def test_help_works_beside_a_broken_file(configured: Configured) -> None:
    assert configured("[", "run", "--help").returncode == 0
    assert configured("[", "--help").returncode == 0


def test_the_users_file_is_found(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pyllama-dsv4"
    folder.mkdir()
    (folder / "config.toml").write_text("[nope]\n", encoding="utf-8")
    done = run("run", "x.gguf", "-p", "a", env={"XDG_CONFIG_HOME": str(tmp_path)})
    assert (done.returncode, b"no such table: nope" in done.stderr) == (2, True)
    none = run("run", "x.gguf", "-p", "a", env={"XDG_CONFIG_HOME": str(tmp_path), "PYLLAMA_DSV4_CONFIG": ""})
    assert none.returncode == 3
