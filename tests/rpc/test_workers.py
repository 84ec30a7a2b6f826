"""Several machines: the same tokens as one, and named errors when a worker is not there, dies or hangs."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rpc_process import (
    ALLOC_BUFFER,
    BEAT,
    BUFFER_CLEAR,
    DEVICE_COUNT,
    LIMIT_S,
    OURS,
    FakeWorker,
    Start,
    Worker,
    greet,
    greeting,
    receive,
    request,
    response,
)

from pyllama_dsv4 import Llama
from pyllama_dsv4._native import ffi, lib, text
from pyllama_dsv4.errors import ArgumentError, MemoryLimitError, WorkerError
from pyllama_dsv4.rpc import endpoints, rpc_devices

PROMPT = "The capital of France is a city in which many people live."


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def identity() -> bytes:
    out = ffi.new("uint8_t[24]")
    lib.pyl_rpc_identity(out)
    return bytes(ffi.buffer(out))


def names(workers: list[Worker]) -> list[str]:
    return [worker.endpoint for worker in workers]


@contextmanager
def named_error(*parts: str) -> Iterator[None]:
    """Expect a WorkerError with these parts in its message, soon."""
    start_s = time.monotonic()
    with pytest.raises(WorkerError) as info:
        yield
    assert time.monotonic() - start_s < LIMIT_S
    for part in parts:
        assert part in str(info.value)


# --- equal answers ---


def outcome(model: Path, **options: object) -> tuple[str, np.ndarray]:
    with Llama(model, n_ctx=1024, n_threads=1, **options) as llm:
        ids = llm.tokenize(PROMPT, add_bos=True)
        answer = "".join(llm.generate(ids, max_tokens=24, temperature=0))
        llm.reset()
        return answer, llm.eval(ids, logits="all")


@pytest.mark.parametrize("act_quant", ["none", "cache", "full"])
def test_two_workers_compute_what_one_process_computes(
    model: Path, pair: list[Worker], act_quant: str
) -> None:
    answer, logits = outcome(model, act_quant=act_quant)
    answer_rpc, logits_rpc = outcome(model, act_quant=act_quant, rpc=names(pair))
    assert answer_rpc == answer
    # the kernels are the same, with the same number of threads: not one bit differs
    assert np.array_equal(logits_rpc, logits)


def test_both_workers_hold_a_part(model: Path, pair: list[Worker]) -> None:
    with Llama(model, n_ctx=256, n_threads=1, rpc=",".join(names(pair))) as llm:
        held = {gpu.name: gpu.weights for gpu in llm.plan.gpus[:2]}
        assert list(held) == names(pair)
        assert all(held.values())
        entries = ffi.new("struct pyl_memory[8]")
        n = lib.pyl_memory_breakdown(llm._context.pointer, entries, 8)
        used = {text(entries[i].name): int(entries[i].weights) for i in range(n)}
    # what the plan says of every worker's weights; the engine rounds tensors up to the alignment of a buffer
    for name, n_bytes in held.items():
        assert used[f"RPC0[{name}]"] == pytest.approx(n_bytes, rel=0.001)


def test_some_layers_may_stay_here(model: Path, pair: list[Worker]) -> None:
    here, there = outcome(model), outcome(model, rpc=pair[0].endpoint, n_gpu_layers=1)
    assert there[0] == here[0]


def test_experts_may_stay_here(model: Path, pair: list[Worker]) -> None:
    here = outcome(model)
    with Llama(model, n_ctx=256, n_threads=1, rpc=names(pair)) as llm:
        n_before = sum(gpu.weights for gpu in llm.plan.gpus)
    with Llama(model, n_ctx=256, n_threads=1, rpc=names(pair), n_cpu_moe=99) as llm:
        n_after = sum(gpu.weights for gpu in llm.plan.gpus)
        entries = ffi.new("struct pyl_memory[8]")
        n = lib.pyl_memory_breakdown(llm._context.pointer, entries, 8)
        used = {text(entries[i].name): int(entries[i].weights) for i in range(n)}
    assert n_after < n_before
    there = sum(size for name, size in used.items() if name.startswith("RPC"))
    assert there == pytest.approx(n_after, rel=0.001)
    there_too = outcome(model, rpc=names(pair), n_cpu_moe=99)
    assert there_too[0] == here[0]
    assert np.array_equal(there_too[1], here[1])


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(model: Path, start: Start) -> None:
    worker = start("--host", "::1")
    assert worker.endpoint.startswith("[::1]:")
    assert "Everybody" not in worker.log
    assert outcome(model, rpc=worker.endpoint)[0] == outcome(model)[0]
    worker.process.kill()
    worker.process.wait()
    with named_error(worker.endpoint, "cannot be reached"):
        Llama(model, rpc=worker.endpoint)


def test_a_name_is_looked_up(model: Path, pair: list[Worker]) -> None:
    """Also where it has an IPv6 address first, at which nobody listens."""
    endpoint = f"localhost:{pair[0].address[1]}"
    with Llama(model, n_ctx=256, n_threads=1, rpc=endpoint) as llm:
        assert [gpu.name for gpu in llm.plan.gpus] == [endpoint]
        llm.eval([1, 2, 3])


def test_a_saved_state_goes_on_elsewhere(model: Path, pair: list[Worker]) -> None:
    with Llama(model, n_ctx=256, n_threads=1, rpc=names(pair)) as llm:
        llm.eval(llm.tokenize(PROMPT))
        state, expected = llm.save_state(), llm.logits
    with Llama(model, n_ctx=256, n_threads=1) as llm:
        llm.load_state(state)
        assert np.array_equal(llm.logits, expected)


def test_weights_are_kept_when_asked_to(model: Path, start: Start, tmp_path: Path) -> None:
    big = 10 * 1024 * 1024  # upstream's HASH_THRESHOLD
    worker = start("--cache", env={"XDG_CACHE_HOME": str(tmp_path)})
    texts = [outcome(model, rpc=worker.endpoint)[0] for _ in range(2)]
    assert texts[0] == texts[1] == outcome(model)[0]
    kept = list((tmp_path / "pyllama-dsv4" / "rpc").iterdir())
    assert all(path.stat().st_size > big for path in kept)
    assert kept  # the demo model's embedding is larger than that


# --- lost workers ---


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_is_an_error(model: Path, start: Start, number: int) -> None:
    worker = start()
    with Llama(model, n_ctx=256, n_threads=1, rpc=worker.endpoint) as llm:
        llm.eval(llm.tokenize(PROMPT))
        worker.stop(number)
        with named_error(worker.endpoint, "ended the connection"):
            llm.eval([1])
        with named_error(worker.endpoint):  # and stays one
            llm.eval([1])
        with named_error(worker.endpoint):
            llm.save_state()
        llm.reset()
        with pytest.raises(WorkerError):
            "".join(llm.generate(PROMPT, max_tokens=1))
    assert outcome(model)[0]  # this process goes on


def test_a_worker_that_dies_in_the_middle_of_an_answer(model: Path, start: Start) -> None:
    workers = [start(), start()]
    with Llama(model, n_ctx=1024, n_threads=1, rpc=names(workers)) as llm:
        pieces = llm.generate(PROMPT, max_tokens=500, temperature=0)
        next(pieces)
        workers[1].process.kill()
        with named_error(workers[1].endpoint):
            for _ in pieces:
                pass


def test_a_worker_that_hangs_is_an_error(model: Path, start: Start) -> None:
    worker = start()
    with Llama(model, n_ctx=256, n_threads=1, rpc=worker.endpoint) as llm:
        llm.eval(llm.tokenize(PROMPT))
        worker.process.send_signal(signal.SIGSTOP)
        with named_error(worker.endpoint, "no sign of life"):
            llm.eval([1])
    worker.process.send_signal(signal.SIGCONT)
    # it has got over it: another client is served
    assert outcome(model, rpc=worker.endpoint)[0] == outcome(model)[0]


def test_a_lost_worker_can_be_replaced(model: Path, start: Start) -> None:
    worker = start()
    port = worker.endpoint.split(":")[1]
    expected = outcome(model, rpc=worker.endpoint)[0]
    with Llama(model, n_ctx=256, n_threads=1, rpc=worker.endpoint) as llm:
        worker.stop(signal.SIGKILL)
        with pytest.raises(WorkerError):
            llm.eval([1])
        again = start("--port", port)
        assert again.endpoint == worker.endpoint
        # beside the old one, which still holds on to what it had
        assert outcome(model, rpc=worker.endpoint)[0] == expected


def test_a_worker_that_ends_while_weights_are_sent(model: Path, start: Start) -> None:
    worker = start()

    def on_progress(progress: object) -> bool:
        worker.process.kill()
        return True

    with named_error(worker.endpoint):
        Llama(model, n_ctx=256, rpc=worker.endpoint, progress=on_progress)


@pytest.mark.slow
def test_a_long_computation_is_waited_for() -> None:
    """A worker that shows signs of life may take longer than one that shows none."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(greeting(OURS, identity()))
        receive(connection, 9)  # DEVICE_COUNT
        for _ in range(18):
            connection.sendall(BEAT)
            time.sleep(0.5)
        connection.sendall((4).to_bytes(8, "little") + (0).to_bytes(4, "little"))

    fake = FakeWorker(talk)
    start_s = time.monotonic()
    with pytest.raises(WorkerError, match="lends no device"):
        rpc_devices(fake.endpoint)
    assert time.monotonic() - start_s > 9
    fake.close()


