"""Random values, and the codes nearest to them. Only the raw bits of a generator are used, so that the same seed gives
the same bytes with every numpy version."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from .shards import Array

__all__ = [
    "E2M1_VALUES",
    "SCALE_STEPS",
    "Random",
    "bf16",
    "e4m3_values",
    "nearest_codes",
    "normal_quantiles",
    "split_std",
]

PIECE: Final = 1 << 22
"""Values generated at once; a multiple of the values per 64-bit word."""


@cache
def normal_quantiles() -> npt.NDArray[np.float64]:
    """(65536,) values that are normally distributed when the index is uniform."""
    inv_cdf = statistics.NormalDist().inv_cdf
    return np.array([inv_cdf((i + 0.5) / 65536) for i in range(65536)])


class Random:
    """Random values for one tensor; the stream depends on the seed and the name only."""

    def __init__(self, seed: int, name: str) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, *name.encode()]))

    def u16(self, n: int) -> Array:
        """(n,) uniform 16-bit values."""
        words = np.asarray(self._bits.random_raw((n + 3) // 4), "<u8")
        return words.view("<u2")[:n]

    def lookup(self, table: Array, n: int) -> Iterator[Array]:
        """Yield ``n`` entries of a (65536,) table in pieces."""
        for start in range(0, n, PIECE):
            yield table[self.u16(min(PIECE, n - start))]


def bf16(x: Array) -> Array:
    """Round to BF16, ties to even; finite values only."""
    bits: Array = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


@cache
def e4m3_values() -> npt.NDArray[np.float32]:
    """(127,) non-negative finite E4M3 values by code."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7)).astype(
        np.float32
    )


E2M1_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def nearest_codes(x: Array, values: Array, sign_bit: int) -> npt.NDArray[np.uint8]:
    """Code of the value nearest to each x, saturating, with the sign in ``sign_bit``."""
    middles = (values[:-1] + values[1:]) / 2
    codes = np.searchsorted(middles, np.abs(x)).astype(np.uint8)
    return np.where(np.signbit(x), codes | sign_bit, codes).astype(np.uint8)


# Scales differ by one step up or down from tile to tile, so that a scale put in the wrong place shows.
SCALE_STEPS: Final = np.array([-1, 0, 1])
SCALE_RMS: Final = math.sqrt(float(np.mean(4.0**SCALE_STEPS)))


def split_std(std: float, code_std: float) -> tuple[float, int]:
    """Split a standard deviation into that of the codes, at least ``code_std``, and an E8M0 scale byte."""
    exponent = math.floor(math.log2(std / SCALE_RMS / code_std))
    return std / SCALE_RMS / 2.0**exponent, exponent + 127
