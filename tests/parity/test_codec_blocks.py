"""Decoding and quantising blocks: F8_E4M3_B128 against `ml_dtypes`, MXFP4 against `gguf` and ggml.

Every code meets every scale byte. Repacking and argument checks are in the other test_codec files.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyllama_dsv4 import _codec

# a busy machine is not a failure; no files outside tmp_path
SETTINGS = settings(deadline=None, database=None)
ROOT = Path(__file__).parents[2]
ALL_BYTES = np.arange(256, dtype=np.uint8)
ALL_BF16 = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 values, all NaN made equal."""
    return np.where(np.isnan(x), np.float32(np.nan), x).astype(np.float32).view(np.uint32)


# --- F8_E4M3_B128 ------------------------------------------------------------------------------------------


def f8_encode_expected(x: np.ndarray) -> np.ndarray:
    """(n, 128) float32 to (n, 129): the rule of `_codec.f8_e4m3_b128_encode`, from float64 and ml_dtypes."""
    amax = np.where(np.isfinite(x), np.abs(x), 0).max(axis=1).astype(np.float64)
    # the smallest k with amax <= 448 * 2**k, by trying all of them
    k = np.arange(-127, 128)
    e = (amax[:, None] > 448 * 2.0**k).sum(axis=1)
    numbers = np.where(np.isnan(x), 0, x).astype(np.float64)
    scaled = np.clip(numbers / 2.0 ** (e - 127)[:, None], -448, 448).astype(np.float32)
    codes = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes = np.where(np.isnan(x), np.where(np.signbit(x), 0xFF, 0x7F), codes)
    return np.concatenate([e[:, None], codes], axis=1).astype(np.uint8)


def test_f8_decode_all_codes_and_scales() -> None:
    blocks = np.empty((256, 2, 129), np.uint8)
    blocks[:, :, 0] = ALL_BYTES[:, None]
    blocks[:, :, 1:] = ALL_BYTES.reshape(2, 128)
    got = _codec.f8_e4m3_b128_decode(blocks.reshape(256, 258))

    codes = ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = ALL_BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = scales[:, None] * codes
    np.testing.assert_array_equal(bits(got), bits(expected))

    # the cases that the format description singles out
    assert np.isnan(got[255]).all()
    assert np.isnan(got[:, [0x7F, 0xFF]]).all()
    assert not np.isnan(np.delete(got[:255], [0x7F, 0xFF], axis=1)).any()
    assert (got[127, 0x7E], got[115, 0x38], got[0, 1]) == (448, 2.0**-12, 2.0**-136)
    assert np.isinf(got[247, 0x7E])
    assert np.isfinite(got[246, 0x7E])
    assert np.signbit(got[100, 0x80])


def test_f8_encode_scale_of_exact_powers() -> None:
    """448 * 2**k has scale byte k + 127; a log2 computed in floating point can be one too high."""
    k = np.arange(-127, 120)
    amax = np.ldexp(np.float32(448), k)
    x = np.zeros((3 * k.size, 128), np.float32)
    below, above = np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))
    x[:, 77] = np.concatenate([amax, below, -above])
    got = _codec.f8_e4m3_b128_encode(x)
    np.testing.assert_array_equal(got[:, 0], np.concatenate([k + 127, k + 127, k + 128]))
    assert (got[: k.size, 1 + 77] == 0x7E).all()


def test_f8_encode_extremes() -> None:
    x = np.zeros((4, 128), np.float32)
    x[1, 5] = np.finfo(np.float32).max
    x[2, 5] = 1e-45
    x[3, :] = -0.0
    got = _codec.f8_e4m3_b128_encode(x)
    assert got[0].tolist() == [0] * 129
    assert got[1, 0] == 247
    assert got[2].tolist() == [0] * 129
    assert got[3].tolist() == [0] + [0x80] * 128
    np.testing.assert_array_equal(got, f8_encode_expected(x))


def test_f8_encode_all_bf16() -> None:
    # as they come (one exponent per block), and mixed so that most values are far below the block's maximum
    for order in (np.arange(65536), np.random.default_rng(1).permutation(65536)):
        x = ALL_BF16[order].reshape(512, 128)
        np.testing.assert_array_equal(_codec.f8_e4m3_b128_encode(x), f8_encode_expected(x))


