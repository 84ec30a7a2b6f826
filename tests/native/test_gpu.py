"""The same model on GPUs and on the CPU: needs a build with a GPU backend and a GPU (``-m gpu``).

Single operations are compared by ``test-backend-ops`` (ctest, label gpu); this is about whole graphs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import Llama
from pyllama_dsv4._native import build_info, lib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not lib.llama_supports_gpu_offload(),
        reason=f"no GPU was found (backends in this build: {build_info()['backends']})",
    ),
]

TOKENS = [0, *range(5, 69)]

# Sums in another order, and F16 inside attention; a rounding of the experts' inputs to 8 bits gives 1e-3 and more.
NMSE_MAX = 1e-5


def logits(path: Path, n_batch: int, **options: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    with Llama(path, n_ctx=256, n_threads=1, warmup=False, flash_attn="off", **options) as llm:
        for i in range(0, len(TOKENS), n_batch):
            llm.eval(TOKENS[i : i + n_batch])
        return np.array(llm.logits, np.float64)


def nmse(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.mark.parametrize("act_quant", ["none", "cache", "full"])
@pytest.mark.parametrize("n_batch", [1, 5, 65])
def test_logits_are_those_of_the_cpu(tiny_model: Path, act_quant: str, n_batch: int) -> None:
    options: dict[str, Any] = {"act_quant": act_quant, "cache_type": "f32"}
    on_cpu = logits(tiny_model, n_batch, n_gpu_layers=0, **options)
    on_gpu = logits(tiny_model, n_batch, n_gpu_layers=-1, **options)
    # a value that lies on a border of rounding may fall to either side
    assert nmse(on_gpu, on_cpu) < (NMSE_MAX if act_quant == "none" else 1e-3)


def test_experts_may_stay_in_host_memory(tiny_model: Path) -> None:
    everything = logits(tiny_model, 65, n_gpu_layers=-1, act_quant="none")
    divided = logits(tiny_model, 65, n_gpu_layers=-1, n_cpu_moe=1000, act_quant="none")
    assert nmse(divided, everything) < NMSE_MAX


def test_auto_places_layers(tiny_model: Path) -> None:
    assert (
        nmse(
            logits(tiny_model, 65, n_gpu_layers="auto", act_quant="none"),
            logits(tiny_model, 65, n_gpu_layers=-1, act_quant="none"),
        )
        < NMSE_MAX
    )


def test_bench_runs(tiny_model: Path) -> None:
    work = ["-ngl", "all", "-p", "16", "-n", "4", "-r", "1", "--json"]
    command = [sys.executable, "-m", "pyllama_dsv4", "bench", str(tiny_model), *work]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {m["kind"] for m in json.loads(run.stdout)["measurements"]} == {"prefill", "decode"}
