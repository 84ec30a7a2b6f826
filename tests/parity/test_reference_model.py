"""What must hold in the NumPy reference whatever the weights: one result for every split of a prompt, no look
ahead, rows that appear and disappear at the exact token, margins that say how close a choice was.

All in float64, where splitting a prompt only reorders sums (1e-13) and rounding flips do not happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import LEVELS, Config, Model, State, fq4_32, fq8_64, load_checkpoint
from reference.elementary import hadamard, sigmoid, softplus, top_k
from reference.quant import Rounding

from pyllama_dsv4.synth import tiny_config, write_checkpoint

Array = npt.NDArray[Any]

TINY = Config()
N_TOKENS = 300  # two windows of 128 and some, 75 rows of ratio 4
SAME = 1e-10  # logits have RMS 4; splits were measured to differ by 1e-13


def random_tokens(n_tokens: int) -> Array:
    return np.random.default_rng(0).integers(0, TINY.vocab_size, n_tokens)


def one_layer(folder: Path, ratio: int, **changes: Any) -> tuple[Config, dict[str, Array]]:
    """A random model whose only layer has this ratio."""
    raw = tiny_config(num_hidden_layers=1, num_hash_layers=1, compress_ratios=[ratio, 0], **changes)
    return load_checkpoint(write_checkpoint(folder, raw, seed=0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Array]:
    config, weights = load_checkpoint(write_checkpoint(tmp_path_factory.mktemp("tiny"), seed=0))
    assert config.compress_ratios[:6] == TINY.compress_ratios
    assert replace(config, compress_ratios=TINY.compress_ratios) == TINY
    return weights


@pytest.fixture(scope="module")
def tokens() -> Array:
    return random_tokens(N_TOKENS)


@pytest.fixture(scope="module")
def models(weights: Mapping[str, Array]) -> dict[str, Model]:
    return {level: Model(TINY, weights, np.float64, level) for level in LEVELS}


@pytest.fixture(scope="module")
def whole(models: dict[str, Model], tokens: Array) -> dict[str, Array]:
    """Logits of the whole prompt in one call, (N_TOKENS, V) per level."""
    return {level: model.forward(tokens).logits for level, model in models.items()}


def in_steps(model: Model, tokens: Array, sizes: list[int]) -> tuple[Array, State]:
    """Logits of a prompt fed in pieces of the given sizes."""
    assert sum(sizes) == len(tokens)
    state, begin, logits = model.new_state(), 0, []
    for n in sizes:
        logits.append(model.forward(tokens[begin : begin + n], state).logits)
        begin += n
    return np.concatenate(logits), state


@pytest.mark.parametrize("level", LEVELS)
def test_decode_equals_prefill(
    level: str, models: dict[str, Model], tokens: Array, whole: dict[str, Array]
) -> None:
    n = 135  # past the first window edge and the first row of ratio 128; all 300 in the slow test
    logits, state = in_steps(models[level], tokens[:n], [1] * n)
    assert state.n_tokens == n
    assert np.abs(logits - whole[level][:n]).max() < SAME


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_decode_equals_prefill_over_two_windows(
    level: str, models: dict[str, Model], tokens: Array, whole: dict[str, Array]
) -> None:
    logits, _ = in_steps(models[level], tokens, [1] * N_TOKENS)
    assert np.abs(logits - whole[level]).max() < SAME


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", [[128, 128, 44], [1, 3, 5, 118, 2, 126, 45]])
def test_any_split_equals_prefill(
    sizes: list[int], level: str, models: dict[str, Model], tokens: Array, whole: dict[str, Array]
) -> None:
    logits, _ = in_steps(models[level], tokens, sizes)
    assert np.abs(logits - whole[level]).max() < SAME


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("changed", [127, 200])
def test_a_later_token_changes_no_earlier_logits(
    changed: int, level: str, models: dict[str, Model], tokens: Array, whole: dict[str, Array]
) -> None:
    other = tokens.copy()
    other[changed] = (other[changed] + 1) % TINY.vocab_size
    difference = np.abs(models[level].forward(other).logits - whole[level]).max(axis=1)
    assert difference[:changed].max() < SAME
    assert difference[changed] > 1e-3


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_window_reaches_back_127_tokens(ratio: int, tmp_path: Path) -> None:
    """A change of token 0 reaches the window up to token 127, later only readers of its compressed row."""
    # Every row is read, so row 0 shows in all later tokens.
    config, weights = one_layer(tmp_path, ratio, index_topk=1000)
    model = Model(config, weights)
    tokens = random_tokens(260)
    other = tokens.copy()
    other[0] = (other[0] + 1) % config.vocab_size
    difference = np.abs(model.forward(tokens).logits - model.forward(other).logits).max(axis=1)
    assert (difference[:128] > 1e-4).all()
    if ratio:
        assert (difference[128:] > 1e-7).all()
    else:
        assert difference[128:].max() < SAME


@pytest.mark.parametrize("n_tokens", [127, 128, 129])
def test_window_edge_in_prefill_and_decode(n_tokens: int, tmp_path: Path) -> None:
    """A layer without compression sees exactly the last 128 tokens: starting later gives the same answer.

    Rope makes a shift of all positions invisible, which this checks as well.
    """
    config, weights = one_layer(tmp_path, 0)
    model = Model(config, weights)
    tokens = random_tokens(n_tokens)
    state = model.new_state()
    model.forward(tokens[:-1], state)
    decoded = model.forward(tokens[-1:], state).logits[0]
    assert len(state.layers[0].window) == min(n_tokens, 127)
    assert np.abs(decoded - model.forward(tokens).logits[-1]).max() < SAME
    assert np.abs(decoded - model.forward(tokens[-128:]).logits[-1]).max() < 1e-9
    too_short = model.forward(tokens[-127:]).logits[-1]
    if n_tokens == 127:
        assert np.abs(decoded - too_short).max() < SAME
    else:
        assert np.abs(decoded - too_short).max() > 1e-4


@pytest.mark.parametrize("ratio", [4, 128])
def test_rows_appear_exactly_at_multiples_of_the_ratio(ratio: int, tmp_path: Path) -> None:
    config, weights = one_layer(tmp_path, ratio, index_topk=1000)
    model = Model(config, weights)
    tokens = random_tokens(258)
    prefill = model.forward(tokens).layers[0].rows  # (n, R)
    state = model.new_state()
    for i, token in enumerate(tokens):
        result = model.forward([token], state).layers[0]
        n_rows = (i + 1) // ratio
        assert len(state.layers[0].rows) == n_rows
        assert len(state.layers[0].index_rows) == (n_rows if ratio == 4 else 0)
        assert result.rows.shape == (1, n_rows)
        assert result.rows.all()
        assert prefill[i].sum() == n_rows
        assert prefill[i, :n_rows].all()


def test_a_row_is_seen_by_the_token_that_completes_it(tmp_path: Path) -> None:
    """Ratio 128: token 127 reads row 0, token 126 does not."""
    config, weights = one_layer(tmp_path, 128)
    tokens = random_tokens(130)
    changed = {
        **weights,
        "layers.0.attn.compressor.wkv.weight": -weights["layers.0.attn.compressor.wkv.weight"],
    }
    difference = np.abs(
        Model(config, weights).forward(tokens).logits - Model(config, changed).forward(tokens).logits
    ).max(axis=1)
    assert difference[:127].max() == 0
    assert (difference[127:] > 1e-4).all()


def test_rows_of_ratio_4_pool_the_window_before(tmp_path: Path) -> None:
    """A change of token 3 reaches rows 0 and 1, a change of token 4 rows 1 and 2."""
    config, weights = one_layer(tmp_path, 4)
    model = Model(config, weights)
    tokens = random_tokens(24)

    def rows(ids: Array) -> Array:
        state = model.new_state()
        model.forward(ids, state)
        return state.layers[0].rows

    for changed, touched in ((0, [0, 1]), (3, [0, 1]), (4, [1, 2]), (20, [5])):
        other = tokens.copy()
        other[changed] = (other[changed] + 1) % config.vocab_size
        difference = np.abs(rows(other) - rows(tokens)).max(axis=1)
        assert np.flatnonzero(difference > 1e-9).tolist() == touched


def test_indexer_reads_k_rows_once_there_are_more(tmp_path: Path) -> None:
    config, weights = one_layer(tmp_path, 4, index_topk=5)
    result = Model(config, weights).forward(random_tokens(60)).layers[0]
    n_visible = (np.arange(60) + 1) // 4
    assert result.rows.sum(axis=1).tolist() == np.minimum(n_visible, 5).tolist()
    assert (np.isinf(result.row_margin) == (n_visible <= 5)).all()
    for i in range(60):
        assert not result.rows[i, n_visible[i] :].any()


def test_margins_are_the_distance_to_another_choice(
    models: dict[str, Model], weights: Mapping[str, Array], tokens: Array
) -> None:
    """A bias smaller than every margin changes no expert; one larger than a token's margin changes it."""
    result = models["none"].forward(tokens)
    i_layer = TINY.num_hidden_layers - 1
    layer = result.layers[i_layer]
    assert np.isfinite(layer.expert_margin).all()
    assert np.isinf(result.layers[0].expert_margin).all()  # routed by token id
    name = f"layers.{i_layer}.ffn.gate.bias"
    i_token = int(layer.expert_margin.argmax())
    margin = layer.expert_margin[i_token]
    left_in = layer.experts[i_token][-1]  # the last one chosen
    for factor, is_same in ((0.99, True), (1.01, False)):
        bias = weights[name].astype(np.float64)
        bias[left_in] -= factor * margin
        changed = Model(TINY, {**weights, name: bias}).forward(tokens).layers[i_layer]
        assert (left_in in changed.experts[i_token]) == is_same
    assert (result.row_margin >= 0).all()
    assert np.isinf(result.row_margin[: 4 * TINY.index_topk]).all()
    assert np.isfinite(result.row_margin[4 * TINY.index_topk + 4 :]).all()


