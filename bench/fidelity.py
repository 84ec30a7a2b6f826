"""Print how far the engine is from the NumPy reference and from itself: the numbers of docs/fidelity.md.

Owns the choice of comparisons and their figures, one JSON object a line; asserts nothing (tests/parity does). Models
are tiny, random and made on the spot. Run: python bench/fidelity.py [PART ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from layer_probe import DEEP, probed, reference_streams
from reference import LEVELS, Model, load_checkpoint

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4._native import ffi, lib
from pyllama_dsv4.convert import convert

Array = npt.NDArray[np.floating]

N_TOKENS = 300
EXACT: dict[str, Any] = {"cache_type": "f32", "flash_attn": "off"}


def figures(got: Array, want: Array) -> dict[str, float]:
    """Distance of logits (n, V) or streams: absolute errors are maxima of a token, relative ones norms of a token."""
    absolute = np.abs(got - want).max(axis=1)
    relative = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return {
        "max": float(absolute.max()),
        "median": float(np.median(absolute)),
        "nmse": float(np.mean((got - want) ** 2) / np.mean(want**2)),
        "argmax": float(np.mean(got.argmax(axis=1) == want.argmax(axis=1))),
        "median_relative": float(np.median(relative)),
        "below_1e-4": float(np.mean(relative < 1e-4)),
    }


def show(part: str, values: dict[str, float], **what: object) -> None:
    rounded = {name: float(f"{value:.3g}") for name, value in values.items()}
    print(json.dumps({"part": part, **what, **rounded}), flush=True)


class Files:
    """A checkpoint of a seed, its F32 and its native file, and token ids."""

    def __init__(self, folder: Path, seed: int, **changes: Any) -> None:
        self.checkpoint = folder / "checkpoint"
        synth.write_checkpoint(self.checkpoint, synth.tiny_config(**changes), seed=seed)
        self.paths = {name: folder / f"{name}.gguf" for name in ("f32", "native")}
        synth.write_upstream_f32(self.checkpoint, self.paths["f32"])
        convert(self.checkpoint, self.paths["native"])
        self.ids = [int(i) for i in np.random.default_rng(seed).integers(0, 320, N_TOKENS)]

    def run(self, name: str, splits: tuple[int, ...] = (), **options: Any) -> Array:
        """Logits (n, V) of the engine, evaluated in calls of the lengths in `splits` and of what is left."""
        with Llama(self.paths[name], n_ctx=512, n_threads=1, warmup=False, **options) as llm:
            rows, start = [], 0
            for length in (*splits, N_TOKENS):
                if chunk := self.ids[start : start + length]:
                    rows.append(llm.eval(chunk, logits="all"))
                start += length
        return np.concatenate(rows)

    def reference(self, level: str, dtype: npt.DTypeLike = np.float64) -> Array:
        config, weights = load_checkpoint(self.checkpoint)
        return Model(config, weights, dtype, level).forward(self.ids).logits


def levels(folder: Path, seed: int) -> None:
    """Both files against the reference, whole models; and the reference in float32 against itself."""
    files = Files(folder, seed)
    for level in LEVELS:
        want = files.reference(level)
        for name in files.paths:
            got = files.run(name, act_quant=level, **EXACT)
            show("levels", figures(got, want), seed=seed, level=level, file=name)
        show(
            "levels",
            figures(files.reference(level, np.float32), want),
            seed=seed,
            level=level,
            file="float32",
        )


def layers(folder: Path, seed: int) -> None:
    """The layers of a deep model, each on the reference's own input."""
    files = Files(folder, seed, **DEEP)
    config, weights = load_checkpoint(files.checkpoint)
    for level in LEVELS:
        streams = reference_streams(Model(config, weights, np.float64, level), files.ids)
        for name in files.paths:
            with probed(streams) as probe:
                files.run(name, act_quant=level, **EXACT)
            for i, (got, want) in enumerate(zip(probe.made[1:], streams[1:], strict=True)):
                what = {"ratio": DEEP["compress_ratios"][i], "is_hash": i < DEEP["num_hash_layers"]}
                values = figures(got.reshape(N_TOKENS, -1), want.reshape(N_TOKENS, -1))
                del values["argmax"]
                show("layers", values, seed=seed, layer=i, level=level, file=name, **what)


