"""Failures that users of other bindings know, and that must not happen here.

Where another file tests one, it is named here: tokens longer than 32 bytes, biases beside processors, ignored schemas
(test_completion, test_chat_answers); swallowed keywords, batches larger than n_batch (test_llama); calls in the history
with arguments as text, V4 rendered as V3 (test_chat_format); states with garbage (test_state); one message for every
failure of a load (unit/test_header); missing dependencies (packaging).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyllama_dsv4 import Llama, errors
from pyllama_dsv4._native import lib
from pyllama_dsv4.context import Context
from pyllama_dsv4.model import Model


def test_the_library_prints_nothing(vocab_model: Path) -> None:
    """Not at a load, a chat with tools, a refused grammar, a cancelled call, nor at the end of the process."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pyllama_dsv4 import Llama, errors\n"
        "llm = Llama(sys.argv[1], n_ctx=512, n_threads=1)\n"
        "tool = {'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}\n"
        "llm.create_chat_completion([{'role': 'user', 'content': 'x'}], tools=[tool], max_tokens=2)\n"
        "for options in ({'grammar': 'root ::= ('}, {'timeout': 1e-9}):\n"
        "    try: llm.create_completion('x', max_tokens=2, **options)\n"
        "    except errors.PyllamaError: pass\n"
        "    else: raise SystemExit(1)\n"
        "try: Llama(sys.argv[1] + 'x')\n"
        "except errors.ModelNotFoundError: pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(vocab_model), *sys.path],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_a_mixed_batch_larger_than_n_batch_is_refused_and_changes_nothing(tiny_model: Path) -> None:
    with Model(tiny_model) as model:
        context = Context(
            model, n_ctx=64, n_batch=16, n_ubatch=16, n_threads=1, cache_type="f32", n_seq_max=2
        )
        try:
            with pytest.raises(errors.ArgumentError, match="n_batch = 16"):
                context.decode_mixed([(0, [1] * 9), (1, [2] * 9)])
            with pytest.raises(errors.ArgumentError, match="every sequence once"):
                context.decode_mixed([(0, [1]), (0, [2])])
            with pytest.raises(errors.ArgumentError):
                context.decode_mixed([(0, [1]), (1, [])])
            assert context.n_tokens == 0
            rows = context.decode_mixed([(0, [1] * 8), (1, [2] * 8)])
            assert [row.shape for row in rows] == [(1, 320), (1, 320)]
        finally:
            context.close()


def test_a_sequence_that_cannot_be_removed_is_an_error(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    state = llm.save_state()

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *args: False) if name == "llama_memory_seq_rm" else getattr(lib, name)

    llm.eval([1, 2, 3])
    monkeypatch.setattr("pyllama_dsv4.context.lib", Refusing())
    with pytest.raises(errors.StateError, match="forgetting sequence"):
        llm.load_state(state)
    monkeypatch.undo()
    assert llm.n_tokens == 0
    llm.eval([1, 2])


@pytest.mark.parametrize("name", ["mirostat_mode", "tfs_z", "stopping_criteria", "penalize_nl", "model"])
def test_keywords_of_others_are_refused_by_name(llm: Llama, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        llm.create_completion("x", **{name: 1})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("what", "limit_s"), [("import pyllama_dsv4", 0.2), ("from pyllama_dsv4 import Llama", 0.4)]
)
def test_importing_takes_a_fraction_of_a_second(what: str, limit_s: float) -> None:
    code = f"import numpy, time; start = time.process_time(); {what}; print(time.process_time() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < limit_s  # CPU seconds beside numpy's own; the class loads the engine
