"""The three levels of rounding against the NumPy reference: logits of whole models, and the layers of a deep one.

Rounding makes the function discontinuous: two correct programs differ by single flips, and the selection of rows and
experts amplifies them. So whole models are held by the median token at level cache, and at level full by how far the
reference in float32 is from itself in float64; layers, each given the reference's own input to the bit, are held
tightly at every level. What the bounds can see is shown by references that are wrong in one step each. Some mistakes
no bound on logits can see (a block of another size, a tie rule): those are shown on the operation, in
``test_act_quant.py``.

The native file and the same weights in F32 are held alike: its products lose nothing of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from layer_probe import DEEP, layer_output, probed, reference_streams
from reference import LEVELS, Model, attention, indexer, load_checkpoint, moe, quant
from reference.quant import Rounding

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4.convert import convert
from pyllama_dsv4.translate import translate

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
FULL_NMSE = 2e-2
FULL_SEEDS = range(1, 7)
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


def compute(checkpoint: Path, ids: tuple[int, ...], level: str, dtype: npt.DTypeLike = np.float64) -> Array:
    """Logits of the reference as it is now, not from the cache of results."""
    config, weights = load_checkpoint(checkpoint)
    return Model(config, weights, dtype, level).forward(ids).logits


def expected(files: Files, level: str) -> Array:
    return _expected(files.checkpoint, tuple(files.ids), level)


def token_errors(a: Array, b: Array) -> Array:
    return np.abs(a - b).max(axis=1)


def relative_errors(a: Array, b: Array) -> Array:
    """Of tokens, whatever belongs to one."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
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
@pytest.mark.parametrize("heads", HEADS)
def test_full_differs_as_two_correct_programs_do(make: Callable[..., Files], heads: str) -> None:
    """The reference in float32 is another correct program. Which of them flips in a seed is chance, hence the means."""
    distances: dict[str, list[float]] = {name: [] for name in (*FILES, "float32")}
    for seed in FULL_SEEDS:
        files = make(seed, **HEADS[heads])
        want = expected(files, "full")
        for name in FILES:
            distances[name].append(nmse(run(files.paths[name], files.ids, "full"), want))
        other = compute(files.checkpoint, tuple(files.ids), "full", np.float32)
        distances["float32"].append(nmse(other, want))
    own = np.mean(distances["float32"])
    for name in FILES:
        assert np.mean(distances[name]) < min(FULL_NMSE, 2 * own), distances


# --- the layers of a deep model: the input of each is the reference's own --------------------------------------------


@lru_cache(maxsize=16)
def _streams(checkpoint: Path, ids: tuple[int, ...], level: str) -> list[Array]:
    config, weights = load_checkpoint(checkpoint)
    return reference_streams(Model(config, weights, np.float64, level), ids)


def streams(files: Files, level: str) -> list[Array]:
    """What enters each layer, and what leaves the last one."""
    return _streams(files.checkpoint, tuple(files.ids), level)


def layer_outputs(files: Files, file: str, level: str, splits: tuple[int, ...] = ()) -> list[Array]:
    """What each layer of the engine makes of the reference's streams."""
    given = streams(files, level)
    with probed(given) as probe:
        run(files.paths[file], files.ids, level, splits)
    np.testing.assert_array_equal(probe.made[0], given[0])  # embeddings: not a bit of difference
    return probe.made[1:]


def is_near(errors: Array) -> bool:
    return bool(np.median(errors) < LAYER_MEDIAN and np.mean(errors < LAYER_HALF) >= 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "split"), [*((seed, "prefill") for seed in SEEDS), (SEEDS[0], "mixed")])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("heads", HEADS)
