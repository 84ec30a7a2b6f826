"""The reference's checkpoint reader, on files made here byte by byte with values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import Config, load_checkpoint

Array = npt.NDArray[Any]
Stored = dict[str, tuple[str, list[int], bytes]]  # name -> safetensors dtype, shape, data


def write(path: Path, tensors: Stored) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())
    )


def write_config(folder: Path) -> None:
    raw: dict[str, Any] = {k: v for k, v in asdict(Config()).items() if not k.startswith("yarn_")}
    raw["compress_ratios"] = [*Config().compress_ratios, 0]
    raw["rope_scaling"] = {
        "type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
    }
    (folder / "config.json").write_text(json.dumps(raw))


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_fp8_codes_and_tile_scales(tmp_path: Path) -> None:
    """Four tiles of 128x128, the last column of tiles partial; every code but the two NaNs."""
    n_out, n_in = 256, 160
    codes = (np.arange(n_out)[:, None] + 7 * np.arange(n_in)).astype(np.uint8)
    codes[codes & 127 == 127] = 0
    scales = np.array([[127, 115], [0, 130]], np.uint8)
    write_config(tmp_path)
    write(
        tmp_path / "model.safetensors",
        {
            "layers.0.attn.wkv.weight": ("F8_E4M3", [n_out, n_in], codes.tobytes()),
            "layers.0.attn.wkv.scale": ("F8_E8M0", [2, 2], scales.tobytes()),
            "mtp.0.e_proj.weight": ("F32", [1], b"\0\0\0\0"),
        },
    )
    config, weights = load_checkpoint(tmp_path)
    assert list(weights) == ["layers.0.attn.wkv.weight"]
    got = weights["layers.0.attn.wkv.weight"]
    assert got.dtype == np.float32
    value = np.array([0.0 if c & 127 == 127 else e4m3(c) for c in range(256)])[codes]
    for i, j in np.ndindex(2, 2):
        tile = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        assert np.array_equal(got[tile], value[tile] * 2.0 ** (int(scales[i, j]) - 127))
    assert (config.yarn_factor, config.yarn_original) == (8, 4096)
    assert (config.yarn_beta_fast, config.yarn_beta_slow) == (16, 1)
    assert config.compress_ratios == (0, 0, 4, 128, 4, 128, 0)


def test_fp4_nibble_order_and_group_scales(tmp_path: Path) -> None:
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    codes = np.random.default_rng(0).integers(0, 16, (2, 64))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)  # input 2i in the low nibble
    scales = np.array([[127, 120], [128, 1]], np.uint8)
    name = "layers.0.ffn.experts.0.w1"
    write_config(tmp_path)
    write(
        tmp_path / "model.safetensors",
        {
            f"{name}.weight": ("I8", [2, 32], packed.tobytes()),
            f"{name}.scale": ("F8_E8M0", [2, 2], scales.tobytes()),
        },
    )
    got = load_checkpoint(tmp_path)[1][f"{name}.weight"]
    expected = np.array(e2m1)[codes] * 2.0 ** (scales.astype(int).repeat(32, axis=1) - 127)
    assert np.array_equal(got, expected)
    assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_shards_and_plain_types(tmp_path: Path) -> None:
    ids = np.arange(6).reshape(2, 3) << 32
    write_config(tmp_path)
    write(tmp_path / "a.safetensors", {"norm.weight": ("BF16", [3], bytes.fromhex("803f00c0003f"))})
    write(
        tmp_path / "b.safetensors",
        {"layers.0.ffn.gate.tid2eid": ("I64", [2, 3], ids.astype("<i8").tobytes())},
    )
    index = {"norm.weight": "a.safetensors", "layers.0.ffn.gate.tid2eid": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = load_checkpoint(tmp_path)[1]
    assert weights["norm.weight"].tolist() == [1.0, -2.0, 0.5]
    assert np.array_equal(weights["layers.0.ffn.gate.tid2eid"], ids)


def test_a_missing_scale_or_size_is_not_guessed(tmp_path: Path) -> None:
    write_config(tmp_path)
    write(tmp_path / "model.safetensors", {"layers.0.attn.wkv.weight": ("F8_E4M3", [1, 1], b"\x38")})
    with pytest.raises(KeyError, match=r"wkv\.scale"):
        load_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(KeyError, match="head_dim"):
        load_checkpoint(tmp_path)
