"""Every command the same way: help, a good run and two bad ones, through pipes and on a terminal, and Ctrl-C.

What a command does is its own file's; this table is what keeps a new command from having none of it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from cli_process import TIMEOUT_S, Terminal, command

pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")

from pyllama_dsv4 import cli, synth
from pyllama_dsv4.convert import convert, write_recipe

Run = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Terminal]

TRACEBACK = "Traceback"
COLORED = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])(?:;\d+)*m")
ANSWER = "-c 512 -n 6 --temp 0 -t 1"
LONG = "word " * 3000


@dataclass(frozen=True)
class Verb:
    """How one command is called.

    Attributes:
        good: Arguments of a run that succeeds; names in braces are files of ``places``.
        shows: Pattern of what it then writes.
        near: A mistyped option, and the option that is named for it.
        bad: Arguments that must fail, the exit code, and a part of the message.
        busy: Arguments that keep it at work, or waiting for what a test does not send; as ``good`` where it is empty.
        sign: Pattern of what it writes once it is at work; where it is empty, its output is held up instead.
        typed: What is typed on a terminal, or piped.
        serves: It goes on until it is interrupted.
    """

    good: str
    shows: str
    near: tuple[str, str]
    bad: tuple[str, int, str]
    busy: str = ""
    sign: str = ""
    typed: str = ""
    serves: bool = False


VERBS = {
    "chat": Verb(
        f"{{model}} {ANSWER}", r"prompt \d+.*\| answer \d", ("--sytem-prompt", "--system-prompt"),
        ("{missing}", 3, "no such file"), "{model} -c 8192 -n 8000", r"needs [\d.]+ GB", typed="Hello",
    ),
    "run": Verb(
        f"{{model}} -p Hello {ANSWER}", r"prompt \d+.*\| answer \d", ("--tepm", "--temp"),
        ("{broken} -p Hello", 3, "broken.gguf"), "{model} -p Hello -c 8192", r"needs [\d.]+ GB",
    ),
    "serve": Verb(
        "{model} --port 0 -c 512 -t 1", r"listening on http://127\.0\.0\.1:\d+", ("--prot", "--port"),
        ("{broken}", 3, "broken.gguf"), serves=True,
    ),
    "rpc-server": Verb(
        "--port 0 -t 1", r"listening on 127\.0\.0\.1:\d+", ("--hots", "--host"),
        ("--port 70000", 2, "--port"), serves=True,
    ),
    "tokenize": Verb(
        "{model} -p Hello", r'^ *\d+ +"Hello"', ("--idss", "--ids"), ("{broken} -p a", 3, "not a GGUF file"),
    ),
    "explain": Verb(
        "{model} -p Hello", r"\d+ tokens: \d+ special", ("--thnik", "--think"),
        ("{model} -f {broken}", 2, "line 1"),
    ),
    "inspect": Verb("{model}", r"deepseek4", ("--jsn", "--json"), ("{missing}", 3, "missing.gguf")),
    "plan": Verb(
        "{model} --bandwidth 20", r"m\.gguf: fits", ("--bandwith", "--bandwidth"),
        ("{model} --ram 0.001 --bandwidth 20", 4, "memory"),
    ),
    "convert": Verb(
        "{checkpoint} --outfile {out}", r"wrote .*out\.gguf", ("--outfil", "--outfile"),
        ("{missing} --outfile {out}", 3, "missing.gguf"), "{large} --outfile {out}", r"\d %",
    ),
    "restore": Verb(
        "{native} {out} --recipe {recipe}", r"rebuilt 1 of 1 shards", ("--recip", "--recipe"),
        ("{missing} {out} --recipe {recipe}", 3, "missing.gguf"),
    ),
    "verify": Verb(
        "{native}", r"native\.gguf: sound", ("--agaisnt", "--against"), ("{broken}", 3, "broken.gguf"),
        "{sparse}", r"\d %",
    ),
    "translate": Verb(
        "{native} {out} --to upstream", r"wrote .*out\.gguf", ("--dens", "--dense"),
        ("{native} {out} --to nowhere", 2, "--to"), "{sparse} {out} --to upstream --dense q8_0", r"\d %",
    ),
    "quantize": Verb(
        "{model} {out} q8_0 -t 1", r"wrote .*out\.gguf", ("--dry-rnu", "--dry-run"),
        ("{model} {out} q9_9", 2, "q9_9"), "{sparse} {out} q8_0 --allow-requantize -t 1", r"\d %",
    ),
    "doctor": Verb("{model}", r"ok +model", ("--jsno", "--json"), ("{broken}", 3, "verify")),
    "selftest": Verb(
        "{native}", r"\d+ checks passed", ("--therads", "--threads"), ("{broken}", 3, "broken.gguf"),
    ),
    "bench": Verb(
        "{model} -p 8 -n 2 -t 1", r"decode +2", ("--n-promt", "--n-prompt"), ("{model} -p many", 2, "many"),
    ),
    "score": Verb(
        "{model} --text 'a b c' -c 128 -t 1", r"nll [\d.]+", ("--txet", "--text"),
        ("{model} -f {missing}", 3, "missing.gguf"), f"{{model}} --text '{LONG}' -c 8192 -ub 16 -t 1",
        r"needs [\d.]+ GB",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    checkpoint = synth.write_checkpoint(folder / "Tiny-V4", seed=3, tokenizer="bytes")
    native, recipe = folder / "native.gguf", folder / "native.recipe"
    convert(checkpoint, native)
    write_recipe(checkpoint, recipe)
    broken = folder / "broken.gguf"
    broken.write_bytes(b"no model")
    (folder / "m.gguf").symlink_to(model)
    layer = synth.flash_config(num_hidden_layers=1, num_hash_layers=1, compress_ratios=[0, 0])
    return {
        "model": folder / "m.gguf",
        "checkpoint": checkpoint,
        "native": native,
        "recipe": recipe,
        "broken": broken,
        "missing": folder / "missing.gguf",
        "sparse": synth.write_sparse_native(folder / "sparse.gguf", layer, tokenizer=None),
        "large": synth.write_checkpoint(
            folder / "large", {**layer, "vocab_size": 1024}, seed=0, is_sparse=True
        ),
    }


@pytest.fixture
def call(files: dict[str, Path], tmp_path: Path) -> Callable[[str, str], list[str]]:
    """Return the arguments of a command line with files in it."""

    def arguments(name: str, text: str) -> list[str]:
        return [name, *shlex.split(text.format(**files, out=tmp_path / "out.gguf"))]

    return arguments


Call = Callable[[str, str], list[str]]
Begin = Callable[[list[str], int], subprocess.Popen[bytes]]


@pytest.fixture
def begin(environment: dict[str, str]) -> Iterator[Begin]:
    """Start the command in pipes; it is gone at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def call(args: list[str], stdout: int) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command(*args), stdin=pipe, stdout=stdout, stderr=pipe, env=environment)
        )
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


