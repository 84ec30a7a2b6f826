"""Runs every test in a folder of its own making, and names the helpers that lie in this one.

This folder is on the import path (pyproject.toml): ``gguf_writer``, ``reference`` and other helpers are modules of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# continuous integration judges the change at hand, with the same examples every time
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _outside_of_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the source folder: ``python -c`` puts the working folder first on the path of every child process,
    and there the package has no compiled modules."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and every child process inherits that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
