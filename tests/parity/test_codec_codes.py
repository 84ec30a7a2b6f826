"""The single-code codecs of `_codec` against `ml_dtypes`: E4M3FN, E8M0 and E2M1.

Decoders are compared over all codes, encoders over all BF16 values, all ties, the neighbours of every edge,
and random float32. Blocks, repacking and argument checks are in the other test_codec files.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyllama_dsv4 import _codec

# a busy machine is not a failure; no files outside tmp_path
SETTINGS = settings(deadline=None, database=None)
ALL_BYTES = np.arange(256, dtype=np.uint8)
ALL_BF16 = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
FLOAT32 = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32))


def bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 values, all NaN of one sign made equal."""
    return np.where(np.isnan(x), np.copysign(np.float32(np.nan), x), x).astype(np.float32).view(np.uint32)


def edges(values: np.ndarray) -> np.ndarray:
    """Every value, every midpoint of two, what is next to both on either side, and the negatives."""
    values = np.unique(np.abs(values[np.isfinite(values)].astype(np.float32)))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))]
    )
    return np.concatenate([points, -points])


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 464, 465, -465, 480, 1e30, -3e38, 1e-45, -1e-45, 1e-39],
    np.float32,
)


# --- E4M3FN ------------------------------------------------------------------------------------------------


def e4m3_expected(x: np.ndarray) -> np.ndarray:
    # ml_dtypes rounds like we do but overflows to NaN; clipping first makes it saturate
    codes = np.clip(np.where(np.isnan(x), 0, x), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.where(np.signbit(x), 0xFF, 0x7F), codes).astype(np.uint8)


def test_e4m3_decode_all_codes() -> None:
    got = _codec.e4m3_decode(ALL_BYTES)
    np.testing.assert_array_equal(bits(got), bits(ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)))


def test_e4m3_decode_values_of_the_specification() -> None:
    codes = np.array([0x01, 0x07, 0x08, 0x38, 0x40, 0xB8, 0x7E], np.uint8)
    assert _codec.e4m3_decode(codes).tolist() == [2**-9, 7 * 2**-9, 2**-6, 1, 2, -1, 448]


@pytest.mark.parametrize(
    "x", [ALL_BF16, edges(ALL_BYTES.view(ml_dtypes.float8_e4m3fn)), SPECIAL], ids=["bf16", "edges", "special"]
)
def test_e4m3_encode(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_codec.e4m3_encode(x), e4m3_expected(x))


@SETTINGS
@given(FLOAT32)
def test_e4m3_encode_random(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_codec.e4m3_encode(x), e4m3_expected(x))


def test_e4m3_encode_inverts_decode() -> None:
    np.testing.assert_array_equal(_codec.e4m3_encode(_codec.e4m3_decode(ALL_BYTES)), ALL_BYTES)


# --- E8M0 --------------------------------------------------------------------------------------------------


def test_e8m0_decode_all_codes() -> None:
    got = _codec.e8m0_decode(ALL_BYTES)
    np.testing.assert_array_equal(
        bits(got), bits(ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    )
    assert got[0] == 2.0**-127


def test_e8m0_encode_all_powers_of_two() -> None:
    np.testing.assert_array_equal(
        _codec.e8m0_encode(np.ldexp(np.float32(1), np.arange(-127, 128))), ALL_BYTES[:255]
    )


@SETTINGS
@given(
    st.floats(width=32).filter(
        lambda x: not (x > 0 and x != np.inf and np.frexp(x)[0] == 0.5 and x >= 2.0**-127)
    )
)
def test_e8m0_encode_refuses_everything_else(x: float) -> None:
    with pytest.raises(
        ValueError, match=r"e8m0_encode: argument 'x': found \S+ at index \(0,\), expected powers of two"
    ):
        _codec.e8m0_encode(np.array([x], np.float32))


@pytest.mark.parametrize(
    "x", [0.0, -0.0, -1.0, 3.0, 2.0**-128, np.inf, np.nan, np.nextafter(np.float32(1), 2)]
)
def test_e8m0_encode_names_the_first_bad_value(x: float) -> None:
    values = np.ones((3, 5), np.float32)
    values[2, 4] = 3
    values[1, 2] = x
    with pytest.raises(
        ValueError, match=r"at index \(1, 2\), expected powers of two in 2\*\*-127 \.\. 2\*\*127"
    ):
        _codec.e8m0_encode(values)


def test_e8m0_encode_names_the_first_bad_value_of_all_threads() -> None:
    values = np.ones(1 << 20, np.float32)
    values[[99, 300_000, 600_000, 900_000]] = 3
    with pytest.raises(ValueError, match=r"found 3\.0 at index \(99,\)"):
        _codec.e8m0_encode(values, n_threads=4)


# --- E2M1 --------------------------------------------------------------------------------------------------


def e2m1_expected(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def test_e2m1_decode_all_codes() -> None:
    codes = ALL_BYTES[:16]
    np.testing.assert_array_equal(
        bits(_codec.e2m1_decode(codes)), bits(codes.view(ml_dtypes.float4_e2m1fn).astype("f4"))
    )


@pytest.mark.parametrize("code", [16, 0x80, 255])
def test_e2m1_decode_refuses_a_high_nibble(code: int) -> None:
    codes = np.full((2, 7), 15, np.uint8)
    codes[1, 6] = code
    with pytest.raises(
        ValueError, match=rf"'codes': found {code} at index \(1, 6\), expected one code of 0 \.\. 15"
    ):
        _codec.e2m1_decode(codes)


@pytest.mark.parametrize(
    "x",
    [ALL_BF16, edges(ALL_BYTES[:16].view(ml_dtypes.float4_e2m1fn)), SPECIAL],
    ids=["bf16", "edges", "special"],
)
def test_e2m1_encode(x: np.ndarray) -> None:
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(_codec.e2m1_encode(x), e2m1_expected(x))


@SETTINGS
@given(hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-8, 8, width=32)))
def test_e2m1_encode_random(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_codec.e2m1_encode(x), e2m1_expected(x))


def test_e2m1_encode_refuses_nan() -> None:
    with pytest.raises(ValueError, match=r"e2m1_encode: argument 'x': found nan at index \(1, 0\)"):
        _codec.e2m1_encode(np.array([[1, 2], [np.nan, np.nan]], np.float32))


def test_e2m1_encode_inverts_decode() -> None:
    np.testing.assert_array_equal(_codec.e2m1_encode(_codec.e2m1_decode(ALL_BYTES[:16])), ALL_BYTES[:16])
