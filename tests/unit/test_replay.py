"""Sampled ids in the next prompt: where they go, and where they do not."""

from __future__ import annotations

from typing import Any

import pytest

from pyllama_dsv4.replay import N_ANSWERS_MAX, Marks, Replay

EOS, USER, BOT, THINK, THINK_END, TASK, REMINDER = range(1, 8)
MARKS = Marks(EOS, THINK, THINK_END, frozenset({TASK}), REMINDER)
ASKED = {"role": "user", "content": "q"}


def says(content: str | None, **members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **members}


def called(arguments: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return says(None, tool_calls=[call])


def remembering(message: dict[str, Any], sampled: list[int], has_reasoning: bool = False) -> Replay:
    replay = Replay(MARKS)
    replay.remember(message, sampled, has_reasoning)
    return replay


def test_an_answer_is_put_between_its_header_and_its_end() -> None:
    replay = remembering(says("hi"), [70, 71])
    prompt = [0, USER, 50, BOT, THINK_END, 60, EOS, USER, 51, BOT, THINK_END]
    assert replay.put_back(prompt, [ASKED, says("hi"), ASKED]) == [
        0, USER, 50, BOT, THINK_END, 70, 71, EOS, USER, 51, BOT, THINK_END,
    ]  # fmt: skip
    assert replay.put_back(prompt, [ASKED, says("ho"), ASKED]) == prompt


def test_reasoning_goes_back_where_the_prompt_keeps_it() -> None:
    message = says("hi", reasoning_content="r")
    replay = remembering(message, [80, 81, THINK_END, 70], has_reasoning=True)
    kept = [0, USER, 50, BOT, THINK, 61, THINK_END, 60, EOS, USER, 52]
    dropped = [0, USER, 50, BOT, THINK_END, 60, EOS, USER, 52]
    assert replay.put_back(kept, [ASKED, message]) == [
        0, USER, 50, BOT, THINK, 80, 81, THINK_END, 70, EOS, USER, 52,
    ]  # fmt: skip
    assert replay.put_back(dropped, [ASKED, message]) == [0, USER, 50, BOT, THINK_END, 70, EOS, USER, 52]
    other = says("hi", reasoning_content="another")
    assert replay.put_back(kept, [ASKED, other]) == [
        0, USER, 50, BOT, THINK, 61, THINK_END, 70, EOS, USER, 52,
    ]  # fmt: skip


def test_calls_are_known_by_what_they_mean() -> None:
    replay = remembering(called('{"a":1,"b":[2]}'), [70, 71, 72])
    prompt = [0, USER, 50, BOT, THINK_END, 60, 61, EOS]
    expected = [0, USER, 50, BOT, THINK_END, 70, 71, 72, EOS]
    assert replay.put_back(prompt, [ASKED, called('{"b": [2], "a": 1}')]) == expected
    assert replay.put_back(prompt, [ASKED, called('{"a": 1, "b": [3]}')]) == prompt
    assert remembering(called('{"a":'), [70]).put_back(prompt, [ASKED, called('{"a":')]) == prompt


def test_the_newest_of_equal_answers_is_put_back() -> None:
    replay = remembering(says("hi"), [70])
    replay.remember(says("hi"), [71], False)
    assert replay.put_back([BOT, THINK_END, 60, EOS], [says("hi")]) == [BOT, THINK_END, 71, EOS]


def test_an_answer_to_a_task_begins_behind_its_token() -> None:
    replay = remembering(says("law"), [70])
    prompt = [0, USER, 50, BOT, THINK_END, 60, EOS, USER, 51, TASK, 61, EOS]
    messages = [ASKED, says("hi"), {**ASKED, "task": "domain"}, says("law")]
    assert replay.put_back(prompt, messages) == [*prompt[:10], 70, EOS]


def test_the_text_of_a_reminder_stays_where_it_is() -> None:
    message = says("hi", reasoning_content="r")
    replay = remembering(message, [80, THINK_END, 70], has_reasoning=True)
    messages = [ASKED, {"role": "latest_reminder", "content": "x"}, message]
    dropped = [USER, 50, BOT, THINK_END, REMINDER, 55, 60, EOS]
    assert replay.put_back(dropped, messages) == dropped
    kept = [USER, 50, BOT, THINK, REMINDER, 55, 61, THINK_END, 60, EOS]
    assert replay.put_back(kept, messages) == [USER, 50, BOT, THINK, REMINDER, 55, 61, THINK_END, 70, EOS]


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ([USER, 50, 60], [ASKED, says("hi")]),  # another format, without the marks
        ([USER, 50, BOT, 60, EOS], [ASKED, says("hi")]),
        ([USER, 50, BOT, THINK_END, 60, EOS, EOS], [ASKED, says("hi")]),
    ],
)
def test_other_formats_are_left_alone(prompt: list[int], messages: list[Any]) -> None:
    assert remembering(says("hi"), [70]).put_back(prompt, messages) == prompt


def test_unfinished_reasoning_and_empty_answers_are_not_remembered() -> None:
    prompt = [BOT, THINK_END, 60, EOS]
    assert remembering(says("hi"), [70], has_reasoning=True).put_back(prompt, [says("hi")]) == prompt
    assert remembering(says(""), [70]).put_back(prompt, [says("")]) == prompt


def test_the_oldest_answers_are_forgotten() -> None:
    replay = remembering(says("first"), [70])
    for i in range(N_ANSWERS_MAX):
        replay.remember(says(f"answer {i}"), [71], False)
    prompt = [BOT, THINK_END, 60, EOS]
    assert replay.put_back(prompt, [says("first")]) == prompt
    assert replay.put_back(prompt, [says("answer 0")]) == [BOT, THINK_END, 71, EOS]