@pytest.mark.parametrize(("level", "median_limit"), [("none", 1e-4), ("cache", 5e-3)])
def test_float32_agrees_with_float64(
    level: str, median_limit: float, weights: Mapping[str, Array], tokens: Array, whole: dict[str, Array]
) -> None:
    """At level "cache", rounding flips allow a bound on the median token only (spec section 12)."""
    single = Model(TINY, weights, np.float32, level).forward(tokens)
    assert single.logits.dtype == np.float32
    assert all(layer.streams.dtype == np.float32 for layer in single.layers)
    error = np.abs(single.logits - whole[level]).max(axis=1)
    assert np.median(error) < median_limit
    if level == "none":
        assert error.max() < 1e-3


def test_levels_differ_by_what_the_specification_measured(whole: dict[str, Array]) -> None:
    """A quantiser that is silently off, or far too coarse, leaves these ranges."""

    def nmse(a: Array, b: Array) -> float:
        return float(((a - b) ** 2).sum() / (b**2).sum())

    assert 5e-4 < nmse(whole["cache"], whole["none"]) < 5e-2
    assert 2e-3 < nmse(whole["full"], whole["cache"]) < 2e-1


def test_kept_rows_are_rounded_where_the_specification_says(models: dict[str, Model], tokens: Array) -> None:
    """Quantised KV channels, exact rope channels, indexer rows quantised in the Hadamard domain."""
    kept = {level: in_steps(models[level], tokens, [N_TOKENS])[1].layers for level in ("none", "cache")}
    for exact, rounded in zip(kept["none"], kept["cache"], strict=True):
        for rows, exact_rows in ((rounded.window, exact.window), (rounded.rows, exact.rows)):
            if len(rows):
                n_nope = TINY.head_dim - TINY.qk_rope_head_dim
                assert np.array_equal(fq8_64(rows[:, :n_nope]), rows[:, :n_nope])
                assert not np.array_equal(fq8_64(exact_rows[:, :n_nope]), exact_rows[:, :n_nope])
                assert not np.array_equal(fq8_64(rows[:, n_nope:]), rows[:, n_nope:])
        if len(rounded.index_rows):
            assert np.array_equal(fq4_32(rounded.index_rows), rounded.index_rows)
            assert not np.array_equal(fq4_32(exact.index_rows), exact.index_rows)
    # Layer 2 is the first with an indexer. A row has the position of its first token, so row 0, back from the
    # Hadamard domain, is a plain normalised vector.
    exact, rounded = kept["none"][2], kept["cache"][2]
    cosine = np.einsum("rd,rd->r", exact.index_rows, rounded.index_rows) / (
        np.linalg.norm(exact.index_rows, axis=1) * np.linalg.norm(rounded.index_rows, axis=1)
    )
    assert (cosine > 0.95).all()
    plain = hadamard(exact.index_rows)
    norm = models["none"].weights["layers.2.attn.indexer.compressor.norm.weight"]
    assert np.allclose(np.sqrt(np.mean((plain[0] / norm) ** 2)), 1, atol=1e-5)
    assert not np.allclose(np.sqrt(np.mean((exact.index_rows[0] / norm) ** 2)), 1, atol=1e-3)


