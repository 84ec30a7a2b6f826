"""The 1:1 repack between checkpoint tensors and GGUF blocks, and the block statistics.

The expected bytes are built here with numpy indexing from the layouts, not from the codec.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama_dsv4 import _codec

# a busy machine is not a failure; no files outside tmp_path
SETTINGS = settings(deadline=None, database=None)
SEEDS = st.integers(0, 2**32 - 1)
THREADS = [0, 1, 2, 3, 7]


def random_bytes(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- F8_E4M3_B128 ------------------------------------------------------------------------------------------


def f8_expected(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rows, cols = weight.shape
    blocks = np.empty((rows, cols // 128, 129), np.uint8)
    blocks[:, :, 0] = scale[np.arange(rows) // 128]
    blocks[:, :, 1:] = weight.reshape(rows, cols // 128, 128)
    return blocks.reshape(rows, cols // 128 * 129)


@SETTINGS
@given(SEEDS, st.integers(0, 3), st.integers(0, 3))
def test_f8_pack_and_unpack(seed: int, tile_rows: int, tile_cols: int) -> None:
    weight = random_bytes(seed, tile_rows * 128, tile_cols * 128)
    scale = random_bytes(seed + 1, tile_rows, tile_cols)
    blocks = _codec.f8_e4m3_b128_pack(weight, scale)
    assert blocks.dtype == np.uint8
    np.testing.assert_array_equal(blocks, f8_expected(weight, scale))
    weight_again, scale_again = _codec.f8_e4m3_b128_unpack(blocks)
    np.testing.assert_array_equal(weight_again, weight)
    np.testing.assert_array_equal(scale_again, scale)


@pytest.mark.parametrize("n_threads", THREADS)
def test_f8_repack_threads(n_threads: int) -> None:
    weight = random_bytes(3, 11 * 128, 13 * 128)  # 2.3 MB: enough work for all of them
    scale = random_bytes(4, 11, 13)
    blocks = _codec.f8_e4m3_b128_pack(weight, scale, n_threads=n_threads)
    np.testing.assert_array_equal(blocks, f8_expected(weight, scale))
    weight_again, scale_again = _codec.f8_e4m3_b128_unpack(blocks, n_threads=n_threads)
    np.testing.assert_array_equal(weight_again, weight)
    np.testing.assert_array_equal(scale_again, scale)


def test_f8_unpack_names_the_first_row_and_block_with_another_scale() -> None:
    blocks = _codec.f8_e4m3_b128_pack(random_bytes(5, 11 * 128, 13 * 128), np.full((11, 13), 115, np.uint8))
    for row, block, byte in ((1300, 0, 9), (700, 3, 7), (699, 12, 116)):
        blocks[row, block * 129] = byte
        with pytest.raises(
            ValueError, match=f"found scale byte {byte} in row {row}, block {block}, expected 115 as in row"
        ):
            _codec.f8_e4m3_b128_unpack(blocks, n_threads=3)


def test_f8_unpack_accepts_a_scale_that_changes_between_tiles() -> None:
    blocks = _codec.f8_e4m3_b128_pack(random_bytes(6, 256, 256), np.array([[1, 2], [3, 4]], np.uint8))
    assert _codec.f8_e4m3_b128_unpack(blocks)[1].tolist() == [[1, 2], [3, 4]]


# --- MXFP4 -------------------------------------------------------------------------------------------------


def mxfp4_expected(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rows, half = weight.shape
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(rows, half // 16, 32)  # in column order
    blocks = np.empty((rows, half // 16, 17), np.uint8)
    blocks[:, :, 0] = scale
    blocks[:, :, 1:] = codes[:, :, :16] | codes[:, :, 16:] << 4
    return blocks.reshape(rows, half // 16 * 17)


def test_mxfp4_pack_vector_of_the_specification() -> None:
    # value j of the block has code j mod 16
    weight = np.frombuffer(bytes.fromhex("1032547698BADCFE" * 2), np.uint8).reshape(1, 16)
    blocks = _codec.mxfp4_pack(weight, np.array([[0x7B]], np.uint8))
    assert blocks.tobytes().hex() == "7b00112233445566778899aabbccddeeff"


@SETTINGS
@given(SEEDS, st.integers(0, 4), st.integers(0, 5))
def test_mxfp4_pack_and_unpack(seed: int, rows: int, n_blocks: int) -> None:
    weight = random_bytes(seed, rows, n_blocks * 16)
    scale = random_bytes(seed + 1, rows, n_blocks)
    blocks = _codec.mxfp4_pack(weight, scale)
    assert blocks.dtype == np.uint8
    np.testing.assert_array_equal(blocks, mxfp4_expected(weight, scale))
    weight_again, scale_again = _codec.mxfp4_unpack(blocks)
    np.testing.assert_array_equal(weight_again, weight)
    np.testing.assert_array_equal(scale_again, scale)


@pytest.mark.parametrize("n_threads", THREADS)
def test_mxfp4_repack_threads(n_threads: int) -> None:
    weight = random_bytes(7, 1021, 16 * 131)  # 2.1 MB, and no thread count divides the blocks
    scale = random_bytes(8, 1021, 131)
    blocks = _codec.mxfp4_pack(weight, scale, n_threads=n_threads)
    np.testing.assert_array_equal(blocks, mxfp4_expected(weight, scale))
    weight_again, scale_again = _codec.mxfp4_unpack(blocks, n_threads=n_threads)
    np.testing.assert_array_equal(weight_again, weight)
    np.testing.assert_array_equal(scale_again, scale)


def test_mxfp4_pack_keeps_values_in_their_columns() -> None:
    """Reading ggml's nibbles as neighbours gives finite, wrong weights; this is the check on values."""
    weight = random_bytes(9, 8, 64)
    scale = random_bytes(10, 8, 4) % 253  # no NaN, no overflow
    columns = _codec.e2m1_decode(np.stack([weight & 15, weight >> 4], axis=-1).reshape(8, 128))
    expected = columns * np.repeat(_codec.e8m0_decode(scale), 32, axis=1)
    np.testing.assert_array_equal(_codec.mxfp4_decode(_codec.mxfp4_pack(weight, scale)), expected)


