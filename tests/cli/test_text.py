"""The commands ``tokenize`` and ``explain``."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_process import Terminal

from pyllama_dsv4 import Llama

Run = Callable[..., subprocess.CompletedProcess[bytes]]

TEXT = "Hello, wörld 😀 <think>"
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi <think> there é"},
    {"role": "assistant", "reasoning_content": "a secret thought", "content": "Hello"},
    {"role": "user", "content": "again <｜User｜>"},
]


@pytest.fixture(scope="module")
def llm(model: Path) -> Any:
    with Llama(model, n_ctx=256, n_threads=1, warmup=False) as opened:
        yield opened


@pytest.fixture
def conversation(tmp_path: Path) -> Path:
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8")
    return path


# --- tokenize ---


@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_the_librarys(run: Run, model: Path, llm: Llama, special: bool) -> None:
    args = ("tokenize", model, "-p", TEXT, "--bos", *(["--special"] if special else []))
    expected = llm.tokenize(TEXT, add_bos=True, special=special)
    assert run(*args, "--ids").stdout.split() == [str(i).encode() for i in expected]
    body = json.loads(run(*args, "--json").stdout)
    assert [token["id"] for token in body["tokens"]] == expected
    assert body["n_tokens"] == len(expected)
    rows = run(*args).stdout.decode().splitlines()
    assert [int(row.split()[0]) for row in rows] == expected
    assert json.loads(rows[1].split(maxsplit=1)[1]) == body["tokens"][1]["text"] == "Hello"


def test_tokens_come_from_pipes_and_files_and_go_back(
    run: Run, model: Path, llm: Llama, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT, encoding="utf-8")
    piped = run("tokenize", model, "--ids", input=TEXT.encode()).stdout
    assert piped == run("tokenize", model, "--ids", "-f", path).stdout
    ids = ",".join(piped.decode().split())
    assert run("tokenize", model, "--decode", ids).stdout.decode() == TEXT + "\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--decode", "1 x"), 2, "ids are numbers"),
        (("--decode", "99999999"), 3, "no token has id 99999999"),
        (("-p", "a", "-f", "b"), 2, "two prompts"),
        (("-f", "/no/such/file"), 3, "/no/such/file"),
    ],
)
def test_what_cannot_be_tokenized(
    run: Run, model: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    done = run("tokenize", model, *args)
    assert done.returncode == code
    assert message in done.stderr.decode()


def test_a_file_that_is_no_model(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"no model")
    for verb in ("tokenize", "explain"):
        done = run(verb, path, "-p", "a")
        assert done.returncode == 3
        assert b"not a GGUF file" in done.stderr


# --- explain ---


@pytest.mark.parametrize("thinking", [False, True])
def test_the_ids_are_those_that_a_chat_evaluates(
    run: Run, model: Path, llm: Llama, conversation: Path, thinking: bool
) -> None:
    done = run("explain", model, "-f", conversation, "--json", *(["--think"] if thinking else []))
    body = json.loads(done.stdout)
    ids = [token["id"] for token in body["tokens"]]
    assert ids == llm.format_chat_tokens(MESSAGES, thinking=thinking)
    llm.reset()
    llm.create_chat_completion(MESSAGES, thinking=thinking, max_tokens=1, temperature=0)
    assert list(llm._session.ids[: len(ids)]) == ids
    assert body["dropped"] == [{"message": 1, "reasoning": "a secret thought"}]


def test_kinds_and_what_is_shared(run: Run, model: Path, llm: Llama, conversation: Path) -> None:
    tokens = json.loads(run("explain", model, "-f", conversation, "--json").stdout)["tokens"]
    kinds = {
        kind: "".join(t["text"] for t in tokens if t["kind"] == kind)
        for kind in ("special", "template", "text")
    }
    # what spells a special token in a message is text
    assert kinds["text"] == "".join(message["content"] for message in MESSAGES)
    assert kinds["special"].count("<｜User｜>") == 2
    assert kinds["template"] == ""
    assert kinds["special"].endswith("</think>")
    n_shared = sum(token["is_shared"] for token in tokens)
    assert [token["is_shared"] for token in tokens] == [i < n_shared for i in range(len(tokens))]
    before = llm.format_chat_tokens(MESSAGES[:2], add_generation_prompt=False)
    assert [token["id"] for token in tokens[:n_shared]] == before


def test_a_pipe_gets_the_text(run: Run, model: Path, llm: Llama, conversation: Path) -> None:
    text, dropped, counts = run("explain", model, "-f", conversation).stdout.decode().splitlines()
    assert text == llm.format_chat(MESSAGES)
    assert dropped == "reasoning of message 2, left out: a secret thought"
    assert re.match(r"\d+ tokens: \d special, \d+ shared", counts)


def test_a_terminal_gets_colours(terminal: Callable[..., Terminal], model: Path, conversation: Path) -> None:
    shown = terminal("explain", model, "-f", conversation)
    screen, code = shown.end()
    assert code == 0
    assert "<｜User｜>".replace("｜", "｜") in screen.replace(" ", "") or "User" in screen
    for style in (b"\x1b[35m", b"\x1b[36m", b"\x1b[4m", b"\x1b[2;9m"):
        assert style in shown.raw
    plain = terminal("explain", model, "-f", conversation, env={"NO_COLOR": "1"})
    plain.end()
    assert b"\x1b[35m" not in plain.raw


def test_tools_of_a_request_are_shown(run: Run, model: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"messages": MESSAGES[:1], "tools": [tool]}), encoding="utf-8")
    assert b"get_weather" in run("explain", model, "-f", path).stdout


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("{", 2, "line 1"),
        ('{"a": 1}', 2, "no list of messages"),
        ('[{"role": "nobody", "content": "a"}]', 3, "nobody"),
    ],
)
def test_what_is_no_conversation(
    run: Run, model: Path, tmp_path: Path, body: str, code: int, message: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(body, encoding="utf-8")
    done = run("explain", model, "-f", path)
    assert done.returncode == code
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
