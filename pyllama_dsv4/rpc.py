"""Several machines: the devices that workers lend, and being a worker.

The protocol is llama.cpp's RPC with a greeting and signs of life of our own (``native/rpc``); both ends must be of the
same patch series. It has no authentication and no encryption.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._native import check, drain_log, encode_path, ffi, lib, run_cancellable, text
from .errors import ArgumentError, WorkerError

__all__ = [
    "HOST_DEFAULT",
    "N_WORKERS_MAX",
    "PORT_DEFAULT",
    "Device",
    "device_plan",
    "endpoints",
    "is_loopback",
    "protocol_version",
    "rpc_devices",
    "run_worker",
]

HOST_DEFAULT = "127.0.0.1"
PORT_DEFAULT = 50052
N_WORKERS_MAX = 16
_N_DEVICES_MAX = 16  # of one worker
_N_POLLS_STAY = 10  # half a second
_ENDPOINT = re.compile(
    r"(?P<host>\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^:\[\]]+)(?::(?P<port>[^:]*))?"
)
_HINT = "Start `pyllama-dsv4 rpc-server` there, of the same version as here."


@dataclass(frozen=True)
class Device:
    """Something that layers can be placed on.

    Attributes:
        name: For people.
        n_bytes_free: Memory that it has left.
        pointer: ``ggml_backend_dev_t``, valid until the process ends.
    """

    name: str
    n_bytes_free: int
    pointer: Any


def protocol_version() -> str:
    """Return the version of the protocol, such as ``212.0.0``: upstream's count from 1, ours from 212."""
    return text(lib.pyl_rpc_version())


def endpoints(workers: str | Sequence[str]) -> list[str]:
    """Return ``host:port`` for each worker.

    Args:
        workers: A list, or one text with commas; without a port ``PORT_DEFAULT`` is meant. IPv6 addresses stand in
            brackets.

    Raises:
        ArgumentError: Not of that form, a worker named twice, or more than ``N_WORKERS_MAX``.
    """
    names = [workers] if isinstance(workers, str) else list(workers)
    found: list[str] = []
    for name in (part.strip() for entry in names for part in entry.split(",")):
        match = _ENDPOINT.fullmatch(name)
        host = match["host"] if match else ""
        port = match["port"] if match and match["port"] is not None else str(PORT_DEFAULT)
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ArgumentError(
                "naming workers", key="rpc", found=repr(name), expected="host:port or [IPv6 address]:port"
            )
        found.append(f"{host}:{int(port)}")
    if len(set(found)) != len(found):
        raise ArgumentError("naming workers", key="rpc", found=", ".join(found), expected="each once")
    if len(found) > N_WORKERS_MAX:
        raise ArgumentError(
            "naming workers", key="rpc", found=f"{len(found)} workers", expected=f"at most {N_WORKERS_MAX}"
        )
    return found


def rpc_devices(workers: str | Sequence[str]) -> list[Device]:
    """Return what workers lend, then this machine's GPUs; nothing if there are no workers.

    Raises:
        ArgumentError: As ``endpoints``.
        WorkerError: A worker cannot be reached within seconds, is busy, or is of another build.
    """
    found: list[Device] = []
    for endpoint in endpoints(workers) if workers else ():
        found += _devices(endpoint, endpoint)
    return found + _devices(None, "GPU") if found else []


def _devices(endpoint: str | None, name: str) -> list[Device]:
    pointers = ffi.new("ggml_backend_dev_t[]", _N_DEVICES_MAX)
    n_bytes = ffi.new("uint64_t[]", _N_DEVICES_MAX)
    c_endpoint = ffi.NULL if endpoint is None else ffi.new("char[]", endpoint.encode())
    n = check(
        lib.pyl_devices(c_endpoint, pointers, n_bytes, _N_DEVICES_MAX), "connecting", WorkerError, hint=_HINT
    )
    if endpoint is not None and not all(n_bytes[i] for i in range(n)):
        # known from before, and lost since: its memory is asked for in vain
        raise WorkerError(f"worker {endpoint} cannot be reached", found="no memory that it lends", hint=_HINT)
    numbers = [f" {i}" for i in range(n)] if n > 1 or endpoint is None else [""]
    return [Device(f"{name}{numbers[i]}", int(n_bytes[i]), pointers[i]) for i in range(n)]


def device_plan(devices: Sequence[Device], n_gpu_layers: int | str, n_cpu_moe: int = 0) -> dict[str, Any]:
    """Return the keywords of ``plan_model`` that count workers as GPUs; none if there are no workers."""
    if not devices:
        return {}
    return {
        "gpu_bytes": [device.n_bytes_free for device in devices],
        "gpu_names": [device.name for device in devices],
        "n_gpu_layers": -1 if n_gpu_layers == "auto" else n_gpu_layers,
        "n_cpu_moe": n_cpu_moe,
    }


# --- being a worker ----------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the address."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def run_worker(
    *,
    host: str = HOST_DEFAULT,
    port: int = PORT_DEFAULT,
    n_threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    on_start: Callable[[str, int], None] | None = None,
    on_client: Callable[[bool], None] | None = None,
) -> None:
    """Lend this machine's GPUs, or else its memory and cores, to one client after the other until interrupted.

    Args:
        host: Address to listen on; 0.0.0.0 for everybody in the network.
        port: 0 takes a free one.
        n_threads: None takes the physical cores.
        cache: Folder in which weights that were sent are kept, so that they need not be sent again.
        on_start: Called with address and port once it listens.
        on_client: Called with True when a client has come, with False when it has left.

    Raises:
        WorkerError: The address or the port cannot be had.
        KeyboardInterrupt: The way it ends.
    """
    try:
        address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise WorkerError(f"listening on {host}, port {port}", found=error.strerror) from error
    if cache is not None:
        os.makedirs(cache, exist_ok=True)
    worker = ffi.new("struct pyl_worker *")
    c_host = ffi.new("char[]", str(address).encode())
    c_cache = ffi.NULL if cache is None else ffi.new("char[]", encode_path(cache))
    threads = int(lib.pyl_n_cores()) if n_threads is None else n_threads
    polls = _Polls(worker, lambda number: on_start and on_start(host, number), on_client)

    def serve() -> int:
        return check(
            lib.pyl_rpc_serve(c_host, port, c_cache, threads, worker),
            f"listening on {host}, port {port}",
            WorkerError,
            hint="Choose another port or address.",
        )

    run_cancellable(serve, worker, polls.look)


class _Polls:
    """Turns what the worker's thread counts into calls. A client that looks in for a moment is none."""

    def __init__(
        self, worker: Any, on_start: Callable[[int], Any], on_client: Callable[[bool], None] | None
    ) -> None:
        self._worker = worker
        self._on_start = on_start
        self._on_client = on_client
        self._is_started = self._is_announced = False
        self._n_clients = self._n_polls = 0

    def look(self) -> bool:
        drain_log()
        if self._worker.port and not self._is_started:
            self._is_started = True
            self._on_start(int(self._worker.port))
        n_clients, is_busy = int(self._worker.n_clients), bool(self._worker.is_busy)
        if n_clients != self._n_clients or not is_busy:
            self._announce(False)
            self._n_clients, self._n_polls = n_clients, 0
        self._n_polls += is_busy
        if self._n_polls == _N_POLLS_STAY:
            self._announce(True)
        return True

    def _announce(self, is_there: bool) -> None:
        if is_there != self._is_announced and self._on_client is not None:
            self._on_client(is_there)
        self._is_announced = is_there
