"""Workers as processes, and programs that speak the RPC protocol by hand: helpers of ``tests/rpc``.

The wire format is written down here a second time, from upstream's ``ggml-rpc.cpp``, so that a change of it is seen.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cli_process import TIMEOUT_S, command

LIMIT_S = 10.0  # what an error about a worker may take
STOCK = (7, 0, 0)
OURS = (212, 0, 0)
NOBODY = bytes(24)  # stock llama.cpp without RDMA
BEAT = struct.pack("<Q", 2**64 - 1)

HELLO, ALLOC_BUFFER, BUFFER_GET_BASE, BUFFER_CLEAR, GET_TENSOR, DEVICE_COUNT = 14, 0, 3, 5, 8, 15


class Worker:
    """``pyllama-dsv4 rpc-server`` on a free port of the loopback interface.

    Attributes:
        log: What it has written to stderr.
        endpoint: ``host:port``.
    """

    def __init__(self, log: Path, *args: object, env: dict[str, str] | None = None) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYLLAMA_DSV4_")}
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command("rpc-server", "--port", 0, "-t", 1, *args), stderr=stream, env={**kept, **(env or {})}
            )
        self.endpoint = self.wait_for(r"listening on (\S+);")[1]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.endpoint.rpartition(":")
        return host.strip("[]"), int(port)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the log has it."""
        end_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end_s:
            if found := re.search(pattern, self.log):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the worker's log:\n{self.log}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


Start = Callable[..., Worker]


def receive(connection: socket.socket, n: int) -> bytes:
    """Return n bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < n and (piece := connection.recv(n - len(data))):
        data += piece
    return data


def request(connection: socket.socket, number: int, body: bytes) -> None:
    connection.sendall(struct.pack("<BQ", number, len(body)) + body)


def response(connection: socket.socket) -> bytes:
    """Return the next response; ``b""`` at the end of the stream."""
    while (head := receive(connection, 8)) == BEAT:
        pass
    return receive(connection, *struct.unpack("<Q", head)) if head else b""


def greet(worker: Worker, identity: bytes) -> tuple[socket.socket, bytes]:
    """Connect as a client that says `identity`; return the connection and the worker's greeting."""
    connection = socket.create_connection(worker.address, TIMEOUT_S)
    request(connection, HELLO, identity)
    return connection, response(connection)


def is_ended(connection: socket.socket) -> bool:
    """Tell whether the other end has closed the connection, waiting for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


class FakeWorker:
    """A program that is taken for a worker.

    Args:
        talk: Called with every connection after the client's greeting was read.
    """

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                if receive(connection, 33):
                    self._talk(connection)

    def close(self) -> None:
        self._listener.close()


def greeting(version: tuple[int, int, int], identity: bytes) -> bytes:
    body = bytes((*version, 0)) + identity
    return struct.pack("<Q", len(body)) + body


def tensor(buffer: int, data: int, n: int) -> bytes:
    """Return an ``rpc_tensor``: one row of n F32 values."""
    ne = (n, 1, 1, 1)
    nb = (4, 4 * n, 4 * n, 4 * n)
    return struct.pack(
        "<QIQ4I4II16ii10QQQQ64si", 1, 0, buffer, *ne, *nb, 0, *([0] * 16), 0, *([0] * 10), 0, 0, data, b"t", 0
    )
