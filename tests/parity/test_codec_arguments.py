"""What `_codec` accepts and refuses, and how it behaves: threads, GIL, floating-point environment.

The values it computes are tested in the other test_codec files.
"""

from __future__ import annotations

import ctypes
import inspect
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyllama_dsv4 import _codec

# function, argument, dtype, elements per block in and out (1: any shape)
ONE_ARRAY = [
    (_codec.e4m3_decode, "codes", np.uint8, 1, 1),
    (_codec.e4m3_encode, "x", np.float32, 1, 1),
    (_codec.e8m0_decode, "codes", np.uint8, 1, 1),
    (_codec.e8m0_encode, "x", np.float32, 1, 1),
    (_codec.e2m1_decode, "codes", np.uint8, 1, 1),
    (_codec.e2m1_encode, "x", np.float32, 1, 1),
    (_codec.f8_e4m3_b128_decode, "blocks", np.uint8, 129, 128),
    (_codec.f8_e4m3_b128_encode, "x", np.float32, 128, 129),
    (_codec.mxfp4_decode, "blocks", np.uint8, 17, 32),
    (_codec.mxfp4_encode, "x", np.float32, 32, 17),
]
BLOCKS_ONLY = [
    (_codec.f8_e4m3_b128_unpack, "blocks", np.uint8, 129, None),
    (_codec.f8_e4m3_b128_check, "blocks", np.uint8, 129, None),
    (_codec.mxfp4_unpack, "blocks", np.uint8, 17, None),
    (_codec.mxfp4_check, "blocks", np.uint8, 17, None),
]


def names(cases: list) -> list[str]:  # type: ignore[type-arg]
    return [case[0].__name__ for case in cases]


each = pytest.mark.parametrize(("function", "arg", "dtype", "n_in", "n_out"), ONE_ARRAY, ids=names(ONE_ARRAY))
each_and_blocks = pytest.mark.parametrize(
    ("function", "arg", "dtype", "n_in", "n_out"), ONE_ARRAY + BLOCKS_ONLY, ids=names(ONE_ARRAY + BLOCKS_ONLY)
)


def valid(dtype: type, *shape: int) -> np.ndarray:
    """An array that every function taking `dtype` accepts: powers of two, or codes below 16."""
    return np.ones(shape, dtype)


# --- arrays that are refused -------------------------------------------------------------------------------


@each_and_blocks
def test_wrong_dtype(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    expected = np.dtype(dtype).name
    for wrong in ("int8", "float64", "float16", "bool", ">f4", ">u2", "complex64"):
        x = np.ones((128, n_in), wrong)
        with pytest.raises(TypeError) as error:
            function(x)
        assert f"{function.__name__}: argument '{arg}': found {x.dtype} array of shape (128, {n_in})" in str(
            error.value
        )
        assert f"expected {expected}" in str(error.value)


@each_and_blocks
@pytest.mark.parametrize("wrong", [None, 1.0, [1, 2], b"abc", memoryview(b"abc"), np.float32(1)], ids=repr)
def test_not_an_array(  # type: ignore[type-arg]
    function: Callable, arg: str, dtype: type, n_in: int, n_out: int, wrong: object
) -> None:
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: argument '{arg}': found {type(wrong).__name__}, expected"
    ):
        function(wrong)


