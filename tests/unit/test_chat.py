"""Messages, tools and options: what is accepted, how it is normalised, what every refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyllama_dsv4 import chat, responses
from pyllama_dsv4.chat import AnswerReader, ChatPrompt, ChatRequest
from pyllama_dsv4.chat_request import N_NESTED_MAX
from pyllama_dsv4.errors import ArgumentError, ChatError

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def call(name: str = "add", arguments: Any = "{}", **members: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **members}


def asks(*calls: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **members}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# --- messages ---


def test_text_and_lists_of_text_parts_become_text() -> None:
    request = ChatRequest.create(
        [
            {"role": "system", "content": ["a", {"type": "text", "text": "b"}]},
            {"role": "user", "content": []},
            {"role": "assistant", "content": ""},
            {"role": "assistant", "content": None, "reasoning_content": "r"},
        ]
    )
    assert [m["content"] for m in request.messages] == ["a\n\nb", "", "", ""]


def test_an_answer_of_ours_can_be_put_back() -> None:
    answer: chat.AssistantMessage = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "sum",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        ],
    }
    request = ChatRequest.create([USER, answer, {"role": "tool", "content": "1", "tool_call_id": "call_1"}])
    assert request.messages[1] == {**answer, "content": ""}
    assert request.messages[2] == {"role": "tool", "content": "1", "tool_call_id": "call_1"}


def test_empty_members_that_client_libraries_add_are_ignored() -> None:
    request = ChatRequest.create([{**USER, "name": None, "annotations": []}])
    assert request.messages == [USER]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, {}),
        ("", {}),
        ({}, {}),
        ('{"b": 1, "a": "ü"}', {"b": 1, "a": "ü"}),
        ({"b": 1.5, "a": [None, True, {"x": ()}]}, {"b": 1.5, "a": [None, True, {"x": []}]}),
    ],
)
def test_arguments_are_text_dict_or_none(arguments: Any, expected: dict[str, Any]) -> None:
    request = ChatRequest.create([asks(call(arguments=arguments))])
    text = request.messages[0]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(text) == expected
    assert list(json.loads(text)) == list(expected)  # in their order


def test_results_without_an_id_answer_calls_without_an_id() -> None:
    request = ChatRequest.create([asks(call(), call()), {"role": "tool", "content": "1", "name": "add"}])
    assert request.messages[1] == {"role": "tool", "content": "1"}


@pytest.mark.parametrize(
    ("messages", "key"),
    [
        ("hi", "messages"),
        (5, "messages"),
        (USER, "messages"),
        (None, "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([USER, {"role": "root", "content": "x"}], "messages[1].role"),
        ([{**USER, "task": "summary"}], "messages[0].task"),
        ([{**USER, "task": ["query"]}], "messages[0].task"),
        ([{**USER, "task": "query"}, USER], "messages[0].task"),
        ([{"role": "system", "content": "x", "task": "query"}], "messages[0].task"),
        ([USER, {"role": ["user"], "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": b"x"}], "messages[0].content"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["a", {"type": "image_url"}]}], "messages[0].content[1].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": "Bob"}], "messages[0].name"),
        ([{"role": "user", "content": "x", "reasoning_content": "y"}], "messages[0].reasoning_content"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": "", "reasoning_content": 1}], "messages[0].reasoning_content"),
        ([{"role": "assistant", "content": "", "tool_calls": "add"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "", "tool_calls": call()}], "messages[0].tool_calls"),
        ([asks("add")], "messages[0].tool_calls[0]"),  # type: ignore[arg-type]
        ([asks({"type": "custom"})], "messages[0].tool_calls[0].type"),
        ([asks({"type": "function"})], "messages[0].tool_calls[0].function"),
        ([asks(call(name=""))], "messages[0].tool_calls[0].function.name"),
        ([asks(call(name='a"b'))], "messages[0].tool_calls[0].function.name"),
        ([asks(call(name="a\x07"))], "messages[0].tool_calls[0].function.name"),
        ([asks(call(arguments="[1]"))], "messages[0].tool_calls[0].function.arguments"),
        ([asks(call(arguments='{"a":'))], "messages[0].tool_calls[0].function.arguments"),
        ([asks(call(arguments="[" * 100_000))], "messages[0].tool_calls[0].function.arguments"),
        ([asks(call(arguments='{"a": NaN}'))], "messages[0].tool_calls[0].function.arguments.a"),
        ([asks(call(arguments={"a": 2**63}))], "messages[0].tool_calls[0].function.arguments.a"),
        ([asks(call(arguments={"a": ["\udfff"]}))], "messages[0].tool_calls[0].function.arguments.a[0]"),
        ([asks(call(arguments={1: 2}))], "messages[0].tool_calls[0].function.arguments"),
        ([asks(call(arguments={"a": object()}))], "messages[0].tool_calls[0].function.arguments.a"),
        ([asks(call(id="x"), call(id="x"))], "messages[0].tool_calls[1].id"),
        ([asks(call(id=7))], "messages[0].tool_calls[0].id"),
        ([{"role": "tool", "content": "1"}], "messages[0].tool_call_id"),
        ([asks(call(id="x")), {"role": "tool", "content": "1"}], "messages[1].tool_call_id"),
        (
            [asks(call(id="x")), {"role": "tool", "content": "1", "tool_call_id": "y"}],
            "messages[1].tool_call_id",
        ),
        (
            [asks(call(id="x")), {"role": "tool", "content": "1", "tool_call_id": ["x"]}],
            "messages[1].tool_call_id",
        ),
    ],
)
def test_refused_messages_are_named_by_their_place(messages: Any, key: str) -> None:
    with pytest.raises(ChatError) as caught:
        ChatRequest.create(messages)
    assert caught.value.key == key
    assert key in str(caught.value)
    assert caught.value.found is not None
    assert caught.value.expected is not None


def test_a_refusal_in_full() -> None:
    with pytest.raises(ChatError) as caught:
        ChatRequest.create([USER, {"role": "user", "content": None}])
    assert str(caught.value) == (
        "cannot make a prompt of messages: 'messages[1].content' is not usable;"
        " found None, expected text or a list of text parts"
    )
    with pytest.raises(
        ChatError, match=r"^cannot make a prompt of tools: 'tools\[0\]' is not usable; found str"
    ):
        ChatRequest.create([USER], tools=["add"])  # type: ignore[list-item]
    with pytest.raises(
        ChatError, match=r"^cannot make a prompt of the JSON schema: 'json_schema' is not usable"
    ):
        ChatRequest.create([USER], json_schema=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("calls", "call_id", "expected"),
    [
        ([], None, "an assistant message with tool_calls before it"),
        ([call(id="x")], None, "the id of a call in the assistant message before"),
        ([call(id="x"), call(id="y")], "z", r"\('x', 'y'\)"),
        ([call()], "z", "no calls with an id"),
    ],
)
def test_a_result_without_its_call_says_what_calls_there_are(calls: Any, call_id: Any, expected: str) -> None:
    before = [asks(*calls)] if calls else [USER]
    with pytest.raises(ChatError, match=expected):
        ChatRequest.create([*before, {"role": "tool", "content": "1", "tool_call_id": call_id}])


# --- tools ---


def function(**members: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": members}]


@pytest.mark.parametrize(
    ("tools", "key"),
    [
        ("add", "tools"),
        (TOOL, "tools"),
        (["add"], "tools[0]"),
        ([{"function": {"name": "add"}}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        (function(), "tools[0].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(name="a", description=1), "tools[0].function.description"),
        (function(name="a", parameters=None), "tools[0].function.parameters"),
        (function(name="a", parameters={"x": float("inf")}), "tools[0].function.parameters.x"),
        ([TOOL, TOOL], "tools[1].function.name"),
        ([{**TOOL, "strict": True}], "tools[0].strict"),
    ],
)
def test_refused_tools_are_named_by_their_place(tools: Any, key: str) -> None:
    with pytest.raises(ChatError) as caught:
        ChatRequest.create([USER], tools=tools)
    assert caught.value.key == key


def test_nesting_is_bounded() -> None:
    def tool(depth: int) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "a", "x": nested(depth)}}

    ChatRequest.create([USER], tools=[tool(N_NESTED_MAX - 1)])
    with pytest.raises(ChatError, match="nesting"):
        ChatRequest.create([USER], tools=[tool(N_NESTED_MAX)])


def test_tools_are_copied_with_all_their_members() -> None:
    tool = {"type": "function", "function": {"strict": True, "name": "a", "parameters": {"z": 1, "y": (2,)}}}
    request = ChatRequest.create([USER], tools=[tool])
    assert json.dumps(request.tools) == json.dumps([tool])
    assert request.tools[0] is not tool


# --- options ---


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"thinking": 1}, "thinking"),
        ({"add_generation_prompt": None}, "add_generation_prompt"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"thinking": True, "reasoning_effort": "medium"}, "reasoning_effort"),
        ({"reasoning_effort": "max"}, "reasoning_effort"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"json_schema": {}, "tools": [TOOL]}, "json_schema"),
    ],
)
def test_refused_options_are_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ChatRequest.create([USER], **options)
    assert caught.value.key == key


def test_a_call_can_be_required() -> None:
    request = ChatRequest.create([USER], tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    body = json.loads(request.to_json())
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)


def test_a_schema_that_is_not_one_is_refused() -> None:
    with pytest.raises(ChatError) as caught:
        ChatRequest.create([USER], json_schema="{}")  # type: ignore[arg-type]
    assert caught.value.key == "json_schema"


def test_the_request_is_ascii_json_with_what_was_asked_for() -> None:
    request = ChatRequest.create(
        [{"role": "user", "content": "ü\x00\U0001f600"}], tools=[TOOL], thinking=True, reasoning_effort="max"
    )
    text = request.to_json()
    assert text.isascii()
    assert "\x00" not in text
    assert json.loads(text) == {
        "messages": [{"role": "user", "content": "ü\x00\U0001f600"}],
        "add_generation_prompt": True,
        "thinking": True,
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "template_kwargs": {"reasoning_effort": "max"},
    }
    plain = ChatRequest.create([USER], add_generation_prompt=False)
    assert json.loads(plain.to_json()) == {
        "messages": [USER],
        "add_generation_prompt": False,
        "thinking": False,
    }


# --- prompts and answers ---


def test_a_prompt_is_read_from_json() -> None:
    body = {
        "tokens": [0, 5],
        "parts": [{"text": "<B>", "is_input": False}, {"text": "hi", "is_input": True}],
        "parser": {"format": 2},
        "grammar": "root ::= x",
        "grammar_lazy": True,
        "grammar_triggers": [{"type": "word", "value": "<x>"}],
        "generation_tokens": [7],
        "preserved_tokens": [7],
        "stops": [],
        "supports_thinking": True,
    }
    prompt = ChatPrompt.from_json(json.dumps(body))
    assert prompt.text == "<B>hi"
    assert prompt.parts[1].is_input
    assert json.loads(prompt.parser_state) == {"format": 2}
    assert prompt.grammar_triggers == [("word", "<x>")]


class Script:
    """A native parser that answers with prepared JSON and notes what it was given."""

    def __init__(self, *deltas: dict[str, Any], complete: bool = True, **message: Any) -> None:
        self.deltas = list(deltas)
        message = {"content": "", "reasoning_content": "", "tool_calls": [], **message}
        self.end = {"message": message, "complete": complete}
        self.seen: list[tuple[str, bool]] = []

    def __call__(self, text: str, is_final: bool) -> str:
        self.seen.append((text, is_final))
        return json.dumps({"deltas": self.deltas.pop(0), **(self.end if is_final else {})})


def test_plain_answer() -> None:
    script = Script({"content": "a"}, {}, {"content": "b"}, content="ab")
    reader = AnswerReader(script)
    assert reader.feed("a") == {"content": "a"}
    assert reader.feed("") == {}
    assert reader.feed("b") == {}
    assert reader.finish("length") == (
        {"content": "b"},
        {"role": "assistant", "content": "ab"},
        "length",
        True,
    )
    assert script.seen == [("a", False), ("b", False), ("", True)]
    assert reader.raw == "ab"


def test_content_beside_calls_stays() -> None:
    calls = [{"name": "f", "arguments": "{}"}]
    reader = AnswerReader(
        Script({"tool_calls": [{"index": 0, **calls[0]}]}, {}, content="a", tool_calls=calls)
    )
    reader.feed("x")
    assert reader.finish("stop")[1]["content"] == "a"


def test_an_answer_without_calls_just_stops() -> None:
    assert AnswerReader(Script({}, content="a")).finish("stop")[2:] == ("stop", True)


def test_calls_are_numbered_and_named_once() -> None:
    calls = [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g", "arguments": "{}"}]
    script = Script(
        {"reasoning_content": "r"},
        {"tool_calls": [{"index": 0, "name": "f", "arguments": "{"}]},
        {
            "tool_calls": [
                {"index": 0, "arguments": '"a": 1}'},
                {"index": 1, "name": "g", "arguments": "{}"},
            ]
        },
        {},
        tool_calls=calls,
        reasoning_content="r",
    )
    reader = AnswerReader(script)
    assert reader.feed("1") == {"reasoning_content": "r"}
    first = reader.feed("2")["tool_calls"]
    second = reader.feed("3")["tool_calls"]
    _, message, *end = reader.finish("stop")
    ids = [first[0]["id"], second[1]["id"]]
    assert len(set(ids)) == 2
    assert first == [
        {"index": 0, "id": ids[0], "type": "function", "function": {"name": "f", "arguments": "{"}}
    ]
    assert second == [
        {"index": 0, "function": {"arguments": '"a": 1}'}},
        {"index": 1, "id": ids[1], "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "r",
        "tool_calls": [{"id": i, "type": "function", "function": c} for i, c in zip(ids, calls, strict=True)],
    }
    assert end == ["tool_calls", True]


@pytest.mark.parametrize(
    ("given", "arguments", "complete", "reason", "follows_format"),
    [
        ("stop", "{}", True, "tool_calls", True),
        ("length", "{}", True, "length", True),
        ("stop", '{"a":', True, "stop", False),
        ("length", '{"a":', False, "length", True),
        ("stop", "{}", False, "stop", False),
        ("stop", "[" * 100_000, True, "stop", False),
    ],
)
def test_finish_reason_says_tool_calls_only_for_whole_calls(
    given: Any, arguments: str, complete: bool, reason: str, follows_format: bool
) -> None:
    calls = [{"name": "f", "arguments": arguments}]
    delta = {"tool_calls": [{"index": 0, "name": "f", "arguments": arguments}]}
    reader = AnswerReader(Script(delta, {}, complete=complete, tool_calls=calls))
    reader.feed("<x>")
    _, message, *end = reader.finish(given)
    assert end == [reason, follows_format]
    assert message["tool_calls"][0]["function"] == calls[0]


# --- OpenAI's shapes ---


def test_shapes() -> None:
    head = responses.ResponseHead("chatcmpl-1", 1700000000, "m", "fp")
    counts = responses.usage(5, 3, 2, 1)
    assert counts == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    common = {"id": "chatcmpl-1", "created": 1700000000, "model": "m", "system_fingerprint": "fp"}
    message: chat.AssistantMessage = {"role": "assistant", "content": "x"}
    choice = responses.chat_choice(0, message, "stop")
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert responses.chat_choice(1, message, "stop", "<x")["unparsed"] == "<x"
    assert responses.chat_completion(head, [choice], counts) == {
        **common,
        "object": "chat.completion",
        "choices": [choice],
        "usage": counts,
    }
    assert responses.chat_completion_chunk(head, 0, {"role": "assistant"}) == {
        **common,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"role": "assistant"}, "logprobs": None, "finish_reason": None}],
    }
    last = responses.chat_completion_chunk(head, 2, {}, "length", counts, "y")
    assert last["usage"] == counts
    assert last["choices"][0] == {
        "index": 2,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
        "unparsed": "y",
    }
    text = responses.completion(head, 0, "abc", "stop", counts)
    assert text == {
        **common,
        "object": "text_completion",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
        "usage": counts,
    }
    assert "usage" not in responses.completion(head, 0, "abc")


def test_heads_differ() -> None:
    first, second = (responses.ResponseHead.new("cmpl", "m", "fp") for _ in range(2))
    assert first.id != second.id
    assert first.id.startswith("cmpl-")
