"""What may be said in a conversation: checking messages, tools and options.

Owns which of them are accepted and how they are normalised for the native side (``ChatRequest``). Leaves the text of
the prompt and its token ids to ``native/capi/pyl-chat.cpp``. Pure Python: it never loads the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ArgumentError, ChatError

__all__ = ["TASKS", "ChatRequest", "ReasoningEffort", "ToolChoice"]

Role = Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
ReasoningEffort = Literal["high", "max"]
ToolMode = Literal["auto", "required", "none"]
ToolChoice = ToolMode | Mapping[str, Any]

ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
"""Quick tasks, by the token that asks for one. Source: DeepSeek's ``encoding_dsv4.py``."""
REASONING_EFFORTS: tuple[ReasoningEffort, ...] = ("high", "max")
TOOL_CHOICES: tuple[ToolMode, ...] = ("auto", "required", "none")

TEXT_PARTS_SEPARATOR = "\n\n"
"""Between the text parts of one message. Source: DeepSeek's encoder joins the text blocks of a turn so."""

N_NESTED_MAX = 64
"""Deepest nesting of lists and dictionaries in schemas and arguments; the native side recurses over them."""

INT_MIN, INT_MAX = -(2**63), 2**63 - 1  # the native side holds JSON integers in 64 bits

_MEMBERS: dict[Role, frozenset[str]] = {
    "system": frozenset({"role", "content"}),
    "developer": frozenset({"role", "content", "task"}),
    "user": frozenset({"role", "content", "task"}),
    "assistant": frozenset({"role", "content", "reasoning_content", "tool_calls", "task"}),
    # the name repeats what tool_call_id says
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
    "latest_reminder": frozenset({"role", "content"}),
}


