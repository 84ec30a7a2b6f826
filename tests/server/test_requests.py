"""What bad requests get, and what a page of another origin may do."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse
import urllib.request
from typing import Any

import pytest
from server_process import Server, Start

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"messages": [',
        b"[" * 1_000_000,
        b'{"tools": ' + b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"messages": "Hello"}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": 3}]}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": "many"}',
    ],
    ids=[
        "empty",
        "cut",
        "brackets",
        "objects",
        "301 levels",
        "text",
        "no content",
        "number",
        "no UTF-8",
        "option",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/completion"])
def test_malformed_requests_are_the_clients_fault(server: Server, path: str, body: bytes) -> None:
    if path == "/v1/messages" and body == b'{"messages": "Hello"}':
        pytest.skip("taken as one message of the user")
    status, answer = server.post(path, body)
    assert status == 400, answer
    assert answer["error"]["message"]
    if path == "/v1/messages":
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "invalid_request_error"
    assert server.get("/health") == (200, {"status": "ok"})


def test_a_prompt_that_does_not_fit_is_refused(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 5000}]}
    status, answer = server.post(CHAT, body)
    assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")


@pytest.mark.parametrize(
    ("path", "headers", "status", "kind"),
    [
        ("/v1/messages", {"x-api-key": "wrong"}, 401, "authentication_error"),
        ("/v1/messages/count_tokens", {}, 401, "authentication_error"),
        ("/v1/messages/nowhere", {"x-api-key": "right"}, 404, "not_found_error"),
    ],
)
def test_anthropics_clients_get_their_errors(
    start: Start, model: Any, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    server = start(model, "--api-key", "right").wait()
    found, answer = server.post(path, HELLO, **headers)
    assert found == status
    assert answer["type"] == "error"
    assert answer["error"]["type"] == kind
    assert set(answer["error"]) == {"type", "message"}
    assert "code" in server.post(CHAT, HELLO)[1]["error"]  # others get theirs


def test_anthropics_client_raises_its_own_errors(server: Server) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    with pytest.raises(anthropic.BadRequestError) as info:
        client.messages.create(
            model="any", max_tokens=4, messages=[{"role": "user", "content": "word " * 5000}]
        )
    assert info.value.body["error"]["type"] == "invalid_request_error"


def test_an_unknown_place_is_not_found(server: Server) -> None:
    status, answer = server.get("/v1/nowhere")
    assert (status, answer["error"]["code"]) == (404, 404)


def test_connections_that_send_half_a_request_or_none_do_no_harm(server: Server) -> None:
    place = urllib.parse.urlsplit(server.url)
    for data in (
        b"",
        b"POST /v1/chat/comple",
        b"\x00\xff\x00",
        b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ):
        with socket.create_connection((place.hostname, place.port or 0)) as connection:
            connection.sendall(data)
    assert server.post(CHAT, HELLO)[0] == 200


def test_a_connection_is_kept_after_a_stream(server: Server) -> None:
    place = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    connection.request("POST", CHAT, json.dumps({**HELLO, "stream": True}))
    assert b"[DONE]" in connection.getresponse().read()
    kept = connection.sock
    time.sleep(0.2)  # time for the server to close it
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock is kept
    connection.close()


def test_health_metrics_and_slots_are_there(server: Server) -> None:
    assert server.get("/health") == (200, {"status": "ok"})
    status, text = server.get("/metrics")
    assert status == 200
    assert "llamacpp:prompt_tokens_total" in text
    status, slots = server.get("/slots")
    assert (status, len(slots)) == (200, 4)


def _allowed(server: Server, method: str) -> str | None:
    request = urllib.request.Request(
        server.url + "/v1/models", method=method, headers={"Origin": "http://page.example"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.headers.get("Access-Control-Allow-Origin")


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_pages_of_other_origins_may_not_read_answers(server: Server, method: str) -> None:
    assert not _allowed(server, method)


def test_no_tools_of_the_server_are_offered(server: Server) -> None:
    for path in ("/tools", "/cors-proxy"):
        assert server.get(path)[0] == 403


def test_a_key_is_asked_for_and_never_shown(start: Start, model: Any) -> None:
    key = "secret-of-the-test"
    server = start(model, "-v", env={"PYLLAMA_DSV4_API_KEY": key}).wait()
    status, answer = server.post(CHAT, HELLO)
    assert (status, answer["error"]["type"]) == (401, "authentication_error")
    assert server.post(CHAT, HELLO, Authorization="Bearer wrong")[0] == 401
    assert server.post(CHAT, HELLO, Authorization=f"Bearer {key}")[0] == 200
    assert server.post("/v1/messages", HELLO, **{"X-Api-Key": key})[0] == 200
    assert key not in server.log
