"""Embeddings: what a model's last layer makes of a text, as one vector for the text or one for each token.

Owns the context for them and its reading; which text, and the shape of answers, is ``Llama``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib
from .context import POOLING, Context
from .errors import ArgumentError, UnsupportedModelError
from .model import Model
from .watch import Watch

__all__ = ["check_embeddings", "embed"]


def check_embeddings(model: Model, pooling: str | None) -> None:
    """Refuse models whose graphs give no embeddings.

    Raises:
        UnsupportedModelError: The engine would read past the rows that the graph computes, and end the process.
        ArgumentError: Another way of pooling.
    """
    if pooling is not None and pooling not in POOLING:
        raise ArgumentError(
            "embedding", key="pooling_type", found=repr(pooling), expected=f"None, {', '.join(POOLING)}"
        )
    n_embd, n_embd_out = (int(f(model.pointer)) for f in (lib.llama_model_n_embd, lib.llama_model_n_embd_out))
    if n_embd_out != n_embd:
        raise UnsupportedModelError(
            "embedding: upstream's graph of this architecture gives none",
            path=model.path,
            found=f"rows of {n_embd} values, announced as {n_embd_out}",
            expected="rows of the announced width",
            hint="Use a model that was trained for embeddings; DeepSeek-V4 was not.",
        )


def embed(
    model: Model,
    options: Mapping[str, Any],
    ids: Sequence[int],
    *,
    pooling: str | None,
    is_normalized: bool,
    loras: Sequence[tuple[Any, float]],
    watch: Watch,
) -> npt.NDArray[np.float32]:
    """Return the embedding of one text.

    Args:
        model: See ``check_embeddings``.
        options: Of a ``Context``; its sizes become those of the text.
        ids: The text, at least one token.
        pooling: A key of ``POOLING``, or None for the file's own way.
        is_normalized: Make vectors of length 1.
        loras: As for ``Context.set_loras``.
        watch: May stop the call.

    Returns:
        ``(n_embd,) float32``; without pooling ``(len(ids), n_embd)``.
    """
    # one batch: a mean over several would have to know of the others
    size = {"n_ctx": len(ids), "n_batch": len(ids), "n_ubatch": len(ids)}
    context = Context(model, **{**options, **size}, pooling="file" if pooling is None else pooling)
    try:
        context.set_loras(loras)
        context.decode(ids, watch=watch)
        is_pooled = int(lib.llama_pooling_type(context.pointer)) != int(lib.LLAMA_POOLING_TYPE_NONE)
        n_embd = int(lib.llama_model_n_embd_out(model.pointer))
        rows = np.empty((1 if is_pooled else len(ids), n_embd), np.float32)
        for i, row in enumerate(rows):
            status = lib.pyl_embedding_copy(
                context.pointer, 0 if is_pooled else -1, i, ffi.from_buffer("float[]", row), n_embd
            )
            check(status, "reading embeddings")
    finally:
        context.close()
    if is_normalized:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(norms > 0, norms, 1)
    return rows[0] if is_pooled else rows