@dataclass(frozen=True)
class ChatRequest:
    """A checked conversation with its options, ready to be formatted.

    Attributes:
        messages: Messages in normal form: ``content`` is text, arguments of tool calls are JSON text.
        tools: OpenAI function tools, or an empty list.
        tool_choice: Whether the answer may, must or must not call a tool.
        tool_name: The only tool that may be called, or ``None``.
        parallel_tool_calls: Whether one answer may call several tools.
        thinking: Whether the model reasons before it answers.
        reasoning_effort: Paragraph on effort in front of the prompt; ``None``: no such paragraph.
        drop_thinking: Whether the reasoning of past turns is left out where the format allows it (no tools in use).
        json_schema: JSON schema that the answer must follow, or ``None``.
        add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: ToolMode = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    thinking: bool = False
    reasoning_effort: ReasoningEffort | None = None
    drop_thinking: bool = True
    json_schema: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    @property
    def is_task(self) -> bool:
        """Whether the answer is that of a quick task: plain text, without reasoning and calls."""
        return "task" in self.messages[-1]

    @property
    def has_reasoning(self) -> bool:
        """Whether the answer begins with reasoning."""
        return self.thinking and not self.is_task

    @classmethod
    def create(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool = False,
        reasoning_effort: ReasoningEffort | None = None,
        drop_thinking: bool = True,
        response_format: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> ChatRequest:
        """Check and normalise a conversation as users write it.

        Args:
            messages: OpenAI messages with the roles of ``ROLES``. ``content`` is text or a list of text parts
                (joined by an empty line); an assistant's may be ``None`` beside ``tool_calls``. Arguments of
                tool calls are JSON text, a dictionary, or ``None`` for no arguments. A ``task`` of ``TASKS`` beside
                the content of the last message, or of one that an assistant's follows, asks for that quick task.
            tools: ``{"type": "function", "function": {"name", "description", "parameters"}}``; other members
                of ``function`` reach the prompt as they are.
            tool_choice: See the attribute. ``"none"`` still shows the tools to the model; OpenAI's
                ``{"type": "function", "function": {"name": ...}}`` demands a call of that tool.
            parallel_tool_calls: See the attribute.
            thinking: See the attribute.
            reasoning_effort: See the attribute; needs ``thinking``.
            drop_thinking: See the attribute; False needs ``thinking``.
            response_format: ``{"type": "text"}``, ``{"type": "json_object"}`` (with an optional ``schema``), or
                ``{"type": "json_schema", "json_schema": {"schema": {...}}}``; sets ``json_schema``.
            json_schema: See the attribute.
            add_generation_prompt: See the attribute.

        Raises:
            ChatError: A message, a tool or the schema cannot become part of a prompt; ``key`` names the
                place, such as ``messages[2].role``.
            ArgumentError: An option has a value outside its range, or contradicts another.
        """
        for key, flag in (
            ("thinking", thinking),
            ("drop_thinking", drop_thinking),
            ("parallel_tool_calls", parallel_tool_calls),
            ("add_generation_prompt", add_generation_prompt),
        ):
            if not isinstance(flag, bool):
                raise _argument_error(key, flag, "True or False")
        if reasoning_effort is not None:
            if reasoning_effort not in REASONING_EFFORTS:
                raise _argument_error("reasoning_effort", reasoning_effort, "None, 'high' or 'max'")
            if not thinking:
                raise ArgumentError(
                    "'reasoning_effort' contradicts thinking=False",
                    key="reasoning_effort",
                    found=repr(reasoning_effort),
                    hint="Pass thinking=True as well, or leave reasoning_effort out",
                )
        if not drop_thinking and not thinking:
            raise ArgumentError(
                "'drop_thinking' contradicts thinking=False, which shows no reasoning at all",
                key="drop_thinking",
                found="False",
                hint="Pass thinking=True as well, or leave drop_thinking out",
            )
        checked_tools = _tools(tools)
        tool_name: str | None = None
        if isinstance(tool_choice, Mapping):
            tool_name = _chosen_tool(tool_choice, checked_tools)
            mode: ToolMode = "required"
        elif tool_choice in TOOL_CHOICES:
            mode = tool_choice
        else:
            raise _argument_error("tool_choice", tool_choice, "'auto', 'required', 'none' or a function")
        if mode == "required" and not checked_tools:
            raise ArgumentError(
                "'tool_choice' asks for a call, and there is nothing to call",
                key="tool_choice",
                found="no tools",
                expected="at least one tool",
            )
        if response_format is not None:
            if json_schema is not None:
                raise ArgumentError("'response_format' contradicts json_schema", key="response_format")
            json_schema = _schema_of(response_format)
        if json_schema is not None:
            if not isinstance(json_schema, Mapping):
                raise _chat_error("json_schema", _type_name(json_schema), "a dictionary")
            json_schema = _json_value(json_schema, "json_schema")
            if checked_tools:
                raise ArgumentError(
                    "'json_schema' contradicts tools: an answer is either JSON or may call tools",
                    key="json_schema",
                    hint="Leave one of the two out",
                )
        checked_messages = _messages(messages)
        if "task" in checked_messages[-1] and (json_schema is not None or mode == "required"):
            raise ArgumentError(
                "a task contradicts response_format and a required call: its answer is plain text",
                key=f"messages[{len(checked_messages) - 1}].task",
            )
        return cls(
            messages=checked_messages,
            tools=checked_tools,
            tool_choice=mode,
            tool_name=tool_name,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            drop_thinking=drop_thinking,
            json_schema=None if json_schema is None else dict(json_schema),
            add_generation_prompt=add_generation_prompt,
        )

    def to_json(self) -> str:
        """Return the request that ``pyl_chat_format`` takes, as ASCII text without NUL bytes."""
        body: dict[str, Any] = {
            "messages": self.messages,
            "add_generation_prompt": self.add_generation_prompt,
            "thinking": self.thinking,
        }
        if self.tools:
            body["tools"] = self.tools
            body["tool_choice"] = self.tool_choice
            body["parallel_tool_calls"] = self.parallel_tool_calls
        if self.tool_name is not None:
            body["tool_name"] = self.tool_name
        if self.json_schema is not None:
            body["json_schema"] = self.json_schema
        variables: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        if not self.drop_thinking:
            variables["drop_thinking"] = False
        if variables:
            body["template_kwargs"] = variables
        return json.dumps(body, allow_nan=False)


def _chat_error(key: str, found: str, expected: str, hint: str | None = None) -> ChatError:
    what = "tools" if key.startswith("tools") else "the JSON schema" if key == "json_schema" else "messages"
    return ChatError(
        f"cannot make a prompt of {what}: '{key}' is not usable",
        key=key,
        found=found,
        expected=expected,
        hint=hint,
    )


def _argument_error(key: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(
        f"'{key}' has a value outside its range", key=key, found=repr(found), expected=expected
    )


def _type_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _text(value: object, key: str) -> str:
    """Return ``value`` if it is text that has a UTF-8 form."""
    if not isinstance(value, str):
        raise _chat_error(key, _type_name(value), "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _chat_error(
            key,
            f"a lone surrogate at index {error.start}",
            "text that can be encoded as UTF-8",
            "Decode the source with errors='replace'",
        ) from None
    return value


def _content(value: object, key: str) -> str:
    """Return the text of a message from text or a list of text parts."""
    if isinstance(value, str):
        return _text(value, key)
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise _chat_error(key, _type_name(value), "text or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        at = f"{key}[{i}]"
        if isinstance(part, str):
            texts.append(_text(part, at))
            continue
        if not isinstance(part, Mapping):
            raise _chat_error(at, _type_name(part), "{'type': 'text', 'text': ...}")
        if part.get("type") != "text":
            raise _chat_error(
                f"{at}.type",
                repr(part.get("type")),
                "'text'",
                "This model takes text only",
            )
        texts.append(_text(part.get("text"), f"{at}.text"))
    return TEXT_PARTS_SEPARATOR.join(texts)


def _json_value(value: object, key: str, depth: int = 0) -> Any:
    """Return a copy of ``value`` that JSON, and the native side's JSON, can hold without a change."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, key)
    if isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise _chat_error(key, str(value), "an integer of 64 bits", "Pass larger numbers as text")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _chat_error(key, repr(value), "a finite number")
        return value
    if depth >= N_NESTED_MAX:
        raise _chat_error(key, "deeper nesting", f"at most {N_NESTED_MAX} levels of lists and dictionaries")
    if isinstance(value, Mapping):
        out = {}
        for name, member in value.items():
            if not isinstance(name, str):
                raise _chat_error(key, f"the key {name!r}", "text as keys")
            out[_text(name, f"{key}: a key")] = _json_value(member, f"{key}.{name}", depth + 1)
        return out
    if isinstance(value, (list, tuple)):
        return [_json_value(member, f"{key}[{i}]", depth + 1) for i, member in enumerate(value)]
    raise _chat_error(key, _type_name(value), "None, a bool, a number, text, a list or a dictionary")