every = pytest.mark.parametrize("name", VERBS)


def test_no_command_is_left_out() -> None:
    assert set(VERBS) == set(cli._cli.list_commands(click.Context(cli._cli)))


@every
def test_help(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert text.startswith(f"Usage: pyllama-dsv4 {name} ")
    for section in ("Examples:", f"pyllama-dsv4 {name}", "Help:", "~/.config/pyllama-dsv4/config.toml"):
        assert section in text
    assert "..." not in run(name, "-h").stdout.decode().split("Most used options:")[0]  # whole sentences


@every
def test_help_on_a_terminal(terminal: Start, name: str) -> None:
    text, code = terminal(name, "--help", columns=60).end()
    assert code == 0
    assert max(map(len, text.splitlines())) <= 60
    assert "Examples:" in text


# --- a good run ---


@every
def test_a_good_run_in_pipes(run: Run, begin: Begin, call: Call, name: str) -> None:
    verb = VERBS[name]
    if verb.serves:
        process = begin(call(name, verb.good), subprocess.PIPE)
        seen = wait_for(process, verb.shows)
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 143
        written = out + seen + rest
    else:
        done = run(*call(name, verb.good), input=verb.typed.encode())
        assert done.returncode == 0, done.stderr
        written = done.stdout + done.stderr
    assert re.search(verb.shows, written.decode(), re.MULTILINE), written
    assert b"\x1b" not in written  # neither colour nor animation
    assert TRACEBACK.encode() not in written


@every
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_a_good_run_on_a_terminal(terminal: Start, call: Call, name: str, env: dict[str, str]) -> None:
    verb = VERBS[name]
    shown = terminal(*call(name, verb.good), env=env)
    if verb.typed:
        shown.prompt()
        shown.ask(verb.typed)
        shown.keys("\x04")
    if verb.serves:
        shown.wait(lambda: re.search(verb.shows, "\n".join(shown.lines())) is not None, verb.shows)
        shown.keys("\x03")
    text, code = shown.end()
    assert code == (130 if verb.serves else 0), text
    assert re.search(verb.shows, text, re.MULTILINE), text
    assert TRACEBACK not in text
    if env:
        assert not COLORED.search(shown.raw)


# --- bad runs ---


@every
def test_a_mistyped_option_is_named_with_the_nearest(run: Run, terminal: Start, name: str) -> None:
    wrong, right = VERBS[name].near
    done = run(name, wrong)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"No such option: {wrong}. Did you mean {right}" in done.stderr.decode()
    text, code = terminal(name, wrong).end()
    assert code == 2
    assert f"Did you mean {right}" in text


@every
def test_a_bad_run(run: Run, terminal: Start, call: Call, name: str) -> None:
    args, expected, message = VERBS[name].bad
    done = run(*call(name, args))
    written = (done.stdout + done.stderr).decode()
    assert done.returncode == expected, written
    assert message in written
    assert TRACEBACK not in written
    assert "\x1b" not in written
    text, code = terminal(*call(name, args), columns=300).end()
    assert code == expected
    assert message in text


# --- Ctrl-C ---


def wait_for(process: subprocess.Popen[bytes], pattern: str) -> bytes:
    """Read stderr until it has a pattern; return it."""
    assert process.stderr is not None
    seen = b""
    while not re.search(pattern.encode(), seen):
        data = os.read(process.stderr.fileno(), 4096)
        assert data, f"no {pattern!r} in {seen!r}"
        seen += data
    return seen


def wait_until_it_rests(pid: int) -> None:
    """Wait until a process has slept for half a second: it is held up."""
    end_s = time.monotonic() + TIMEOUT_S
    before, since_s = "", time.monotonic()
    while time.monotonic() - since_s < 0.5:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        state, times = fields[0], " ".join(fields[11:13])
        if times != before or state != "S" or times == "0 0":
            before, since_s = times, time.monotonic()
        assert time.monotonic() < end_s, "it does not rest"
        time.sleep(0.02)


@every
def test_ctrl_c_in_pipes(begin: Begin, call: Call, name: str, tmp_path: Path) -> None:
    """While it works, where that takes long; else while nobody reads what it writes."""
    verb = VERBS[name]
    sign = verb.sign or (verb.shows if verb.serves else "")
    reader, writer = os.pipe()
    if not sign:
        os.set_blocking(writer, False)
        with open(writer, "wb", buffering=0, closefd=False) as pipe:
            while pipe.write(bytes(1024)):
                pass
        os.set_blocking(writer, True)
    process = begin(call(name, verb.busy or verb.good), writer)
    os.close(writer)
    if verb.typed:
        assert process.stdin is not None
        process.stdin.write(f"{verb.typed}\n".encode())
        process.stdin.flush()
    seen = b""
    if sign:
        seen = wait_for(process, sign)
    else:
        wait_until_it_rests(process.pid)
    process.send_signal(signal.SIGINT)
    with open(reader, "rb") as pipe:
        written = pipe.read()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, seen + errors
    assert TRACEBACK.encode() not in written + seen + errors
    if sign:
        assert not (tmp_path / "out.gguf").exists()


@every
def test_ctrl_c_on_a_terminal(terminal: Start, call: Call, name: str) -> None:
    """At its first output, which Ctrl-S holds up."""
    verb = VERBS[name]
    if verb.typed:  # what Ctrl-C means in a chat is tests/cli/test_chat.py's
        shown = terminal(*call(name, verb.good))
        shown.prompt()
        shown.keys("\x03")
        shown.prompt(shown.row + 1)
        shown.keys("\x03")
    else:
        shown = terminal(*call(name, verb.good))
        shown.keys("\x13")
        wait_until_it_rests(shown.child.pid)
        shown.keys("\x03")
    text, code = shown.end()
    assert code == 130, text
    assert TRACEBACK not in text
