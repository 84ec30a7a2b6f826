"""Chats whose answers are forced: tools, response formats, reasoning, on a tiny model with the real vocabulary.

Random weights say nothing; grammars make them say real DSML, and the sampled ids split it as they happen to.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pyllama_dsv4 import Llama, errors

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {
                "wind": {"type": "boolean"},
                "days": {"type": "integer", "maximum": 9, "minimum": 0},
            },
            "required": ["wind", "days"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
START = "<｜DSML｜tool_calls>"


def speaks(llm: Llama, text: str) -> Any:
    """Return a processor that makes the model say a text, then whatever its grammar wants, then end."""
    wanted = llm.tokenize(text, special=True)
    end = 1  # end of sentence
    state = {"n": 0}

    def process(ids: Any, logits: Any) -> None:
        n = state["n"]
        state["n"] += 1
        if n < len(wanted):
            logits[wanted[n]] = 1e6
        else:
            logits[end] = 1e5

    return process


def test_the_end_of_the_model_is_the_end_of_sentence(llm: Llama) -> None:
    assert llm.token_to_bytes(1).decode() == "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(("thinking", "seed"), [(False, 0), (True, 1)])
def test_a_call_once_begun_follows_the_schema(llm: Llama, thinking: bool, seed: int) -> None:
    before = f"no call here: {START}</think>" if thinking else "let me see "
    answer = llm.create_chat_completion(
        [USER],
        tools=[WEATHER],
        thinking=thinking,
        logits_processor=speaks(llm, f"{before}\n\n{START}"),
        seed=seed,
        max_tokens=300,
    )
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    assert "unparsed" not in choice
    message = choice["message"]
    assert "DSML" not in str(message["content"])
    if thinking:
        assert message["reasoning_content"].startswith("no call here: ")
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(
            llm.tokenize(before, special=True)
        )
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "weather"
        assert isinstance(arguments["wind"], bool)
        assert 0 <= arguments["days"] <= 9


def test_a_named_tool_is_called_and_no_other(llm: Llama) -> None:
    choice: Any = {"type": "function", "function": {"name": "clock"}}
    answer = llm.create_chat_completion(
        [USER],
        tools=[WEATHER, CLOCK],
        tool_choice=choice,
        parallel_tool_calls=False,
        logits_processor=speaks(llm, f'\n\n{START}\n<｜DSML｜invoke name="'),
        max_tokens=200,
        temperature=0,
    )["choices"][0]
    assert [c["function"]["name"] for c in answer["message"]["tool_calls"]] == ["clock"]
    with pytest.raises(errors.ArgumentError, match="one of the tools"):
        llm.create_chat_completion(
            [USER], tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "clock"}}
        )


def test_a_required_call_does_not_end_before_it_was_made(llm: Llama) -> None:
    ends = speaks(llm, "")
    answer = llm.create_chat_completion(
        [USER], tools=[CLOCK], tool_choice="required", logits_processor=ends, max_tokens=5
    )
    assert answer["choices"][0]["finish_reason"] == "length"  # the model wanted to end at once
    free = llm.create_chat_completion([USER], tools=[CLOCK], logits_processor=speaks(llm, ""), max_tokens=5)
    assert free["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["u", "v"]}},
                    "required": ["a", "b"],
                    "additionalProperties": False,
                },
            },
        },
    ],
)
def test_response_formats_are_enforced(llm: Llama, response_format: Any, thinking: bool) -> None:
    """A peer ignored json_schema."""
    is_schema = response_format["type"] == "json_schema"
    said = ("hm</think>" if thinking else "") + "```json\n" + ("" if is_schema else '{"q": [1, 2]}')
    answer = llm.create_chat_completion(
        [USER],
        response_format=response_format,
        thinking=thinking,
        logits_processor=speaks(llm, said),
        seed=4,
        max_tokens=300,
    )
    message = answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "stop", message
    value = json.loads(message["content"] or "")
    if is_schema:
        assert isinstance(value["a"], bool)
        assert value["b"] in ("u", "v")
    else:
        assert value == {"q": [1, 2]}
    if thinking:
        assert message["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    "response_format",
    [{"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 3}}, {}],
)
def test_other_response_formats_are_named(llm: Llama, response_format: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="response_format"):
        llm.create_chat_completion([USER], response_format=response_format)


def test_a_schema_that_cannot_be_expressed_is_named(llm: Llama) -> None:
    bad = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}
    with pytest.raises((errors.ChatError, errors.ArgumentError), match="nowhere"):
        llm.create_chat_completion([USER], response_format=bad, max_tokens=2)


def test_a_grammar_of_ones_own_holds_after_the_reasoning(llm: Llama) -> None:
    answer = llm.create_chat_completion(
        [USER],
        thinking=True,
        grammar='root ::= "yes" | "no"',
        logits_processor=speaks(llm, "let me think</think>"),
        max_tokens=50,
    )["choices"][0]["message"]
    assert answer["reasoning_content"] == "let me think"
    assert answer["content"] in ("yes", "no")
    with pytest.raises(errors.ArgumentError, match="contradicts"):
        llm.create_chat_completion([USER], grammar='root ::= "a"', response_format={"type": "json_object"})


def test_streams_of_forced_calls_add_up_to_the_message_and_leak_no_markup(llm: Llama) -> None:
    parts = [
        START + '\n<｜DSML｜invoke name="weather">\n',
        '<｜DSML｜parameter name="wind" string="false">true</｜DSML｜parameter>',
        '\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n',
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    ]
    text = "Hello \n\n" + "".join(parts)
    content, arguments, names = "", "", []
    last: Any = None
    for chunk in llm.create_chat_completion(
        [USER], tools=[WEATHER], stream=True, logits_processor=speaks(llm, text), max_tokens=200
    ):
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content", "")
        assert "<" not in delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            arguments += call["function"].get("arguments", "")
            names += [call["function"]["name"]] if "name" in call["function"] else []
        last = chunk
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert names == ["weather"]
    assert json.loads(arguments) == {"wind": True, "days": 3}
    assert content.strip() == "Hello"


# --- ten turns ---


def test_ten_turns_with_thinking_evaluate_only_what_is_new(llm: Llama) -> None:
    """Reasoning is dropped from the history, and that never costs more than the last answer again."""
    messages: list[Any] = [{"role": "system", "content": "You are terse. " * 20}]
    rng = np.random.default_rng(2)
    n_last_answer = 0
    for turn in range(10):
        text = " ".join(f"word{i}" for i in rng.integers(0, 999, 12))
        messages.append({"role": "user", "content": text})
        said = f"reasoning number {turn} " * 6 + f"</think>answer number {turn}"
        answer = llm.create_chat_completion(
            messages, thinking=True, logits_processor=speaks(llm, said), max_tokens=120
        )
        usage = answer["usage"]
        n_new = len(llm.tokenize(text))
        n_prefilled = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        if turn > 0:
            assert n_prefilled <= n_new + n_last_answer + 256
            assert n_prefilled < usage["prompt_tokens"] - 100  # and that is not nearly everything
        message = answer["choices"][0]["message"]
        assert message["content"] == f"answer number {turn}"
        n_last_answer = len(llm.tokenize(message["content"]))
        messages.append(message)


def in_small_pieces(llm: Llama, text: str) -> list[int]:
    """Return ids of a text that no tokeniser would give: a token for every character."""
    ids: list[int] = []
    for i, part in enumerate(text.split("｜DSML｜")):
        ids += llm.tokenize("｜DSML｜", special=True) if i else []
        for j, piece in enumerate(part.split("</think>")):
            ids += llm.tokenize("</think>", special=True) if j else []
            for character in piece:
                ids += llm.tokenize(character)
    return ids


def speaks_ids(ids: list[int]) -> Any:
    """Return a processor that makes the model say these ids and end."""
    wanted = iter([*ids, 1])

    def process(_: Any, logits: Any) -> None:
        logits[next(wanted)] = 1e6

    return process


CALL = (
    START + '\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="wind" string="false">true'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_sampled_calls_and_reasoning_are_replayed_id_by_id(
    llm: Llama, thinking: bool, is_streamed: bool
) -> None:
    sampled = in_small_pieces(llm, ("let me think</think>" if thinking else "") + f"I look.\n\n{CALL}")
    options: dict[str, Any] = {"tools": [WEATHER], "thinking": thinking, "temperature": 0}
    spoken: dict[str, Any] = {**options, "logits_processor": speaks_ids(sampled), "max_tokens": 400}
    if is_streamed:
        message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
        calls: list[dict[str, Any]] = []
        for chunk in llm.create_chat_completion([USER], stream=True, **spoken):
            delta: Any = chunk["choices"][0]["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    calls.append({**piece, "function": {**piece["function"], "arguments": ""}})
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        message["tool_calls"] = calls
        n_prompt = len(llm.format_chat_tokens([USER], tools=[WEATHER], thinking=thinking))
    else:
        first = llm.create_chat_completion([USER], **spoken)
        message = dict(first["choices"][0]["message"])
        assert first["choices"][0]["finish_reason"] == "tool_calls"
        n_prompt = first["usage"]["prompt_tokens"]
    # as a program puts it back: arguments read and written again
    function = message["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])
    result = {"role": "tool", "content": "calm", "tool_call_id": message["tool_calls"][0]["id"]}
    history: list[Any] = [USER, message, result]
    ids = llm.format_chat_tokens(history, tools=[WEATHER], thinking=thinking)
    assert ids[n_prompt : n_prompt + len(sampled)] == sampled
    second = llm.create_chat_completion(history, max_tokens=1, **options)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt + len(sampled)

    function["arguments"]["days"] = 4  # not what was sampled
    ids = llm.format_chat_tokens(history, tools=[WEATHER], thinking=thinking)
    assert ids[n_prompt : n_prompt + len(sampled)] != sampled


def test_a_quick_task_is_answered_in_plain_text(llm: Llama) -> None:
    """Its answer is content also with thinking=True, and is not evaluated again."""
    asked: list[Any] = [{"role": "user", "content": "Is it raining?", "task": "query"}]
    sampled = in_small_pieces(llm, "rain now")
    answer = llm.create_chat_completion(
        asked, thinking=True, logits_processor=speaks_ids(sampled), max_tokens=50
    )
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "rain now"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    follow_up = [*asked, choice["message"], {"role": "user", "content": "And tomorrow?"}]
    again = llm.create_chat_completion(follow_up, max_tokens=1)
    n_before = answer["usage"]["prompt_tokens"] + len(sampled)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_before
    constrained = llm.create_chat_completion(
        asked, thinking=True, grammar='root ::= "yes"', max_tokens=20, temperature=0
    )
    assert constrained["choices"][0]["message"]["content"] == "yes"


def test_a_full_context_is_an_error_or_drops_the_oldest_turns(llm: Llama) -> None:
    history: list[Any] = [{"role": "system", "content": "Remember me."}]
    for i in range(30):
        history += [
            {"role": "user", "content": f"question {i} " * 20},
            {"role": "assistant", "content": f"answer {i} " * 20},
        ]
    history.append({"role": "user", "content": "last question"})
    with pytest.raises(errors.ContextFullError):
        llm.create_chat_completion(history, max_tokens=8)
    answer = llm.create_chat_completion(history, max_tokens=8, on_context_full="drop_oldest")
    assert answer["usage"]["prompt_tokens"] <= llm.n_ctx - 8
    shown = llm.detokenize(llm._session.ids, special=True)
    assert "Remember me." in shown
    assert "last question" in shown
    assert "question 29" in shown
    assert "question 1 " not in shown
    with pytest.raises(errors.ContextFullError):
        llm.create_chat_completion([{"role": "user", "content": "x " * 3000}], on_context_full="drop_oldest")
