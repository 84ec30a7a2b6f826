"""A hub-form checkpoint -> dict of float arrays by official tensor names (spec section 1).

Owns just enough of the safetensors container to read one: 8 bytes of header length, a JSON header, raw data.
Codes become numbers through ``ml_dtypes``, so nothing here shares a decoder with the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .config import Config

__all__ = ["load_checkpoint", "part", "read_tensors"]

Array = npt.NDArray[Any]

_DTYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


def read_tensors(folder: Path) -> dict[str, Array]:
    """All tensors of ``model.safetensors`` or of the shards of its index, memory-mapped, as stored."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Array] = {}
    for name in files:
        data = np.memmap(folder / name, dtype=np.uint8, mode="r")
        n_header = int(data[:8].view("<u8")[0])
        header = json.loads(data[8 : 8 + n_header].tobytes())
        for tensor, info in header.items():
            if tensor != "__metadata__":
                begin, end = (8 + n_header + offset for offset in info["data_offsets"])
                tensors[tensor] = data[begin:end].view(_DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


def dequantise(weight: Array, scale: Array) -> Array:
    """FP8 codes (a scale per 128x128 tile) or packed FP4 codes (one per 32 inputs) -> float32, exact."""
    s = scale.astype(np.float32)
    if weight.dtype == ml_dtypes.float8_e4m3fn:  # (out, in); the last tiles may be partial
        n_out, n_in = weight.shape
        s = s.repeat(128, axis=0)[:n_out].repeat(128, axis=1)[:, :n_in]
        return weight.astype(np.float32) * s
    packed = weight.view(np.uint8)  # (out, in/2), input 2i in the low nibble
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * s.repeat(32, axis=1)


def part(weights: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The tensors whose names start with ``prefix``, under the rest of their names."""
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}


def load_checkpoint(folder: str | Path) -> tuple[Config, dict[str, Array]]:
    """Read ``config.json`` and all trunk tensors of a hub-form checkpoint.

    Returns:
        The config, and float32 (or integer) arrays by official name; the scales are gone, MTP is left out.

    Raises:
        KeyError: a quantised weight without its scale.
    """
    folder = Path(folder)
    config = Config.from_json(json.loads((folder / "config.json").read_text()))
    stored = read_tensors(folder)
    weights: dict[str, Array] = {}
    for name, tensor in stored.items():
        if name.startswith("mtp.") or name.endswith(".scale"):
            continue
        if tensor.dtype in (np.int8, ml_dtypes.float8_e4m3fn):
            weights[name] = dequantise(tensor, stored[name.removesuffix(".weight") + ".scale"])
        elif tensor.dtype.kind in "iu":
            weights[name] = np.asarray(tensor)
        else:
            weights[name] = tensor.astype(np.float32)
    return config, weights
