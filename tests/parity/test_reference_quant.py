"""The reference's fake quantisers against ml_dtypes' casts: every BF16 number, every edge, every tie.

On whole models these steps amplify single rounding flips, so exactness is shown here, on the operator.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from reference.quant import (
    E2M1,
    E4M3,
    Format,
    Rounding,
    fake_quantise,
    fq4_32,
    fq8_64,
    fq8_128,
    round_to_format,
    scale_exponent,
)

Array = npt.NDArray[Any]

CASTS = {"E4M3": (E4M3, ml_dtypes.float8_e4m3fn), "E2M1": (E2M1, ml_dtypes.float4_e2m1fn)}
BLOCKS = {"E4M3": 64, "E2M1": 32}
# From the floor, over where KV rows live, to the largest powers of two that BF16 numbers can need.
SCALE_EXPONENTS = {
    "E4M3": (-22, -21, -9, -1, 0, 1, 7, 60, 118),
    "E2M1": (-126, -125, -22, -1, 0, 1, 7, 60, 124),
}


def bf16_numbers() -> Array:
    """Every finite BF16 number, both zeros and all subnormals included, as float32 (65 280,)."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return codes[np.isfinite(codes)]


def same_bits(a: Array, b: Array) -> bool:
    """Equal including the sign of zero."""
    return bool(np.array_equal(a, b) and np.array_equal(np.signbit(a), np.signbit(b)))


def cast(y: Array, dtype: Any) -> Array:
    """ml_dtypes' rounding of numbers within the range of ``dtype``."""
    return y.astype(dtype).astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASTS)
def test_every_bf16_number_under_every_scale_edge(name: str, dtype: Any) -> None:
    fmt, small = CASTS[name]
    block = BLOCKS[name]
    for exponent in SCALE_EXPONENTS[name]:
        top = np.float32(np.ldexp(fmt.qmax, exponent))
        x = bf16_numbers()
        x = x[np.abs(x) <= top]
        x = np.concatenate([x, np.zeros(-len(x) % (block - 1), np.float32)]).reshape(-1, block - 1)
        # The first value of each block is the largest that this scale can hold.
        x = np.concatenate([np.full((len(x), 1), top), x], axis=1).astype(dtype)
        expected = np.ldexp(cast(np.ldexp(x.astype(np.float64), -exponent), small), exponent)
        got = fake_quantise(x, fmt, block)
        assert got.dtype == dtype
        assert same_bits(got, expected), f"scale 2^{exponent}"


@pytest.mark.parametrize("name", CASTS)
def test_rounding_of_bf16_numbers_includes_many_ties(name: str) -> None:
    """BF16 inputs reach every tie between two codes, so the test above decides the tie rule."""
    fmt, small = CASTS[name]
    all_codes = np.arange(256 if name == "E4M3" else 16, dtype=np.uint8).view(small).astype(np.float64)
    values = np.unique(all_codes[np.isfinite(all_codes)])
    ties = (values[1:] + values[:-1]) / 2
    assert same_bits(ties.astype(ml_dtypes.bfloat16).astype(np.float64), ties)
    rounded = round_to_format(ties, fmt)
    assert same_bits(rounded, cast(ties, small))
    lower = np.abs(rounded) < np.abs(ties)
    assert 0.4 < lower.mean() < 0.6  # to even: neither always up nor always down


@pytest.mark.parametrize("name", CASTS)
def test_every_code_is_a_fixed_point(name: str) -> None:
    fmt, small = CASTS[name]
    codes = np.arange(256 if name == "E4M3" else 16, dtype=np.uint8).view(small).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    assert same_bits(round_to_format(codes, fmt), codes)


def test_rounding_saturates() -> None:
    for fmt in (E4M3, E2M1):
        too_large = np.array([fmt.qmax, 1.001 * fmt.qmax, 1.1 * fmt.qmax, 3e38])
        for y in (too_large, -too_large):
            assert same_bits(round_to_format(y, fmt), np.copysign(fmt.qmax, y))


def exact_exponent(amax: float, qmax: float) -> int:
    """ceil(log2(amax / qmax)) in rational arithmetic."""
    ratio = Fraction(amax) / Fraction(qmax)
    n = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    while Fraction(2) ** n < ratio:
        n += 1
    while Fraction(2) ** (n - 1) >= ratio:
        n -= 1
    return n