@pytest.mark.slow
def test_a_busy_worker_shows_signs_of_life(pair: list[Worker]) -> None:
    connection, _ = greet(pair[0], identity())
    with connection:
        request(connection, ALLOC_BUFFER, struct.pack("<IQ", 0, 256 << 20))
        buffer, _ = struct.unpack("<QQ", response(connection))
        for _ in range(100):  # seconds of work that is not answered
            request(connection, BUFFER_CLEAR, struct.pack("<QB", buffer, 1))
        request(connection, DEVICE_COUNT, b"")
        n_beats = 0
        while receive(connection, 8) == BEAT:
            n_beats += 1
        assert n_beats >= 1
        assert receive(connection, 4) == struct.pack("<I", 1)


def test_nobody_there_is_an_error(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with named_error(f"127.0.0.1:{port}", "cannot be reached", "rpc-server"):
        Llama(model, rpc=f"127.0.0.1:{port}")
    with named_error("no-such-host.invalid:50052", "cannot be found"):
        Llama(model, rpc="no-such-host.invalid")


def test_somebody_who_does_not_answer_is_an_error(model: Path) -> None:
    fake = FakeWorker(lambda connection: time.sleep(60))
    with named_error(fake.endpoint, "no sign of life"):
        Llama(model, rpc=fake.endpoint)
    fake.close()


def test_a_busy_worker_is_an_error(model: Path, start: Start) -> None:
    worker = start()
    connection, _ = greet(worker, identity())
    with connection, named_error(worker.endpoint, "serves another client"):
        Llama(model, n_ctx=256, rpc=worker.endpoint)
    assert outcome(model, rpc=worker.endpoint)[0]


def test_what_does_not_fit_into_a_worker_is_refused(
    model: Path, pair: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pyllama_dsv4 import llama_base

    small = [replace(device, n_bytes_free=1000) for device in rpc_devices(names(pair))]
    monkeypatch.setattr(llama_base, "rpc_devices", lambda rpc: small)
    with pytest.raises(MemoryLimitError, match=pair[0].endpoint):
        Llama(model, n_ctx=256, rpc=names(pair))


def test_no_error_ends_the_process(model: Path, start: Start) -> None:
    """Freed while a worker is lost, never closed, at the end of the interpreter."""
    worker = start()
    program = (
        "import os, signal, sys\n"
        "from pyllama_dsv4 import Llama\n"
        "llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, rpc=sys.argv[2])\n"
        "llm.eval([1, 2, 3])\n"
        "os.kill(int(sys.argv[3]), signal.SIGKILL)\n"
        "try:\n"
        "    llm.eval([1])\n"
        "except ConnectionError as error:\n"
        "    print(type(error).__name__)\n"
    )
    args = [sys.executable, "-c", program, str(model), worker.endpoint, str(worker.process.pid)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "WorkerError\n"), done.stderr


# --- names ---


def test_endpoints() -> None:
    assert endpoints("a:1,b") == ["a:1", "b:50052"]
    assert endpoints(["a:1", " b:2 "]) == ["a:1", "b:2"]
    assert endpoints("[::1]:1,[fe80::1%eth0]") == ["[::1]:1", "[fe80::1%eth0]:50052"]


@pytest.mark.parametrize(
    "names",
    ["", "a:", ":1", "a:b", "a:0", "a:65536", "a:1,", "a:1,a:1", "::1:50052", "[::1", "[a]:1", "[]:1"],
)
def test_malformed_endpoints(names: str) -> None:
    with pytest.raises(ArgumentError, match="naming workers"):
        endpoints(names)


def test_too_many_workers() -> None:
    with pytest.raises(ArgumentError, match="at most 16"):
        endpoints([f"a{i}" for i in range(17)])
