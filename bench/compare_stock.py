"""Compare this package with the unpatched pin on the same weights: native file here, Q8_0 with MXFP4 experts there.

    python bench/compare_stock.py FILE.gguf [--threads N] [--prompt 512] [--gen 32] [--rounds 9]

FILE is a native file, as bench/middle_model.py writes. Its stock conversion is written beside it once, and the
unpatched pin is built once in build/stock. Both engines stay loaded and take turns in random order. Ratios are medians
of the pairs, with their quartiles: of time on the wall, which says something on a quiet machine only, and of CPU time.
Activations are evaluated as each engine does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "buildutils"))

import vendor  # noqa: E402


def build_stock(program: str = "stock-runner") -> Path:
    """Build the unpatched pin and a program of bench/stock, and return the program."""
    build = ROOT / "build" / "stock"
    configure = ["cmake", "-S", str(ROOT / "bench" / "stock"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    configure.append(f"-DLLAMA_CPP={vendor.pristine()}")
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    if shutil.which("ccache"):
        configure += ["-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
    # the pin would take the commit of the folder around it
    environment = {**os.environ, "GIT_DIR": str(build / "no-git")}
    n_jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    for command in (configure, ["cmake", "--build", str(build), "--target", program, "-j", n_jobs]):
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return build / program


def convert_for_stock(file: Path) -> Path:
    """Write the stock conversion of a native file beside it, once, and return it."""
    stock_file = file.with_name(file.stem + ".stock.gguf")
    if not stock_file.exists():
        command = [sys.executable, "-m", "pyllama_dsv4", "translate", "--to", "upstream", "--dense", "q8_0"]
        subprocess.run([*command, str(file), str(stock_file)], check=True, stdout=sys.stderr)
    return stock_file


class Stock:
    """The unpatched pin in a process of its own."""

    def __init__(self, program: Path, model: Path, n_threads: int, n_ctx: int, n_batch: int) -> None:
        self._process = subprocess.Popen(
            [str(program), str(model), str(n_threads), str(n_ctx), str(n_batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_s = float(self._answer()[1])

    def _answer(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the unpatched pin ended with code {self._process.wait()}; its errors are above")
        return line.split()

    def run(self, kind: str, n_tokens: int) -> tuple[float, float]:
        """Do the work and return seconds on the wall and of CPU time."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {n_tokens}\n")
        self._process.stdin.flush()
        wall, cpu = self._answer()
        return float(wall), float(cpu)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """This package in this process."""

    def __init__(self, model: Path, n_threads: int, n_ctx: int, n_batch: int) -> None:
        from pyllama_dsv4.context import Context
        from pyllama_dsv4.model import Model

        start_s = time.perf_counter()
        self._model = Model(model, n_gpu_layers=0, use_mmap=True, use_mlock=False, on_progress=None)
        self._context = Context(
            self._model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, n_threads=n_threads, cache_type="f16"
        )
        self.load_s = time.perf_counter() - start_s
        self._n_batch = n_batch

    def run(self, kind: str, n_tokens: int) -> tuple[float, float]:
        """Do the work and return seconds on the wall and of CPU time."""
        self._context.clear()
        state, ids = 1, []
        for _ in range(n_tokens):
            state = (state * 1664525 + 1013904223) % 2**32
            ids.append((state >> 8) % self._model.n_vocab)
        step = self._n_batch if kind == "prefill" else 1
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        for i in range(0, n_tokens, step):
            self._context.decode(ids[i : i + step])
        return time.perf_counter() - start_s, time.process_time() - cpu_start_s

    def close(self) -> None:
        self._context.close()
        self._model.close()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, nargs="*", default=[512])
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="the numbers of every round")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the spread is part of the answer")

    stock_file = convert_for_stock(args.file)
    program = build_stock()

    n_ctx = max(*args.prompt, args.gen, 1) + 1
    engines: dict[str, Stock | Ours] = {
        "stock": Stock(program, stock_file, args.threads, n_ctx, 512),
        "ours": Ours(args.file, args.threads, n_ctx, 512),
    }
    works = [*(("prefill", n) for n in args.prompt), ("decode", args.gen)]
    times: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for kind, n in works:  # untimed: pages of the files and the caches are warm afterwards
        for engine in engines.values():
            engine.run(kind, min(n, 16))
    order = random.Random(1)
    for _ in range(args.rounds):
        for kind, n in works:
            for name in order.sample(sorted(engines), 2):
                times.setdefault((kind, n, name), []).append(engines[name].run(kind, n))
    for engine in engines.values():
        engine.close()

    if args.json:
        rows = [{"kind": k, "n_tokens": n, "engine": e, "wall_cpu_s": t} for (k, n, e), t in times.items()]
        print(json.dumps({"threads": args.threads, "rounds": args.rounds, "times": rows}, indent=2))
        return
    print(f"{args.threads} threads, {args.rounds} rounds; load: ", end="")
    print(", ".join(f"{name} {engine.load_s:.2f} s" for name, engine in engines.items()))
    print(f"{'work':13} {'clock':5} {'stock t/s':>10} {'ours t/s':>10} {'ratio':>7}  quartiles")
    for kind, n in works:
        for i, clock in enumerate(("wall", "CPU")):
            stock, ours = ([t[i] for t in times[kind, n, name]] for name in ("stock", "ours"))
            low, middle, high = quartiles([a / b for a, b in zip(stock, ours, strict=True)])
            rates = (n / statistics.median(stock), n / statistics.median(ours))
            label = f"{kind} {n}" if i == 0 else ""
            print(
                f"{label:13} {clock:5} {rates[0]:10.2f} {rates[1]:10.2f} {middle:6.2f}x  {low:.2f}..{high:.2f}"
            )


if __name__ == "__main__":
    main()