def inputs(folder: Path, seed: int) -> None:
    """The native file against the same weights in F32: what products lose of their inputs."""
    files = Files(folder, seed)
    for level in LEVELS:
        want = files.run("f32", act_quant=level, **EXACT)
        got = files.run("native", act_quant=level, **EXACT)
        show("inputs", figures(got, want), seed=seed, level=level)


def roundings(folder: Path, seed: int) -> None:
    """What the levels change: each against none, in the reference."""
    files = Files(folder, seed)
    plain = files.reference("none")
    for level in LEVELS[1:]:
        show("roundings", figures(files.reference(level), plain), seed=seed, level=level)


def caches(folder: Path, seed: int) -> None:
    """Cache types and flash attention against the exact cache."""
    files = Files(folder, seed)
    for level in ("none", "cache"):
        want = files.run("native", act_quant=level, **EXACT)
        for cache_type, flash_attn in (
            ("f32", "on"),
            ("f16", "off"),
            ("f16", "on"),
            ("bf16", "off"),
            ("bf16", "on"),
            ("q8_0", "on"),
        ):
            options = {"cache_type": cache_type, "flash_attn": flash_attn}
            show(
                "caches",
                figures(files.run("native", act_quant=level, **options), want),
                seed=seed,
                level=level,
                **options,
            )


def splits(folder: Path, seed: int) -> None:
    """One prompt in many calls against one call."""
    files = Files(folder, seed)
    for level in LEVELS:
        for cache_type, flash_attn in (("f32", "off"), ("f16", "on")):
            options = {"act_quant": level, "cache_type": cache_type, "flash_attn": flash_attn}
            want = files.run("native", **options)
            for name, lengths in (("one by one", (1,) * N_TOKENS), ("mixed", (127, 1, 1, 64, 3, 1))):
                show(
                    "splits",
                    figures(files.run("native", lengths, **options), want),
                    seed=seed,
                    split=name,
                    **options,
                )


def states(folder: Path, seed: int) -> None:
    """A state of one sequence, and of the whole context, put into another context against going on."""
    files = Files(folder, seed)
    n = 129
    for level in ("none", "cache"):
        for cache_type, flash_attn in (("f32", "off"), ("f16", "on"), ("q8_0", "on")):
            options: dict[str, Any] = {"cache_type": cache_type, "flash_attn": flash_attn, "act_quant": level}
            for kind in ("sequence", "context"):
                with (
                    Llama(files.paths["native"], n_ctx=512, n_threads=1, warmup=False, **options) as first,
                    Llama(files.paths["native"], n_ctx=512, n_threads=1, warmup=False, **options) as second,
                ):
                    first.eval(files.ids[:n])
                    second.load_state(first.save_state())
                    if kind == "context":
                        move_context(first, second)
                    want = first.eval(files.ids[n:], logits="all")
                    got = second.eval(files.ids[n:], logits="all")
                show("states", figures(got, want), seed=seed, state=kind, **options)


def move_context(source: Llama, target: Llama) -> None:
    """Copy the state of all sequences as well, which the package itself never does."""
    pointers = [llm._context.pointer for llm in (source, target)]
    n = int(lib.llama_state_get_size(pointers[0]))
    buffer = ffi.new("uint8_t[]", n)
    written = int(lib.llama_state_get_data(pointers[0], buffer, n))
    read = int(lib.llama_state_set_data(pointers[1], buffer, written))
    if read != written:
        raise RuntimeError(f"the state has {written} bytes, {read} were read")


PARTS: dict[str, Callable[[Path, int], None]] = {
    f.__name__: f for f in (levels, layers, inputs, roundings, caches, splits, states)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all without any")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (3)")
    args = parser.parse_args()
    for part in args.parts or PARTS:
        for seed in range(1, args.seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                PARTS[part](Path(folder), seed)


if __name__ == "__main__":
    main()
