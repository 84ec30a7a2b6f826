"""The one way to the engine: loads the cffi extension and translates statuses, log lines, paths and text.

Owns the version handshake, ``check``/``check_ptr`` and the log ring's way into ``logging``. Owners of native
objects (model, context, sampler, tokenizer) import ``ffi`` and ``lib`` from here and from nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from . import _cublas, errors


def _is_missing(module: str, error: ImportError) -> ImportError:
    if "libcublas" in str(error):
        advice = f"It was built for NVIDIA GPUs and needs cuBLAS: {_cublas.advice(error)}"
    elif (Path(__file__).parent.parent / "pyproject.toml").exists():
        advice = (
            "Python found the source folder instead of an installed package: run `pip install .` here and start "
            "Python elsewhere, use .venv/bin/pyllama-dsv4 after `make chat`, or install with `pip install -e .`"
        )
    else:
        advice = (
            "It is built by pip: run `pip install .` in the source folder, or install a wheel for this Python"
        )
    return ImportError(f"the {module} module of pyllama-dsv4 could not be loaded ({error}). {advice}")


try:
    from ._codec import cpu_features, missing_cpu_features
except ImportError as error:
    raise _is_missing("codec", error) from error

if missing_cpu_features():  # an instruction that a CPU lacks would end the process
    raise errors.UnsupportedCpuError(
        "the native module of pyllama-dsv4 cannot run on this CPU",
        found=f"a CPU without {', '.join(missing_cpu_features())}",
        expected=f"one with {cpu_features.replace(' ', ', ')}, which it was built for",
        hint="Build it here (`pip install .` in the source folder), which takes what this CPU has",
    )

try:
    try:
        from ._llama import ffi, lib
    except ImportError as first:
        if not _cublas.load_for(first):
            raise
        from ._llama import ffi, lib
except ImportError as error:
    raise _is_missing("native", error) from error

__all__ = [
    "build_info",
    "check",
    "check_ptr",
    "drain_log",
    "encode_path",
    "ffi",
    "lib",
    "log_tail",
    "run_cancellable",
    "series_digest",
    "text",
]

T = TypeVar("T")

logger = logging.getLogger("pyllama_dsv4")
logger.addHandler(logging.NullHandler())

N_LOG_TAIL = 12  # lines attached to an exception
N_LOG_BYTES_MAX = 8192
POLL_S = 0.05  # how often a waiting main thread looks for Ctrl-C


def text(pointer: Any) -> str:
    """Return a C string as ``str``; bytes that are not UTF-8 become U+FFFD."""
    return "" if pointer == ffi.NULL else bytes(ffi.string(pointer)).decode("utf-8", "replace")


def encode_path(path: str | os.PathLike[str]) -> bytes:
    """Return the path as the bytes that the C library's ``open`` wants."""
    return os.fsencode(path)


# --- handshake -----------------------------------------------------------------------------------------


def series_digest() -> str:
    """Return the digest of the patch series that is compiled in (16 hex digits)."""
    return text(lib.pyl_build_series())


def build_info() -> dict[str, str]:
    """Return what is compiled in, for people: pinned llama.cpp, patches, backends, and the CPU features in use."""
    return {
        "llama.cpp": text(lib.pyl_build_commit()),
        "patches": series_digest(),
        "backends": text(lib.pyl_build_backends()),
        "system": text(lib.llama_print_system_info()),
    }


def _handshake() -> None:
    built = text(lib.pyl_build_version())
    try:
        installed = metadata.version("pyllama-dsv4")
    except metadata.PackageNotFoundError:
        return  # imported from a bare folder: nothing to compare with
    if built != installed:
        raise ImportError(
            f"the native module was built for pyllama-dsv4 {built}, but {installed} is installed; "
            "build again: pip install ."
        )
    stamp = Path(__file__).resolve().parent.parent / "vendor" / "llama.cpp" / ".pyllama-dsv4-stamp.json"
    if stamp.exists():  # an editable install: sources may have moved on since the build
        import json

        wanted = json.loads(stamp.read_text(encoding="utf-8"))["series"]
        if wanted != series_digest():
            raise ImportError(
                f"the native module was built with patch series {series_digest()}, the source folder has {wanted}; "
                "build again with the command that made this editable install"
            )


# --- log -----------------------------------------------------------------------------------------------

