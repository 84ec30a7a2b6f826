"""Measures training steps: tokens per second by the clock, and CPU seconds, which a busy machine changes less."""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional

from pyllama_dsv4.tensors import HParams

from .config import demo_config, first_values, parameter_specs
from .model import LEVELS, Model
from .optimizer import Optimizer

N_BATCH = 4096
SHARE_LEARNED = 0.4  # of the tokens, as in the data


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps on random tokens.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--level", choices=LEVELS, default="full")
    parser.add_argument("--length", type=int, action="append")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hp = HParams.from_hf_config(demo_config())
    params = first_values(hp, 0)
    for name, w in params.items():
        if w.dtype == torch.float32 and not name.endswith("gate.bias"):
            w.requires_grad_()
    model, optimizer = Model(hp, params, args.level), Optimizer(params, parameter_specs(hp))
    for length in args.length or (256, 1024, 4096):
        tokens = torch.randint(0, hp.n_vocab, (N_BATCH // length, length))
        wanted = torch.rand(tokens.shape) < SHARE_LEARNED
        for step in range(args.steps + 1):
            if step == 1:  # the first one warms up
                wall, cpu = time.perf_counter(), time.process_time()
            out = model.forward(tokens, wanted)
            torch.autograd.backward(functional.cross_entropy(out.logits, tokens[wanted]) + out.index_loss)
            optimizer.step(1e-3)
        n = args.steps * tokens.numel()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(
            f"length {length} level {args.level} threads {args.threads}: {n / wall:.0f} tokens/s, "
            f"{cpu / n * 1000:.3f} CPU s per 1000 tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
