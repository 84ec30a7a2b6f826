"""Checks that any user can run on any build and file: does this engine compute what it should, here?

Owns the list of checks, their bounds and their report. Codecs and the rounding operation are held against definitions
written out here; a model is held against itself: whatever the cache, the split of a prompt, a saved state or a second
sequence, the logits must be those of the plain run. Without a file a tiny random model is made, whose weights are also
written in F32 in the upstream dialect, so that the native products are compared with exact ones; and the trained demo
model, if the package holds it, must compute what it computed in another program, and answer what it answered there.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _codec, convert, demo, synth
from ._native import check as check_status
from ._native import ffi, lib
from .context import Context
from .header import check_header, read_header
from .llama import Llama
from .model import Model

__all__ = ["Check", "selftest"]

N_TOKENS = 270  # more than two windows of 128, and compressed rows of both ratios
# how far the mean negative log-likelihood of answers may be from the training program's, nats
NLL_BOUNDS = {"none": 1e-3, "cache": 0.02, "full": 0.05}
TIME_LIMIT_S = 60.0  # for one evaluation of the prompt; on slower models it is made shorter

Logits = npt.NDArray[np.float32]


@dataclass
class Check:
    """One check and how it ended.

    Attributes:
        name: What was checked.
        numbers: What was measured, by name; a bound stands behind the measured value as ``NAME_max``.
        failures: What was wrong; empty if the check passed.
    """

    name: str
    numbers: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Note a number that must not exceed `bound`; NaN exceeds everything."""
        self.numbers[name] = value
        self.numbers[f"{name}_max"] = bound
        if not value <= bound:
            self.failures.append(f"{name} is {value:.3g}, allowed {bound:.3g}")

    def equal(self, name: str, n_different: int, n_all: int) -> None:
        """Note a comparison that must hold everywhere."""
        self.numbers[name] = n_all
        if n_different:
            self.failures.append(f"{name}: {n_different} of {n_all} differ")


def nmse(got: Logits, want: Logits) -> float:
    """Return the squared difference over the squared values."""
    return float(np.mean((got.astype(np.float64) - want) ** 2) / np.mean(want.astype(np.float64) ** 2))


# --- codecs and rounding ------------------------------------------------------------------------------------------