def test_every_layer_of_a_deep_model(
    make: Callable[..., Files], heads: str, file: str, level: str, seed: int, split: str
) -> None:
    files = make(seed, **DEEP, **HEADS[heads])
    made = layer_outputs(files, file, level, SPLITS[split])
    assert len(made) == len(DEEP["compress_ratios"]) - 1
    for i_layer, (got, want) in enumerate(zip(made, streams(files, level)[1:], strict=True)):
        assert is_near(relative_errors(got, want)), i_layer


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_layer_of_a_file_with_bf16_weights(make: Callable[..., Files], level: str) -> None:
    """The upstream dialect, BF16 in place of FP8: not a weight differs, and what is rounded goes by a weight's role."""
    files = make(SEEDS[0], **DEEP, **HEADS["D=256"])
    files.paths["bf16"] = files.checkpoint.parent / "bf16.gguf"
    if not files.paths["bf16"].exists():
        translate(files.paths["native"], files.paths["bf16"], to="upstream", dense="bf16")
    for got, want in zip(layer_outputs(files, "bf16", level), streams(files, level)[1:], strict=True):
        assert is_near(relative_errors(got, want))


@pytest.mark.slow
def test_levels_change_a_q8_0_file_as_they_change_the_model(make: Callable[..., Files]) -> None:
    """Its weights and inputs have 8 bits, which no bound of the others allows; what a level adds has the same size."""
    files = make(SEEDS[0], **HEADS["D=128"])
    path = files.checkpoint.parent / "q8_0.gguf"
    translate(files.paths["native"], path, to="upstream", dense="q8_0")
    plain, want = run(path, files.ids, "none"), expected(files, "none")
    for level in LEVELS[1:]:
        effect = nmse(run(path, files.ids, level), plain) / nmse(expected(files, level), want)
        assert 1 / 3 < effect < 3, level


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


@dataclass(frozen=True)
class Deep:
    """A deep model at one level: the reference's streams, and what the engine's layers made of them."""

    files: Files
    level: str
    given: list[Array]
    made: list[Array]

    def model(self) -> Model:
        config, weights = load_checkpoint(self.files.checkpoint)
        return Model(config, weights, np.float64, self.level)

    def errors(self, model: Model, i_layer: int) -> Array:
        """Of a layer against the reference as it is now, on the input that the engine had."""
        want = layer_output(model, i_layer, self.given[i_layer], self.files.ids)
        return relative_errors(self.made[i_layer], want)


@pytest.fixture(scope="module")
def deep(make: Callable[..., Files]) -> Callable[[str], Deep]:
    @cache
    def at(level: str) -> Deep:
        files = make(MUTANT_SEED, **DEEP, **HEADS["D=256"])
        return Deep(files, level, streams(files, level), layer_outputs(files, "native", level))

    return at


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "i_layer"),
    [
        (no_window_rows, 3),
        (no_window_rows, 5),
        (no_compressed_rows, 2),
        (no_compressed_rows, 4),
        (rope_channels_too, 3),
        (no_hadamard, 4),
        (no_index_rounding, 4),
    ],
)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_wrong_step_is_seen_in_its_layer(
    deep: Callable[[str], Deep],
    level: str,
    mutate: Callable[[pytest.MonkeyPatch], None],
    i_layer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = deep(level)
    mutate(monkeypatch)
    assert not is_near(seen.errors(seen.model(), i_layer))


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
    deep: Callable[[str], Deep], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, i_layer = deep("full"), 4  # a layer with an indexer
    model = seen.model()
    plain = {id(w) for n, w in model.weights.items() if fnmatch(n, f"layers.{i_layer}.{name}")}
    assert plain
    original = Rounding.linear
    monkeypatch.setattr(
        Rounding, "linear", lambda self, x, w: x @ w.T if id(w) in plain else original(self, x, w)
    )
    wrong = np.mean(seen.errors(model, i_layer) > LAYER_HALF)
    right = np.mean(relative_errors(seen.made[i_layer], seen.given[i_layer + 1]) > LAYER_HALF)
    # the indexer's input reaches only tokens whose selection changes, the others reach all
    assert wrong > 0.25
    assert right < wrong / 5


@pytest.mark.slow
@pytest.mark.parametrize("i_layer", [2, 3])  # experts chosen by token, by score
def test_a_routing_weight_behind_the_rounding_is_seen_at_full(
    deep: Callable[[str], Deep], i_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = deep("full")
    original = moe.MoE.expert
    monkeypatch.setattr(moe.MoE, "expert", lambda self, x, w, m: w * original(self, x, 1.0, m))
    assert np.median(seen.errors(seen.model(), i_layer)) > 10 * LAYER_MEDIAN
