"""The command ``pyllama-dsv4 serve``: how it starts, warns, refuses and ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cli_process import TIMEOUT_S, command
from server_process import EXACT, Server, Start

from pyllama_dsv4 import Llama
from pyllama_dsv4.demo import demo_model, demo_note, is_trained


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("serve", *args), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(start: Start, model: Path, number: int, code: int) -> None:
    server = start(model).wait()
    assert server.stop(number) == code
    assert "cleaning up" in server.log


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_load(start: Start, model: Path, number: int, code: int) -> None:
    server = start(model)
    while "loading model" not in server.log:
        assert server.process.poll() is None, server.log
        time.sleep(0.005)
    assert server.stop(number) == code
    assert "cleaning up" in server.log  # in order, whether the load was over or not


def test_a_signal_ends_it_while_it_answers(start: Start, model: Path) -> None:
    server = start(model).wait()
    place = server.url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "n_predict": 8000, "ignore_eos": true, "stream": true}'
    with socket.create_connection((place[0], int(place[1]))) as connection:
        connection.sendall(
            b"POST /completion HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert connection.recv(10)
        assert server.stop(signal.SIGINT) == 130


def test_a_port_in_use_is_named(server: Server, model: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    done = run(model, "--port", port)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "Choose another port." in done.stderr
    assert "loading model" not in done.stderr


@pytest.mark.parametrize("key", ["", "secret"])
def test_it_warns_when_everybody_can_reach_it(start: Start, model: Path, key: str) -> None:
    server = start(model, "--host", "0.0.0.0", *(["--api-key", key] if key else [])).wait()
    assert ("it has no API key" in server.log) is not bool(key)


def test_on_loopback_it_does_not_warn(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert "security" not in server.log


def test_the_plan_is_said_and_weights_are_not_repacked(server: Server) -> None:
    assert server.log.startswith("needs ")
    assert "CPU_REPACK" not in server.log


def test_quiet_says_nothing(start: Start, model: Path) -> None:
    server = start(model, "-q")
    time.sleep(4)
    assert server.stop() == 143
    assert server.log == ""


def test_the_servers_own_options_win(start: Start, model: Path) -> None:
    server = start(model, "-c", 1024, "--", "-c", 2048, "-a", "mine").wait()
    assert server.get("/slots")[1][0]["n_ctx"] == 2048
    assert server.get("/v1/models")[1]["data"][0]["id"] == "mine"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["no-such.gguf"], 3, "no-such.gguf"),
        (["MODEL", "--prot", "1"], 2, "--port"),
        (["MODEL", "--", "--no-such-option"], 2, "--no-such-option"),
        (["MODEL", "--", "--version"], 2, "pyllama-dsv4 --version"),
        (["MODEL", "--", "-m", "other.gguf"], 2, "FILE"),
        (["MODEL", "--", "-hf", "some/model"], 2, "another model"),
        (["MODEL", "--", "--mmproj", "eyes.gguf"], 2, "images"),
        (["MODEL", "--", "--models-dir", "."], 2, "several models"),
        (["MODEL", "--host", "192.0.2.1"], 1, "192.0.2.1"),
        (["MODEL", "-c", "2000000000"], 4, "memory"),
    ],
)  # fmt: skip
def test_what_it_refuses(model: Path, args: list[str], code: int, text: str) -> None:
    done = run(*[model if arg == "MODEL" else arg for arg in args])
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr


def test_without_a_file_it_serves_the_demo_model(start: Start, tmp_path: Path) -> None:
    server = start("-c", 1024, env={"XDG_CACHE_HOME": str(tmp_path)}).wait()
    assert demo_note() in " ".join(server.log.split())
    expected = demo_model().name if is_trained() else "demo-"
    assert server.get("/v1/models")[1]["data"][0]["id"].startswith(expected)
    body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 4}
    assert server.post("/v1/chat/completions", body)[0] == 200


def test_help_is_ours_and_the_servers_is_in_reach(model: Path) -> None:
    ours = run("--help")
    assert (ours.returncode, ours.stderr) == (0, "")
    assert "[-- ARGS]" in ours.stdout
    theirs = run(model, "--", "--help")
    assert theirs.returncode == 0
    assert "--slot-save-path" in theirs.stdout


@pytest.mark.parametrize(("level", "other"), [("none", "full"), ("full", "none")])
def test_the_level_of_rounding_reaches_the_server(start: Start, model: Path, level: str, other: str) -> None:
    server = start(model, "--act-quant", level, "-c", 512, *EXACT).wait()
    body = {"prompt": "Hello", "n_predict": 1, "temperature": 0, "n_probs": 8}
    _, answer = server.post("/completion", body)
    found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def distance(act_quant: str) -> float:
        with Llama(
            model,
            n_ctx=512,
            n_threads=1,
            cache_type="f32",
            flash_attn="off",
            act_quant=act_quant,
            warmup=False,
        ) as llm:
            llm.eval(llm.tokenize("Hello"))
            logits = llm.logits.astype("f8")
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return max(abs(float(expected[token]) - logprob) for token, logprob in found.items())

    assert distance(level) < 0.1 * distance(other)
