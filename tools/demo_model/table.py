"""Scores the demonstration model at all settings and writes the table into the documentation.

Settings: levels of activation rounding, types of the KV cache, and the stock conversion, whose FP8 weights became
Q8_0. Scores are kept in a JSON file as they come, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pyllama_dsv4 import Llama
from pyllama_dsv4.demo import TRAINED
from pyllama_dsv4.translate import translate

from .score_demo import GOALS, N_CTX, score_model

__all__ = ["table_lines"]

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- scores -->\n", "<!-- /scores -->\n"
# column -> file, level, type of the cache
SETTINGS: dict[str, tuple[str, str, str]] = {
    "none, F16": ("native", "none", "f16"),
    "none, Q8_0": ("native", "none", "q8_0"),
    "cache, F16": ("native", "cache", "f16"),
    "cache, Q8_0": ("native", "cache", "q8_0"),
    "full, F16": ("native", "full", "f16"),
    "full, Q8_0": ("native", "full", "q8_0"),
    "stock, F16": ("stock", "none", "f16"),
    "stock, Q8_0": ("stock", "none", "q8_0"),
}

Scores = dict[str, dict[str, list[int]]]  # column -> task -> right answers and questions


def table_lines(scores: Scores) -> list[str]:
    """Return the table in Markdown; what was not measured stays empty."""
    columns = [column for column in SETTINGS if column in scores]
    lines = [f"| Task | Goal | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for task, goal in GOALS.items():
        cells = []
        for column in columns:
            right, n = scores[column].get(task, (0, 0))
            cells.append(f"{right / n:.1%}" if n else "")
        lines.append(f"| {task} | {goal:.0%} | {' | '.join(cells)} |")
    return lines


def _score(path: Path, column: str, n: int, n_threads: int, scores: Scores, results: Path) -> None:
    _, level, cache_type = SETTINGS[column]
    done = scores.setdefault(column, {})
    left = [task for task in GOALS if done.get(task, [0, 0])[1] != n]
    if not left:
        return
    options: dict[str, Any] = {"act_quant": level, "cache_type": cache_type}
    with Llama(path, n_ctx=N_CTX, n_threads=n_threads, warmup=False, **options) as llm:
        for task, n_right, _ in score_model(llm, n, left):
            done[task] = [n_right, n]
            print(f"{column:12} {task:16} {n_right / n:7.1%}", flush=True)
            results.write_text(json.dumps(scores, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score the packaged model at all settings, for the documentation."
    )
    parser.add_argument("results", type=Path, help="JSON file of the scores; continued if it exists")
    parser.add_argument("-n", type=int, default=200, help="questions per task")
    parser.add_argument("--model", type=Path, default=TRAINED)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "demo-model.md")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    scores: Scores = json.loads(args.results.read_text()) if args.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        stock = Path(folder) / "stock.gguf"
        translate(args.model, stock, to="upstream", dense="q8_0")
        for column, (kind, _, _) in SETTINGS.items():
            _score(
                args.model if kind == "native" else stock, column, args.n, args.threads, scores, args.results
            )
    text = args.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    note = f"\n{args.n} questions per task, seed fixed; a share of 95 % has a standard error of {_error(args.n):.1%}.\n"
    block = "\n".join(table_lines(scores)) + "\n" + note
    args.page.write_text(before + BEGIN + block + END + after, encoding="utf-8")


def _error(n: int) -> float:
    return float((0.95 * 0.05 / n) ** 0.5)


if __name__ == "__main__":
    main()
