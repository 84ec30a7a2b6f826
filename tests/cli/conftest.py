"""The installed command with pipes and on a pseudo-terminal, in a home folder of its own, and a tiny model for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_process import TIMEOUT_S, Terminal, command

from pyllama_dsv4 import synth

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of the tests' own: cache, state, and no options in the environment."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYLLAMA_DSV4_", "XDG_"))}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        kept.pop(name, None)
    return {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_STATE_HOME": str(home / "state"),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nothing answers questions about the cursor here
        "PYLLAMA_DSV4_THREADS": "1",
    }


@pytest.fixture(scope="session")
def model(home: Path) -> Path:
    """The demo model: tiny, random, V4's vocabulary if it is installed. In the cache where ``chat`` looks for it."""
    pytest.importorskip("pyllama_dsv4._codec", reason="the codecs are not built")
    pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")
    return synth.demo_model(home / "cache" / "pyllama-dsv4")


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Run:
    """Run the command with pipes; input and output are bytes."""

    def call(*args: object, input: bytes = b"", env: dict[str, str] | None = None, **options: Any) -> Any:
        options.setdefault("stdout", subprocess.PIPE)
        return subprocess.run(
            command(*args),
            input=input,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            env={**environment, **(env or {})},
            **options,
        )

    return call


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    """Start the command on a pseudo-terminal."""
    started: list[Terminal] = []

    def start(*args: object, columns: int = 100, env: dict[str, str] | None = None) -> Terminal:
        started.append(Terminal(args, {**environment, **(env or {})}, columns))
        return started[-1]

    yield start
    for one in started:
        one.child.close(force=True)
