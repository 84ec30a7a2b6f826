"""The rounding steps of the official code: quantise to FP8 or FP4 and straight back (spec section 9).

Owns the two formats, the block scale and the three levels. Who is rounded, and when, is decided where the
value is made; this file only says how.

Not modelled: the BF16 storage between operations. Values here keep the compute type from one fake quantiser
to the next, as the engine keeps F32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["E2M1", "E4M3", "LEVELS", "Format", "Rounding", "fake_quantise", "fq4_32", "fq8_64", "fq8_128"]

Array = npt.NDArray[np.floating]

# none:  exact arithmetic on the exact weights
# cache: rows that are kept (window KV, compressed rows, indexer rows) and the indexer queries that meet them
# full:  also the activation side of every product with an FP8 or FP4 weight
LEVELS = ("none", "cache", "full")


@dataclass(frozen=True)
class Format:
    """A small float: sign, exponent with subnormals, ``n_mantissa`` bits; saturates at ``qmax``."""

    n_mantissa: int
    min_exponent: int  # of the smallest normal number; below it the spacing stays constant
    qmax: float
    floor: float  # smallest block maximum the scale is taken from, so that a zero block has a scale


E4M3 = Format(n_mantissa=3, min_exponent=-6, qmax=448.0, floor=1e-4)
E2M1 = Format(n_mantissa=1, min_exponent=0, qmax=6.0, floor=6 * 2.0**-126)


def round_to_format(y: Array, fmt: Format) -> Array:
    """Round to the nearest number of ``fmt``, ties to even, saturating, sign of zero kept; any shape."""
    y = np.clip(y, -fmt.qmax, fmt.qmax)
    exponent = np.frexp(y)[1] - 1  # |y| in [2^exponent, 2^(exponent+1))
    step = np.maximum(exponent, fmt.min_exponent) - fmt.n_mantissa
    # In units of the step the significand is an integer whose last bit is the code's last bit, so rint's
    # even integer is the even code, also when rounding carries into the next binade.
    return np.ldexp(np.rint(np.ldexp(y, -step)), step)


def scale_exponent(amax: Array, fmt: Format) -> npt.NDArray[np.int32]:
    """Exponent of the power-of-two block scale, ``ceil(log2(max(amax, floor) / qmax))``.

    Taken from the bits of the F32 quotient as the official kernel does: the exponent field, plus one if any
    mantissa bit is set. No logarithm, so nothing can land on the wrong side of a power of two.
    """
    quotient = np.maximum(amax.astype(np.float32), np.float32(fmt.floor)) * np.float32(1 / fmt.qmax)
    bits = quotient.view(np.uint32)
    exponent = (bits >> 23).astype(np.int32) - 127
    return exponent + ((bits & 0x7FFFFF) != 0)


def fake_quantise(x: Array, fmt: Format, block: int) -> Array:
    """Quantise each ``block`` consecutive channels with one power-of-two scale, and dequantise.

    Args:
        x: (..., n_channels) finite values; n_channels is a multiple of ``block``.

    Returns:
        (..., n_channels), same dtype as ``x``.

    Raises:
        ValueError: a partial block, or a value that is not finite.
    """
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} channels are not whole blocks of {block}")
    if not np.isfinite(x).all():
        raise ValueError("fake quantisation of a value that is not finite")
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)  # (..., n_blocks, block)
    exponent = scale_exponent(np.abs(blocks).max(axis=-1, keepdims=True), fmt)  # (..., n_blocks, 1)
    y = round_to_format(np.ldexp(blocks, -exponent), fmt)  # ldexp: division by the scale is exact
    return np.ldexp(y, exponent).reshape(x.shape)


def fq8_64(x: Array) -> Array:
    """E4M3 in blocks of 64: the part of a cached KV row that rope leaves alone."""
    return fake_quantise(x, E4M3, 64)


def fq4_32(x: Array) -> Array:
    """E2M1 in blocks of 32: indexer queries and rows, after the Hadamard transform."""
    return fake_quantise(x, E2M1, 32)


def fq8_128(x: Array) -> Array:
    """E4M3 in blocks of 128: the input of a product with an FP8 or FP4 weight."""
    return fake_quantise(x, E4M3, 128)


@dataclass(frozen=True)
class Rounding:
    """Which of the rounding steps are on."""

    level: str = "none"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is none of {LEVELS}")

    def kv_row(self, row: Array, n_rope: int) -> Array:
        """Round a finished KV row (..., D); its last ``n_rope`` channels carry the position and stay."""
        if self.level == "none":
            return row
        n_nope = row.shape[-1] - n_rope
        return np.concatenate([fq8_64(row[..., :n_nope]), row[..., n_nope:]], axis=-1)

    def index(self, x: Array) -> Array:
        """Round an indexer query head or row (..., D_i), already Hadamard-transformed."""
        return x if self.level == "none" else fq4_32(x)

    def linear(self, x: Array, weight: Array) -> Array:
        """Product with an FP8 or FP4 weight: (..., n_in) x (n_out, n_in) -> (..., n_out)."""
        if self.level == "full":
            x = fq8_128(x)
        return x @ weight.T
