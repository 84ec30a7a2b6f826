"""Routing weights of experts that the router dislikes but the token's id selects, against the reference.

A hash layer uses the experts of the token's id however small their scores are: there softplus must not become zero, and
the weights must be divided by their sum as it is. Random gates score near zero, so the gate is scaled up here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from reference import Model, load_checkpoint, moe

from pyllama_dsv4 import Llama, synth

Array = npt.NDArray[np.floating]

N_TOKENS = 200
IDS = [int(i) for i in np.random.default_rng(4).integers(0, 320, N_TOKENS)]
GATE = "layers.0.ffn.gate.weight"
EXPONENT = 5  # the gate times 32
LEAST = 2.0**-14  # upstream divides by this at least
NONE_MAX = 1e-3  # as in test_levels: logits of exact weights without rounding


def scale_tensor(folder: Path, name: str, exponent: int) -> None:
    """Multiply a BF16 tensor of a checkpoint by 2**exponent, in its file."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = bytearray(path.read_bytes())
        n_header = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n_header])
        if name in header:
            assert header[name]["dtype"] == "BF16"
            begin, end = (8 + n_header + at for at in header[name]["data_offsets"])
            codes = np.frombuffer(raw, np.uint16, (end - begin) // 2, begin).copy()
            codes[codes & 0x7F80 != 0] += exponent << 7
            raw[begin:end] = codes.tobytes()
            path.write_bytes(raw)
            return
    raise AssertionError(f"{name} is in no shard of {folder}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing") / "checkpoint"
    config = synth.tiny_config(num_hidden_layers=1, num_hash_layers=1, compress_ratios=[0, 0])
    synth.write_checkpoint(folder, config, seed=1)
    scale_tensor(folder, GATE, EXPONENT)
    synth.write_upstream_f32(folder, folder / "f32.gguf")
    return folder


@pytest.fixture(scope="module")
def logits(checkpoint: Path) -> Array:
    with Llama(
        checkpoint / "f32.gguf",
        n_ctx=256,
        n_threads=1,
        warmup=False,
        cache_type="f32",
        flash_attn="off",
        act_quant="none",
    ) as llm:
        return llm.eval(IDS, logits="all")


class Sums:
    """Records the sums that routing weights are divided by, and may do what upstream does instead of the model."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, softplus_ends: bool = False, least: float = 0
    ) -> None:
        self.values: list[Array] = []
        original = moe.softplus

        def softplus(x: Array) -> Array:
            with np.errstate(over="ignore"):
                return np.log(1 + np.exp(x.astype(np.float32))) if softplus_ends else original(x)

        def route(
            layer: moe.MoE, x: Array, tokens: npt.NDArray[np.integer]
        ) -> tuple[npt.NDArray[np.integer], Array, Array]:
            assert layer.tid2eid is not None
            chosen = layer.tid2eid[tokens]
            picked = np.take_along_axis(np.sqrt(softplus(x @ layer.gate.T)), chosen, axis=1)
            sums = picked.sum(axis=1, keepdims=True)
            self.values.append(sums[:, 0])
            weights = layer.config.routed_scaling_factor * picked / np.maximum(sums, least)
            return chosen, weights, np.full(len(x), np.inf)

        monkeypatch.setattr(moe.MoE, "route", route)


def expected(checkpoint: Path) -> Array:
    config, weights = load_checkpoint(checkpoint)
    return Model(config, weights, np.float64, "none").forward(IDS).logits


def test_small_weights_and_sums_are_kept(checkpoint: Path, logits: Array) -> None:
    assert np.abs(logits - expected(checkpoint)).max() < NONE_MAX


def test_the_model_has_small_weights_and_sums(
    checkpoint: Path, logits: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References that do as upstream does, one difference at a time, are far outside of the tolerance."""
    sums = Sums(monkeypatch)
    assert np.abs(logits - expected(checkpoint)).max() < NONE_MAX
    is_small = sums.values[0] < LEAST
    assert 0 < np.count_nonzero(is_small) < 0.1 * N_TOKENS

    Sums(monkeypatch, least=LEAST)
    errors = np.abs(logits - expected(checkpoint)).max(axis=1)
    assert errors[is_small].min() > 10 * NONE_MAX
    assert errors[~is_small].max() < NONE_MAX

    Sums(monkeypatch, softplus_ends=True, least=1e-30)
    errors = np.abs(logits - expected(checkpoint)).max(axis=1)
    assert errors[~is_small].max() > 100 * NONE_MAX
