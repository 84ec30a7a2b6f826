"""How fast a model is here: prefill and decode at several depths and thread counts, beside what memory would allow.

Owns the order of measurements (interleaved, so that a machine that slows down for a while slows all alike), their
statistics, and the roofline: bytes a token reads (``plan``'s count) over the bandwidth measured in the same run. For
the trained demo model also the quality: how likely right answers are at the settings measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import demo
from ._native import lib
from .context import Context
from .errors import ArgumentError
from .machine import peak_bytes, read_bandwidth
from .model import Model, check_model
from .placement import Placement
from .plan import Plan, TokenBytes, plan_model

__all__ = ["Bench", "Measurement", "bench"]


Kind = Literal["prefill", "decode"]


@dataclass
class Measurement:
    """Tokens per second of one kind of work.

    Attributes:
        kind: ``prefill`` or ``decode``.
        n_tokens: Tokens per repetition.
        depth: Tokens in the cache before.
        n_threads: CPU threads.
        rates: Tokens per second of each repetition.
        bound: Tokens per second at which the measured bandwidth would be used up; None for prefill, which
            arithmetic limits.
        token: Bytes that one decoded token reads at this depth; None for prefill.
    """

    kind: Kind
    n_tokens: int
    depth: int
    n_threads: int
    rates: list[float] = field(default_factory=list)
    bound: float | None = None
    token: TokenBytes | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of weights and cache read per second while decoding."""
        return None if self.token is None else self.median * self.token.total

    @property
    def share(self) -> float | None:
        """Share of the measured bandwidth that decoding used."""
        return None if self.bound is None else self.median / self.bound