def _name(value: object, key: str) -> str:
    """Return the name of a tool if the call markup can carry it: it stands unescaped between quotes."""
    name = _text(value, key)
    if not name or any(c in '"<>' or c.isspace() or not c.isprintable() for c in name):
        raise _chat_error(key, repr(name), "a name without spaces, quotes, '<' and '>'")
    return name


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise _chat_error("tools", _type_name(tools), "a list of function tools")
    out: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        at = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            raise _chat_error(at, _type_name(tool), "{'type': 'function', 'function': {...}}")
        if tool.get("type") != "function":
            raise _chat_error(f"{at}.type", repr(tool.get("type")), "'function'")
        _refuse_unknown(tool, frozenset({"type", "function"}), at)
        if not isinstance(tool.get("function"), Mapping):
            raise _chat_error(f"{at}.function", _type_name(tool.get("function")), "a dictionary")
        function = _json_value(tool["function"], f"{at}.function")
        name = _name(function.get("name"), f"{at}.function.name")
        if any(name == other["function"]["name"] for other in out):
            raise _chat_error(
                f"{at}.function.name", f"'{name}' a second time", "a different name for each tool"
            )
        for member, kind in (("description", str), ("parameters", dict)):
            if member in function and not isinstance(function[member], kind):
                raise _chat_error(
                    f"{at}.function.{member}",
                    _type_name(function[member]),
                    "text" if kind is str else "a JSON schema (a dictionary)",
                    "Leave it out when there is none",
                )
        out.append({"type": "function", "function": function})
    return out


