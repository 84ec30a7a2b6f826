"""Several machines from the command line: ``rpc-server``, ``--rpc`` of the other commands, and ``serve``."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from cli_process import TIMEOUT_S, command
from rpc_process import LIMIT_S, Start, Worker
from server_process import Server

pytestmark = pytest.mark.usefixtures("model")


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


# --- rpc-server ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_worker(start: Start, number: int, code: int) -> None:
    worker = start()
    with socket.create_connection(worker.address):
        assert worker.stop(number) == code
    assert "Traceback" not in worker.log


def test_a_worker_warns(start: Start) -> None:
    worker = start()
    assert "no authentication and no encryption." in worker.log
    assert "Everybody" not in worker.log
    assert "Everybody who can reach 0.0.0.0" in start("--host", "0.0.0.0").log


def test_a_quiet_worker_still_warns(start: Start, tmp_path: Path) -> None:
    process = subprocess.Popen(command("rpc-server", "-q", "--port", 0), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    process.terminate()
    assert process.wait(TIMEOUT_S) == 143
    assert "no authentication" in line
    assert process.stderr.read() == ""


def test_the_port_of_a_worker_is_taken(pair: list[Worker]) -> None:
    done = run("rpc-server", "--port", pair[0].address[1])
    assert done.returncode == 1
    assert f"port {pair[0].address[1]}" in done.stderr
    assert "in use" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--prot", 1), 2, "Did you mean --port"),
        (("--port", 70000), 2, "--port"),
        (("--host", "no-such-host.invalid", "--port", 0), 1, "no-such-host.invalid"),
    ],
)
def test_wrong_workers(args: tuple[object, ...], code: int, message: str) -> None:
    done = run("rpc-server", *args)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- its clients ---


def test_run_takes_workers(model: Path, pair: list[Worker]) -> None:
    args = ("run", model, "-p", "Once", "-n", 8, "--temp", 0, "-t", 1, "-c", 256)
    alone, together = run(*args), run(*args, "--rpc", ",".join(one.endpoint for one in pair))
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout
    assert pair[1].endpoint in together.stderr  # in the line of the plan


def test_plan_asks_workers(model: Path, pair: list[Worker]) -> None:
    done = run("plan", model, "--bandwidth", 10, "--json", "--rpc", f"{pair[0].endpoint},{pair[1].endpoint}")
    found = json.loads(done.stdout)
    assert [gpu["name"] for gpu in found["gpus"]] == [one.endpoint for one in pair]
    assert all(gpu["available"] > 10**6 for gpu in found["gpus"])


@pytest.mark.parametrize("verb", ["run", "serve", "plan"])
def test_a_worker_that_is_not_there(model: Path, verb: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = run(verb, model, "--rpc", f"127.0.0.1:{port}", *(["-p", "a"] if verb == "run" else []))
    assert done.returncode == 1
    assert f"worker 127.0.0.1:{port} cannot be reached" in done.stderr
    assert run(verb, model, "--rpc", "a:b", *(["-p", "a"] if verb == "run" else [])).returncode == 2


def test_serve_takes_workers_and_survives_their_loss(model: Path, start: Start, tmp_path: Path) -> None:
    workers = [start(), start()]
    body = {"prompt": "Once", "n_predict": 8, "temperature": 0}
    alone = Server(tmp_path / "alone", model, "-c", 512)
    expected = alone.wait().post("/completion", body)[1]["content"]
    alone.stop()

    server = Server(tmp_path / "log", model, "-c", 512, "--rpc", ",".join(one.endpoint for one in workers))
    assert server.wait().post("/completion", body)[1]["content"] == expected
    workers[0].process.kill()
    status, answer = server.post("/completion", body)
    assert status == 500
    assert re.search(rf"worker {workers[0].endpoint} \w+", answer["error"]["message"])
    assert server.post("/completion", body)[0] == 500
    assert server.get("/health")[0] == 200
    assert server.stop(signal.SIGINT) == 130


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_serve_takes_names_and_ipv6(model: Path, start: Start, tmp_path: Path, host: str) -> None:
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    worker = start("--host", host)
    place = f"{host}:{worker.address[1]}"
    server = Server(tmp_path / "log", model, "-c", 512, "--rpc", place)
    status, answer = server.wait().post("/completion", {"prompt": "Once", "n_predict": 4})
    assert (status, answer["tokens_predicted"]) == (200, 4)
    assert server.stop() == 143


def test_serve_keeps_experts_here(model: Path, pair: list[Worker], tmp_path: Path) -> None:
    body = {"prompt": "Once", "n_predict": 8, "temperature": 0}
    texts = []
    for args in ((), ("--rpc", pair[0].endpoint, "-ncmoe", 99)):
        server = Server(tmp_path / f"log{len(texts)}", model, "-c", 512, *args)
        texts.append(server.wait().post("/completion", body)[1]["content"])
        server.stop()
    assert texts[0] == texts[1]


def test_serve_with_a_worker_that_hangs(model: Path, start: Start, tmp_path: Path) -> None:
    import time

    worker = start()
    server = Server(tmp_path / "log", model, "-c", 512, "--rpc", worker.endpoint).wait()
    worker.process.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    status, answer = server.post("/completion", {"prompt": "Once", "n_predict": 4})
    assert time.monotonic() - start_s < LIMIT_S
    assert status == 500
    assert "no sign of life" in answer["error"]["message"]
    assert server.stop() == 143
