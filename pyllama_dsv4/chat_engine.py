"""Owner of one ``pyl_chat``: a parsed chat template over a vocabulary.

Requests and answers are ``chat.py``'s; this module carries them over the binding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ._native import check, check_ptr, ffi, lib
from .chat import AnswerReader, ChatPrompt, ChatRequest
from .errors import ChatError
from .model import Model

if TYPE_CHECKING:
    from .convert.template import Generation

__all__ = ["ChatEngine"]


def _take(out: Any) -> bytes:
    """Return and free a string that the engine handed over."""
    try:
        return bytes(ffi.string(out[0]))
    finally:
        lib.pyl_string_free(out[0])


class ChatEngine:
    """A chat template, ready to format.

    Args:
        model: Stays referenced as long as the engine lives.
        template: Jinja text instead of the file's template, or a generation of V4: ``"preview"`` or ``"0731"``.

    Raises:
        ChatError: The file has no template, or it cannot be parsed.
    """

    def __init__(self, model: Model, template: str | None = None) -> None:
        self._model = model
        if template in ("preview", "0731"):
            from .convert.template import chat_template  # the converter takes long to import

            template = chat_template(cast("Generation", template))
        text = ffi.NULL if template is None else ffi.new("char[]", template.encode("utf-8"))
        pointer = lib.pyl_chat_init(model.pointer, text)
        check_ptr(
            pointer,
            "preparing the chat template",
            ChatError,
            path=model.path,
            hint="Pass chat_template= to Llama.",
        )
        self._pointer: Any = ffi.gc(pointer, lib.pyl_chat_free)

    def format(self, request: ChatRequest) -> ChatPrompt:
        """Return the exact prompt of a conversation.

        Raises:
            ChatError: The template refuses it.
        """
        out = ffi.new("char **")
        status = lib.pyl_chat_format(self._pointer, request.to_json().encode("utf-8"), out)
        if status == lib.PYL_ERROR:
            check_ptr(ffi.NULL, "formatting the conversation", ChatError)
        check(status, "formatting the conversation")
        return ChatPrompt.from_json(_take(out))

    def reader(self, prompt: ChatPrompt) -> AnswerReader:
        """Return a reader for the answer to `prompt`."""
        state = ffi.new("char[]", prompt.parser_state.encode("utf-8"))
        pointer = check_ptr(lib.pyl_chat_parser_init(state), "preparing to read the answer", ChatError)
        parser = ffi.gc(pointer, lib.pyl_chat_parser_free)

        def push(text: str, is_final: bool) -> bytes:
            data = text.encode("utf-8")
            out = ffi.new("char **")
            check(lib.pyl_chat_parser_push(parser, data, len(data), is_final, out), "reading the answer")
            return _take(out)

        return AnswerReader(push)

    def close(self) -> None:
        """Free the template. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
