"""Time and memory against context length, model size and threads; a table, and a plot.

    python bench/growth.py OUT.png [--depths 0 1024 4096 16384 65536] [--folder DIR] [--json OUT.json]

Context: one model is filled to the last depth in steps of 512 tokens; at each depth the last step is timed, 16 tokens
are decoded, and the memory that no file backs is read. Size and threads: models of other depths of layers and widths of
experts, at an empty context. The models are random weights in V4-Flash's shapes (``middle_model.py``) and are
written once into the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyllama_dsv4 import Llama, bench

STEP, N_GEN = 512, 16
CONTEXT_MODEL = (6, 8)  # layers, experts
SIZES = ((4, 8), (6, 8), (8, 16), (12, 32))
HERE = Path(__file__).parent


def model(folder: Path, layers: int, experts: int) -> Path:
    path = folder / f"growth-{layers}-{experts}.gguf"
    if not path.exists():
        size = ["--layers", str(layers), "--experts", str(experts)]
        subprocess.run([sys.executable, str(HERE / "middle_model.py"), str(path), *size], check=True)
    return path


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell how much memory no file backs")


def context(path: Path, depths: list[int], n_threads: int) -> Iterator[dict[str, Any]]:
    """Yield what each depth costs."""
    before = anonymous_bytes()
    with Llama(path, n_ctx=depths[-1] + STEP + N_GEN * len(depths), n_threads=n_threads) as llm:
        ids = [11 + i * 7919 % 1000 for i in range(STEP)]
        filled = 0
        for depth in depths:
            while True:
                start = time.perf_counter()
                llm.eval(ids)
                prefill_s = time.perf_counter() - start
                filled += STEP
                if filled >= depth:
                    break
            rates = []
            for token in ids[:N_GEN]:
                start = time.perf_counter()
                llm.eval([token])
                rates.append(1 / (time.perf_counter() - start))
            filled += N_GEN
            yield {
                "depth": filled,
                "prefill": STEP / prefill_s,
                "decode": statistics.median(rates),
                "anonymous_mb": (anonymous_bytes() - before) / 1e6,
                "cache_mb": llm.plan.host.cache / 1e6,
                "token_mb": llm.token_bytes.total / 1e6,
            }


def sizes(folder: Path, n_threads: list[int]) -> Iterator[dict[str, Any]]:
    for layers, experts in SIZES:
        result = bench.bench(model(folder, layers, experts), n_threads=n_threads, n_gen=N_GEN, repetitions=3)
        for prefill, decode in zip(
            result.measurements[: len(n_threads)], result.measurements[len(n_threads) :], strict=True
        ):
            yield {
                "layers": layers,
                "experts": experts,
                "file_mb": result.plan.n_file_bytes / 1e6,
                "token_mb": decode.token.total / 1e6 if decode.token else 0,
                "threads": decode.n_threads,
                "prefill": prefill.median,
                "decode": decode.median,
                "share": decode.share,
            }


def table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Return rows as Markdown; `columns` gives the format of each cell by its heading."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(columns.values()).format(**row) + " |" for row in rows]
    return "\n".join(lines)


BY_CONTEXT = {
    "tokens in the context": "{depth:,}",
    "prefill of the last 512, tokens/s": "{prefill:.0f}",
    "decode, tokens/s": "{decode:.1f}",
    "MB a token reads": "{token_mb:.0f}",
    "memory beyond the file, MB": "{anonymous_mb:.0f}",
    "of it caches, MB": "{cache_mb:.0f}",
}
BY_SIZE = {
    "layers, experts": "{layers}, {experts}",
    "file, MB": "{file_mb:,.0f}",
    "MB a token reads": "{token_mb:.0f}",
    "threads": "{threads}",
    "prefill, tokens/s": "{prefill:.0f}",
    "decode, tokens/s": "{decode:.1f}",
    "of the bound": "{share:.0%}",
}


def plot(by_context: list[dict[str, Any]], by_size: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (time_of, memory, size) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    depth = [row["depth"] for row in by_context]
    for kind, factor in (("prefill", 1e3), ("decode", 1e3)):
        time_of.plot(depth, [factor / row[kind] for row in by_context], "o-", label=kind)
    time_of.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in the context",
        ylabel="milliseconds a token",
        title="Time",
    )
    time_of.legend()
    memory.plot(depth, [row["anonymous_mb"] for row in by_context], "o-", label="beyond the file")
    memory.plot(depth, [row["cache_mb"] for row in by_context], "--", label="caches for the whole context")
    memory.set(xscale="log", xlabel="tokens in the context", ylabel="MB", title="Memory", ylim=0)
    memory.legend()
    for n in sorted({row["threads"] for row in by_size}):
        rows = [row for row in by_size if row["threads"] == n]
        size.plot(
            [row["token_mb"] for row in rows], [1e3 / row["decode"] for row in rows], "o-",
            label=f"{n} thread{'s' * (n > 1)}",
        )  # fmt: skip
    size.set(
        xlabel="MB a token reads", ylabel="milliseconds a token", title="Decode and size", xlim=0, ylim=0
    )
    size.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the plot")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1024, 4096, 16384, 65536])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(), help="of the models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(a >= b for a, b in pairwise(options.depths)):
        parser.error("--depths rise")
    by_context = list(context(model(options.folder, *CONTEXT_MODEL), options.depths, max(options.threads)))
    by_size = list(sizes(options.folder, options.threads))
    plot(by_context, by_size, options.out)
    if options.json:
        options.json.write_text(json.dumps({"context": by_context, "size": by_size}, indent=1))
    print(table(BY_CONTEXT, by_context), table(BY_SIZE, by_size), sep="\n\n")


if __name__ == "__main__":
    main()
