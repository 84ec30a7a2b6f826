"""How much a server takes at once, and what its answers do not say."""

from __future__ import annotations

import json
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from server_process import Server, Start

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
BODY_BYTES_MAX = 100 << 20  # the HTTP library's
LONG = {**HELLO, "max_tokens": 3000, "stream": True, "ignore_eos": True}


def raw(server: Server, data: bytes) -> tuple[int, str, bytes]:
    """Send bytes; return status, headers and body of the answer, after which the server ends the connection."""
    place = urllib.parse.urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port or 0), 30) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_a_body_that_is_too_long_is_refused(server: Server, path: str) -> None:
    n = BODY_BYTES_MAX + 1
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n"
    status, headers, body = raw(server, head.encode() + bytes(n))
    assert (status, "application/json" in headers) == (413, True)
    error = json.loads(body)
    if path == CHAT:
        assert error["error"]["code"] == 413
        assert error["error"]["type"] == "invalid_request_error"
    else:
        assert (error["type"], error["error"]["type"]) == ("error", "request_too_large")
    assert "larger" in error["error"]["message"]


def test_a_body_below_the_limit_is_read(server: Server) -> None:
    status, answer = server.post(CHAT, {**HELLO, "unused": "x" * (20 << 20)})
    assert status == 200, answer


def test_one_request_too_many_is_told_so(start: Start, model: Path) -> None:
    server = start(model, "-c", 8192, "-np", 1, "--max-requests", 2).wait()
    data = json.dumps(LONG).encode()
    streams = []
    for _ in range(2):  # one is answered, one waits
        place = urllib.parse.urlsplit(server.url)
        connection = socket.create_connection((place.hostname, place.port or 0), 30)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        streams.append(connection)
    while "llamacpp:requests_deferred 1" not in server.get("/metrics")[1]:
        time.sleep(0.05)
    status, answer = server.post(CHAT, HELLO)
    assert (status, answer["error"]["type"]) == (503, "unavailable_error")
    assert "2 requests" in answer["error"]["message"]
    status, answer = server.post("/v1/messages", HELLO)
    assert (status, answer["type"], answer["error"]["type"]) == (503, "error", "overloaded_error")
    assert server.get("/health")[0] == 200
    for connection in streams:
        connection.close()
    for _ in range(100):  # each that has left makes room
        status, _ = server.post(CHAT, HELLO)
        if status == 200:
            break
    assert status == 200


def test_as_many_as_there_may_be_are_answered(start: Start, model: Path) -> None:
    server = start(model, "-c", 512, "--max-requests", 1).wait()
    for _ in range(20):  # counted down after each, whatever became of it
        assert server.post(CHAT, HELLO)[0] == 200
        assert server.post(CHAT, {**HELLO, "messages": "x"})[0] == 400
        assert server.post("/v1/messages", {})[0] == 400
        assert server.post("/completion", {"prompt": "a", "n_predict": 1})[0] == 200


def test_no_folder_and_no_key_is_in_any_answer(start: Start, model: Path, tmp_path: Path) -> None:
    key = "key-of-this-test"
    server = start(model, "-v", "--sessions", tmp_path / "saved", env={"PYLLAMA_DSV4_API_KEY": key}).wait()
    own = {"Authorization": f"Bearer {key}"}
    answers = []
    for path in ("/props", "/v1/models", "/slots", "/health", "/metrics", "/nowhere", "/"):
        answers.append(server.get(path, **own)[1])
    few = {"max_tokens": 2, "n_predict": 2, "max_output_tokens": 2}
    bad: list[dict[str, Any]] = [{}, {"messages": 3}, {"prompt": {}}, {"filename": "none"}]
    bad.append({"messages": [{"role": "critic", "content": "x"}]})
    for path in (
        CHAT,
        "/v1/messages",
        "/v1/responses",
        "/completion",
        "/slots/0?action=restore",
        "/props",
        "/models",
    ):
        for body in bad:
            answers.append(server.post(path, {**few, **body}, **own)[1])
        answers.append(server.post(path, {})[1])
        answers.append(server.post(path, {}, Authorization="Bearer wrong")[1])
    text = json.dumps(answers)
    assert str(model.parent) not in text
    assert str(tmp_path) not in text
    assert key not in text


def test_there_are_no_web_pages(server: Server) -> None:
    for path in ("/", "/index.html"):
        status, answer = server.get(path)
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
