"""A worker that dies while an answer is streamed: each client gets the error in its own format."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_process import TIMEOUT_S
from rpc_process import Start, Worker
from server_process import Server

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Hello"}]
N_TOKENS = 3000  # far more than there is time for
MORE = {"ignore_eos": True}


@pytest.fixture
def pair_of_two(model: Path, start: Start, tmp_path: Path) -> Iterator[tuple[Server, Worker]]:
    """A server and its worker."""
    worker = start()
    server = Server(tmp_path / "log", model, "-c", 4096, "--rpc", worker.endpoint)
    yield server.wait(), worker
    server.process.kill()
    server.process.wait()


def test_openais_client_raises_its_error(pair_of_two: tuple[Server, Worker]) -> None:
    server, worker = pair_of_two
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=N_TOKENS, stream=True, extra_body=MORE
    )
    next(iter(stream))
    worker.process.kill()
    with pytest.raises(openai.APIError, match=worker.endpoint) as info:
        for _ in stream:
            pass
    assert info.value.body["type"] == "server_error"
    assert info.value.body["code"] == 500


def test_the_responses_api_has_an_event_for_it(pair_of_two: tuple[Server, Worker]) -> None:
    server, worker = pair_of_two
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.responses.create(
        model="any", input="Hello", max_output_tokens=N_TOKENS, stream=True, extra_body=MORE
    )
    kinds = []
    for event in stream:
        kinds.append(event.type)
        if event.type.endswith(".delta"):
            worker.process.kill()
    assert kinds[-1] == "error"
    assert event.code == "server_error"
    assert worker.endpoint in event.message


def test_anthropics_client_raises_its_error(pair_of_two: tuple[Server, Worker]) -> None:
    server, worker = pair_of_two
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    stream = client.messages.create(
        model="any", messages=MESSAGES, max_tokens=N_TOKENS, stream=True, extra_body=MORE
    )
    next(iter(stream))
    worker.process.kill()
    with pytest.raises(anthropic.APIError, match=worker.endpoint) as info:
        for _ in stream:
            pass
    assert info.value.body == {
        "type": "error",
        "error": {"type": "api_error", "message": info.value.body["error"]["message"]},
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_the_events_themselves(pair_of_two: tuple[Server, Worker], path: str) -> None:
    """What goes over the wire, which clients of other languages read."""
    server, worker = pair_of_two
    body: dict[str, Any] = {"messages": MESSAGES, "input": "Hello", "prompt": "Hello", "stream": True, **MORE}
    body |= {"max_tokens": N_TOKENS, "max_output_tokens": N_TOKENS}
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.readline()
        worker.process.kill()
        lines = answer.read().decode().splitlines()
    events = [line[7:] for line in lines if line.startswith("event: ")]
    last = next(json.loads(line[6:]) for line in reversed(lines) if line.startswith("data: {"))
    if path == "/v1/responses":
        assert events[-1] == last["type"] == "error"
        assert set(last) == {"type", "code", "message", "param", "sequence_number"}
    elif path == "/v1/messages":
        assert events[-1] == last["type"] == "error"
        assert last["error"]["type"] == "api_error"
    else:
        assert last["error"]["type"] == "server_error"
    assert worker.endpoint in json.dumps(last)
