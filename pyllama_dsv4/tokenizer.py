"""Text to token ids and back, over the model's vocabulary."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from ._native import check, ffi, lib
from .errors import TokenizeError
from .model import Model

__all__ = ["StreamDecoder", "Tokenizer"]

_INT32_MIN = -(2**31)


class Tokenizer:
    """View of a model's vocabulary; owns nothing native.

    Args:
        model: An open model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.n_vocab = model.n_vocab
        self.has_vocab = bool(lib.llama_vocab_type(model.vocab) != lib.LLAMA_VOCAB_TYPE_NONE)
        self.bos = int(lib.llama_vocab_bos(model.vocab))
        self.eos = int(lib.llama_vocab_eos(model.vocab))
        self._bytes: dict[int, bytes] = {}
        self._is_special: dict[int, bool] = {}

    def _need_vocab(self, op: str) -> None:
        if not self.has_vocab:
            raise TokenizeError(
                f"{op}: the file has no vocabulary",
                path=self._model.path,
                key="tokenizer.ggml.model",
                found="none",
                hint="Use eval() with token ids.",
            )

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        Args:
            text: Any text; lone surrogates are refused.
            add_bos: Put the beginning-of-sentence id in front.
            special: Text that spells a special token becomes its id. Otherwise it stays ordinary text.

        Raises:
            TokenizeError: No vocabulary, or text that is not valid Unicode.
        """
        self._need_vocab("tokenizing")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizeError(
                "tokenizing", found=f"a lone surrogate at index {error.start}", expected="valid Unicode text"
            ) from error
        head = [self.bos] if add_bos else []
        if not data:
            return head
        n_max = len(data) + 8
        ids = ffi.new("int32_t[]", n_max)
        n = lib.pyl_tokenize(self._model.vocab, data, len(data), ids, n_max, special)
        if n < 0:  # a token never spans less than a byte, so n_max is enough: this is a failure
            check(lib.PYL_ERROR if n == _INT32_MIN else n, f"tokenizing {len(data)} bytes")
        return head + list(ffi.unpack(ids, n))

    def token_to_bytes(self, token: int) -> bytes:
        """Return the bytes a token stands for; special tokens give their text.

        Raises:
            TokenizeError: No vocabulary, or no such id.
        """
        cached = self._bytes.get(token)
        if cached is not None:
            return cached
        self._need_vocab("reading a token")
        if not 0 <= token < self.n_vocab:
            raise TokenizeError(f"no token has id {token}", expected=f"0 to {self.n_vocab - 1}")
        size = 64
        while True:
            buffer = ffi.new("char[]", size)
            n = lib.pyl_token_bytes(self._model.vocab, token, buffer, size)
            if n == _INT32_MIN:
                check(lib.PYL_ERROR, f"reading token {token}")
            if n >= 0:
                break
            size = -n
        data = bytes(ffi.buffer(buffer, n))
        self._bytes[token] = data
        return data

    def is_special(self, token: int) -> bool:
        """Tell whether detokenising without specials leaves this token out: control tokens, by the file's types."""
        known = self._is_special.get(token)
        if known is None:
            known = self._is_special[token] = bool(lib.llama_vocab_is_control(self._model.vocab, token))
        return known

    def is_added(self, token: int) -> bool:
        """Tell whether the token was added to the vocabulary as a whole, such as ``</think>``."""
        return bool(lib.llama_vocab_get_attr(self._model.vocab, token) & lib.LLAMA_TOKEN_ATTR_USER_DEFINED)

    def is_eog(self, token: int) -> bool:
        """Tell whether this token ends a generation."""
        return bool(lib.llama_vocab_is_eog(self._model.vocab, token))

    def detokenize(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            special: Include the text of control tokens.
        """
        return self.detokenize_bytes(ids, special=special).decode("utf-8", "replace")

    def detokenize_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """Return the bytes of token ids."""
        return b"".join(self.token_to_bytes(i) for i in ids if special or not self.is_special(i))


class StreamDecoder:
    """Bytes of tokens in, text out; a character that is not complete yet is held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        return self._decoder.decode(b"", True)
