"""Several threads on one ``Llama``, cancelling, asyncio, batches of sequences."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import AsyncLlama, Llama, batch, errors, synth
from pyllama_dsv4.generate import Request, TextSteps
from pyllama_dsv4.machine import peak_bytes, working_set_bytes
from pyllama_dsv4.warmup import Progress

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 4000)]
GREEDY: Any = {"temperature": 0}
SLACK_S = 0.3  # two hundred milliseconds, and a machine that does other things


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Llama]:
    with Llama(tiny_model, n_ctx=4096, n_threads=1, warmup=False) as llm:
        yield llm


def ids_of(llm: Llama, prompt: list[int], n: int) -> list[int]:
    pieces = llm._pieces(prompt, llm._params(GREEDY), Request(max_tokens=n))
    return [p.token for p in pieces if p.token is not None]


# --- cancelling ---


def test_a_timeout_stops_a_prefill(llm: Llama) -> None:
    start = time.monotonic()
    with pytest.raises(errors.CancelledError, match=r"timeout=0.2 seconds passed"):
        llm.create_completion(IDS[:3900], max_tokens=1, timeout=0.2)
    assert time.monotonic() - start < 0.2 + SLACK_S
    assert ids_of(llm, IDS[:20], 3) == ids_of(llm, IDS[:20], 3)


@pytest.mark.parametrize("in_prefill", [True, False])
def test_a_stop_event_from_another_thread(llm: Llama, in_prefill: bool) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    prompt = IDS[:3900] if in_prefill else IDS[:10]
    start = time.monotonic()
    with pytest.raises(errors.CancelledError, match="stop_event was set"):
        llm.create_completion(prompt, stop_event=stop, **GREEDY)
    assert time.monotonic() - start < 0.3 + SLACK_S


@pytest.mark.parametrize("how", ["callback", "interrupt"])
def test_a_load_is_cancelled_in_the_middle_of_a_tensor(tmp_path: Path, how: str) -> None:
    """Without mapping, where reading takes long; the file is two tensors of 410 MB, and a hole."""
    path = synth.write_sparse_native(
        tmp_path / "m.gguf", synth.tiny_config(vocab_size=800_000), tokenizer=None, is_published_form=False
    )
    seen: list[tuple[float, float]] = []

    def look(progress: Progress) -> bool:
        if progress.stage == "load" and progress.fraction > 0.05:
            seen.append((progress.fraction, time.monotonic()))
            if how == "interrupt" and len(seen) == 1:
                signal.raise_signal(signal.SIGINT)
        return how == "interrupt" or not seen

    with pytest.raises(errors.CancelledError if how == "callback" else KeyboardInterrupt):
        Llama(path, n_ctx=64, n_threads=1, warmup=False, use_mmap=False, progress=look)
    fraction, at_s = seen[0]
    assert time.monotonic() - at_s < SLACK_S + 0.1  # memory is given back, too
    assert fraction < 0.45


def test_the_prefill_says_how_far_it_is_and_can_be_stopped(llm: Llama) -> None:
    seen: list[float] = []
    llm.create_completion(IDS[:1300], max_tokens=1, on_prefill=seen.append)
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    llm.reset()
    with pytest.raises(errors.CancelledError, match="callback returned False"):
        llm.create_completion(IDS[:1300], max_tokens=1, on_prefill=lambda fraction: False)


def test_closing_the_iterator_stops_and_frees_the_turn(llm: Llama) -> None:
    steps = llm.create_completion(IDS[:20], stream=True, **GREEDY)
    pieces = llm._pieces(IDS[:20], llm._params(GREEDY), Request())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(ids_of(llm, IDS[:20], 2)))
    thread.start()
    thread.join(30)
    assert len(done[0]) == 2
    del steps


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon"])
def test_timeouts_out_of_range(llm: Llama, timeout: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="timeout"):
        llm.create_completion(IDS[:5], timeout=timeout)


def test_ctrl_c_stops_a_prefill_at_once(tiny_model: Path) -> None:
    code = (
        "import sys, time; from pyllama_dsv4 import Llama\n"
        "llm = Llama(sys.argv[1], n_ctx=4096, n_threads=1, warmup=False)\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True: llm.reset(); llm.eval([i % 320 for i in range(4000)])\n"
        "except KeyboardInterrupt:\n"
        "    llm.reset(); llm.eval([1, 2]); print('stopped', llm.n_tokens)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tiny_model)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "stopped 2\n"
    assert time.monotonic() - start < SLACK_S + 0.3
    assert child.wait(10) == 0


# --- threads ---


def test_threads_queue_and_none_gets_anothers_tokens(llm: Llama) -> None:
    prompts = [IDS[i * 20 : i * 20 + 30] for i in range(8)]
    expected = [ids_of(llm, p, 12) for p in prompts]
    got: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: ids_of(llm, prompts[i], 12)})) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(8)] == expected


def test_waiting_for_another_thread_counts_against_the_timeout(llm: Llama) -> None:
    pieces = llm._pieces(IDS[:20], llm._params(GREEDY), Request())
    next(pieces)
    caught: list[Exception] = []

    def other() -> None:
        try:
            llm.create_completion(IDS[:5], max_tokens=1, timeout=0.2)
        except errors.PyllamaError as error:
            caught.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    assert isinstance(caught[0], errors.CancelledError)
    assert next(pieces).token is not None  # and the generation goes on


def _soak(llm: Llama, seconds: float) -> int:
    """Eight threads stream, cancel, save and load; return how many generations were compared."""
    prompts = [IDS[i * 25 : i * 25 + 40] for i in range(8)]
    expected = [ids_of(llm, p, 16) for p in prompts]
    llm.create_completion(prompts[0], max_tokens=1)
    state = llm.save_state()
    end = time.monotonic() + seconds
    wrong: list[str] = []
    n_compared = [0] * 8

    def work(i: int) -> None:
        rng = np.random.default_rng(i)
        while time.monotonic() < end or n_compared[i] == 0:  # also on a busy machine
            what = rng.integers(0, 5) if n_compared[i] else 4
            if what == 0:
                pieces = llm._pieces(prompts[i], llm._params(GREEDY), Request(max_tokens=16))
                first = next(pieces).token
                pieces.close()  # type: ignore[attr-defined]
                if first != expected[i][0]:
                    wrong.append(f"thread {i}: first token {first}")
            elif what == 1:
                stop = threading.Event()
                stop.set()
                try:
                    llm.create_completion(prompts[i], max_tokens=4, stop_event=stop)
                    wrong.append(f"thread {i}: not cancelled")
                except errors.CancelledError:
                    pass
            elif what == 2:
                llm.load_state(state)
                llm.save_state()
            else:
                got = ids_of(llm, prompts[i], 16)
                n_compared[i] += 1
                if got != expected[i]:
                    wrong.append(f"thread {i}: {got}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(n_compared) > 0
    return sum(n_compared)


@pytest.mark.parametrize("seconds", [20, pytest.param(600, marks=pytest.mark.soak)])
def test_soak(llm: Llama, seconds: float) -> None:
    _soak(llm, 2)
    peak, resident = peak_bytes() or 0, working_set_bytes() or 0
    n_compared = _soak(llm, seconds - 2)
    grown, grown_resident = (peak_bytes() or 0) - peak, (working_set_bytes() or 0) - resident
    print(
        f"{n_compared} generations compared; resident {resident:,} {grown_resident:+,}, peak {peak:,} {grown:+,}"
    )
    assert n_compared > 8
    assert grown < 64 << 20


# --- asyncio ---


def test_async_answers_equal_the_others_and_tasks_queue(llm: Llama) -> None:
    expected = [llm.create_completion(IDS[i : i + 9], max_tokens=5, seed=1)["usage"] for i in range(3)]

    async def main() -> None:
        async with AsyncLlama(llm) as async_llm:
            answers = await asyncio.gather(
                *(async_llm.create_completion(IDS[i : i + 9], max_tokens=5, seed=1) for i in range(3))
            )
            assert [a["usage"]["total_tokens"] for a in answers] == [e["total_tokens"] for e in expected]
            chunks = [c async for c in async_llm.stream_completion(IDS[:9], max_tokens=3)]
            assert chunks[-1]["usage"]["completion_tokens"] == 3
            with pytest.raises(errors.ContextFullError):
                await async_llm.create_completion([1] * 5000)

    asyncio.run(main())


def test_cancelling_a_task_stops_its_generation(llm: Llama) -> None:
    async def main() -> None:
        async_llm = AsyncLlama(llm)
        task = asyncio.create_task(async_llm.create_completion(IDS[:3900], max_tokens=100))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - start < SLACK_S
        answer = await async_llm.create_completion(IDS[:9], max_tokens=2)
        assert answer["usage"]["completion_tokens"] == 2

    asyncio.run(main())


def test_the_event_loop_runs_on_while_tokens_come(llm: Llama) -> None:
    async def main() -> None:
        async_llm = AsyncLlama(llm)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await async_llm.create_completion(IDS[:2000], max_tokens=5)
        ticking.cancel()
        assert ticks >= 3

    asyncio.run(main())


# --- batches ---


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
def test_batches_give_what_single_generations_give(
    tiny_model: Path, n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "cache_type": "f32", "flash_attn": "off"}
    prompts = [IDS[i * 31 : i * 31 + 5 + 17 * (i % 4)] for i in range(7)]
    with Llama(tiny_model, n_batch=64, n_ubatch=64, warmup=False, **options) as llm:
        seen: list[list[int]] = []
        llm._tokenizer.is_eog = lambda token: False  # type: ignore[method-assign]
        expected = [ids_of(llm, p, 10) for p in prompts]

        class Recorder(TextSteps):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.ids: list[int] = []
                seen.append(self.ids)

            def feed(self, token: int) -> str | None:
                self.ids.append(token)
                return super().feed(token)

        monkeypatch.setattr(batch, "TextSteps", Recorder)  # without a vocabulary there is no text to compare
        results = llm.generate_batch(prompts, max_tokens=10, n_parallel=n_parallel, **GREEDY)
        assert seen == expected
        assert [r["usage"]["prompt_tokens"] for r in results] == [len(p) for p in prompts]
        assert {r["choices"][0]["finish_reason"] for r in results} == {"length"}


def test_a_batch_that_does_not_fit_is_refused_before_it_is_allocated(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate_batch([IDS[:10]] * 2, max_tokens=1)
    monkeypatch.setattr("pyllama_dsv4.plan.available_bytes", lambda: 60 << 20)
    with pytest.raises(errors.MemoryLimitError, match="KV cache of 4096 tokens"):
        llm.generate_batch([IDS[:10]] * 64, n_parallel=64)


def test_batches_can_be_cancelled_and_refuse_what_does_not_fit(llm: Llama) -> None:
    with pytest.raises(errors.CancelledError, match="timeout"):
        llm.generate_batch([IDS[:1500]] * 8, max_tokens=100, timeout=0.2)
    with pytest.raises(errors.ContextFullError):
        llm.generate_batch([IDS[:10], [1] * 5000], max_tokens=1)
    with pytest.raises(errors.ArgumentError, match="n_parallel"):
        llm.generate_batch([IDS[:10]], n_parallel=0)
    assert llm.generate_batch([]) == []
