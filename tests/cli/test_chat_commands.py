"""Commands in a chat that change or keep the conversation: /retry, /undo, /edit, /save, /load, /tokens, /ctx."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Terminal

Run = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Terminal]

OPTIONS = ("-c", 2048, "-n", 6, "--temp", 0, "--color", "never")


def talk(run: Run, model: Path, *lines: str) -> tuple[list[str], str, int]:
    """Send lines through a pipe; return what stdout got, by line, stderr and the exit code."""
    done = run("chat", model, *OPTIONS, input="\n".join(lines).encode() + b"\n")
    return done.stdout.decode().splitlines(), done.stderr.decode(), done.returncode


def test_retry_answers_the_last_message_again(run: Run, model: Path) -> None:
    answers, notes, code = talk(run, model, "one", "/retry", "/tokens")
    assert code == 0
    n = len(answers) // 2
    assert answers[:n] == answers[n:]
    assert "tokens in 2 messages" in notes


def test_undo_takes_the_last_turn_back(run: Run, model: Path) -> None:
    plain, _, _ = talk(run, model, "one", "two")
    answers, notes, code = talk(run, model, "one", "three", "/undo", "two", "/undo", "/undo", "/tokens")
    assert code == 0
    assert "taken back: three" in notes
    assert answers[: len(plain) // 2] == plain[: len(plain) // 2]
    assert answers[-1:] == plain[-1:]
    assert notes.rstrip().endswith("0 tokens")


def test_edit_replaces_the_last_message(run: Run, model: Path) -> None:
    plain, _, _ = talk(run, model, "other")
    answers, notes, code = talk(run, model, "one", "/edit other", "/tokens")
    assert code == 0
    assert answers[-len(plain) :] == plain
    assert "tokens in 2 messages" in notes


@pytest.mark.parametrize(
    "command", ["/retry", "/undo", "/edit", "/edit x", "/save", "/load", "/load no-such-file"]
)
def test_what_there_is_nothing_for(run: Run, model: Path, command: str) -> None:
    _, notes, code = talk(run, model, command)
    assert code == 1
    assert notes.count("Error: ") == 1
    assert "Traceback" not in notes


def test_a_conversation_goes_on_after_a_restart(run: Run, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    whole, _, _ = talk(run, model, "one", "two")
    first, _, code = talk(run, model, "/system Be brief.", "one", f"/save {path}")
    assert code == 0
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    assert kept["system"] == "Be brief."
    assert path.stat().st_mode & 0o077 == 0

    rest, notes, code = talk(run, model, f"/load {path}", "two", "/stats")
    assert code == 0
    assert "need not be evaluated again" in notes
    cached = re.search(r"\((\d+) cached\)", notes)
    assert cached
    assert int(cached[1]) > 3
    direct, _, _ = talk(run, model, "/system Be brief.", "one", "two")
    assert first + rest == direct
    assert whole != direct

    (tmp_path / "talk.json.state").write_bytes(b"damaged")
    again, notes, code = talk(run, model, f"/load {path}", "two")
    assert code == 0
    assert "evaluates them again" in notes
    assert again == rest


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"messages": [{"role": "system", "content": "a"}]}', '{"messages": [1]}']
)
def test_other_files_are_refused(run: Run, model: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    _, notes, code = talk(run, model, f"/load {path}")
    assert code == 1
    assert "a file of /save" in notes


def test_tokens_and_context(run: Run, model: Path) -> None:
    _, notes, _ = talk(run, model, "/tokens", "/tokens Hello there", "one", "/ctx")
    assert "0 tokens" in notes
    assert re.search(r"\d tokens: 'Hello' ", notes)
    assert re.search(r"\d+ of 2,048 tokens evaluated \(\d+%\); the model was made for", notes)


def test_editing_on_a_terminal(terminal: Start, model: Path) -> None:
    shown = terminal("chat", model, *OPTIONS, "--no-history")
    shown.prompt()
    shown.ask("one")
    start = shown.row + 1
    shown.keys("/edit\r")
    shown.wait(lambda: shown.lines(shown.row) == ["> one"], "the message to be edited")
    answer = shown.ask(" two")
    assert "prompt" in answer
    assert "> one two" in shown.lines(start)
    shown.keys("\x04")
    assert shown.end()[1] == 0
