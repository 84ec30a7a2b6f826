"""Puts a trained model into the package: the file, its exam, and the picture of its training in the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyllama_dsv4.demo import TRAINED

from .curve import draw_curve
from .exam import write_exam
from .export import export_gguf

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a run's model into the package in this source tree.")
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    torch.set_num_threads(1)
    state = torch.load(run / "state.pt", weights_only=True)
    path = ROOT / "pyllama_dsv4" / "data" / TRAINED.name
    path.parent.mkdir(exist_ok=True)
    export_gguf(run, state["config"], state["params"], path)
    n = write_exam(state["config"], state["params"], path, path.with_suffix(".json"))
    draw_curve(run / "log.csv", ROOT / "docs" / "demo-model.png")
    print(f"{path}: {path.stat().st_size} bytes, after {state['step']} steps; {n} questions in the exam")


if __name__ == "__main__":
    main()
