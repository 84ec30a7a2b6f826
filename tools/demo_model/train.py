"""Trains the demonstration model; stops and goes on at any time with the same result.

Owns the curriculum, the learning rate, the loss and the log. A step's data depend on the seed, the step and the tokens
done only, and nothing else is random, so parameters, optimizer and these numbers are the whole state.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pyllama_dsv4.tensors import HParams

from .config import demo_config, first_values, parameter_specs
from .data import ALL, FIRST, SHORT, Formatter, Mixture, batch, conversation
from .export import export_gguf
from .model import Model
from .optimizer import Optimizer
from .tokenizer import texts_of, write_vocabulary

__all__ = ["Phase", "Recipe", "Run", "learning_rate", "phase_of"]

BIAS_STEP = 1e-3  # of the routing bias towards equal loads, per step
COLUMNS = ("step", "tokens", "length", "loss", "index_loss", "index_hits", "rate", "wall_s", "cpu_s")


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum.

    Attributes:
        end: Share of all tokens at which it ends.
        lengths: Sequence lengths, and how often each is drawn.
        mixture: What the conversations are made of.
        batch: Tokens of a step, as a share of the recipe's.
    """

    end: float
    lengths: dict[int, int]
    mixture: Mixture = ALL
    batch: float = 1.0


# sums and small talk come first, in short steps: what somebody asks first works early
PHASES = (
    Phase(0.04, {128: 1}, FIRST, 0.5),
    Phase(0.10, {128: 1}, SHORT, 0.5),
    Phase(0.45, {128: 1, 256: 1}),
    Phase(0.70, {128: 2, 256: 2, 512: 1, 1024: 1}),
    Phase(1.00, {128: 1, 256: 1, 512: 1, 1024: 1, 2048: 1, 4608: 2}),
)
STOP = "STOP"  # a file of this name in the run's folder ends the training


@dataclass(frozen=True)
class Recipe:
    """What fixes a run, besides the threads.

    Attributes:
        seed: Of parameters, data and lengths.
        n_tokens: Of the whole run: the curriculum and the learning rate follow it.
        n_batch: Tokens of a step; a longer sequence is a step of its own.
        rate: Largest learning rate.
        n_warmup: Steps until it is reached.
        decay: Share of the run, at its end, in which it falls to zero.
        level: Rounding of activations in the loop.
    """

    seed: int = 4
    n_tokens: int = 24_000_000
    n_batch: int = 4096
    rate: float = 4e-3
    n_warmup: int = 100
    decay: float = 0.4
    level: str = "full"


def phase_of(recipe: Recipe, n_done: int) -> Phase:
    """Return the phase of a step that begins after `n_done` tokens."""
    progress = n_done / recipe.n_tokens
    return next((phase for phase in PHASES if progress < phase.end), PHASES[-1])


def learning_rate(recipe: Recipe, step: int, n_done: int) -> float:
    """Return the rate of a step: a rise, a plateau, a fall to zero."""
    left = max(1 - n_done / recipe.n_tokens, 0)
    return recipe.rate * min((step + 1) / recipe.n_warmup, left / recipe.decay, 1)


