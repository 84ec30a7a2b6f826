"""What a generated text must follow: GBNF, given as such or made from a JSON schema.

Owns the text and when it holds; the sampler enforces it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._native import check, ffi, lib
from .errors import ArgumentError

__all__ = ["Grammar"]


@dataclass(frozen=True)
class Grammar:
    """A grammar, and from where on it holds.

    Attributes:
        text: GBNF with a rule ``root``.
        words: If there are any, the grammar holds from the first of them on.
        start: Token after which the grammar, or the search for `words`, starts; -1 means at once.
        prefix: Tokens at the end of the prompt that the grammar begins with.
    """

    text: str
    words: tuple[str, ...] = ()
    start: int = -1
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip() or "\0" in self.text:
            raise ArgumentError("reading the grammar", key="grammar", found=repr(self.text), expected="GBNF")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(
                "reading the grammar", key="grammar", found=f"a lone surrogate at index {error.start}"
            ) from None

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """Return the grammar of JSON that fits a schema.

        Args:
            schema: As a dictionary, or as JSON text.

        Raises:
            ArgumentError: Not JSON, or a schema that a grammar cannot express.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
            json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(
                "reading the JSON schema", key="schema", found=str(error), expected="a JSON schema"
            ) from error
        out = ffi.new("char **")
        # ASCII without NUL bytes, and no lone surrogates: escapes of them are refused by the engine's JSON
        status = lib.pyl_grammar_of_schema(json.dumps(json.loads(text)).encode("ascii"), out)
        check(status, "making a grammar of the JSON schema", key="schema")
        try:
            return cls(bytes(ffi.string(out[0])).decode("utf-8"))
        finally:
            lib.pyl_string_free(out[0])
