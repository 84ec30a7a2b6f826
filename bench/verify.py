"""Measure `verify` on layers of V4-Flash's true shapes: python bench/verify.py [--layers N] [--folder F].

Makes a random checkpoint with all 256 experts per layer, converts it, and prints one JSON object: speed of a plain read
and a plain copy of the file, of verify alone, with sums and with the checkpoint, and the peak of resident memory, with
what the numbers depend on. Needs some 3.5 GB of disk per layer, three times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIECE = 4 << 20

# in a process of its own, so that the peak is that of the verification
RUN = """
import json, re, sys, time
from pyllama_dsv4.verify import verify
path, options = sys.argv[1], json.loads(sys.argv[2])
start = time.monotonic()
report = verify(path, **options)
seconds = time.monotonic() - start
print(json.dumps({
    "ok": report.ok, "seconds": seconds, "gb_per_s": report.n_bytes / 1e9 / seconds,
    # getrusage would count the process this one was forked from
    "peak_rss_mib": int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024,
}))
"""


def read_through(path: Path, target: Path | None = None) -> float:
    """Return the speed in GB/s of reading a file, and of writing it again if there is a target."""
    start_s = time.monotonic()
    n = 0
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as source:
        sink = None if target is None else target.open("wb", buffering=0)
        while n_read := source.readinto(buffer):
            n += n_read
            if sink is not None:
                sink.write(memoryview(buffer)[:n_read])
        if sink is not None:
            os.fsync(sink.fileno())
            sink.close()
    return n / 1e9 / (time.monotonic() - start_s)


def run(path: Path, **options: object) -> Any:
    """Verify in a process of its own."""
    text = json.dumps(
        {key: value if isinstance(value, int) else str(value) for key, value in options.items()}
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), text], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put the files; by default a temporary folder")
    args = parser.parse_args()
    from pyllama_dsv4 import synth
    from pyllama_dsv4.convert import convert

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        config = synth.flash_config(
            num_hidden_layers=args.layers,
            compress_ratios=[4 if il % 2 == 0 else 128 for il in range(args.layers)] + [0],
            num_hash_layers=1,
            vocab_size=4096,
        )
        synth.write_checkpoint(folder / "checkpoint", config, seed=0, n_shards=max(2, args.layers))
        path = convert(folder / "checkpoint", folder / "x.gguf").path
        result = {
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
            ).stdout.strip(),
            "machine": platform.machine(),
            "n_cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "n_layers": args.layers,
            "n_bytes": path.stat().st_size,
            "plain_read_gb_per_s": read_through(path),
            "plain_copy_gb_per_s": read_through(path, folder / "copy.gguf"),
        }
        (folder / "copy.gguf").unlink()
        result["verify"] = run(path)
        result["verify_manifest"] = run(path, manifest=folder / "sums.json")
        result["verify_against"] = run(path, against=folder / "checkpoint")
        result["verify_1_thread"] = run(path, n_threads=1)
        shutil.rmtree(folder / "checkpoint")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
