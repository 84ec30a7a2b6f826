"""Writes a training state as a checkpoint in hub form, and converts it.

Owns the codes: FP8 tiles, packed FP4, BF16. They spell exactly the values that the training module computes with, so
the file is the trained model. The converter is the product's.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyllama_dsv4.convert import convert
from pyllama_dsv4.synth import write_safetensors
from pyllama_dsv4.synth.numbers import E2M1_VALUES, bf16, nearest_codes
from pyllama_dsv4.synth.tokenizers import write_json
from pyllama_dsv4.tensors import HParams

from .config import parameter_specs
from .rounding import (
    E2M1_FLOOR,
    E2M1_MAX,
    E4M3_FLOOR,
    E4M3_MAX,
    GROUP,
    TILE,
    fp4_groups,
    fp8_tiles,
    power,
    scale_bits,
)

__all__ = ["NAME", "export_gguf", "write_hub_checkpoint"]

NAME = "DeepSeek V4 demonstration"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json")
CARD = """---
license: mit
---
A tiny DeepSeek-V4, trained on generated text: a demonstration of the runtime, not an assistant.
"""

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[str, Array]]


def _f8(w: torch.Tensor) -> tuple[Array, Array]:
    """Return codes (out, in) and scale bytes (out / 128, in / 128)."""
    tiles = w.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))  # (R, 128, C, 128)
    byte = scale_bits(tiles.abs().amax((1, 3)), E4M3_MAX, E4M3_FLOOR)
    scale = power(byte).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    codes = (fp8_tiles(w) / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.numpy(), byte.to(torch.uint8).numpy()


def _fp4(w: torch.Tensor) -> tuple[Array, Array]:
    """Return codes (out, in / 2), input 2i in the low nibble, and scale bytes (out, in / 32)."""
    byte = scale_bits(w.unflatten(1, (-1, GROUP)).abs().amax(-1), E2M1_MAX, E2M1_FLOOR)
    values = (fp4_groups(w) / power(byte).repeat_interleave(GROUP, 1)).numpy()
    codes = nearest_codes(values, E2M1_VALUES, 8)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int8), byte.to(torch.uint8).numpy()


def hub_tensors(hp: HParams, params: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors of a checkpoint by name: dtype and bits."""
    out: Tensors = {}
    with torch.no_grad():
        for name, spec in parameter_specs(hp).items():
            w = params[name]
            if spec.kind not in ("f8", "mxfp4"):
                if spec.kind == "i32":
                    out[name] = ("I64", w.numpy())
                elif name.endswith(".weight"):
                    out[name] = ("BF16", bf16(w.numpy()))
                else:
                    out[name] = ("F32", w.numpy())
                continue
            weight, scale = spec.hf
            for e in range(spec.dims[2] if spec.is_expert_stack else 1):
                codes, scales = _f8(w) if spec.kind == "f8" else _fp4(w[e])
                out[weight.format(e=e)] = ("F8_E4M3" if spec.kind == "f8" else "I8", codes)
                out[scale.format(e=e)] = ("F8_E8M0", scales)
    return out


def write_hub_checkpoint(
    folder: Path, config: Mapping[str, Any], params: Mapping[str, torch.Tensor], vocabulary: Path | None
) -> None:
    """Write a checkpoint in hub form.

    Args:
        folder: Where to; created if need be.
        config: ``config.json``.
        params: By the names of ``config.parameter_specs``.
        vocabulary: Folder with the tokenizer's files; None for a model that knows ids only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detached = {name: w.detach() for name, w in params.items()}
    write_safetensors(folder / "model.safetensors", hub_tensors(HParams.from_hf_config(config), detached))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.0})
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for name in VOCABULARY_FILES if vocabulary is not None else ():
        shutil.copyfile(vocabulary / name, folder / name)  # type: ignore[operator]


def export_gguf(
    run: Path, config: Mapping[str, Any], params: Mapping[str, torch.Tensor], outfile: Path
) -> Path:
    """Write the checkpoint into ``run/checkpoint``, with the vocabulary of `run`, and convert it to `outfile`."""
    write_hub_checkpoint(run / "checkpoint", config, params, run)
    outfile.unlink(missing_ok=True)
    return Path(convert(run / "checkpoint", outfile, name=NAME).path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training run as hub checkpoint and native GGUF.")
    parser.add_argument("run", type=Path)
    parser.add_argument("outfile", type=Path)
    args = parser.parse_args()
    state = torch.load(args.run / "state.pt", weights_only=True)
    path = export_gguf(args.run, state["config"], state["params"], args.outfile)
    print(f"{path}: {path.stat().st_size} bytes, after {state['step']} steps")


if __name__ == "__main__":
    main()
