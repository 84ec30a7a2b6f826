"""Answers go back into the next prompt with the ids that were sampled, as the library does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_model import scripted_model
from server_process import EXACT, Server, Start

from pyllama_dsv4 import Llama

CHAT = "/v1/chat/completions"
WORDS = "rain stop"  # nine letters, and none twice: each is followed by one other
REASONING = "cdegh"
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
TOOL = {"type": "function", "function": {"name": "lamp", "parameters": SCHEMA}}
ASKED = {"role": "user", "content": "Hello"}
NEXT = {"role": "user", "content": "And then?"}


def n_tokens(model: Path, text: str) -> int:
    with Llama(model, n_ctx=256, n_threads=1, warmup=False) as llm:
        return len(llm.tokenize(text))


def usage(server: Server, messages: list[dict[str, Any]], **options: Any) -> tuple[int, int]:
    """Return how many tokens a prompt has, and how many of them were in the cache."""
    status, answer = server.post(CHAT, {"messages": messages, "max_tokens": 1, "temperature": 0, **options})
    assert status == 200, answer
    found = answer["usage"]
    return found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"]


def ask(server: Server, is_streamed: bool, **options: Any) -> tuple[dict[str, Any], int]:
    """Return the answer's message, and the tokens of its prompt."""
    body = {"messages": [ASKED], "max_tokens": 50, "temperature": 0, **options}
    if not is_streamed:
        status, answer = server.post(CHAT, body)
        assert status == 200, answer
        return answer["choices"][0]["message"], answer["usage"]["prompt_tokens"]
    _, text = server.post(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    message: dict[str, Any] = {"role": "assistant"}
    for event in events:
        for choice in event["choices"]:
            for key in ("content", "reasoning_content"):
                message[key] = message.get(key, "") + (choice["delta"].get(key) or "")
    return message, events[-1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
def test_sampled_ids_go_back(start: Start, model: Path, tmp_path: Path, is_streamed: bool) -> None:
    path = scripted_model(model, tmp_path / "m.gguf", WORDS, after="</think>", by_letter=True)
    server = start(path, "-c", 1024, *EXACT).wait()
    plain = {"chat_template_kwargs": {"enable_thinking": False}}
    said = {"role": "assistant", "content": WORDS}
    before, _ = usage(server, [ASKED, said, NEXT], **plain)
    message, n_prompt = ask(server, is_streamed, **plain)
    assert message["content"] == WORDS
    after, cached = usage(server, [ASKED, said, NEXT], **plain)
    n_words = n_tokens(model, WORDS)
    assert n_words < len(WORDS)
    assert after - before == len(WORDS) - n_words
    assert cached >= n_prompt + len(WORDS)  # nothing of the answer was evaluated again
    other, _ = usage(server, [ASKED, {**said, "content": "rain stops"}, NEXT], **plain)
    assert other < after
    # what a user says in the same words is the user's
    first = [{"role": "user", "content": WORDS}]
    with Llama(model, n_ctx=256, n_threads=1, warmup=False) as llm:
        expected = len(llm.format_chat_tokens(first, thinking=False))
    assert usage(server, first, **plain)[0] == expected


@pytest.mark.parametrize("has_tools", [False, True], ids=["dropped", "kept"])
def test_reasoning_goes_back_where_the_prompt_keeps_it(
    start: Start, model: Path, tmp_path: Path, has_tools: bool
) -> None:
    text = f"{REASONING}</think>{WORDS}"
    path = scripted_model(model, tmp_path / "m.gguf", text, after="<think>", by_letter=True)
    server = start(path, "-c", 2048, *EXACT).wait()
    options = {"tools": [TOOL]} if has_tools else {}
    said = {"role": "assistant", "content": WORDS, "reasoning_content": REASONING}
    before, _ = usage(server, [ASKED, said, NEXT], **options)
    message, n_prompt = ask(server, False, **options)
    assert (message["reasoning_content"], message["content"]) == (REASONING, WORDS)
    after, cached = usage(server, [ASKED, said, NEXT], **options)
    grown = len(WORDS) - n_tokens(model, WORDS)
    if has_tools:
        grown += len(REASONING) - n_tokens(model, REASONING)
        assert cached >= n_prompt + len(REASONING) + 1 + len(WORDS)
    assert after - before == grown


def test_calls_go_back_by_what_they_mean(start: Start, model: Path, tmp_path: Path) -> None:
    call = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="lamp">\n<｜DSML｜parameter name="on" string="false">'
        "true</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    path = scripted_model(model, tmp_path / "m.gguf", call, after="</think>")
    server = start(path, "-c", 2048, *EXACT).wait()
    options = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    message, n_prompt = ask(server, False, max_tokens=200, **options)
    [made] = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": made["id"], "content": "done"}
    made["function"]["arguments"] = ' { "on" :true } '
    _, cached = usage(server, [ASKED, {**message, "content": ""}, result], **options)
    assert cached > n_prompt + 20  # the whole call


def test_anthropics_answers_go_back(start: Start, model: Path, tmp_path: Path) -> None:
    path = scripted_model(model, tmp_path / "m.gguf", WORDS, after="</think>", by_letter=True)
    server = start(path, "-c", 1024, *EXACT).wait()
    body = {"max_tokens": 50, "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}
    said = {"role": "assistant", "content": [{"type": "text", "text": WORDS}]}
    counts = []
    for messages in ([ASKED, said, NEXT], [ASKED], [ASKED, said, NEXT]):
        _, answer = server.post("/v1/messages", {**body, "messages": messages})
        counts.append(answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"])
    assert counts[2] - counts[0] == len(WORDS) - n_tokens(model, WORDS)
