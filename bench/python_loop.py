"""Microseconds per token that the Python loop adds to the engine: python bench/python_loop.py [--tokens N].

Compares `Llama.generate`'s loop with a bare loop over the same C functions, on a tiny random model, in CPU time of one
thread. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pyllama_dsv4 import Llama, synth
from pyllama_dsv4._native import build_info, ffi, lib
from pyllama_dsv4.convert import convert
from pyllama_dsv4.generate import Request
from pyllama_dsv4.sampler import Sampler, SamplingParams

N_PROMPT = 16


def bare_s(llm: Llama, ids: list[int], n: int) -> float:
    llm.reset()
    llm.eval(ids)
    sampler = Sampler(SamplingParams(temperature=0), llm._model, llm.n_ctx)
    token = ffi.new("int32_t[1]", [sampler.sample(llm.logits)])
    row = np.empty(llm.n_vocab, np.float32)
    out, context = ffi.from_buffer("float[]", row), llm._context.pointer
    start_s = time.process_time()
    for i in range(n):
        lib.pyl_decode(context, token, 1, len(ids) + i, 0, lib.PYL_OUTPUTS_LAST)
        lib.pyl_logits_copy(context, -1, out, llm.n_vocab)
        token[0] = lib.pyl_sampler_sample(sampler._pointer, out)
    elapsed_s = time.process_time() - start_s
    sampler.close()
    return elapsed_s


def loop_s(llm: Llama, ids: list[int], n: int) -> float:
    llm.reset()
    pieces = llm._pieces(ids, llm._params({"temperature": 0}), Request(max_tokens=n + 1))
    next(pieces)
    start_s = time.process_time()
    for _ in pieces:
        pass
    return time.process_time() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        synth.write_checkpoint(Path(folder) / "checkpoint", synth.tiny_config(), seed=1)
        convert(Path(folder) / "checkpoint", Path(folder) / "model.gguf")
        ids = [int(i) for i in np.random.default_rng(0).integers(0, 320, N_PROMPT)]
        with Llama(Path(folder) / "model.gguf", n_ctx=1024, n_threads=1, warmup=False) as llm:
            for measure in (bare_s, loop_s):
                measure(llm, ids, args.tokens)
            bare, loop = [], []
            for _ in range(args.repeats):
                bare.append(bare_s(llm, ids, args.tokens) / args.tokens * 1e6)
                loop.append(loop_s(llm, ids, args.tokens) / args.tokens * 1e6)
            print(
                json.dumps(
                    {
                        "bare_us_per_token": round(statistics.median(bare), 1),
                        "generate_us_per_token": round(statistics.median(loop), 1),
                        "added_us_per_token": round(statistics.median(loop) - statistics.median(bare), 1),
                        "tokens": args.tokens,
                        "build": build_info(),
                    }
                )
            )


if __name__ == "__main__":
    main()