def test_f8_encode_ties() -> None:
    # a fixed maximum pins the scale to 1; then every midpoint between codes, and its neighbours
    values = np.unique(np.abs(ALL_BYTES[:0x7F].view(ml_dtypes.float8_e4m3fn).astype(np.float32)))
    ties = (values[1:] + values[:-1]) / 2
    points = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(448))])
    points = np.concatenate([points, -points])
    x = np.zeros((-(-points.size // 127), 128), np.float32)
    x[:, 0] = 448
    x[np.arange(points.size) // 127, 1 + np.arange(points.size) % 127] = points
    got = _codec.f8_e4m3_b128_encode(x)
    assert (got[:, 0] == 127).all()
    np.testing.assert_array_equal(got, f8_encode_expected(x))


@SETTINGS
@given(hnp.arrays(np.float32, (2, 128), elements=st.floats(width=32)))
def test_f8_encode_random(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_codec.f8_e4m3_b128_encode(x), f8_encode_expected(x))


def test_f8_encode_non_finite_values_do_not_move_the_scale() -> None:
    x = np.ones((1, 128), np.float32)
    x[0, :4] = [np.nan, -np.nan, np.inf, -np.inf]
    got = _codec.f8_e4m3_b128_encode(x)[0]
    assert got[0] == 119  # 1 <= 448 * 2**-8
    assert got[1:6].tolist() == [0x7F, 0xFF, 0x7E, 0xFE, 0x78]

    x[:] = np.inf
    assert _codec.f8_e4m3_b128_encode(x)[0].tolist() == [0] + [0x7E] * 128


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.integers(0, 246))
def test_f8_decoded_weights_survive_encoding(seed: int, e: int) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 129), dtype=np.uint8)
    blocks[:, 1:] &= np.random.default_rng(seed + 1).integers(
        0, 256, (3, 1), dtype=np.uint8
    )  # small maxima too
    blocks[:, 0] = e
    x = _codec.f8_e4m3_b128_decode(blocks)
    np.testing.assert_array_equal(bits(_codec.f8_e4m3_b128_decode(_codec.f8_e4m3_b128_encode(x))), bits(x))


# --- MXFP4 -------------------------------------------------------------------------------------------------


def mxfp4_all() -> np.ndarray:
    """(256, 17): every scale byte with every code in both nibbles."""
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = ALL_BYTES
    blocks[:, 1:] = np.arange(16) | (15 - np.arange(16)) << 4
    return blocks


def test_mxfp4_decode_all_codes_and_scales() -> None:
    got = _codec.mxfp4_decode(mxfp4_all())
    assert np.isnan(got[255]).all()

    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(mxfp4_all()[:255], gguf.GGMLQuantizationType.MXFP4)
        codes = np.concatenate([np.arange(16), 15 - np.arange(16)]).astype(np.uint8)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        product = ALL_BYTES[:255].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None] * values
    np.testing.assert_array_equal(bits(got[:255]), bits(theirs))
    np.testing.assert_array_equal(got[:255], product)  # -0 == 0: ggml has no negative zero