# --- out= --------------------------------------------------------------------------------------------------


def f8_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight, scale = random_bytes(11, 256, 384), random_bytes(12, 2, 3)
    return weight, scale, f8_expected(weight, scale)


def mxfp4_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight, scale = random_bytes(13, 5, 48), random_bytes(14, 5, 3)
    return weight, scale, mxfp4_expected(weight, scale)


PACKS = pytest.mark.parametrize(
    ("pack", "case"),
    [(_codec.f8_e4m3_b128_pack, f8_case), (_codec.mxfp4_pack, mxfp4_case)],
    ids=["f8", "mxfp4"],
)


@PACKS
def test_pack_into_a_memory_map(pack, case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    weight, scale, expected = case()
    path = tmp_path / "file"
    path.write_bytes(b"\xee" * (expected.size + 20))
    file = np.memmap(path, np.uint8, mode="r+")
    out = file[13 : 13 + expected.size].reshape(expected.shape)  # an odd address
    assert pack(weight, scale, out=out) is out
    file.flush()
    assert path.read_bytes() == b"\xee" * 13 + expected.tobytes() + b"\xee" * 7


@PACKS
def test_pack_refuses_a_wrong_out(pack, case) -> None:  # type: ignore[no-untyped-def]
    weight, scale, expected = case()
    rows, row_bytes = expected.shape
    read_only = np.empty_like(expected)
    read_only.flags.writeable = False
    shared = np.empty(expected.size + weight.size, np.uint8)
    shared_weight = shared[: weight.size].reshape(weight.shape)

    with pytest.raises(
        ValueError, match=rf"'out': found uint8 array of shape \({row_bytes}, {rows}\), expected shape"
    ):
        pack(weight, scale, out=np.empty((row_bytes, rows), np.uint8))
    with pytest.raises(
        ValueError, match=r"'out': found uint8 array .* with strides .*, expected a C-contiguous array"
    ):
        pack(weight, scale, out=np.empty((row_bytes, rows), np.uint8).T)
    with pytest.raises(TypeError, match=r"'out': found int8 array"):
        pack(weight, scale, out=np.empty((rows, row_bytes), np.int8))
    with pytest.raises(ValueError, match=r"'out': found a read-only array, expected a writeable one"):
        pack(weight, scale, out=read_only)
    with pytest.raises(ValueError, match=r"'out': found memory shared with 'weight' or 'scale'"):
        pack(shared_weight, scale, out=shared[weight.size - 1 :][: expected.size].reshape(expected.shape))
    # next to each other is fine
    out = shared[weight.size :][: expected.size].reshape(expected.shape)
    shared_weight[:] = weight
    np.testing.assert_array_equal(pack(shared_weight, scale, out=out), expected)


# --- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", THREADS)
def test_f8_check(n_threads: int) -> None:
    codes = random_bytes(15, 9_000, 2, 129) & 0xBF  # 2.3 MB without NaN codes
    codes[:, :, 0] = 115
    assert _codec.f8_e4m3_b128_check(codes.reshape(9_000, 258)) == (18_000, 0, -1, 0, -1, 0, -1)

    codes[4_000, 1, 0] = codes[8_999, 0, 0] = 255
    codes[17, 0, 0] = codes[17, 1, 0] = codes[6_000, 1, 0] = 0
    codes[8_000, 1, 128] = codes[8_500, 0, 1] = 0x7F
    codes[8_500, 0, 2] = 0xFF
    codes[20, 0, 5] = 0x7E  # the neighbours of what is counted: 448, and the extreme valid scales
    codes[3, 0, 0], codes[4, 0, 0] = 254, 1
    got = _codec.f8_e4m3_b128_check(codes.reshape(9_000, 258), n_threads=n_threads)
    assert got == _codec.BlockStats(
        n_blocks=18_000,
        n_scale_nan=2,
        i_scale_nan=8_001,
        n_scale_zero=3,
        i_scale_zero=34,
        n_code_nan=3,
        i_code_nan=16_001,
    )


@SETTINGS
@given(SEEDS, st.integers(1, 5), st.integers(1, 3))
def test_f8_check_counts_what_decoding_shows(seed: int, rows: int, n_blocks: int) -> None:
    blocks = random_bytes(seed, rows, n_blocks * 129)
    got = _codec.f8_e4m3_b128_check(blocks)
    scales = blocks.reshape(-1, 129)[:, 0]
    nan = np.isnan(_codec.e4m3_decode(np.ascontiguousarray(blocks.reshape(-1, 129)[:, 1:])))
    assert (got.n_scale_nan, got.n_scale_zero, got.n_code_nan) == (
        (scales == 255).sum(),
        (scales == 0).sum(),
        nan.sum(),
    )
    assert got.i_code_nan == (np.flatnonzero(nan.any(axis=1))[0] if nan.any() else -1)


@pytest.mark.parametrize("n_threads", THREADS)
def test_mxfp4_check(n_threads: int) -> None:
    blocks = random_bytes(16, 3, 50_000, 17)
    blocks[:, :, 0] = 120
    blocks[1, 7, 0] = blocks[2, 1, 0] = 255
    blocks[2, 49_999, 0] = 0
    blocks[0, :2, 0] = 254, 1
    got = _codec.mxfp4_check(blocks.reshape(3, 50_000 * 17), n_threads=n_threads)
    assert got == (150_000, 2, 50_007, 1, 149_999, 0, -1)


def test_check_of_nothing() -> None:
    assert _codec.f8_e4m3_b128_check(np.empty((4, 0), np.uint8)) == (0, 0, -1, 0, -1, 0, -1)
    assert _codec.mxfp4_check(np.empty(0, np.uint8)) == (0, 0, -1, 0, -1, 0, -1)
