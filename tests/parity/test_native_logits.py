"""The native file against the same weights in F32 in the upstream dialect, both through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4.convert import convert

N_TOKENS = 300
SEEDS = (1, 2, 3)
# Products keep their inputs, so the two files differ by the order of sums: 4e-13. The rounding of the cache turns a
# last bit into a flip now and then: up to 4e-4 with the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"act_quant": "none", "cache_type": "f32", "flash_attn": "off"},
    "default": {},
}
NMSE_MAX = {"exact": 1e-9, "default": 5e-3}
ARGMAX_MIN = 0.99

Logits = npt.NDArray[np.float32]


def _logits(path: Path, ids: list[int], options: str) -> Logits:
    with Llama(path, n_ctx=512, n_threads=1, warmup=False, **OPTIONS[options]) as llm:
        return llm.eval(ids, logits="all")


def _nmse(exact: Logits, other: Logits) -> float:
    return float(np.mean((exact - other) ** 2) / np.mean(exact**2))


@pytest.fixture(scope="module", params=list(OPTIONS))
def options(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, options: str) -> list[tuple[Logits, Logits]]:
    out = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        synth.write_checkpoint(folder / "checkpoint", synth.tiny_config(), seed=seed)
        synth.write_upstream_f32(folder / "checkpoint", folder / "f32.gguf")
        convert(folder / "checkpoint", folder / "native.gguf")
        ids = [int(i) for i in np.random.default_rng(seed).integers(0, 320, N_TOKENS)]
        out.append(
            (
                _logits(folder / "f32.gguf", ids, options),
                _logits(folder / "native.gguf", ids, options),
            )
        )
    return out


@pytest.mark.slow
def test_the_same_weights_give_the_same_logits(pairs: list[tuple[Logits, Logits]], options: str) -> None:
    for exact, native in pairs:
        assert _nmse(exact, native) <= NMSE_MAX[options]
        assert np.mean(exact.argmax(axis=1) == native.argmax(axis=1)) >= ARGMAX_MIN


@pytest.mark.slow
def test_the_comparison_sees_a_wrong_weight(pairs: list[tuple[Logits, Logits]]) -> None:
    """The bounds have teeth: logits of another seed's weights are far outside."""
    exact, other = pairs[0][0], pairs[1][1]
    assert _nmse(exact, other) > 0.1
    assert np.mean(exact.argmax(axis=1) == other.argmax(axis=1)) < 0.5
