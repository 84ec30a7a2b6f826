"""Draws the loss curve of a run's ``log.csv`` as a PNG. Needs matplotlib."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

__all__ = ["draw_curve"]


def draw_curve(log: Path, picture: Path) -> None:
    """Draw loss by tokens, one colour for each class of lengths, and the indexer's loss below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(log.open()))
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for label, low, high in (
        ("up to 256 tokens", 0, 256),
        ("512, 1024", 257, 1024),
        ("longer", 1025, 1 << 30),
    ):
        some = [row for row in rows if low <= int(row["length"]) <= high]
        tokens = [int(row["tokens"]) / 1e6 for row in some]
        above.plot(tokens, [float(row["loss"]) for row in some], ".", markersize=2, label=label)
        below.plot(tokens, [float(row["index_loss"]) for row in some], ".", markersize=2)
    above.set_yscale("log")
    above.set_ylabel("loss of answers, nats")
    above.legend()
    below.set_ylabel("indexer's loss, nats")
    below.set_xlabel("million tokens")
    figure.savefig(picture, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw_curve(args.run / "log.csv", args.picture)


if __name__ == "__main__":
    main()
