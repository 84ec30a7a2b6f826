"""The background reader: order, budget, progress, stopping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyllama_dsv4 import Llama, Progress
from pyllama_dsv4.machine import available_bytes
from pyllama_dsv4.warmup import CHUNK_BYTES, Warmup

N_BYTES = 5 * CHUNK_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with open(path, "wb") as out:
        out.truncate(N_BYTES)
    return path


def _run(path: Path, **options: object) -> tuple[Warmup, list[Progress]]:
    seen: list[Progress] = []
    warmup = Warmup([(path, 0, N_BYTES)], seen.append, **options)  # type: ignore[arg-type, func-returns-value]
    warmup.start()
    assert warmup.wait(60)
    assert warmup.error is None
    return warmup, seen


def test_chunks_are_small_enough_to_interrupt() -> None:
    assert CHUNK_BYTES <= 256 << 20


def test_it_reads_everything_that_fits(file: Path) -> None:
    warmup, seen = _run(file, budget=N_BYTES)
    assert warmup.n_bytes == N_BYTES
    assert [p.n_bytes for p in seen] == [CHUNK_BYTES * i for i in range(1, 6)]
    assert seen[-1].fraction == 1.0
    assert seen[-1].eta_s == 0
    assert all(p.eta_s is not None and p.eta_s > 0 for p in seen[:-1])


def test_it_stops_at_its_budget(file: Path) -> None:
    warmup, seen = _run(file, budget=2 * CHUNK_BYTES + 4096)
    assert warmup.n_bytes == warmup.n_bytes_total == 2 * CHUNK_BYTES + 4096
    assert seen[-1].fraction == 1.0


def test_no_memory_means_no_reading(file: Path) -> None:
    warmup, seen = _run(file, budget=0)
    assert warmup.n_bytes == 0
    assert seen == []


def test_the_budget_is_below_what_is_available(tmp_path: Path) -> None:
    available = available_bytes()
    if available is None:
        pytest.skip("this system does not say how much memory is available")
    huge = tmp_path / "huge"
    with open(huge, "wb") as out:
        out.truncate(4 * available)
    assert Warmup([(huge, 0, 4 * available)]).n_bytes_total < available


def test_progress_can_stop_it(file: Path) -> None:
    warmup = Warmup([(file, 0, N_BYTES)], lambda p: p.n_bytes < 2 * CHUNK_BYTES, budget=N_BYTES)
    warmup.start()
    assert warmup.wait(60)
    assert warmup.n_bytes == 2 * CHUNK_BYTES


def test_stop_ends_it_between_chunks(file: Path) -> None:
    stopped_at: list[int] = []

    def stop(event: Progress) -> None:
        warmup._stop.set()
        stopped_at.append(event.n_bytes)

    warmup = Warmup([(file, 0, N_BYTES)], stop, budget=N_BYTES)
    warmup.start()
    assert warmup.wait(60)
    assert stopped_at == [CHUNK_BYTES]
    warmup.stop()
    warmup.stop()


def test_a_file_that_vanishes_is_no_crash(file: Path) -> None:
    warmup = Warmup([(file, 0, N_BYTES)], budget=N_BYTES)
    os.unlink(file)
    warmup.start()
    assert warmup.wait(60)
    assert isinstance(warmup.error, FileNotFoundError)


def test_tokens_come_before_it_ends(tiny_model: Path) -> None:
    with Llama(tiny_model, n_ctx=64, n_threads=1) as llm:
        llm.eval([1])  # whatever the reader is doing
        assert llm.warmup is not None
        llm.warmup.stop()
        assert not llm.warmup.is_running