@pytest.mark.parametrize(("fmt", "lowest"), [(E4M3, -22), (E2M1, -126)])
def test_scale_is_exact_at_every_power_of_two(fmt: Format, lowest: int) -> None:
    """The F32 quotient is rounded; next to each edge it must still fall on the right side."""
    for exponent in range(lowest, 119):
        edge = np.float32(np.ldexp(fmt.qmax, exponent))
        below, above = np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))
        for amax in (below, edge, above):
            expected = max(exact_exponent(float(amax), fmt.qmax), lowest)
            assert scale_exponent(np.array([amax]), fmt)[0] == expected, f"amax {amax!r}"


def test_scale_is_exact_on_random_numbers() -> None:
    rng = np.random.default_rng(0)
    amax = np.ldexp(rng.uniform(0.5, 1, 20000), rng.integers(-10, 60, 20000)).astype(np.float32)
    for fmt in (E4M3, E2M1):
        expected = [exact_exponent(float(a), fmt.qmax) for a in amax]
        assert scale_exponent(amax, fmt).tolist() == expected


@pytest.mark.parametrize(("name", "exponent"), [("E4M3", -22), ("E2M1", -126)])
def test_floor_gives_small_blocks_the_smallest_scale(name: str, exponent: int) -> None:
    fmt, small = CASTS[name]
    block = BLOCKS[name]
    zeros = np.zeros((1, block), np.float32)
    zeros[0, ::2] = -0.0
    assert scale_exponent(np.zeros(1, np.float32), fmt)[0] == exponent
    assert same_bits(fake_quantise(zeros, fmt, block), zeros)
    # Without a floor these blocks would get a finer scale and keep more bits.
    x = np.random.default_rng(3).uniform(-1, 1, (100, block)).astype(np.float32) * np.float32(fmt.floor / 100)
    expected = np.ldexp(cast(np.ldexp(x.astype(np.float64), -exponent), small), exponent)
    assert same_bits(fake_quantise(x, fmt, block), expected)


def test_results_of_a_round_trip_are_stable_and_fit_bf16() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((400, 128)) * np.exp(3 * rng.standard_normal((400, 128)))).astype(np.float32)
    for quantise in (fq8_64, fq4_32, fq8_128):
        y = quantise(x)
        assert same_bits(quantise(y), y)
        assert same_bits(y.astype(ml_dtypes.bfloat16).astype(np.float32), y)


def test_blocks_do_not_see_each_other() -> None:
    """A wrong block size hides behind a floating-point format until values become subnormal: so make them."""
    x = np.ones((1, 256), np.float32) * np.float32(0.3)
    x[0, 200] = 3e5  # in block 3 of 64, block 6 of 32, block 1 of 128
    for quantise, block in ((fq8_64, 64), (fq4_32, 32), (fq8_128, 128)):
        flushed = quantise(x)[0] == 0
        begin = 200 // block * block
        expected = np.zeros(256, bool)
        expected[begin : begin + block] = True
        expected[200] = False
        assert np.array_equal(flushed, expected)


def test_levels_round_what_the_specification_names() -> None:
    rng = np.random.default_rng(2)
    row = rng.standard_normal((5, 128))
    w = rng.standard_normal((3, 128))
    none, cache, full = Rounding("none"), Rounding("cache"), Rounding("full")
    assert same_bits(none.kv_row(row, 64), row)
    assert same_bits(none.index(row), row)
    assert same_bits(none.linear(row, w), row @ w.T)
    for level in (cache, full):
        assert same_bits(level.kv_row(row, 64)[:, :64], fq8_64(row[:, :64]))
        assert same_bits(level.kv_row(row, 64)[:, 64:], row[:, 64:])  # rope channels
        assert same_bits(level.index(row), fq4_32(row))
    assert same_bits(cache.linear(row, w), row @ w.T)
    assert same_bits(full.linear(row, w), fq8_128(row) @ w.T)


def test_refuses_what_it_cannot_round() -> None:
    with pytest.raises(ValueError, match="100 channels"):
        fq8_64(np.zeros((1, 100)))
    with pytest.raises(ValueError, match="not finite"):
        fq8_64(np.full((1, 64), np.nan))
    with pytest.raises(ValueError, match="'half'"):
        Rounding("half")
