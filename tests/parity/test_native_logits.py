"""The native file against the same weights in F32 in the upstream dialect, both through the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4.convert import convert

N_TOKENS = 300
SEEDS = (1, 2, 3)
NMSE_MAX = 1e-2  # inputs of the MXFP4 products are rounded to 8 bits: 2e-3 to 5e-3 measured
ARGMAX_MIN = 0.95  # over all seeds together


def _logits(path: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    # rounded rows would amplify the differences of the products, which are looked at here
    with Llama(path, n_ctx=512, n_threads=1, warmup=False, act_quant="none") as llm:
        return llm.eval(ids, logits="all")


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    out = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        synth.write_checkpoint(folder / "checkpoint", synth.tiny_config(), seed=seed)
        synth.write_upstream_f32(folder / "checkpoint", folder / "f32.gguf")
        convert(folder / "checkpoint", folder / "native.gguf")
        ids = [int(i) for i in np.random.default_rng(seed).integers(0, 320, N_TOKENS)]
        out.append((_logits(folder / "f32.gguf", ids), _logits(folder / "native.gguf", ids)))
    return out


@pytest.mark.slow
def test_nmse(pairs: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> None:
    for exact, native in pairs:
        assert np.mean((exact - native) ** 2) / np.mean(exact**2) <= NMSE_MAX


@pytest.mark.slow
def test_argmax(pairs: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> None:
    equal = [exact.argmax(axis=1) == native.argmax(axis=1) for exact, native in pairs]
    assert np.mean(equal) >= ARGMAX_MIN


@pytest.mark.slow
def test_the_comparison_sees_a_wrong_weight(
    pairs: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]],
) -> None:
    """The bounds have teeth: logits of another seed's weights are far outside."""
    exact, other = pairs[0][0], pairs[1][1]
    assert np.mean((exact - other) ** 2) / np.mean(exact**2) > 10 * NMSE_MAX
