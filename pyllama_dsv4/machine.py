"""What this machine has: free memory, and how fast it is read. Asks the system only, never the engine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

__all__ = ["available_bytes", "n_cpus", "peak_bytes", "read_bandwidth", "working_set_bytes"]

_MIB: Final = 1 << 20
_MIN_PROBE_BYTES: Final = 16 * _MIB
_MAX_PROBE_BYTES: Final = 128 * _MIB
"""More than most caches hold. Filling it takes longer than reading it, so it is not larger."""
_N_PASSES: Final = 3


def _first_number(path: str, key: str = "") -> int | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(key):
                    digits = [word for word in line[len(key) :].split() if word.isdigit()]
                    return int(digits[0]) if digits else None
    except OSError:
        pass
    return None


def available_bytes() -> int | None:
    """Return memory that is free or reclaimable, within the control group's limit; None when unknown."""
    available = _first_number("/proc/meminfo", "MemAvailable:")
    if available is None:
        return None
    n = available * 1024
    for limit, used, cached in _group_memory():
        n = min(n, max(limit - used + cached, 0))
    return n


def _group_memory(
    groups_of: str = "/proc/self/cgroup", mounted_at: str = "/sys/fs/cgroup"
) -> Iterator[tuple[int, int, int]]:
    """Yield limit, use and reclaimable file pages of each control group of this process that limits memory."""
    try:
        with open(groups_of, encoding="ascii", errors="replace") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers == "":  # version 2
            root, names = mounted_at, ("memory.max", "memory.current", "file ")
        elif controllers == "memory":
            root, names = (
                f"{mounted_at}/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache "),
            )
        else:
            continue
        for folder in dict.fromkeys(
            (root + path.rstrip("/"), root)
        ):  # a container sees its own group as the root
            limit = _first_number(f"{folder}/{names[0]}")
            used = _first_number(f"{folder}/{names[1]}")
            if limit is not None and used is not None:
                yield limit, used, _first_number(f"{folder}/memory.stat", names[2]) or 0


def working_set_bytes() -> int | None:
    """Return this process's resident memory, mapped file pages included; None when unknown."""
    kib = _first_number("/proc/self/status", "VmRSS:")
    return None if kib is None else kib * 1024


def peak_bytes() -> int | None:
    """Return the largest resident memory that this process ever had, mapped file pages included; None when unknown.

    The system's other count, ``ru_maxrss``, begins with the size of the process that started this one.
    """
    kib = _first_number("/proc/self/status", "VmHWM:")
    return None if kib is None else kib * 1024


def n_cpus() -> int:
    """Return how many CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def read_bandwidth(n_bytes: int = _MAX_PROBE_BYTES) -> float:
    """Measure how fast all CPUs together read memory that was written before.

    Args:
        n_bytes: Size of the data whose reading is of interest: what fits into caches is read faster. More than
            128 MiB are not probed, nor more than an eighth of the free memory.

    Returns:
        Bytes per second, the best of three passes. It takes up to half a second.
    """
    available = available_bytes()
    limit = _MAX_PROBE_BYTES if available is None else min(_MAX_PROBE_BYTES, available // 8)
    n_threads = n_cpus()
    n_values = max(_MIN_PROBE_BYTES, min(n_bytes, limit)) // n_threads // 8
    parts = [np.empty(n_values, np.uint64) for _ in range(n_threads)]
    _in_threads([partial(part.fill, 1) for part in parts])
    best_s = min(_in_threads([part.max for part in parts]) for _ in range(_N_PASSES))  # numpy drops the GIL
    return n_threads * n_values * 8 / best_s


def _in_threads(work: Sequence[Callable[[], Any]]) -> float:
    """Run functions side by side and return the seconds until the last has ended."""
    threads = [threading.Thread(target=function) for function in work]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(time.perf_counter() - start_s, 1e-9)
