"""Decode with memory for a part of the file: announced experts against plain mapping, in turns.

    python bench/paging.py FILE.gguf --memory 0.8e9 [--gen 24] [--rounds 5] [--threads N]

Each run is a process of its own in a control group whose memory, page cache included, is limited (needs the right to
make one); the file is dropped from the page cache before. After a warm-up of as many tokens, decode is timed. Prints
every run, and the ratio of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN = """
import json, resource, sys, time
from pyllama_dsv4 import Llama
path, pages, n_gen, n_threads = sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]), int(sys.argv[4])
with Llama(path, n_ctx=512, n_threads=n_threads, warmup=False, page_experts=pages) as llm:
    ids = [11 + i * 7919 % 1000 for i in range(2 * n_gen)]
    for token in ids[:n_gen]:
        llm.eval([token])
    before, io = llm.paging, resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    start = time.perf_counter()
    for token in ids[n_gen:]:
        llm.eval([token])
    seconds = time.perf_counter() - start
    read = (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - io) * 512
    found = llm.paging.since(before)
    print(json.dumps({"tokens_per_s": n_gen / seconds, "read_per_token": read / n_gen, "hit_rate": found.hit_rate,
        "experts_per_token": found.n_bytes / n_gen}))
"""


@contextmanager
def limited(n_bytes: int) -> Iterator[Path]:
    """A control group of either version; yields its folder."""
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = (
        Path("/sys/fs/cgroup" if version_2 else "/sys/fs/cgroup/memory") / f"pyllama-dsv4-bench-{os.getpid()}"
    )
    group.mkdir()
    try:
        (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(n_bytes))
        yield group
    finally:
        group.rmdir()


def drop(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument(
        "--memory", type=float, required=True, help="bytes for the whole process, page cache included"
    )
    parser.add_argument("--gen", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    with limited(int(options.memory)) as group:
        for _ in range(options.rounds):
            for pages in random.sample(["0", "1"], 2):
                drop(options.file)
                command = [
                    sys.executable,
                    "-c",
                    RUN,
                    options.file,
                    pages,
                    str(options.gen),
                    str(options.threads),
                ]
                run = subprocess.run(
                    ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                results[pages].append(json.loads(run.stdout))
                print("announced" if pages == "1" else "plain    ", run.stdout.strip(), flush=True)
    ratios = sorted(
        a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(results["1"], results["0"], strict=True)
    )
    print(f"announced / plain: median {statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