@dataclass
class Bench:
    """The result of ``bench``.

    Attributes:
        path: The model file.
        load_s: Seconds from opening the file to a context that can evaluate.
        first_token_s: Median seconds of the first prefill and one decoded token, the time to the first token.
        bandwidth: Bytes per second that all CPUs together read here: the median of measurements before, between and
            after the repetitions.
        peak_bytes: Largest resident memory of the process, mapped pages included; None when unknown.
        measurements: In the order of their kinds, depths and threads.
        plan: Memory of the load.
        quality: For the trained demo model, mean negative log-likelihood of answers, in nats per token: at these
            settings, and at this level in the program that trained it.
    """

    path: str
    load_s: float
    first_token_s: float
    bandwidth: float
    peak_bytes: int | None
    measurements: list[Measurement]
    plan: Plan
    quality: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result in JSON types."""
        return {
            "path": self.path,
            "load_s": self.load_s,
            "first_token_s": self.first_token_s,
            "bandwidth": self.bandwidth,
            "peak_bytes": self.peak_bytes,
            "quality": None
            if self.quality is None
            else {"nll": self.quality[0], "nll_trained": self.quality[1]},
            "measurements": [
                {
                    "kind": m.kind,
                    "n_tokens": m.n_tokens,
                    "depth": m.depth,
                    "n_threads": m.n_threads,
                    "rates": m.rates,
                    "median": m.median,
                    "bound": m.bound,
                    "share": m.share,
                    "bytes_per_token": None
                    if m.token is None
                    else {
                        "dense": m.token.dense,
                        "head": m.token.head,
                        "experts": m.token.experts,
                        "cache": m.token.cache,
                        "total": m.token.total,
                    },
                }
                for m in self.measurements
            ],
        }


def bench(
    path: str | os.PathLike[str],
    *,
    n_prompt: Sequence[int] = (512,),
    n_gen: int = 32,
    depths: Sequence[int] = (0,),
    n_threads: Sequence[int] | None = None,
    n_batch: int = 512,
    repetitions: int = 5,
    cache_type: str = "f16",
    act_quant: Literal["none", "cache", "full"] = "cache",
    flash_attn: Literal["auto", "on", "off"] = "auto",
    n_gpu_layers: int = 0,
    n_cpu_moe: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> Bench:
    """Measure a model.

    Args:
        path: A GGUF file.
        n_prompt: Tokens of the prefills.
        n_gen: Tokens decoded one by one per repetition.
        depths: Tokens in the cache before each prefill and decode.
        n_threads: Thread counts; None takes all physical cores.
        n_batch: Tokens evaluated at once.
        repetitions: Of each measurement, in turns.
        cache_type, act_quant, flash_attn: As for ``Llama``.
        n_gpu_layers, n_cpu_moe: As for ``Llama``, but nothing goes to a GPU by itself; with GPUs there is no bound,
            because only the host's memory is measured.
        on_progress: Called with the measurements done and their number.

    Raises:
        ArgumentError: A number is not positive.
        Errors of ``Llama`` for the file.
    """
    threads = list(n_threads) if n_threads else [int(lib.pyl_n_cores())]
    for name, values in (
        ("n_prompt", n_prompt),
        ("n_gen", [n_gen]),
        ("n_threads", threads),
        ("repetitions", [repetitions]),
    ):
        if any(value < 1 for value in values):
            raise ArgumentError("measuring a model", key=name, found=min(values), expected="at least 1")
    if any(depth < 0 for depth in depths):
        raise ArgumentError("measuring a model", key="depths", found=min(depths), expected="0 or more")
    longest = max((*n_prompt, n_gen, 1))
    n_ctx = max(depths) + longest + 1
    report = check_model(path)
    options: dict[str, Any] = {"cache_type": cache_type, "act_quant": act_quant, "flash_attn": flash_attn}
    plan = plan_model(report, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, **options)
    plan.check()

    start_s = time.perf_counter()
    placement = Placement(n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe)
    placement.check_devices()
    model = Model(path, placement=placement)
    try:
        context = Context(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=max(threads),
            **options,
        )
        load_s = time.perf_counter() - start_s
        kinds: tuple[tuple[Kind, Sequence[int]], ...] = (("prefill", n_prompt), ("decode", (n_gen,)))
        measurements = [
            Measurement(kind, n, depth, n_thread)
            for kind, lengths in kinds
            for n in lengths
            for depth in depths
            for n_thread in threads
        ]
        ids = np.random.default_rng(0).integers(0, model.n_vocab, n_ctx).tolist()
        bandwidths = [read_bandwidth()]
        first_s: list[float] = []
        states: dict[int, bytes] = {}
        for depth in depths:
            context.clear()
            if depth:
                context.decode(ids[:depth])
                states[depth] = context.save_state()
        # untimed: pages of the file and the caches of the processor are warm afterwards
        context.clear()
        context.decode(ids[: min(longest, 16)])
        done = 0
        for _ in range(repetitions):
            for measurement in measurements:
                seconds = _measure(context, measurement, ids, states)
                measurement.rates.append(measurement.n_tokens / seconds)
                if measurement.kind == "prefill" and measurement.depth == 0:
                    start_s = time.perf_counter()
                    context.decode(ids[:1])
                    first_s.append(seconds + time.perf_counter() - start_s)
                done += 1
                if on_progress is not None:
                    on_progress(done, repetitions * len(measurements))
            bandwidths.append(read_bandwidth())
        context.close()
    finally:
        model.close()
    quality = _quality(path, max(threads), **options)
    bandwidth = statistics.median(bandwidths)
    for measurement in measurements:
        if measurement.kind == "decode":
            # the caches that attention looks at grow with the tokens in them
            seen = plan_model(report, n_ctx=measurement.depth + n_gen, n_batch=n_batch, **options).token
            measurement.token = seen
            measurement.bound = bandwidth / seen.total if n_gpu_layers == 0 else None
    return Bench(
        path=os.fspath(path),
        load_s=load_s,
        first_token_s=statistics.median(first_s) if first_s else float("nan"),
        bandwidth=bandwidth,
        peak_bytes=peak_bytes(),
        measurements=measurements,
        plan=plan,
        quality=quality,
    )


def _quality(path: str | os.PathLike[str], n_threads: int, **options: Any) -> tuple[float, float] | None:
    """Return the nats per token of the demo model's answers, here and where it was trained."""
    exam = demo.read_exam() if demo.is_trained() and os.path.samefile(path, demo.TRAINED) else None
    if exam is None:
        return None
    model = Model(path, n_gpu_layers=0, use_mmap=True, use_mlock=False, on_progress=None)
    try:
        n = len(exam.ids)
        context = Context(model, n_ctx=n, n_batch=n, n_ubatch=512, n_threads=n_threads, **options)
        logits = context.decode(exam.ids[:-1], all_logits=True)
        context.close()
    finally:
        model.close()
    assert logits is not None
    return exam.nll_of(logits), exam.nll[options["act_quant"]]


def _measure(
    context: Context, measurement: Measurement, ids: Sequence[int], states: dict[int, bytes]
) -> float:
    """Do the work once and return its seconds."""
    depth = measurement.depth
    if depth:
        context.restore_state(states[depth], depth)
    else:
        context.clear()
    context.set_n_threads(measurement.n_threads)
    tokens = ids[depth : depth + measurement.n_tokens]
    start_s = time.perf_counter()
    if measurement.kind == "prefill":
        context.decode(tokens)
    else:
        for token in tokens:
            context.decode([token])
    return time.perf_counter() - start_s
