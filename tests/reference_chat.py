"""The prompt format of DeepSeek-V4 (preview and 0731), written from the format's description, for tests.

Owns a second way from messages to prompt text, and from calls to DSML, that shares no code with the template
engine. The fixed wording (the tools section, the paragraphs on effort) is data of the format and is read from
the template file that the package installs; the tests pin its digest. Leaves tokenising to the ``tokenizers``
package. Imports nothing of the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK, THINK_END = "<think>", "</think>"
DSML = "｜DSML｜"
REMINDER = "<｜latest_reminder｜>"
USER_SIDE = ("user", "developer", "tool")


class Wording:
    """The fixed paragraphs, from the ``set`` lines of a template's text.

    Attributes:
        tools_header, tools_footer: Around the schemas, one a line.
        response_format: In front of the schema of the answer.
        effort: From the value of reasoning_effort to its paragraph.
    """

    def __init__(self, template: str) -> None:
        values: dict[str, str] = {
            "dsml_token": DSML,
            "thinking_start_token": THINK,
            "thinking_end_token": THINK_END,
        }
        for name, expression in re.findall(r"\{%- set (\w+) = ('.*?') -%\}", template):
            pieces = re.findall(r"'((?:[^'\\]|\\.)*)'|(\w+)", expression)
            values[name] = "".join(
                values[variable]
                if variable
                else re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), literal)
                for literal, variable in pieces
            )
        self.tools_header = values["tools_header"]
        self.tools_footer = values["tools_footer"]
        self.response_format = values["response_format_template"]
        self.effort = {
            effort: values[f"reasoning_effort_{effort}"]
            for effort in ("high", "max")
            if f"reasoning_effort_{effort}" in values
        }


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return the DSML block of a list of OpenAI tool calls."""
    lines = [f"<{DSML}tool_calls>"]
    for call in calls:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        lines.append(f'<{DSML}invoke name="{call["function"]["name"]}">')
        for key, value in arguments.items():
            is_text = isinstance(value, str)
            shown = value if is_text else to_json(value)
            flag = "true" if is_text else "false"
            lines.append(f'<{DSML}parameter name="{key}" string="{flag}">{shown}</{DSML}parameter>')
        if not arguments:
            lines.append("")
        lines.append(f"</{DSML}invoke>")
    lines.append(f"</{DSML}tool_calls>")
    return "\n".join(lines)


def in_call_order(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with the results of each turn in the order of the calls they answer."""
    out: list[Mapping[str, Any]] = []
    turn: list[Mapping[str, Any]] = []
    order: dict[str, int] = {}

    def end_turn() -> None:
        results = iter(
            sorted(
                (m for m in turn if m["role"] == "tool"),
                key=lambda m: order.get(m.get("tool_call_id", ""), 0),
            )
        )
        out.extend(next(results) if m["role"] == "tool" else m for m in turn)
        turn.clear()

    for message in messages:
        if message["role"] in ("user", "tool"):
            turn.append(message)
            continue
        end_turn()
        out.append(message)
        if message.get("tool_calls"):
            order = {call["id"]: i for i, call in enumerate(message["tool_calls"]) if call.get("id")}
    end_turn()
    return out


def prompt_text(
    wording: Wording,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    json_schema: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt of messages in normal form (text as content) as one string."""
    out = [BOS]
    if thinking and reasoning_effort in wording.effort:
        out.append(wording.effort[reasoning_effort])

    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    sections = [system] if system else []
    if tools:
        schemas = "".join(to_json(tool["function"]) + "\n" for tool in tools)
        sections.append(wording.tools_header + schemas + wording.tools_footer)
    if json_schema is not None:
        sections.append(wording.response_format + to_json(json_schema))
    out.append("\n\n".join(sections))

    ordered = [m for m in in_call_order(messages) if m["role"] != "system"]
    last_user = max((i for i, m in enumerate(ordered) if m["role"] in USER_SIDE), default=-1)
    uses_tools = bool(tools) or any(m["role"] == "tool" for m in ordered)

    def header(i: int) -> str:
        """The assistant's, of what is said behind message i or instead of it."""
        thinks = thinking and (uses_tools or not drop_thinking or i >= last_user)
        return ASSISTANT + (THINK if thinks else THINK_END)

    is_open = False  # a header, or the token of a task, waits for its answer
    for i, message in enumerate(ordered):
        role, text = message["role"], message["content"]
        before = ordered[i - 1] if i else {}
        following = ordered[i + 1]["role"] if i + 1 < len(ordered) else None
        if role == "assistant":
            if not is_open:
                out.append(header(i))
            if "task" not in before:
                kept = thinking and (uses_tools or not drop_thinking or i > last_user)
                out.append(message.get("reasoning_content", "") + THINK_END if kept else "")
            out.append(text)
            if message.get("tool_calls"):
                out.append("\n\n" + calls_text(message["tool_calls"]))
            out.append(EOS)
            is_open = False
        elif role == "latest_reminder":
            out.append(REMINDER + text)
        else:
            is_joined = role != "developer" and before.get("role") in ("user", "tool")
            out.append("\n\n" if is_joined else USER)
            out.append(f"<tool_result>{text}</tool_result>" if role == "tool" else text)
            is_open = False
        task = message.get("task")
        if task is not None:
            action = ASSISTANT + (THINK if thinking else THINK_END)
            out.append((action if task == "action" else "") + f"<｜{task}｜>")
            is_open = True
        elif role in USER_SIDE and (following in ("assistant", "latest_reminder")):
            out.append(header(i))
            is_open = True

    if add_generation_prompt and not is_open:
        out.append(ASSISTANT + (THINK if thinking else THINK_END))
    return "".join(out)