def test_full_level_rounds_the_inputs_of_every_fp8_and_fp4_product(
    models: dict[str, Model], tokens: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those and no other: wo_a, gate, weights_proj, compressors, hyper-connections and head stay exact."""
    model = models["full"]
    names = {w.__array_interface__["data"][0]: name for name, w in model.weights.items()}
    assert len(names) == len(model.weights)
    seen: dict[str, int] = {}

    def linear(self: Rounding, x: Array, weight: Array) -> Array:
        name = names[weight.__array_interface__["data"][0]]
        seen[name] = seen.get(name, 0) + x.size // x.shape[-1]
        return x @ weight.T

    monkeypatch.setattr(Rounding, "linear", linear)
    model.forward(tokens[:200])
    n_routed = 0
    for i in range(TINY.num_hidden_layers):
        attn = ["wq_a", "wq_b", "wkv", "wo_b"] + (["indexer.wq_b"] if TINY.compress_ratios[i] == 4 else [])
        for name in [*(f"attn.{a}" for a in attn), *(f"ffn.shared_experts.w{k}" for k in (1, 2, 3))]:
            assert seen.pop(f"layers.{i}.{name}.weight") == 200
    for name, n_rows in seen.items():
        assert ".ffn.experts." in name
        n_routed += n_rows
    assert n_routed == 200 * TINY.num_hidden_layers * TINY.num_experts_per_tok * 3


def test_routing_weight_is_applied_before_the_rounding_of_w2(models: dict[str, Model]) -> None:
    x = np.random.default_rng(4).standard_normal((50, TINY.hidden_size))
    for level, is_linear in (("none", True), ("full", False)):
        moe = models[level].layers[0].ffn
        scaled = moe.expert(x, 0.3, moe.shared)
        assert np.allclose(scaled, 0.3 * moe.expert(x, 1.0, moe.shared), rtol=1e-9, atol=1e-12) == is_linear


def test_elementary_operations_at_their_edges() -> None:
    x = np.array([-700.0, -100.0, -20.0, 0.0, 20.0, 700.0])
    assert np.allclose(
        softplus(x), [np.exp(-700), np.exp(-100), np.exp(-20), np.log(2), 20 + 2e-9, 700], rtol=1e-8, atol=0
    )
    assert np.allclose(sigmoid(x), [np.exp(-700), np.exp(-100), np.exp(-20), 0.5, 1, 1], rtol=1e-8, atol=0)
    vectors = np.eye(8)
    rows = hadamard(vectors)
    assert np.allclose(rows[5] * 8**0.5, [1, -1, 1, -1, -1, 1, -1, 1])  # sign = parity of the bits of i & 5
    assert np.allclose(hadamard(rows), vectors)
    chosen, margin = top_k(np.array([[1.0, 3.0, 3.0, -np.inf], [2.0, -np.inf, -np.inf, -np.inf]]), 2)
    assert chosen[0].tolist() == [1, 2]
    assert chosen[1, 0] == 0
    assert margin.tolist() == [2.0, np.inf]


def test_weights_exercise_the_model(models: dict[str, Model], tokens: Array, whole: dict[str, Array]) -> None:
    """Random weights are a test only if no part of the model idles."""
    assert 3 < np.sqrt((whole["none"] ** 2).mean()) < 5
    result = models["none"].forward(tokens)
    for i, layer in enumerate(result.layers):
        used = np.bincount(layer.experts.ravel(), minlength=TINY.n_routed_experts)
        assert (used > 0).all(), f"layer {i}"
    hidden = models["none"].layers[2]
    u = np.random.default_rng(0).standard_normal((200, TINY.hidden_size))
    w1, w3, _ = hidden.ffn.shared
    for pre_activation in (u @ w1.T, u @ w3.T):
        clamped = (np.abs(pre_activation) > TINY.swiglu_limit).mean()
        assert 5e-4 < clamped < 0.5


def test_config_and_tokens_are_checked(models: dict[str, Model]) -> None:
    with pytest.raises(ValueError, match="only 0, 4 and 128"):
        Config(compress_ratios=(0, 0, 4, 128, 4, 8))
    with pytest.raises(ValueError, match="2 compress_ratios"):
        Config(compress_ratios=(0, 0))
    for bad in ([], [320], [-1]):
        with pytest.raises(ValueError, match="token ids"):
            models["none"].forward(bad)