def _e4m3(code: int) -> float:
    """Return the value of an E4M3 code by its definition."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa * 2.0**-9)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _check_codecs(check: Check) -> None:
    codes = np.arange(256, dtype=np.uint8)
    want = np.array([_e4m3(c) for c in range(256)], np.float32)
    got = _codec.e4m3_decode(codes)
    check.equal("E4M3 codes", int((~((got == want) | (np.isnan(got) & np.isnan(want)))).sum()), 256)
    finite = ~np.isnan(want)
    back = _codec.e4m3_encode(want[finite])
    check.equal("E4M3 values", int((back != codes[finite]).sum()), int(finite.sum()))

    nibbles = np.arange(16, dtype=np.uint8)
    values = np.array([*E2M1, *(-x for x in E2M1)], np.float32)
    check.equal("E2M1 codes", int((_codec.e2m1_decode(nibbles) != values).sum()), 16)

    rng = np.random.default_rng(1)
    fp8 = rng.integers(0, 256, (256, 384), np.uint8)
    scales = rng.integers(1, 255, (2, 3), np.uint8)
    packed = _codec.f8_e4m3_b128_pack(fp8, scales)
    weight, scale = _codec.f8_e4m3_b128_unpack(packed)
    check.equal("FP8 repack", int((weight != fp8).sum() + (scale != scales).sum()), fp8.size + scales.size)
    fp4 = rng.integers(0, 256, (8, 64), np.uint8)
    scales = rng.integers(1, 255, (8, 4), np.uint8)
    packed = _codec.mxfp4_pack(fp4, scales)
    weight, scale = _codec.mxfp4_unpack(packed)
    check.equal("MXFP4 repack", int((weight != fp4).sum() + (scale != scales).sum()), fp4.size + scales.size)


def _round_to(
    x: Logits, magnitudes: npt.NDArray[np.float64], largest: float, floor: float, block: int
) -> Logits:
    """Round blocks to the nearest of `magnitudes` times a power of two, ties to the even one of the list."""
    blocks = x.reshape(-1, block)
    quotient = np.maximum(np.abs(blocks).max(axis=1), np.float32(floor)) * np.float32(1 / largest)
    mantissa, exponent = np.frexp(quotient.astype(np.float64))
    exponent = np.where(mantissa > 0.5, exponent, exponent - 1)  # the smallest power of two not below
    scale = np.ldexp(1.0, exponent)[:, None]
    y = np.minimum(np.abs(blocks.astype(np.float64)) / scale, largest)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    low, high = np.searchsorted(middles, y, "left"), np.searchsorted(middles, y, "right")
    index = np.where(low % 2 == 0, low, high)  # they differ in a tie only
    return np.asarray(np.copysign(magnitudes[index] * scale, blocks), np.float32).reshape(x.shape)


def _check_rounding(check: Check) -> None:
    rng = np.random.default_rng(2)
    n_rows, n = 512, 512
    # every magnitude in one row, and values of few bits, which meet ties
    x = rng.standard_normal((n_rows, n)) * 2.0 ** rng.integers(-30, 30, (n_rows, 1))
    x *= 2.0 ** rng.integers(-12, 1, (n_rows, n))
    coarse = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFF80000)
    x32 = np.ascontiguousarray(
        np.where(rng.random((n_rows, n)) < 0.7, coarse.view(np.float32), x), np.float32
    )
    x32[0] = 0
    e4m3 = np.array([_e4m3(c) for c in range(127)], np.float64)
    e2m1 = np.array(E2M1, np.float64)
    for name, number, block, magnitudes, floor in (
        ("FP8 in blocks of 64", lib.PYL_ACT_QUANT_E4M3, 64, e4m3, 1e-4),
        ("FP8 in blocks of 128", lib.PYL_ACT_QUANT_E4M3, 128, e4m3, 1e-4),
        ("FP4 in blocks of 32", lib.PYL_ACT_QUANT_E2M1, 32, e2m1, 6 * 2.0**-126),
    ):
        got = np.empty_like(x32)
        n_channels = n - block  # the last block stays as it is
        status = lib.pyl_act_quant(
            number,
            block,
            n_channels,
            ffi.from_buffer("float[]", x32),
            ffi.from_buffer("float[]", got),
            n_rows,
            n,
            1,
        )
        check_status(status, "rounding activations")
        want = x32.copy()
        rounded = np.ascontiguousarray(x32[:, :n_channels])
        want[:, :n_channels] = _round_to(rounded, magnitudes, float(magnitudes[-1]), floor, block)
        check.equal(name, int((got.view(np.uint32) != want.view(np.uint32)).sum()), got.size)


# --- a model ------------------------------------------------------------------------------------------------------


class _Runs:
    """Evaluations of one prompt in contexts of different kinds."""

    def __init__(self, model: Model, n_threads: int, n_tokens: int) -> None:
        self._model = model
        self._n_threads = n_threads
        vocabulary = model.n_vocab
        self.ids = [int(i) for i in np.random.default_rng(3).integers(0, vocabulary, n_tokens)]

    def context(self, **options: object) -> Context:
        n_ctx = 64 * (2 + len(self.ids) // 64)
        defaults: dict[str, object] = {
            "n_ctx": n_ctx,
            "n_batch": n_ctx,
            "n_ubatch": 512,
            "n_threads": self._n_threads,
            "cache_type": "f32",
            "flash_attn": "off",
            "act_quant": "none",
        }
        return Context(self._model, **(defaults | options))  # type: ignore[arg-type]

    def rows(self, context: Context, ids: Sequence[int], seq: int = 0) -> Logits:
        """Return the last rows of logits for `ids`, as many as are worth their memory."""
        n_last = min(len(ids), max(8, (64 << 20) // (4 * self._model.n_vocab)))
        if len(ids) > n_last:
            context.decode(ids[:-n_last], seq=seq)
        rows = context.decode(ids[-n_last:], all_logits=True, seq=seq)
        assert rows is not None
        return rows

    def run(self, **options: object) -> Logits:
        """Return the logits of the whole prompt in a new context."""
        context = self.context(**options)
        try:
            return self.rows(context, self.ids)
        finally:
            context.close()


def _check_repeats(check: Check, runs: _Runs, plain: Logits) -> None:
    again = runs.run()
    check.equal("logits", int((again.view(np.uint32) != plain.view(np.uint32)).sum()), plain.size)
    if not np.isfinite(plain).all():
        check.failures.append("the logits are not finite")


def _check_splits(check: Check, runs: _Runs, plain: Logits) -> None:
    for n_ubatch in (64, 7):
        check.at_most(f"micro-batches of {n_ubatch}", nmse(runs.run(n_ubatch=n_ubatch), plain), 1e-8)
    context = runs.context()
    n_single = min(12, len(runs.ids) // 2)
    context.decode(runs.ids[:-n_single])
    rows = []
    for token in runs.ids[-n_single:]:
        context.decode([token])
        rows.append(context.logits)
    context.close()
    check.at_most("single tokens", nmse(np.asarray(rows), plain[-n_single:]), 1e-8)


def _check_states(check: Check, runs: _Runs, plain: Logits) -> None:
    source, target = runs.context(), runs.context()
    worst = 0.0
    n_bytes = 0
    lengths = [n for n in (1, 127, 128, 129, 255, 257) if n < len(runs.ids) - 4]
    for n in lengths:
        source.clear()
        source.decode(runs.ids[:n])
        state = source.save_state()
        n_bytes = len(state)
        target.restore_state(state, n)
        rows = [source.decode(runs.ids[n:], all_logits=True), target.decode(runs.ids[n:], all_logits=True)]
        assert rows[0] is not None
        assert rows[1] is not None
        worst = max(worst, nmse(rows[1][-4:], rows[0][-4:]), nmse(rows[1][-4:], plain[-4:]))
        target.clear()
    source.close()
    target.close()
    check.numbers["bytes of a state"] = n_bytes
    check.at_most(f"restored after {', '.join(map(str, lengths))} tokens", worst, 1e-8)


def _check_sequences(check: Check, runs: _Runs, plain: Logits) -> None:
    context = runs.context(n_seq_max=2)
    other = runs.ids[::-1]
    half = len(runs.ids) // 2
    context.decode(runs.ids[:half], seq=0)
    context.decode(other[: half + 5], seq=1)
    rows = runs.rows(context, runs.ids[half:], seq=0)
    context.decode(other[half + 5 :], seq=1)
    context.close()
    n = min(len(rows), len(plain))
    check.at_most("beside another one", nmse(rows[-n:], plain[-n:]), 1e-8)


def _check_caches(check: Check, runs: _Runs, plain: Logits) -> None:
    check.at_most("flash attention", nmse(runs.run(flash_attn="on"), plain), 1e-2)
    check.at_most("F16", nmse(runs.run(cache_type="f16", flash_attn="on"), plain), 1e-2)
    check.at_most("BF16", nmse(runs.run(cache_type="bf16", flash_attn="on"), plain), 0.05)
    check.at_most("Q8_0", nmse(runs.run(cache_type="q8_0", flash_attn="on"), plain), 0.05)


def _check_levels(check: Check, runs: _Runs, plain: Logits) -> None:
    cache, full = runs.run(act_quant="cache"), runs.run(act_quant="full")
    for name, logits, bound in (("cache", cache, 0.1), ("full", full, 0.3)):
        check.at_most(f"none to {name}", nmse(logits, plain), bound)
        if np.array_equal(logits, plain):
            check.failures.append(f"level {name} changes nothing")
    if np.array_equal(cache, full):
        check.failures.append("level full does not differ from cache")


def _check_exact(check: Check, plain: Logits, n_threads: int, f32_path: Path) -> None:
    model = Model(f32_path, n_gpu_layers=0, use_mmap=True, use_mlock=False, on_progress=None)
    try:
        check.at_most("FP8 and MXFP4 to F32", nmse(plain, _Runs(model, n_threads, N_TOKENS).run()), 1e-8)
    finally:
        model.close()


def _check_demo(check: Check, exam: demo.Exam, n_threads: int) -> None:
    model = Model(demo.TRAINED, n_gpu_layers=0, use_mmap=True, use_mlock=False, on_progress=None)
    try:
        runs = _Runs(model, n_threads, len(exam.ids))
        for level, bound in NLL_BOUNDS.items():
            context = runs.context(act_quant=level)
            logits = context.decode(exam.ids[:-1], all_logits=True)
            context.close()
            assert logits is not None
            check.at_most(f"{level}: nats from training", abs(exam.nll_of(logits) - exam.nll[level]), bound)
    finally:
        model.close()
    with Llama(demo.TRAINED, n_ctx=1024, n_threads=n_threads, warmup=False) as llm:
        n_wrong = 0
        for question in exam.questions:
            options: dict[str, Any] = {"temperature": 0, "max_tokens": 256, "thinking": question["thinking"]}
            answer: Any = llm.create_chat_completion(
                question["messages"], tools=question["tools"] or None, **options
            )
            message = answer["choices"][0]["message"]
            if question["tools"]:
                calls = [
                    json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or ()
                ]
                n_wrong += calls != [question["arguments"]]
            else:
                n_wrong += message["content"] != question["answer"]
        check.equal("answers", n_wrong, len(exam.questions))


@contextmanager
def _tiny_model() -> Iterator[tuple[Path, Path]]:
    """Make a tiny native model, and the same weights in F32."""
    with tempfile.TemporaryDirectory(prefix="pyllama-dsv4-selftest-") as name:
        folder = Path(name)
        synth.write_checkpoint(folder / "checkpoint", synth.tiny_config(), seed=1)
        convert.convert(folder / "checkpoint", folder / "native.gguf")
        synth.write_upstream_f32(folder / "checkpoint", folder / "f32.gguf")
        yield folder / "native.gguf", folder / "f32.gguf"


def _n_tokens(model: Model, n_threads: int) -> int:
    """Return how long the prompt may be so that one evaluation keeps the time limit."""
    runs = _Runs(model, n_threads, 16)
    context = runs.context()
    start_s = time.monotonic()
    context.decode(runs.ids)
    seconds = (time.monotonic() - start_s) / len(runs.ids)
    context.close()
    return max(16, min(N_TOKENS, int(TIME_LIMIT_S / max(seconds, 1e-9))))


def selftest(
    path: str | Path | None = None,
    *,
    n_threads: int = 1,
    on_check: Callable[[Check], object] | None = None,
) -> list[Check]:
    """Run all checks that apply.

    Args:
        path: A model file; None makes a tiny random one, and examines the demo model.
        n_threads: Threads of the evaluations.
        on_check: Called with every check when it has ended.

    Returns:
        The checks in their order. A check that could not be run has failed.

    Raises:
        The errors of ``Llama`` for a file that cannot be opened.
    """
    checks: list[Check] = []

    def run(name: str, function: Callable[[Check], None]) -> None:
        check = Check(name)
        start_s = time.monotonic()
        try:
            function(check)
        except Exception as error:  # the others still tell something
            check.failures.append(f"{type(error).__name__}: {error}")
        check.seconds = time.monotonic() - start_s
        checks.append(check)
        if on_check is not None:
            on_check(check)

    run("codecs", _check_codecs)
    run("rounding", _check_rounding)
    if path is None:
        with _tiny_model() as (native, f32):
            _run_model(run, native, n_threads, f32)
        exam = demo.read_exam()
        if exam is not None:
            run("demo model", lambda check: _check_demo(check, exam, n_threads))
    else:
        _run_model(run, Path(path), n_threads, None)
    return checks


def _run_model(
    run: Callable[[str, Callable[[Check], None]], None], path: Path, n_threads: int, f32_path: Path | None
) -> None:
    report = check_header(read_header(path))
    model = Model(path, n_gpu_layers=0, use_mmap=True, use_mlock=False, on_progress=None)
    try:
        runs = _Runs(model, n_threads, _n_tokens(model, n_threads))
        plain = runs.run()
        run("repeats", lambda check: _check_repeats(check, runs, plain))
        run("splits", lambda check: _check_splits(check, runs, plain))
        run("states", lambda check: _check_states(check, runs, plain))
        run("sequences", lambda check: _check_sequences(check, runs, plain))
        run("caches", lambda check: _check_caches(check, runs, plain))
        if report.hparams is not None:
            run("levels", lambda check: _check_levels(check, runs, plain))
        if f32_path is not None:
            run("native weights", lambda check: _check_exact(check, plain, n_threads, f32_path))
    finally:
        model.close()
