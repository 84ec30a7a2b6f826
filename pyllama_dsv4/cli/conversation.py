"""Conversations as files: JSON with the messages as OpenAI has them, and the settings they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllama_dsv4.errors import ChatError

if TYPE_CHECKING:
    from pyllama_dsv4.chat import ReasoningEffort

__all__ = ["Conversation", "load_conversation", "save_conversation"]


@dataclass(frozen=True)
class Conversation:
    """A conversation that was kept. Attributes as in the chat's settings."""

    messages: list[dict[str, Any]]
    system: str | None
    thinking: bool
    effort: ReasoningEffort | None


def save_conversation(
    path: Path,
    messages: Sequence[Mapping[str, Any]],
    *,
    system: str | None,
    thinking: bool,
    effort: str | None,
) -> None:
    """Write a file that only its owner can read; it appears complete or not at all.

    Raises:
        OSError: It cannot be written.
    """
    body = {"messages": list(messages), "system": system, "thinking": thinking, "effort": effort}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(body, file, ensure_ascii=False, indent=1)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_conversation(path: Path) -> Conversation:
    """Read what ``save_conversation`` wrote.

    Raises:
        OSError: It cannot be read.
        ChatError: It is something else.
    """

    def refuse(found: str) -> ChatError:
        return ChatError("reading a conversation", path=path, found=found, expected="a file of /save")

    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refuse(str(error)) from error
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        raise refuse("no list of messages")
    for message in messages:
        is_message = isinstance(message, dict) and message.get("role") in ("user", "assistant")
        if not is_message or not isinstance(message.get("content"), str):
            raise refuse(f"the message {str(message)[:40]}")
    system, effort = body.get("system"), body.get("effort")
    if not isinstance(system, (str, type(None))) or effort not in (None, "high", "max"):
        raise refuse("odd settings")
    return Conversation(messages, system, body.get("thinking") is True, effort)