def _chosen_tool(choice: Mapping[str, Any], tools: list[dict[str, Any]]) -> str:
    """Return the name in OpenAI's form of a tool choice."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _argument_error("tool_choice", dict(choice), "{'type': 'function', 'function': {'name': ...}}")
    if all(name != tool["function"]["name"] for tool in tools):
        known = ", ".join(tool["function"]["name"] for tool in tools) or "no tools"
        raise _argument_error("tool_choice", name, f"one of the tools ({known})")
    return name


def _schema_of(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema in OpenAI's form of a response format; None for text."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    elif kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
    else:
        raise _argument_error(
            "response_format",
            response_format,
            "a dictionary with type 'text', 'json_object' or 'json_schema'",
        )
    if not isinstance(schema, Mapping):
        raise _argument_error("response_format", response_format, "a schema (a dictionary) in it")
    return schema


def _refuse_unknown(value: Mapping[str, Any], known: frozenset[str], key: str) -> None:
    """Refuse members that would be dropped silently; empty ones, which client libraries add, say nothing."""
    for member in value:
        if member not in known and value[member] not in (None, [], {}, ""):
            raise _chat_error(
                f"{key}.{member}",
                "a member that the prompt has no place for",
                f"only {', '.join(sorted(known))}",
                "Leave it out",
            )


def _tool_calls(value: object, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _chat_error(key, _type_name(value), "a list of tool calls")
    out: list[dict[str, Any]] = []
    ids: set[str] = set()
    for i, call in enumerate(value):
        at = f"{key}[{i}]"
        if not isinstance(call, Mapping):
            raise _chat_error(at, _type_name(call), "{'id', 'type', 'function': {'name', 'arguments'}}")
        if call.get("type", "function") != "function":
            raise _chat_error(f"{at}.type", repr(call.get("type")), "'function'")
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise _chat_error(f"{at}.function", _type_name(function), "{'name', 'arguments'}")
        # "index" is what streamed calls carry
        _refuse_unknown(call, frozenset({"id", "type", "function", "index"}), at)
        _refuse_unknown(function, frozenset({"name", "arguments"}), f"{at}.function")
        normal: dict[str, Any] = {
            "type": "function",
            "function": {
                "name": _name(function.get("name"), f"{at}.function.name"),
                "arguments": _arguments(function.get("arguments"), f"{at}.function.arguments"),
            },
        }
        if call.get("id"):
            call_id = _text(call["id"], f"{at}.id")
            if call_id in ids:
                raise _chat_error(f"{at}.id", f"'{call_id}' a second time", "a different id for each call")
            ids.add(call_id)
            normal["id"] = call_id
        out.append(normal)
    return out


def _arguments(value: object, key: str) -> str:
    """Return the arguments of a call as JSON text of an object."""
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        try:
            value = json.loads(_text(value, key))
        except (ValueError, RecursionError) as error:
            raise _chat_error(
                key, f"text that is not JSON ({error})", "a JSON object", "Drop the call when it was cut off"
            ) from None
    if not isinstance(value, Mapping):
        raise _chat_error(key, _type_name(value), "a JSON object, as text or as a dictionary")
    return json.dumps(_json_value(value, key), ensure_ascii=False, allow_nan=False)


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise _chat_error(
            "messages", _type_name(messages), "a list of messages", "Wrap text as a user message"
        )
    if not messages:
        raise _chat_error("messages", "an empty list", "at least one message")
    out: list[dict[str, Any]] = []
    calls: list[str | None] = []  # ids of the calls that tool messages may answer; None: a call without an id
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _chat_error(at, _type_name(message), "a dictionary with 'role' and 'content'")
        role = message.get("role")
        if out and "task" in out[-1] and role != "assistant":
            raise _chat_error(
                f"messages[{i - 1}].task",
                f"a message of '{role}' behind it",
                "the assistant's answer to the task, or nothing",
                "Leave the task out where it was not asked for",
            )
        if role not in ROLES:
            raise _chat_error(f"{at}.role", repr(role), f"one of {', '.join(ROLES)}")
        _refuse_unknown(message, _MEMBERS[role], at)
        normal: dict[str, Any] = {"role": role}
        content = message.get("content")
        if role == "assistant":
            reasoning = message.get("reasoning_content")
            if message.get("tool_calls"):
                normal["tool_calls"] = _tool_calls(message["tool_calls"], f"{at}.tool_calls")
                calls = [call.get("id") for call in normal["tool_calls"]]
            if reasoning is not None:
                normal["reasoning_content"] = _text(reasoning, f"{at}.reasoning_content")
            if content is None and not (normal.get("tool_calls") or reasoning):
                raise _chat_error(f"{at}.content", "None", "text, reasoning_content or tool_calls")
            normal["content"] = "" if content is None else _content(content, f"{at}.content")
        else:
            normal["content"] = _content(content, f"{at}.content")
        if role == "tool":
            call_id = message.get("tool_call_id")
            if call_id is None and None not in calls:
                raise _chat_error(
                    f"{at}.tool_call_id",
                    "None",
                    "the id of a call in the assistant message before"
                    if calls
                    else "an assistant message with tool_calls before it",
                )
            if call_id is not None:
                if call_id not in calls:
                    known = ", ".join(f"'{c}'" for c in calls if c) or "no calls with an id"
                    raise _chat_error(
                        f"{at}.tool_call_id",
                        repr(call_id),
                        f"a call of the message before ({known})",
                    )
                normal["tool_call_id"] = _text(call_id, f"{at}.tool_call_id")
        if message.get("task") is not None:
            if message["task"] not in TASKS:
                raise _chat_error(f"{at}.task", repr(message["task"]), f"one of {', '.join(TASKS)}")
            normal["task"] = message["task"]
        out.append(normal)
    return out
