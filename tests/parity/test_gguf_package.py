"""F8_E4M3_B128 through the gguf package's own quantize and dequantize, once type 42 is registered."""

from __future__ import annotations

import gguf
import numpy as np

from pyllama_dsv4.gguf_types import register


def test_quantize_and_dequantize_use_the_codec() -> None:
    f8 = register()
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    data = gguf.quantize(x, f8)
    assert (data.shape, data.dtype) == ((3, 258), np.uint8)
    y = gguf.dequantize(data, f8)
    assert (y.shape, y.dtype) == ((3, 256), np.float32)
    # 3 mantissa bits: half a step of 1/8 below 2^k, or half the smallest step of the block
    assert np.all(np.abs(y - x) <= np.maximum(np.abs(x) / 16, np.abs(x).max() * 2.0**-17))
    assert (gguf.quantize(y, f8) == data).all()
    one = np.zeros((1, 129), np.uint8)
    one[0, :4] = [128, 0x38, 0x40, 0xB8]
    assert gguf.dequantize(one, f8)[0, :3].tolist() == [2.0, 4.0, -2.0]
