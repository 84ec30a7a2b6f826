"""The engine's operation ACT_QUANT against the reference's fake quantisers, bit by bit.

Inputs are what the model can meet and what goes wrong first: every BF16 number under every scale, ties, blocks of
wide dynamic range. The last tests change the reference on purpose and must see a difference.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from reference import quant
from reference.quant import E2M1, E4M3, Format, fake_quantise

from pyllama_dsv4._native import check, ffi, lib

Array = npt.NDArray[np.float32]

FORMATS = {"E4M3": (E4M3, lib.PYL_ACT_QUANT_E4M3), "E2M1": (E2M1, lib.PYL_ACT_QUANT_E2M1)}
SCALES = {"E4M3": range(-22, 120), "E2M1": range(-126, 126)}  # exponents that F32 numbers can need
BLOCKS = (32, 64, 128)


def engine(x: Array, name: str, block: int, n_channels: int | None = None, n_threads: int = 1) -> Array:
    """The operation on rows (n_rows, n_per_row)."""
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    n_rows, n_per_row = x.shape
    status = lib.pyl_act_quant(
        FORMATS[name][1],
        block,
        n_per_row if n_channels is None else n_channels,
        ffi.from_buffer("float[]", x),
        ffi.from_buffer("float[]", y),
        n_rows,
        n_per_row,
        n_threads,
    )
    check(status, "rounding")
    return y


def expected(x: Array, fmt: Format, block: int) -> Array:
    # float64: the largest numbers round up to 2^128, which float32 does not have
    with np.errstate(over="ignore"):
        return fake_quantise(x.astype(np.float64), fmt, block).astype(np.float32)


def same_bits(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def finite_bf16() -> Array:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return numbers[np.isfinite(numbers)]


def wide_rows(seed: int, n_rows: int = 200, n: int = 512) -> Array:
    """Rows whose channels differ by powers of two up to 2^20, so that small ones become subnormal codes."""
    random = np.random.default_rng(seed)
    spread = np.ldexp(1.0, random.integers(-20, 1, (n_rows, n)))
    return (random.standard_normal((n_rows, n)) * spread).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_every_bf16_number_under_every_scale(name: str) -> None:
    fmt = FORMATS[name][0]
    block = 64 if name == "E4M3" else 32
    numbers = finite_bf16()
    for exponent in SCALES[name]:
        top = np.float32(np.ldexp(fmt.qmax, exponent))
        x = numbers[np.abs(numbers) <= top]
        x = np.concatenate([x, np.zeros(-len(x) % (block - 1), np.float32)]).reshape(-1, block - 1)
        x = np.concatenate([np.full((len(x), 1), top), x], axis=1)  # one block per row, led by its largest
        assert same_bits(engine(x, name, block), expected(x, fmt, block)), f"scale 2^{exponent}"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_all_bf16_numbers_in_order(name: str, block: int) -> None:
    x = finite_bf16()
    x = x[: len(x) // block * block].reshape(-1, block)
    assert same_bits(engine(x, name, block), expected(x, FORMATS[name][0], block))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_wide_rows(name: str, block: int) -> None:
    x = wide_rows(1)
    for n_threads in (1, 2):
        assert same_bits(engine(x, name, block, n_threads=n_threads), expected(x, FORMATS[name][0], block))


@pytest.mark.parametrize("name", FORMATS)
def test_next_to_every_edge_between_scales(name: str) -> None:
    fmt = FORMATS[name][0]
    edges = np.ldexp(fmt.qmax, np.arange(SCALES[name].start, SCALES[name].stop)).astype(np.float32)
    x = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    x = np.concatenate([x, -x])[:, None] * np.array([1.0] + [0.0] * 31, np.float32)
    assert same_bits(engine(x, name, 32), expected(x, fmt, 32))


def test_channels_behind_the_range_are_copied() -> None:
    x = wide_rows(2)
    y = engine(x, "E4M3", 64, n_channels=448)
    assert same_bits(y[:, :448].copy(), expected(x[:, :448], E4M3, 64))
    assert same_bits(y[:, 448:].copy(), x[:, 448:].copy())


@pytest.mark.parametrize("bad", [{"block": 0}, {"n_channels": 513}, {"n_channels": -1}, {"n_threads": 0}])
def test_bad_arguments_are_refused(bad: dict[str, int]) -> None:
    from pyllama_dsv4 import errors

    with pytest.raises(errors.ArgumentError):
        engine(wide_rows(3), "E4M3", **{"block": 64, **bad})


# --- the comparison has teeth: each of these is wrong in one way ------------------------------------------------


def _half_away(y: Any) -> Any:
    return np.copysign(np.floor(np.abs(y) + 0.5), y)


def _half_down(y: Any) -> Any:
    return np.copysign(np.ceil(np.abs(y) - 0.5), y)


@pytest.mark.parametrize("rint", [_half_away, _half_down])
@pytest.mark.parametrize("name", FORMATS)
def test_another_tie_rule_is_seen(name: str, rint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = finite_bf16()[: 508 * 128].reshape(-1, 128)
    fmt = FORMATS[name][0]
    assert same_bits(engine(x, name, 128), expected(x, fmt, 128))
    monkeypatch.setattr(quant.np, "rint", rint)
    assert not same_bits(engine(x, name, 128), expected(x, fmt, 128))


@pytest.mark.parametrize(("name", "block"), [("E4M3", 64), ("E4M3", 128), ("E2M1", 32)])
def test_another_block_is_seen(name: str, block: int) -> None:
    x = wide_rows(4)
    fmt = FORMATS[name][0]
    assert not same_bits(engine(x, name, block), expected(x, fmt, 2 * block))
    assert not same_bits(engine(x, name, block), expected(x, fmt, block // 2))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_floor_is_seen(name: str) -> None:
    fmt = FORMATS[name][0]
    x = np.full((1, 64), 1e-8 if name == "E4M3" else 1e-38, np.float32) * np.linspace(
        0, 1, 64, dtype=np.float32
    )
    no_floor = Format(fmt.n_mantissa, fmt.min_exponent, fmt.qmax, 0.0)
    assert same_bits(engine(x, name, 64), expected(x, fmt, 64))
    if name == "E4M3":  # E2M1's is the smallest normal number: below it the exponent field says the same
        assert not same_bits(engine(x, name, 64), expected(x, no_floor, 64))


@pytest.mark.parametrize("name", FORMATS)
def test_lost_subnormal_codes_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = wide_rows(5)
    fmt = FORMATS[name][0]
    smallest_normal = 2.0**fmt.min_exponent
    original = quant.round_to_format

    def flushing(y: Any, fmt: Format) -> Any:
        return np.where(np.abs(y) < smallest_normal, np.copysign(0.0, y), original(y, fmt))

    monkeypatch.setattr(quant, "round_to_format", flushing)
    assert not same_bits(engine(x, name, 64), expected(x, fmt, 64))