class Run:
    """A training run in a folder: vocabulary, ``state.pt``, ``log.csv``.

    Args:
        folder: Continued if it holds a state, else begun.
        recipe: Must be the one it was begun with, but for the number of tokens: another one moves the end, and with
            it the curriculum and the fall of the learning rate. The state keeps such changes.
        config: ``config.json``; by default the demonstration model's.

    Attributes:
        totals: The numbers of tokens that were aimed at, each with the step from which on.

    Raises:
        ValueError: The folder's run was begun with another recipe or configuration.
    """

    def __init__(self, folder: Path, recipe: Recipe, config: dict[str, Any] | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        self.config = demo_config() if config is None else config
        self.hp = HParams.from_hf_config(self.config)
        self.params = first_values(self.hp, recipe.seed)
        self.step = self.n_done = 0
        self.totals = [(0, recipe.n_tokens)]
        for name, w in self.params.items():
            if w.dtype == torch.float32 and not name.endswith("gate.bias"):
                w.requires_grad_()
        self.optimizer = Optimizer(self.params, parameter_specs(self.hp))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()
        else:
            rng = random.Random(f"{recipe.seed} vocabulary")
            talks = [conversation(rng, "train", 1000) for _ in range(1000)]
            write_vocabulary(folder, texts_of(talks), self.hp.n_vocab)
            export_gguf(folder, self.config, self.params, folder / "untrained.gguf")
        self.formatter = Formatter(folder / "untrained.gguf")

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        wanted = vars(self.recipe)
        if state["recipe"] | {"n_tokens": 0} != wanted | {"n_tokens": 0} or state["config"] != self.config:
            raise ValueError(f"{self.folder} was begun with {state['recipe']}, not {wanted}")
        self.step, self.n_done = state["step"], state["n_done"]
        self.totals = [(step, n) for step, n in state["totals"]]
        if self.totals[-1][1] != self.recipe.n_tokens:
            self.totals.append((self.step, self.recipe.n_tokens))
        with torch.no_grad():
            for name, w in self.params.items():
                w.copy_(state["params"][name])
        self.optimizer.load(state["optimizer"])

    def save(self) -> None:
        """Write the state in one piece: a kill leaves the old or the new one."""
        state = {
            "recipe": vars(self.recipe),
            "config": self.config,
            "step": self.step,
            "n_done": self.n_done,
            "totals": self.totals,
            "params": {name: w.detach() for name, w in self.params.items()},
            "optimizer": self.optimizer.state(),
        }
        torch.save(state, self.folder / "state.new")
        os.replace(self.folder / "state.new", self.folder / "state.pt")

    @property
    def is_done(self) -> bool:
        return self.n_done >= self.recipe.n_tokens

    def train_step(self) -> dict[str, Any]:
        """Do one step; return a row of the log."""
        wall, cpu = time.perf_counter(), time.process_time()
        recipe = self.recipe
        phase = phase_of(recipe, self.n_done)
        lengths, draws = list(phase.lengths), list(phase.lengths.values())
        length = random.Random(f"{recipe.seed} length {self.step}").choices(lengths, draws)[0]
        n_rows = max(int(recipe.n_batch * phase.batch) // length, 1)
        rate = learning_rate(recipe, self.step, self.n_done)
        ids, mask = (
            torch.from_numpy(a)
            for a in batch(self.formatter, recipe.seed, self.step, n_rows, length, phase.mixture)
        )
        wanted = mask[:, 1:]
        out = Model(self.hp, self.params, recipe.level).forward(ids[:, :-1], wanted)
        loss = functional.cross_entropy(out.logits, ids[:, 1:][wanted])
        torch.autograd.backward(loss + out.index_loss)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}; the saved state is whole"
            )
        self.optimizer.step(rate)
        with torch.no_grad():
            for layer, load in out.loads.items():
                bias = self.params[f"layers.{layer}.ffn.gate.bias"]
                bias.add_(torch.sign(1 / self.hp.n_expert - load), alpha=BIAS_STEP)
        self.step += 1
        self.n_done += n_rows * length
        hits = list(out.index_hits.values())
        return {
            "step": self.step,
            "tokens": self.n_done,
            "length": length,
            "loss": round(loss.item(), 5),
            "index_loss": round(out.index_loss.item(), 5),
            "index_hits": round(sum(hits) / len(hits), 4) if hits else 1.0,
            "rate": round(rate, 7),
            "wall_s": round(time.perf_counter() - wall, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
        }

    def train(self, *, seconds: float, save_minutes: float) -> None:
        """Train until the run is done, the time is over or a file STOP appears; save now and then and at the end."""
        end = time.monotonic() + seconds
        stop = self.folder / STOP
        path = self.folder / "log.csv"
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        with path.open("w", newline="") as log:
            writer = csv.DictWriter(log, COLUMNS)
            writer.writeheader()
            # steps after the last save are done again
            writer.writerows(row for row in rows if int(row["step"]) <= self.step)
            next_save = time.monotonic() + save_minutes * 60
            while not self.is_done and time.monotonic() < end and not stop.exists():
                row = self.train_step()
                writer.writerow(row)
                if self.step % 10 == 0:
                    print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                if time.monotonic() >= next_save:
                    log.flush()
                    self.save()
                    next_save = time.monotonic() + save_minutes * 60
        self.save()


def _seconds_until(text: str) -> float:
    """Return the time from now to the next HH:MM."""
    now = datetime.datetime.now()
    at = datetime.datetime.combine(now.date(), datetime.time.fromisoformat(text))
    return ((at - now) % datetime.timedelta(days=1)).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration model; continues a folder's run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--hours", type=float, default=24.0, help="stop after so long")
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time; the same command continues")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=Recipe.n_tokens, help="of the whole run")
    parser.add_argument("--level", default=Recipe.level)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.run, Recipe(n_tokens=args.tokens, level=args.level))
    seconds = args.hours * 3600
    if args.until is not None:
        seconds = min(seconds, _seconds_until(args.until))
    run.train(seconds=seconds, save_minutes=args.save_minutes)
    print(f"{run.step} steps, {run.n_done} of {run.recipe.n_tokens} tokens")


if __name__ == "__main__":
    main()