@each_and_blocks
def test_not_contiguous(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    for x in (
        valid(dtype, 128, 2 * n_in)[:, ::2],
        valid(dtype, n_in, 128).T[:, : n_in * 2],
        valid(dtype, 128, n_in)[::-1],
    ):
        if x.flags.c_contiguous:
            continue  # one column, transposed
        with pytest.raises(
            ValueError, match=rf"'{arg}': found .* with strides \(.*\), expected a C-contiguous array"
        ):
            function(x)


@each
def test_unaligned(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    x = np.frombuffer(b"\0" + valid(dtype, n_in).tobytes(), dtype, offset=1)
    if dtype is np.uint8:
        function(x)  # bytes have no alignment
    else:
        with pytest.raises(
            ValueError, match=f"'{arg}': found float32 array of shape .* at an unaligned address"
        ):
            function(x)


@each_and_blocks
def test_wrong_row_length(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    if n_in == 1:
        return
    for length in (1, n_in - 1, n_in + 1, 3 * n_in // 2):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
            function(valid(dtype, 128, length))
        message = str(error.value)
        assert f"'{arg}': found {np.dtype(dtype)} array of shape (128, {length}), expected" in message
        assert f"a multiple of {n_in}" in message or f"that is a multiple of {n_in}" in message
    with pytest.raises(ValueError, match=rf"'{arg}': found .* of shape \(\)"):
        function(valid(dtype))


def test_unpack_wants_matrices_of_whole_tiles() -> None:
    with pytest.raises(
        ValueError, match=r"found uint8 array of shape \(100, 129\), expected two dimensions, a multiple of"
    ):
        _codec.f8_e4m3_b128_unpack(np.ones((100, 129), np.uint8))
    for function, n in ((_codec.f8_e4m3_b128_unpack, 129), (_codec.mxfp4_unpack, 17)):
        for shape in ((128 * n,), (2, 128, n)):
            with pytest.raises(ValueError, match="expected two dimensions"):
                function(np.ones(shape, np.uint8))


@pytest.mark.parametrize(
    ("pack", "weight", "scale", "message"),
    [
        (
            _codec.f8_e4m3_b128_pack,
            (100, 128),
            (1, 1),
            r"'weight': .* \(100, 128\), expected two dimensions, a multiple of 128",
        ),
        (
            _codec.f8_e4m3_b128_pack,
            (128, 64),
            (1, 1),
            r"'weight': .* \(128, 64\), expected .* by a multiple of 128",
        ),
        (_codec.f8_e4m3_b128_pack, (128,), (1, 1), r"'weight': .* \(128,\), expected two dimensions"),
        (_codec.f8_e4m3_b128_pack, (256, 384), (3, 2), r"'scale': .* \(3, 2\), expected shape \(2, 3\)"),
        (_codec.f8_e4m3_b128_pack, (256, 384), (6,), r"'scale': .* \(6,\), expected shape \(2, 3\)"),
        (_codec.f8_e4m3_b128_pack, (256, 384), (256, 3), r"'scale': .* \(256, 3\), expected shape \(2, 3\)"),
        (
            _codec.mxfp4_pack,
            (4, 24),
            (4, 1),
            r"'weight': .* \(4, 24\), expected .* any number of rows by a multiple of 16",
        ),
        (_codec.mxfp4_pack, (2, 4, 16), (4, 1), r"'weight': .* \(2, 4, 16\), expected two dimensions"),
        (_codec.mxfp4_pack, (4, 32), (2, 4), r"'scale': .* \(2, 4\), expected shape \(4, 2\)"),
        (_codec.mxfp4_pack, (4, 32), (4, 1), r"'scale': .* \(4, 1\), expected shape \(4, 2\)"),
    ],
)
def test_pack_shapes(pack: Callable, weight: tuple, scale: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=rf"{pack.__name__}: argument {message}"):
        pack(np.ones(weight, np.uint8), np.ones(scale, np.uint8))


@pytest.mark.parametrize("pack", [_codec.f8_e4m3_b128_pack, _codec.mxfp4_pack])
def test_pack_dtypes(pack: Callable) -> None:  # type: ignore[type-arg]
    with pytest.raises(
        TypeError,
        match=r"'weight': found int8 array .*, expected uint8\. Reinterpret .*\.view\(numpy\.uint8\)",
    ):
        pack(np.ones((128, 128), np.int8), np.ones((1, 1), np.uint8))
    with pytest.raises(TypeError, match=r"'scale': found float32 array .*, expected uint8$"):
        pack(np.ones((128, 128), np.uint8), np.ones((1, 1), np.float32))


@each_and_blocks
def test_n_threads(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    x = valid(dtype, 128, n_in)
    with pytest.raises(ValueError, match=rf"{function.__name__}: argument 'n_threads': found -1, expected 0"):
        function(x, n_threads=-1)
    with pytest.raises(TypeError):
        function(x, 1)  # keyword only
    function(x, n_threads=1000)


# --- arrays that are accepted ------------------------------------------------------------------------------


@each
def test_shapes(function: Callable, arg: str, dtype: type, n_in: int, n_out: int) -> None:  # type: ignore[type-arg]
    for lead in ((), (3,), (2, 3, 4), (0,), (3, 0)):
        got = function(valid(dtype, *lead, 2 * n_in))
        assert got.shape == (*lead, 2 * n_out)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        # dimensions in front change nothing
        np.testing.assert_array_equal(got.ravel(), function(valid(dtype, got.size // n_out * n_in)))
    assert function(valid(dtype, 3, 0)).shape == (3, 0)
    if n_in == 1:
        assert function(valid(dtype)).shape == ()


@each
def test_read_only_memory_maps(  # type: ignore[type-arg]
    function: Callable, arg: str, dtype: type, n_in: int, n_out: int, tmp_path: Path
) -> None:
    x = valid(dtype, 6, n_in)
    x.tofile(tmp_path / "x")
    got = function(np.memmap(tmp_path / "x", dtype, mode="r", shape=x.shape))
    np.testing.assert_array_equal(got, function(x))


@each
def test_threads_give_the_same_result(
    function: Callable, arg: str, dtype: type, n_in: int, n_out: int
) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(1)
    n = 1_500_007 // n_in * n_in  # at least 1.5 MB: several threads
    if function is _codec.e8m0_encode:
        x = np.ldexp(np.float32(1), rng.integers(-127, 128, n))
    elif dtype is np.float32:
        x = rng.standard_normal(n, np.float32)
    else:
        x = rng.integers(0, 16 if function is _codec.e2m1_decode else 256, n, dtype=np.uint8)
    single = function(x, n_threads=1)
    assert len(np.unique(single[-1000:])) > 5
    for n_threads in (0, 2, 3, 7):
        np.testing.assert_array_equal(function(x, n_threads=n_threads), single)


# --- in a process ------------------------------------------------------------------------------------------


def test_releases_the_gil() -> None:
    """While a call computes, another Python thread runs."""
    x = np.ones(1 << 23, np.float32)
    go, ran = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        ran.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        sys.setswitchinterval(1000)  # from here on this thread keeps the GIL unless it gives it away
        go.set()
        for _ in range(50):  # a busy machine may not schedule the other thread during the first call
            _codec.e4m3_encode(x, n_threads=1)
            if ran.is_set():
                break
        released = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert released


def test_calls_from_many_threads_at_once() -> None:
    weight = np.random.default_rng(2).integers(0, 256, (512, 1024), dtype=np.uint8)
    scale = np.random.default_rng(3).integers(0, 256, (4, 8), dtype=np.uint8)
    expected = _codec.f8_e4m3_b128_pack(weight, scale)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(_codec.f8_e4m3_b128_pack(weight, scale, n_threads=2)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, expected)


@contextmanager
def rounding_up() -> Iterator[None]:
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if sys.platform != "linux" or upward is None:
        pytest.skip("knows the rounding modes of Linux on x86-64 and aarch64 only")
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(upward) == 0
    try:
        yield
        assert libm.fegetround() == upward, "the caller's environment must come back"
    finally:
        libm.fesetround(0)


@contextmanager
def flushing_to_zero() -> Iterator[None]:
    """Subnormals off, as a library built with -ffast-math leaves them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("knows the environment of Linux on x86-64 only")
    libm = ctypes.CDLL("libm.so.6")
    old, new = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)  # fenv_t, MXCSR at the end
    assert libm.fegetenv(old) == 0
    mxcsr = int.from_bytes(old.raw[28:32], "little") | 0x8040
    new.raw = old.raw[:28] + mxcsr.to_bytes(4, "little")
    assert libm.fesetenv(new) == 0
    try:
        yield
    finally:
        libm.fesetenv(old)


@pytest.mark.parametrize("environment", [rounding_up, flushing_to_zero])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_floating_point_environment(environment: Callable, n_threads: int) -> None:  # type: ignore[type-arg]
    """The caller's rounding mode and flush-to-zero flags do not reach the results, in no thread."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((4096, 128), np.float32) * np.float32(2.0**-7)
    blocks = rng.integers(0, 128, (4096, 129), dtype=np.uint8)
    blocks[:, 0] %= 4  # products down to 2**-136
    tiny = np.ldexp(x, -115)

    def compute() -> list[np.ndarray]:
        return [
            _codec.e4m3_encode(x, n_threads=n_threads),
            _codec.f8_e4m3_b128_encode(tiny, n_threads=n_threads),
            _codec.f8_e4m3_b128_decode(blocks, n_threads=n_threads).view(np.uint32),
            _codec.mxfp4_encode(tiny, n_threads=n_threads),
        ]

    expected = compute()
    with environment():
        got = compute()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# --- the stub ----------------------------------------------------------------------------------------------


def test_stub_lists_exactly_the_functions() -> None:
    stub = (Path(__file__).parents[2] / "pyllama_dsv4/_codec.pyi").read_text(encoding="utf-8")
    declared = {
        line.split("(")[0].removeprefix("def ") for line in stub.splitlines() if line.startswith("def ")
    }
    assert declared == {
        name for name, value in vars(_codec).items() if callable(value) and not inspect.isclass(value)
    }
    fields = stub.split("class BlockStats")[1].split("# ---")[0]
    assert [line.split(":")[0].strip() for line in fields.splitlines() if line.endswith(": int")] == list(
        _codec.BlockStats._fields
    )
