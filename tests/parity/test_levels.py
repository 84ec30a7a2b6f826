"""The three levels of rounding against the NumPy reference: logits of whole models, and single layers.

Rounding makes the function discontinuous: two correct programs differ by single flips, and the selection of rows and
experts amplifies them. So whole models are held by the median token at level cache, and by as much as the reference
itself moves at level full; single layers, whose input is the same to the bit, are held tightly at every level. What
the bounds can see is shown by references that are wrong in one step each. Some mistakes no bound on logits can see (a
block of another size, a tie rule): those are shown on the operation, in ``test_act_quant.py``.

The native file and the same weights in F32 are held alike: its products lose nothing of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import LEVELS, Model, attention, indexer, load_checkpoint, moe, quant
from reference.quant import Rounding

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4.convert import convert

Array = npt.NDArray[np.floating]

N_TOKENS = 300  # 75 rows of ratio 4, of which 16 are selected
SEEDS = (1, 2, 3)
MUTANT_SEED = 3
# Where head_dim equals index_head_dim the engine takes a path that Flash does not: both are tried.
HEADS: dict[str, dict[str, Any]] = {
    "D=128": {"head_dim": 128, "index_head_dim": 128},
    "D=256": {"head_dim": 256, "index_head_dim": 128},
}
NONE_MAX, NONE_NMSE = 1e-3, 1e-9
CACHE_MEDIAN = {"D=128": 5e-3, "D=256": 1e-2}  # wider rows, more flips
CACHE_NMSE = 5e-3
FULL_NMSE = 2e-2  # the reference moves as much between float32 and float64
LAYER_MEDIAN, LAYER_HALF = 1e-5, 1e-4  # relative errors of tokens
FILES = ("f32", "native")


@dataclass(frozen=True)
class Files:
    checkpoint: Path
    paths: dict[str, Path]  # by FILES
    ids: list[int]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """Files of one configuration and seed, made once."""
    made: dict[str, Files] = {}

    def files(seed: int, **changes: Any) -> Files:
        key = f"{seed} {changes}"
        if key not in made:
            folder = tmp_path_factory.mktemp("levels")
            synth.write_checkpoint(folder / "checkpoint", synth.tiny_config(**changes), seed=seed)
            paths = {name: folder / f"{name}.gguf" for name in FILES}
            synth.write_upstream_f32(folder / "checkpoint", paths["f32"])
            convert(folder / "checkpoint", paths["native"])
            ids = [int(i) for i in np.random.default_rng(seed).integers(0, 320, N_TOKENS)]
            made[key] = Files(folder / "checkpoint", paths, ids)
        return made[key]

    return files


def run(path: Path, ids: list[int], level: str, splits: tuple[int, ...] = ()) -> Array:
    """Logits (n, V) of the engine; `splits` are the lengths of the calls, the last one takes the rest."""
    with Llama(
        path,
        n_ctx=512,
        n_threads=1,
        warmup=False,
        cache_type="f32",
        flash_attn="off",  # it sums values in F16
        act_quant=level,  # type: ignore[arg-type]
    ) as llm:
        rows = []
        start = 0
        for length in (*splits, len(ids)):
            chunk = ids[start : start + length]
            start += len(chunk)
            if chunk:
                rows.append(llm.eval(chunk, logits="all"))
        return np.concatenate(rows)


@lru_cache(maxsize=64)
def _expected(checkpoint: Path, ids: tuple[int, ...], level: str) -> Array:
    return compute(checkpoint, ids, level)


def compute(checkpoint: Path, ids: tuple[int, ...], level: str) -> Array:
    """Logits of the reference as it is now, not from the cache of results."""
    config, weights = load_checkpoint(checkpoint)
    return Model(config, weights, np.float64, level).forward(ids).logits


def expected(files: Files, level: str) -> Array:
    return _expected(files.checkpoint, tuple(files.ids), level)


def token_errors(a: Array, b: Array) -> Array:
    return np.abs(a - b).max(axis=1)


def relative_errors(a: Array, b: Array) -> Array:
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


def nmse(a: Array, b: Array) -> float:
    return float(np.mean((a - b) ** 2) / np.mean(b**2))


# --- whole models -------------------------------------------------------------------------------------------------

SPLITS = {"prefill": (), "decode": (1,) * N_TOKENS, "mixed": (127, 1, 1, 64, 3, 1)}
RUNS = [*((seed, "prefill") for seed in SEEDS), *((SEEDS[0], split) for split in ("decode", "mixed"))]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "split"), RUNS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("heads", HEADS)
def test_none_is_exact(make: Callable[..., Files], heads: str, file: str, seed: int, split: str) -> None:
    files = make(seed, **HEADS[heads])
    got, want = run(files.paths[file], files.ids, "none", SPLITS[split]), expected(files, "none")
    assert token_errors(got, want).max() < NONE_MAX
    assert nmse(got, want) < NONE_NMSE


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "split"), RUNS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("heads", HEADS)
def test_cache_rounds_what_is_kept(
    make: Callable[..., Files], heads: str, file: str, seed: int, split: str
) -> None:
    files = make(seed, **HEADS[heads])
    got, want = run(files.paths[file], files.ids, "cache", SPLITS[split]), expected(files, "cache")
    assert np.median(token_errors(got, want)) < CACHE_MEDIAN[heads]
    assert nmse(got, want) < CACHE_NMSE


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("heads", HEADS)
def test_full_rounds_inputs_of_products(make: Callable[..., Files], heads: str, file: str, seed: int) -> None:
    files = make(seed, **HEADS[heads])
    assert nmse(run(files.paths[file], files.ids, "full"), expected(files, "full")) < FULL_NMSE


# --- single layers: the input of the layer is the reference's own ---------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "window, hash": {"compress_ratios": [0, 0], "num_hash_layers": 1},
    "ratio 4, biased": {"compress_ratios": [4, 0], "num_hash_layers": 0},
    "ratio 128, biased": {"compress_ratios": [128, 0], "num_hash_layers": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("heads", HEADS)
def test_one_layer(make: Callable[..., Files], heads: str, file: str, layer: str, level: str) -> None:
    for seed in SEEDS[:2]:
        files = make(seed, num_hidden_layers=1, **LAYERS[layer], **HEADS[heads])
        errors = relative_errors(run(files.paths[file], files.ids, level), expected(files, level))
        assert np.median(errors) < LAYER_MEDIAN
        assert np.mean(errors < LAYER_HALF) >= 0.5


# --- the bounds have teeth: references that are wrong in one step ---------------------------------------------------


def _only_in_compressor(monkeypatch: pytest.MonkeyPatch, *, is_rounded: bool) -> None:
    """Round rows of one kind only: those of the compressor, or those of the window."""
    original = attention.Attention._compressed
    kv_row = Rounding.kv_row
    inside = []

    def compressed(self: Any, *args: Any) -> Any:
        inside.append(True)
        try:
            return original(self, *args)
        finally:
            inside.pop()

    def choose(self: Rounding, row: Array, n_rope: int) -> Array:
        return kv_row(self, row, n_rope) if bool(inside) == is_rounded else row

    monkeypatch.setattr(attention.Attention, "_compressed", compressed)
    monkeypatch.setattr(Rounding, "kv_row", choose)


def no_window_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    _only_in_compressor(monkeypatch, is_rounded=True)


def no_compressed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    _only_in_compressor(monkeypatch, is_rounded=False)


def rope_channels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounding, "kv_row", lambda self, row, n_rope: quant.fq8_64(row))


def no_hadamard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "hadamard", lambda x: x)


def no_index_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounding, "index", lambda self, x: x)


def wrong_index_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounding, "index", lambda self, x: quant.fake_quantise(x, quant.E2M1, 64))


CACHE_MUTANTS = (
    no_window_rows,
    no_compressed_rows,
    rope_channels_too,
    no_hadamard,
    no_index_rounding,
    wrong_index_block,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", CACHE_MUTANTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("heads", HEADS)
def test_a_missing_or_wrong_step_is_seen_at_cache(
    make: Callable[..., Files],
    heads: str,
    mutate: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = make(MUTANT_SEED, **HEADS[heads])
    got = run(files.paths["native"], files.ids, "cache")
    mutate(monkeypatch)
    wrong = compute(files.checkpoint, tuple(files.ids), "cache")
    assert np.median(token_errors(got, wrong)) > 2 * CACHE_MEDIAN[heads]


ROUNDED_INPUTS = (
    "attn.wq_a.weight",
    "attn.wq_b.weight",
    "attn.wkv.weight",
    "attn.wo_b.weight",
    "attn.indexer.wq_b.weight",
    "ffn.shared_experts.w1.weight",
    "ffn.shared_experts.w3.weight",
    "ffn.shared_experts.w2.weight",
    "ffn.experts.*.w1.weight",
    "ffn.experts.*.w3.weight",
    "ffn.experts.*.w2.weight",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED_INPUTS)
def test_an_unrounded_input_is_seen_at_full(
    make: Callable[..., Files], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(MUTANT_SEED, num_hidden_layers=1, **LAYERS["ratio 4, biased"], **HEADS["D=256"])
    got = run(files.paths["native"], files.ids, "full")
    config, weights = load_checkpoint(files.checkpoint)
    model = Model(config, weights, np.float64, "full")
    plain = {id(w) for n, w in model.weights.items() if fnmatch(n, f"layers.0.{name}")}
    assert plain
    original = Rounding.linear
    monkeypatch.setattr(
        Rounding, "linear", lambda self, x, w: x @ w.T if id(w) in plain else original(self, x, w)
    )
    wrong = np.mean(relative_errors(got, model.forward(files.ids).logits) > LAYER_HALF)
    assert (
        wrong > 0.25
    )  # the indexer's input reaches only tokens whose selection changes, the others reach all
    right = np.mean(relative_errors(got, expected(files, "full")) > LAYER_HALF)
    assert right < wrong / 5


@pytest.mark.slow
def test_a_routing_weight_behind_the_rounding_is_seen_at_full(
    make: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make(MUTANT_SEED, num_hidden_layers=1, **LAYERS["window, hash"], **HEADS["D=256"])
    got = run(files.paths["native"], files.ids, "full")
    original = moe.MoE.expert
    monkeypatch.setattr(moe.MoE, "expert", lambda self, x, w, m: w * original(self, x, 1.0, m))
    errors = relative_errors(got, compute(files.checkpoint, tuple(files.ids), "full"))
    assert np.median(errors) > 10 * LAYER_MEDIAN
