"""Positions of 64k and 1M tokens: one layer of each kind against the reference, from an offset.

A sequence begins at the offset in an empty cache: the window holds what was evaluated since, and the compressed rows
of the tokens that never were are zeros. The reference starts from the same state, in float64. Its angles are exact, or
float32 products of the position and a float32 frequency as in the official code. The engine does the latter: near 1M
that arithmetic alone turns fast pairs by 0.03 radians, which is what the bounds against exact angles allow for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import Model, attention, compressor, indexer, load_checkpoint, rope

from pyllama_dsv4 import synth
from pyllama_dsv4._native import check, ffi, lib
from pyllama_dsv4.context import Context
from pyllama_dsv4.model import Model as EngineModel

Array = npt.NDArray[np.floating]

OFFSETS = {"64k": 1 << 16, "1M": (1 << 20) - 256}
N_BATCH = 32
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"compress_ratios": [0, 0]},
    "ratio 4": {"compress_ratios": [4, 0], "index_n_heads": 8},
    "ratio 128": {"compress_ratios": [128, 0]},
}
N_TOKENS = {
    "window": 160,
    "ratio 4": 64,
    "ratio 128": 160,
}  # a whole window; a row of ratio 128; 16 rows of ratio 4
# relative errors of tokens' logits: median, maximum
OFFICIAL = {"64k": (2e-6, 1e-5), "1M": (2e-5, 1e-4)}
# median, and what nine tokens of ten keep to: the rows that the indexer selects change for single tokens
EXACT = {"64k": (2e-4, 1e-3), "1M": (3e-3, 3e-2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint with one layer of the kind, and next to it its F32 file, made once."""
    made: dict[str, Path] = {}

    def folder(layer: str) -> Path:
        if layer not in made:
            made[layer] = tmp_path_factory.mktemp("long") / "checkpoint"
            config = synth.tiny_config(num_hidden_layers=1, num_hash_layers=0, **LAYERS[layer])
            synth.write_checkpoint(made[layer], config, seed=2)
            synth.write_upstream_f32(made[layer], made[layer] / "f32.gguf")
        return made[layer]

    return folder


def tokens(layer: str) -> list[int]:
    return [int(i) for i in np.random.default_rng(8).integers(0, 320, N_TOKENS[layer])]


def run(path: Path, ids: list[int], offset: int) -> Array:
    """Logits (n, V) of the engine for a sequence that begins at the offset."""
    with EngineModel(path) as model:
        context = Context(
            model,
            n_ctx=offset + 256,
            n_batch=N_BATCH,
            n_ubatch=N_BATCH,
            n_threads=1,
            cache_type="f32",
            act_quant="none",
            flash_attn="off",
        )
        logits = np.empty((len(ids), context.n_vocab), np.float32)
        for start in range(0, len(ids), N_BATCH):
            batch = np.array(ids[start : start + N_BATCH], np.int32)
            status = lib.pyl_decode(
                context.pointer,
                ffi.from_buffer("int32_t[]", batch),
                batch.size,
                offset + start,
                0,
                lib.PYL_OUTPUTS_ALL,
            )
            check(status, "evaluating")
            for i in range(batch.size):
                row = ffi.from_buffer("float[]", logits[start + i])
                check(lib.pyl_logits_copy(context.pointer, i, row, context.n_vocab), "reading logits")
        context.close()
    return logits


def expected(checkpoint: Path, ids: list[int], offset: int) -> Array:
    """The same of the reference, in float64."""
    config, weights = load_checkpoint(checkpoint)
    model = Model(config, weights, np.float64, "none")
    state = model.new_state()
    layer = state.layers[0]
    layer.n_tokens = offset
    ratio = config.compress_ratios[0]
    if layer.compressor is not None:
        layer.rows = np.zeros((offset // ratio, config.head_dim))
        layer.compressor.n_rows = offset // ratio
        layer.compressor.last_score[:] = 0  # zeros like their contents, instead of weight zero
    if layer.index_compressor is not None:
        layer.index_rows = np.zeros((offset // ratio, config.index_head_dim))
        layer.index_compressor.n_rows = offset // ratio
        layer.index_compressor.last_score[:] = 0
    parts = [
        model.forward(ids[start : start + N_BATCH], state).logits for start in range(0, len(ids), N_BATCH)
    ]
    return np.concatenate(parts)


def official_rope(x: Array, positions: Any, freqs: Array, *, inverse: bool = False) -> Array:
    """``rope`` with angles as the official code makes them: float32 times float32, rounded to float32."""
    angles = positions.astype(np.float32)[:, None] * freqs.astype(np.float32)
    return rope.rotate(x, angles.astype(x.dtype), inverse=inverse)


def drifting_rope(x: Array, positions: Any, freqs: Array, *, inverse: bool = False) -> Array:
    """``rope`` with angles as upstream makes them, for layers without YaRN: one product after the other."""
    angles = np.empty((len(positions), len(freqs)), np.float32)
    angles[:, 0] = positions
    for i in range(1, len(freqs)):
        angles[:, i] = angles[:, i - 1] * np.float32(freqs[1] / freqs[0])
    return rope.rotate(x, angles.astype(x.dtype), inverse=inverse)


def use_rope(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Array]) -> None:
    for module in (attention, compressor, indexer):
        monkeypatch.setattr(module, "rope", function)


def errors(a: Array, b: Array) -> Array:
    """Relative error of each token (n,)."""
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("layer", LAYERS)
def test_angles_are_the_official_ones(
    checkpoint: Callable[[str], Path], layer: str, offset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids, at = checkpoint(layer), tokens(layer), OFFSETS[offset]
    got = run(folder / "f32.gguf", ids, at)
    exact = errors(got, expected(folder, ids, at))
    use_rope(monkeypatch, official_rope)
    official = errors(got, expected(folder, ids, at))
    print(
        f"{layer} at {offset}: from official median {np.median(official):.1e}, max {official.max():.1e};"
        f" from exact median {np.median(exact):.1e}, 90 % {np.quantile(exact, 0.9):.1e}"
    )
    assert np.median(official) < OFFICIAL[offset][0]
    assert official.max() < OFFICIAL[offset][1]
    assert np.median(exact) < EXACT[offset][0]
    assert np.quantile(exact, 0.9) < EXACT[offset][1]


@pytest.mark.slow
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_bounds_see_drifting_angles(
    checkpoint: Callable[[str], Path], offset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids, at = checkpoint("window"), tokens("window"), OFFSETS[offset]
    got = run(folder / "f32.gguf", ids, at)
    use_rope(monkeypatch, drifting_rope)
    assert np.median(errors(got, expected(folder, ids, at))) > 10 * OFFICIAL[offset][0]
