"""Measures conversion against a plain copy of the same bytes on the same disk, in the same run.

Makes a random checkpoint with V4-Flash's true layer shapes, then, alternating and each in a process of its own with
the checkpoint out of the page cache: a copy of its shards, the conversion, and once the recipe and the restore. Every
step ends with its data flushed to the disk. Prints one JSON object; asserts nothing.

    python bench/convert.py FOLDER [--layers 2] [--runs 3] [--threads N] [--keep]

FOLDER needs about 28 GB for two layers and is left as it was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyllama_dsv4 import __version__, synth
from pyllama_dsv4.convert.run import default_n_threads

STEPS: dict[str, str] = {
    # what a step runs, in a fresh process: argv is checkpoint, output folder, threads
    "copy": """
for shard in sorted(ckpt.glob("*.safetensors")):
    target = out / shard.name
    shutil.copyfile(shard, target)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
""",
    "convert": """
from pyllama_dsv4.convert import convert
convert(ckpt, out / "flash.gguf", n_threads=n_threads)
""",
    "recipe": """
from pyllama_dsv4.convert import write_recipe
write_recipe(ckpt, out / "flash.recipe", n_threads=n_threads)
""",
    "restore": """
from pyllama_dsv4.convert import restore
restore(out / "flash.gguf", out / "flash.recipe", out / "again", n_threads=n_threads)
""",
}
PROLOGUE = """
import json, os, resource, shutil, sys, time
from pathlib import Path
import numpy
ckpt, out, n_threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
start = time.monotonic()
"""
EPILOGUE = """
used = resource.getrusage(resource.RUSAGE_SELF)
s = time.monotonic() - start
print(json.dumps({"s": s, "cpu_s": used.ru_utime + used.ru_stime, "peak_rss": used.ru_maxrss * 1024}))
"""


def run(step: str, ckpt: Path, out: Path, n_threads: int, cold: list[Path]) -> dict[str, float]:
    """Run one step; return seconds, CPU seconds and peak resident bytes."""
    os.sync()
    for path in cold:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + STEPS[step] + EPILOGUE, str(ckpt), str(out), str(n_threads)],
        check=True,
        capture_output=True,
        text=True,
    )
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def hardware() -> dict[str, Any]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "cpu": cpu,
        "n_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the commit of the sources, with a mark if they were changed."""
    here = Path(__file__).parent
    run_git: Callable[..., str] = lambda *args: subprocess.run(  # noqa: E731
        ["git", "-C", str(here), *args], capture_output=True, text=True, check=False
    ).stdout.strip()
    return run_git("rev-parse", "--short=12", "HEAD") + ("+" if run_git("status", "--porcelain") else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_n_threads())
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint in FOLDER/checkpoint")
    args = parser.parse_args()
    n_layer = args.layers
    config = synth.flash_config(
        num_hidden_layers=n_layer,
        num_hash_layers=1,
        # a compressed layer of either kind as soon as there is room for one
        compress_ratios=[(4, 128, 0)[il % 3] for il in range(n_layer)],
    )
    scratch = Path(tempfile.mkdtemp(dir=args.folder, prefix="bench-convert-"))
    try:
        ckpt = args.folder / "checkpoint" if args.keep else scratch / "checkpoint"
        if not (ckpt / "config.json").exists():
            start = time.monotonic()
            synth.write_checkpoint(ckpt, config, seed=1, n_shards=4 * n_layer)
            print(f"made the checkpoint in {time.monotonic() - start:.0f} s", file=sys.stderr)
        print(json.dumps(measure(ckpt, scratch, args.runs, args.threads) | {"n_layer": n_layer}, indent=1))
    finally:
        shutil.rmtree(scratch)


def measure(ckpt: Path, scratch: Path, n_runs: int, n_threads: int) -> dict[str, Any]:
    """Alternate copies and conversions, then make a recipe and restore."""
    shards = sorted(ckpt.glob("*.safetensors"))
    n_bytes = sum(shard.stat().st_size for shard in shards)
    facts: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    machine = hardware()
    out = scratch / "out"
    for i in range(n_runs):
        for step in ("copy", "convert"):
            out.mkdir()
            facts[step].append(run(step, ckpt, out, n_threads, shards))
            print(step, facts[step][-1], file=sys.stderr)
            if not (step == "convert" and i == n_runs - 1):
                shutil.rmtree(out)
    facts["recipe"].append(run("recipe", ckpt, out, n_threads, shards))
    facts["restore"].append(run("restore", ckpt, out, n_threads, [out / "flash.gguf"]))
    sizes = {"gguf": (out / "flash.gguf").stat().st_size, "recipe": (out / "flash.recipe").stat().st_size}
    seconds = {step: statistics.median(run["s"] for run in runs) for step, runs in facts.items()}
    return {
        "bench": "convert",
        "version": __version__,
        "commit": commit(),
        "hardware": machine,
        "n_threads": n_threads,
        "n_bytes_checkpoint": n_bytes,
        "n_bytes_gguf": sizes["gguf"],
        "n_bytes_recipe": sizes["recipe"],
        "runs": facts,
        "gb_per_s": {step: n_bytes / 1e9 / s for step, s in seconds.items()},
        "convert_over_copy": seconds["copy"] / seconds["convert"],
        "peak_rss_bytes": {step: max(run["peak_rss"] for run in runs) for step, runs in facts.items()},
        "peak_rss_self": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
