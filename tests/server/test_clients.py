"""The clients that people use, against the server: chat, streaming, tools, thinking, responses, several at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scripted_model import scripted_model
from server_process import Server, Start

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Hello"}]
SHORT: dict[str, Any] = {"model": "any", "messages": MESSAGES, "max_tokens": 12}
GREEDY: dict[str, Any] = {**SHORT, "temperature": 0}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
COLD = {"temperature": 0}  # no argument of the Anthropic client any more
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
TOOL = {"type": "function", "function": {"name": "lamp", "description": "Switch it", "parameters": SCHEMA}}


CALL = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="lamp">
<｜DSML｜parameter name="on" string="false">true</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


@pytest.fixture(scope="module")
def caller(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model calls the tool ``lamp``."""
    folder = tmp_path_factory.mktemp("caller")
    path = scripted_model(model, folder / "m.gguf", CALL, after="</think>")
    running = Server(folder / "log", path, "-c", 1024)
    yield running.wait()
    running.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Server) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_openai_chat_and_its_stream_agree(client: Any) -> None:
    whole = client.chat.completions.create(**GREEDY, extra_body=NO_THINKING)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        **GREEDY, extra_body=NO_THINKING, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == 12
    assert len(chunks) > 4


def test_openai_thinking_is_told_from_the_answer(client: Any) -> None:
    message = client.chat.completions.create(**GREEDY).choices[0].message
    assert message.reasoning_content
    assert not message.content
    stream = client.chat.completions.create(**GREEDY, stream=True)
    pieces = [getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in stream if c.choices]
    assert "".join(pieces) == message.reasoning_content
    none = client.chat.completions.create(**GREEDY, reasoning_effort="none").choices[0].message
    assert none.content
    assert not getattr(none, "reasoning_content", None)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
def test_openai_tools(caller: Server, is_streamed: bool) -> None:
    client = openai.OpenAI(base_url=caller.url + "/v1", api_key="none", max_retries=0)
    options = {**GREEDY, "max_tokens": 200, "tools": [TOOL], "extra_body": NO_THINKING}
    if is_streamed:
        chunks = list(client.chat.completions.create(**options, stream=True))
        calls = [
            call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or []
        ]
        assert {call.index for call in calls} == {0}
        name = "".join(call.function.name or "" for call in calls)
        arguments = "".join(call.function.arguments or "" for call in calls)
        reason = next(c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason)
        content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    else:
        choice = client.chat.completions.create(**options).choices[0]
        [call] = choice.message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, choice.finish_reason
        content = choice.message.content or ""
    assert (name, json.loads(arguments), reason) == ("lamp", {"on": True}, "tool_calls")
    assert "DSML" not in content


def test_openai_reasons_then_answers(start: Start, model: Path, tmp_path: Path) -> None:
    path = scripted_model(model, tmp_path / "m.gguf", "Once upon</think>The end", after="<think>")
    client = openai.OpenAI(base_url=start(path, "-c", 1024).wait().url + "/v1", api_key="none")
    choice = client.chat.completions.create(**GREEDY).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("Once upon", "The end")
    assert choice.finish_reason == "stop"
    chunks = [c.choices[0].delta for c in client.chat.completions.create(**GREEDY, stream=True) if c.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks) == "Once upon"
    assert "".join(delta.content or "" for delta in chunks) == "The end"


def test_openai_completions_responses_and_models(client: Any) -> None:
    done = client.completions.create(model="any", prompt="Once upon", max_tokens=6, temperature=0)
    assert done.usage.completion_tokens == 6
    response = client.responses.create(
        model="any", input="Hello", max_output_tokens=12, temperature=0, extra_body=NO_THINKING
    )
    chat = client.chat.completions.create(**GREEDY, extra_body=NO_THINKING)
    assert response.output_text == chat.choices[0].message.content
    [model] = client.models.list().data
    assert model.id.endswith(".gguf")
    assert "/" not in model.id


def test_openai_json_schema(client: Any) -> None:
    answer = client.chat.completions.create(
        **{**GREEDY, "max_tokens": 60},
        extra_body=NO_THINKING,
        response_format={"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA}},
    )
    assert json.loads(answer.choices[0].message.content)["on"] in (True, False)


def test_anthropic_messages_and_their_stream_agree(claude: Any) -> None:
    options = {**SHORT, "extra_body": {**NO_THINKING, **COLD}}
    whole = claude.messages.create(**options)
    assert whole.stop_reason == "max_tokens"
    assert whole.content[0].text
    with claude.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
    assert text == whole.content[0].text


def test_anthropic_thinking(claude: Any) -> None:
    options = {**SHORT, "thinking": {"type": "enabled", "budget_tokens": 1024}, "extra_body": COLD}
    message = claude.messages.create(**options)
    assert message.content[0].type == "thinking"
    assert message.content[0].thinking
    with claude.messages.stream(**options) as stream:
        assert stream.get_final_message().content[0].thinking == message.content[0].thinking


def test_anthropic_tools(caller: Server) -> None:
    claude = anthropic.Anthropic(base_url=caller.url, api_key="none", max_retries=0)
    options = {
        **SHORT,
        "max_tokens": 200,
        "tools": [{"name": "lamp", "description": "Switch it", "input_schema": SCHEMA}],
        "extra_body": {**NO_THINKING, **COLD},
    }
    message = claude.messages.create(**options)
    assert message.stop_reason == "tool_use"
    [call] = [part for part in message.content if part.type == "tool_use"]
    assert (call.name, call.input) == ("lamp", {"on": True})
    with claude.messages.stream(**options) as stream:
        [streamed] = [part for part in stream.get_final_message().content if part.type == "tool_use"]
    assert (streamed.name, streamed.input) == (call.name, call.input)


def test_anthropic_counts_tokens(claude: Any) -> None:
    count = claude.messages.count_tokens(model="any", messages=MESSAGES)
    usage = claude.messages.create(**SHORT).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens > 0


def test_sixteen_at_once_answer_as_one_alone(client: Any, server: Server) -> None:
    prompts = [f"Tell me about number {i}" * (1 + i % 4) for i in range(16)]

    def ask(prompt: str) -> str:
        stream = client.chat.completions.create(
            **{**GREEDY, "messages": [{"role": "user", "content": prompt}]},
            extra_body={**NO_THINKING, "cache_prompt": False},
            stream=True,
        )
        return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    alone = [ask(prompt) for prompt in prompts]
    assert len(set(alone)) == 16
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_a_client_that_leaves_frees_its_slot(client: Any, server: Server) -> None:
    stream = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.n_busy() == 1
    stream.close()
    time.sleep(1)
    assert server.n_busy() == 0
