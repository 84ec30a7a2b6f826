"""Workers and clients of another build refuse each other by name, in both directions; and strangers do no harm."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from rpc_process import (
    ALLOC_BUFFER,
    BUFFER_GET_BASE,
    DEVICE_COUNT,
    GET_TENSOR,
    HELLO,
    NOBODY,
    OURS,
    STOCK,
    FakeWorker,
    Worker,
    greet,
    greeting,
    is_ended,
    request,
    response,
    tensor,
)

from pyllama_dsv4 import Llama
from pyllama_dsv4._native import ffi, lib, series_digest
from pyllama_dsv4.errors import WorkerError
from pyllama_dsv4.rpc import protocol_version

OTHER = b"pyllama\0" + b"0123456789abcdef"
OWN = b"pyllama\0" + series_digest().encode()


def test_the_identity_is_the_patch_series() -> None:
    out = ffi.new("uint8_t[24]")
    lib.pyl_rpc_identity(out)
    assert bytes(ffi.buffer(out)) == OWN
    assert protocol_version() == ".".join(map(str, OURS))


# --- a client of ours, a worker of others ---


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (greeting(STOCK, NOBODY), ("protocol 7.0.0", "not 212.0.0", "stock llama.cpp")),
        (greeting((6, 1, 0), NOBODY), ("protocol 6.1.0",)),
        (greeting((212, 1, 0), OWN), ("protocol 212.1.0",)),
        (greeting(OURS, OTHER), ("0123456789abcdef", series_digest())),
        (greeting(OURS, NOBODY), ("not a worker of pyllama-dsv4",)),
        (greeting(OURS, b"pyllama\0\x1b[2J" + bytes(12)), ("unreadable",)),
        (struct.pack("<Q", 3) + bytes((3, 0, 0)), ("another length",)),  # before conn_caps
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ("another length",)),
        (b"", ("ended the connection",)),
    ],
    ids=["stock", "older", "newer", "other patches", "unmarked", "odd", "oldest", "http", "silent"],
)
def test_a_worker_of_another_build_is_refused(model: Path, answer: bytes, parts: tuple[str, ...]) -> None:
    fake = FakeWorker(lambda connection: connection.sendall(answer))
    with pytest.raises(WorkerError) as info:
        Llama(model, n_ctx=256, rpc=fake.endpoint)
    fake.close()
    for part in (f"worker {fake.endpoint}", *parts):
        assert part in str(info.value)
    assert "\x1b" not in str(info.value)


# --- a worker of ours, a client of others ---


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (NOBODY, "stock llama.cpp"),
        (OTHER, "patch series 0123456789abcdef"),
        (b"x" * 24, "stock llama.cpp, or another program"),
    ],
    ids=["stock", "other patches", "noise"],
)
def test_a_client_of_another_build_is_refused(pair: list[Worker], identity: bytes, reason: str) -> None:
    worker = pair[0]
    connection, answer = greet(worker, identity)
    with connection:
        # what a stock client reads first, and refuses by; ours also reads the rest
        assert answer == bytes((*OURS, 0)) + OWN
        assert is_ended(connection)
    assert worker.wait_for(f"refused a client: .*{reason}")
    assert worker.process.poll() is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + bytes(100),
        struct.pack("<BQ", HELLO, 2**63),
        struct.pack("<BQ", DEVICE_COUNT, 0),
        struct.pack("<BQ", HELLO, 24) + OWN + struct.pack("<BQ", 200, 0),
        struct.pack("<BQ", HELLO, 24) + OWN + struct.pack("<BQ", ALLOC_BUFFER, 12) + bytes(4) + b"\xff" * 8,
        struct.pack("<BQ", HELLO, 24) + OWN + struct.pack("<BQ", 10, 2**62),  # a graph of that size
    ],
    ids=["http", "long greeting", "no greeting", "no command", "much memory", "large graph"],
)
def test_a_worker_survives_noise(pair: list[Worker], model: Path, data: bytes) -> None:
    worker = pair[0]
    with socket.create_connection(worker.address, 20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while not is_ended(connection):
            pass
    with Llama(model, n_ctx=256, n_threads=1, rpc=worker.endpoint) as llm:
        llm.eval([1, 2, 3])


@pytest.mark.parametrize(("shift", "n"), [(0, 2000), (-4, 4), (2**63, 4), (1 << 20, 4)])
def test_tensors_outside_of_their_buffer_end_the_connection_only(
    pair: list[Worker], shift: int, n: int
) -> None:
    """The worker once ended itself here, by an assertion."""
    worker = pair[0]
    connection, _ = greet(worker, OWN)
    with connection:
        request(connection, ALLOC_BUFFER, struct.pack("<IQ", 0, 4096))
        buffer, _ = struct.unpack("<QQ", response(connection))
        request(connection, BUFFER_GET_BASE, struct.pack("<Q", buffer))
        (base,) = struct.unpack("<Q", response(connection))
        good = tensor(buffer, base, 8) + struct.pack("<QQ", 0, 32)
        request(connection, GET_TENSOR, good)
        assert len(response(connection)) == 32
        request(
            connection, GET_TENSOR, tensor(buffer, (base + shift) % 2**64, n) + struct.pack("<QQ", 0, 4 * n)
        )
        assert is_ended(connection)
    connection, answer = greet(worker, OWN)
    connection.close()
    assert answer[:3] == bytes(OURS)