@pytest.fixture(scope="module")
def ggml_quantize(tmp_path_factory: pytest.TempPathFactory) -> Callable[[np.ndarray], np.ndarray]:
    """quantize_row_mxfp4_ref of the vendored ggml, cut out of its source and compiled by itself."""
    tree = Path(os.environ.get("PYLLAMA_DSV4_LLAMA_CPP", "")) / "ggml/src"
    if not tree.is_absolute() or not tree.is_dir():
        tree = ROOT / "vendor/llama.cpp/ggml/src"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not tree.is_dir() or compiler is None:
        pytest.skip("needs vendor/llama.cpp (made by a build) and a C compiler")

    def cut(file: str, pattern: str) -> str:
        found = re.search(pattern, (tree / file).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert found, f"{pattern} is not in {file} any more"
        return found.group()

    table = cut(
        "ggml-common.h", r"^GGML_TABLE_BEGIN\(int8_t, kvalues_fp4, 16\)$.*?^GGML_TABLE_END\(\)$"
    ).splitlines()[1]
    folder = tmp_path_factory.mktemp("ggml")
    source = folder / "mxfp4.c"
    source.write_text(
        "\n".join(
            [
                "#include <assert.h>\n#include <math.h>\n#include <stdint.h>\n#include <string.h>",
                "#define GGML_RESTRICT restrict\n#define QK_MXFP4 32",
                "#define GGML_E8M0_TO_FP32_HALF(x) ggml_e8m0_to_fp32_half(x)",
                "typedef struct { uint8_t e; uint8_t qs[16]; } block_mxfp4;",
                f"static const int8_t kvalues_mxfp4[16] = {{ {table} }};",
                cut("ggml-impl.h", r"^static inline float ggml_e8m0_to_fp32_half\(.*?^}$"),
                cut("ggml-quants.c", r"^static inline int best_index_mxfp4\(.*?^}$"),
                cut("ggml-quants.c", r"^void quantize_row_mxfp4_ref\(.*?^}$"),
            ]
        )
    )
    library = folder / "mxfp4.so"
    # contraction could matter only where a product overflows, since they are exact; ggml-base has none on x86
    command = [
        compiler,
        "-O1",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        "-o",
        str(library),
        str(source),
        "-lm",
    ]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).quantize_row_mxfp4_ref
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None

    def quantize(x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((x.size // 32, 17), np.uint8)
        function(x.ctypes.data, out.ctypes.data, x.size)
        return out

    return quantize


@functools.cache
def mxfp4_inputs() -> dict[str, np.ndarray]:
    """(n, 32) float32 each, finite, with maxima of 0 or at least 2**-125, where ggml's scale is defined."""
    rng = np.random.default_rng(2)
    finite = ALL_BF16[np.isfinite(ALL_BF16)]
    finite = np.concatenate([finite, np.zeros(-finite.size % 32, np.float32)])
    inputs = {"bf16": finite.reshape(-1, 32), "bf16 mixed": rng.permutation(finite).reshape(-1, 32)}

    # maxima at powers of two and up to 60 steps around them, where log2f rounds to an integer too early
    powers = np.ldexp(np.float32(1), np.arange(-124, 128))
    maxima = (powers.view(np.uint32)[:, None] + np.arange(-60, 61)).astype(np.uint32).view(np.float32).ravel()
    maxima = np.append(maxima, np.finfo(np.float32).max)
    x = rng.uniform(-1, 1, (maxima.size, 32)).astype(np.float32) * maxima[:, None]
    x[:, 3] = maxima
    inputs["powers"] = x

    # every midpoint between codes and its neighbours, both signs, over the exponents
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    ties = np.concatenate(
        [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(9)), [0, 4, 6, 7.9]]
    )
    row = np.concatenate([ties, np.zeros(7)]).astype(np.float32)
    x = np.stack([row, -row])
    inputs["ties"] = (np.ldexp(np.float32(1), np.arange(-123, 125))[:, None, None] * x).reshape(-1, 32)
    inputs["normal"] = rng.standard_normal((2048, 32)).astype(np.float32) * np.exp(
        rng.uniform(-60, 60, (2048, 1)).astype(np.float32)
    )
    inputs["zero"] = np.zeros((1, 32), np.float32)
    for name, x in inputs.items():
        amax = np.abs(x).max(axis=1)
        inputs[name] = x[(amax == 0) | (amax >= 2.0**-125)]
    return inputs


@pytest.mark.parametrize("name", mxfp4_inputs())
def test_mxfp4_encode_is_ggml(name: str, ggml_quantize: Callable[[np.ndarray], np.ndarray]) -> None:
    x = mxfp4_inputs()[name]
    np.testing.assert_array_equal(_codec.mxfp4_encode(x), ggml_quantize(x))


@pytest.mark.parametrize("name", sorted(set(mxfp4_inputs()) - {"powers"}))
def test_mxfp4_encode_is_gguf(name: str) -> None:
    # without "powers": numpy's log2 need not round as the C library's does
    x = mxfp4_inputs()[name]
    with np.errstate(over="ignore"):
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(_codec.mxfp4_encode(x), expected)


@SETTINGS
@given(hnp.arrays(np.float32, (1, 32), elements=st.floats(-1024, 1024, width=32)))
def test_mxfp4_encode_random(x: np.ndarray) -> None:
    """Each code is a nearest one for the scale, whatever the scale."""
    blocks = _codec.mxfp4_encode(x)
    table = _codec.e2m1_decode(ALL_BYTES[:16]).astype(np.float64) * 2.0 ** (float(blocks[0, 0]) - 127)
    error = np.abs(_codec.mxfp4_decode(blocks).astype(np.float64) - x)
    np.testing.assert_array_equal(
        error[0], np.abs(table[None, :] - x[0].astype(np.float64)[:, None]).min(axis=1)
    )


def test_mxfp4_encode_below_the_smallest_scale() -> None:
    # ggml converts a negative exponent to a byte, which wraps to 255 on some machines and saturates on others
    x = np.zeros((2, 32), np.float32)
    x[0, :3] = np.ldexp(np.float32([6, 1, -0.5]), -128)
    x[1, 0] = 1e-45
    got = _codec.mxfp4_encode(x)
    assert got[:, 0].tolist() == [0, 0]
    np.testing.assert_array_equal(_codec.mxfp4_decode(got)[0, :3], np.ldexp(np.float32([6, 1, 0]), -128))
    assert not got[1].any()


def test_mxfp4_encode_non_finite_values_do_not_move_the_scale() -> None:
    x = np.ones((1, 32), np.float32)
    x[0, :4] = [np.nan, -np.nan, np.inf, -np.inf]
    got = _codec.mxfp4_encode(x)
    assert got[0, 0] == 125
    assert _codec.mxfp4_decode(got)[0, :5].tolist() == [0, 0, 1.5, -1.5, 1]
