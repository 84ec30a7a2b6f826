"""A tiny model that says a given text: each token of it is followed by what follows it in the text.

Made of the demo model: token embeddings so large that no layer changes their direction, and an output head that maps
each direction to the tokens that may come next. Where a token occurs twice in the text, its last successor is the
most likely, unless a grammar forbids it.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyllama_dsv4 import Llama
from pyllama_dsv4.header import read_header

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""Tensors of native files; BF16, one row of n_embd values per token."""


def scripted_model(demo: Path, out: Path, text: str, *, after: str, by_letter: bool = False) -> Path:
    """Write a model that says `text` and ends.

    Args:
        demo: The demo model.
        out: The file to write.
        text: At most as many different tokens as the model has channels; special tokens are spelled out.
        after: Last token of the prompts that `text` answers, ``<think>`` or ``</think>``.
        by_letter: Say it letter by letter, which is not how the tokeniser divides it; ``</think>`` stays one token.
    """
    with Llama(demo, n_ctx=256, n_threads=1, warmup=False) as llm:
        pieces = [text]
        if by_letter:
            parts = text.split("</think>")
            pieces = [*parts[0], *(piece for part in parts[1:] for piece in ("</think>", *part))]
        pieces = [after, *pieces, "<｜end▁of▁sentence｜>"]
        ids = [token for piece in pieces for token in llm.tokenize(piece, special=True)]
    shutil.copyfile(demo, out)
    rows = {token: i for i, token in enumerate(dict.fromkeys(ids))}
    tensors = {tensor.name: tensor for tensor in read_header(out).tensors}
    for name in (EMBEDDING, HEAD):
        info = tensors[name]
        assert info.type.name == "BF16"
        n_embd, n_vocab = info.dims
        assert len(rows) <= n_embd
        values = np.zeros((n_vocab, n_embd), np.float32)
        if name == EMBEDDING:
            for token, i in rows.items():
                values[token, i] = 1e4
        else:
            for i, (token, following) in enumerate(itertools.pairwise(ids)):
                values[following, rows[token]] = 4 + i / 16
        with out.open("r+b") as stream:
            stream.seek(info.start)
            stream.write(_bf16(values))
    return out


def _bf16(values: npt.NDArray[np.float32]) -> bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
