"""Slots that clients save: they come back in another process, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_process import EXACT, Server, Start

CHAT = "/v1/chat/completions"
LIMITS = ("-c", 2048, "-np", 1, *EXACT)
ASKED = [{"role": "user", "content": "Tell me about the sea, and about ships. " * 8}]
OPTIONS: dict[str, Any] = {
    "max_tokens": 1,  # then exactly the prompt is in the cache
    "temperature": 0,
    "id_slot": 0,
    "chat_template_kwargs": {"enable_thinking": False},
}


GOING_ON = [*ASKED, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]


def ask(server: Server, messages: list[dict[str, str]]) -> tuple[str, int, int]:
    """Return the answer, and how many tokens the prompt has and how many of them were in the cache."""
    status, answer = server.post(CHAT, {"messages": messages, **OPTIONS})
    assert status == 200, answer
    usage = answer["usage"]
    details = usage["prompt_tokens_details"]
    return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], details["cached_tokens"]


def act(server: Server, action: str, name: str) -> tuple[int, Any]:
    return server.post(f"/slots/0?action={action}", {"filename": name})


@pytest.fixture
def saved(start: Start, model: Path, tmp_path: Path) -> tuple[Path, int, str]:
    """A folder with the session ``sea``, its number of tokens, and what is answered when it goes on."""
    folder = tmp_path / "sessions"
    server = start(model, *LIMITS, "--sessions", folder).wait()
    _, n_prompt, _ = ask(server, ASKED)
    status, answer = act(server, "save", "sea")
    assert status == 200, answer
    assert answer["n_saved"] == n_prompt
    text, _, _ = ask(server, GOING_ON)
    server.stop()
    return folder, n_prompt, text


def test_a_session_comes_back_in_another_process(
    start: Start, model: Path, saved: tuple[Path, int, str]
) -> None:
    folder, n_saved, text = saved
    server = start(model, *LIMITS, "--sessions", folder).wait()
    status, answer = act(server, "restore", "sea")
    assert status == 200, answer
    again, _, n_cached = ask(server, GOING_ON)
    assert (again, n_cached) == (text, n_saved)


@pytest.mark.parametrize("other", ["act_quant", "cache type", "model"])
def test_a_session_of_something_else_is_not_there(
    start: Start, model: Path, saved: tuple[Path, int, str], tmp_path: Path, other: str
) -> None:
    folder, _, _ = saved
    args: list[object] = [model, *LIMITS]
    if other == "act_quant":
        args += ["--act-quant", "none"]
    elif other == "cache type":
        args += ["-ctk", "f16"]
    else:
        data = model.read_bytes()
        copy = tmp_path / "other.gguf"
        copy.write_bytes(data.replace(b"general.name", b"general.nome", 1))
        args[0] = copy
    server = start(*args, "--sessions", folder).wait()
    status, answer = act(server, "restore", "sea")
    assert status == 400, answer
    assert ask(server, GOING_ON)[2] == 0


@pytest.mark.parametrize("name", ["../sea", "/etc/passwd", "a/b", "", "nothing"])
def test_names_stay_in_the_folder(start: Start, model: Path, tmp_path: Path, name: str) -> None:
    server = start(model, *LIMITS, "--sessions", tmp_path / "s").wait()
    assert act(server, "restore", name)[0] == 400
    if name != "nothing":
        assert act(server, "save", name)[0] == 400
    assert server.get("/health")[0] == 200


def test_without_the_option_nothing_is_saved(server: Server) -> None:
    status, answer = act(server, "save", "sea")
    assert status == 501
    assert "not support" in answer["error"]["message"]
