"""Threads that share a core: the engine's barrier must give way to the thread it waits for.

Regression: upstream's barrier spins until its time slice ends. Two engine threads and two other busy processes on one
core are compared with one engine thread and the same busy processes, so that the machine's own speed does not matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RATIO_MAX = 150.0  # patched: 117 at most on a machine with a load of 6; upstream: 450 there
N_TRIES = 3  # what else runs on the machine can only make it slower

SCRIPT = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pyllama_dsv4 import Llama
# they end by themselves should this process be killed
burn = "import os\\nparent = os.getppid()\\nwhile os.getppid() == parent: pass"
others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2)]
try:
    times_s = []
    for n_threads in 1, 2:
        with Llama(sys.argv[1], n_ctx=256, n_threads=n_threads, warmup=False) as llm:
            llm.eval([0])
            start_s = time.monotonic()
            for token in range(1, 4):
                llm.eval([token])
            times_s.append(time.monotonic() - start_s)
finally:
    for other in others:
        other.kill()
print(*times_s)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity (Linux)")
def test_two_threads_on_one_core_make_progress(tiny_upstream: Path) -> None:
    ratios = []
    for _ in range(N_TRIES):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tiny_upstream)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        one_s, two_s = map(float, run.stdout.split())
        ratios.append(two_s / one_s)
        if ratios[-1] < RATIO_MAX:
            break
    assert min(ratios) < RATIO_MAX, ratios
