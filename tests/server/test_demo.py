"""The demo model over HTTP, whichever the package holds: an answer, a stream of it, thinking, a tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server_process import EXACT, N_CTX, Start

from pyllama_dsv4 import demo

CHAT = "/v1/chat/completions"
OPTIONS: dict[str, Any] = {
    "temperature": 0,
    "max_tokens": 64,
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_the_demo_model_is_served(start: Start, model: Path) -> None:
    path = demo.TRAINED if demo.is_trained() else model
    server = start(path, "-c", N_CTX, *EXACT).wait()

    def ask(question: str, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        status, answer = server.post(CHAT, OPTIONS | {"messages": messages} | options)
        assert status == 200, answer
        return dict(answer["choices"][0]["message"])

    whole = ask("What is 17 + 25?")
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    _, text = server.post(CHAT, OPTIONS | {"messages": messages, "stream": True})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["content"]
    if not demo.is_trained():
        return
    assert whole["content"] == "42"
    thought = ask("What is 17 + 25?", chat_template_kwargs={"enable_thinking": True})
    assert (bool(thought["reasoning_content"]), thought["content"]) == (True, "42")
    exam = demo.read_exam()
    if exam is None or not exam.is_asked(tools=True):
        return
    parameters = {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    }
    function = {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": parameters,
    }
    (call,) = ask("What is 431 * 27?", tools=[{"type": "function", "function": function}])["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"expression": "431 * 27"}
