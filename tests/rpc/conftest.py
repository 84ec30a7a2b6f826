"""Workers on the loopback interface, and a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rpc_process import Start, Worker

pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")

from pyllama_dsv4 import synth


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model: tiny, random, in the native dialect: FP8 and MXFP4."""
    return synth.demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start workers; they end with the test."""
    started: list[Worker] = []

    def call(*args: object, env: dict[str, str] | None = None) -> Worker:
        started.append(Worker(tmp_path / f"worker{len(started)}", *args, env=env))
        return started[-1]

    yield call
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    """Two workers for all tests that do not harm them."""
    folder = tmp_path_factory.mktemp("workers")
    workers = [Worker(folder / name) for name in ("a", "b")]
    yield workers
    for one in workers:
        one.process.kill()
        one.process.wait()