_tail: deque[str] = deque(maxlen=N_LOG_TAIL)
_log_lock = threading.Lock()
_log_buffer = ffi.new("char[]", N_LOG_BYTES_MAX)
_log_level = ffi.new("int32_t *")
_LEVELS = {
    lib.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    lib.GGML_LOG_LEVEL_INFO: logging.DEBUG,  # upstream's "info" is a load protocol of hundreds of lines
    lib.GGML_LOG_LEVEL_WARN: logging.WARNING,
    lib.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


def drain_log() -> None:
    """Move the engine's pending log lines into the ``pyllama_dsv4`` logger."""
    with _log_lock:
        while (n := lib.pyl_log_next(_log_buffer, N_LOG_BYTES_MAX, _log_level)) >= 0:
            line = ffi.buffer(_log_buffer, n)[:].decode("utf-8", "replace")
            level = _LEVELS.get(_log_level[0], logging.DEBUG)
            if level >= logging.WARNING:
                _tail.append(line)
            logger.log(level, "%s", line)


def log_tail(clear: bool = False) -> tuple[str, ...]:
    """Return the newest warnings and errors of the engine, oldest first."""
    drain_log()
    lines = tuple(_tail)
    if clear:
        _tail.clear()
    return lines


# --- status --------------------------------------------------------------------------------------------

_STATUS: dict[int, type[errors.PyllamaError]] = {
    lib.PYL_ERROR_MEMORY: errors.MemoryLimitError,
    lib.PYL_ERROR_ARGUMENT: errors.ArgumentError,
    lib.PYL_CANCELLED: errors.CancelledError,
    lib.PYL_CONTEXT_FULL: errors.ContextFullError,
    lib.PYL_ERROR_WORKER: errors.WorkerError,
}


def _fail(cls: type[errors.PyllamaError], op: str, **facts: Any) -> NoReturn:
    reason = text(lib.pyl_last_error())
    raise cls(
        f"{op} failed: {reason}" if reason else f"{op} failed", native_log=log_tail(clear=True), **facts
    )


def check(status: int, op: str, cls: type[errors.PyllamaError] = errors.InferenceError, **facts: Any) -> int:
    """Return `status` if it is not negative, else raise the exception that stands for it.

    Args:
        status: A ``pyl_status``, or a count.
        op: What was attempted, for the message.
        cls: What an error without a status of its own raises.
        facts: Keyword facts of ``PyllamaError`` (path, tensor, found, expected, hint).
    """
    if status < 0:
        _fail(_STATUS.get(status, cls), op, **facts)
    return status


def check_ptr(pointer: T, op: str, cls: type[errors.PyllamaError] = errors.InferenceError, **facts: Any) -> T:
    """Return `pointer` if it is not NULL, else raise: memory and cancel by the engine's reason, `cls` otherwise."""
    if pointer == ffi.NULL:
        reason = text(lib.pyl_last_error())
        if reason == "out of memory":
            cls = errors.MemoryLimitError
        elif reason == "cancelled":
            cls = errors.CancelledError
        elif reason.startswith("worker "):
            cls = errors.WorkerError
        _fail(cls, op, **facts)
    return pointer


def run_cancellable(work: Callable[[], T], monitor: Any, on_poll: Callable[[], bool] | None = None) -> T:
    """Run a long native call so that Ctrl-C and `on_poll` can stop it.

    In the main thread the call moves to a worker, because Python delivers signals only between bytecodes of the
    main thread. On KeyboardInterrupt, or when `on_poll` returns False, the monitor's cancel flag is set, the call
    is waited for, and the interrupt goes on; the flag is cleared again in every case.

    Args:
        work: The native call.
        monitor: ``struct pyl_monitor *`` that the call polls.
        on_poll: Called every 50 ms while waiting.
    """
    if threading.current_thread() is not threading.main_thread() and on_poll is None:
        return work()
    outcome: list[T] = []
    failure: list[BaseException] = []
    go, done = threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    # An interrupt in start() leaves a thread that waits for `go`, never an engine at work unattended. Events and not
    # join(): before Python 3.13 an exception in join() marks the running thread as ended.
    threading.Thread(target=run, name="pyllama-dsv4", daemon=True).start()
    try:
        go.set()
        while not done.wait(POLL_S):
            if on_poll is not None and not on_poll():
                monitor.cancel = 1
                on_poll = None
    except BaseException:
        monitor.cancel = 1
        go.set()
        _wait(done)
        raise
    finally:
        monitor.cancel = 0
    if failure:
        raise failure[0]
    return outcome[0]


def _wait(done: threading.Event) -> None:
    """Wait, whatever Ctrl-C says in the meantime."""
    while not done.is_set():
        with suppress(KeyboardInterrupt):
            done.wait()


_handshake()
lib.pyl_log_init()
lib.llama_backend_init()
