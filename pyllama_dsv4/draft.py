"""A draft model beside a context: it proposes tokens, and the model evaluates several of them at once.

Owns the draft model, its context and upstream's drafting between the two. What a proposal is worth is decided by the
token loop (``generate.py``): only tokens that the sampler chooses anyway are kept. Files are those of ``convert
--draft``: MTP of the preview, DSpark of 0731.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import check, check_ptr, ffi, lib
from .context import Context
from .errors import ArgumentError, ModelLoadError, UnsupportedModelError
from .header import Header, read_header
from .model import Model

__all__ = ["N_DRAFT_DEFAULT", "N_DRAFT_MAX", "Draft", "check_n_draft"]

N_DRAFT_DEFAULT = 3
N_DRAFT_MAX = 16


def _kind(header: Header, path: str | os.PathLike[str]) -> int:
    """Return how a file drafts, a ``pyl_draft_kind``.

    Source: upstream common/speculative.cpp:common_speculative_types_from_gguf.
    """
    names = {tensor.name for tensor in header.tensors}
    if header.architecture == "dflash":
        return int(lib.PYL_DRAFT_DSPARK if "markov_w1.weight" in names else lib.PYL_DRAFT_DFLASH)
    if header.architecture == "deepseek4" and any(n.endswith(".nextn.eh_proj.weight") for n in names):
        return int(lib.PYL_DRAFT_MTP)
    raise UnsupportedModelError(
        "opening a draft model",
        path=path,
        found=f"a model of '{header.architecture}' that drafts nothing",
        expected="an MTP or DSpark file",
        hint="pyllama-dsv4 convert --draft writes one from a checkpoint.",
    )


class Draft:
    """Owner of one ``pyl_draft``.

    Args:
        path: The draft model.
        target: The context that it drafts for; made with ``n_rollback`` = `n_max`.
        n_max: Tokens in a proposal at most.
        options: Those of `target`, for the draft's context.
        model_options: Keywords of ``Model``.

    Attributes:
        n_max: As given.

    Raises:
        UnsupportedModelError: Not a draft model.
        ModelLoadError: It is damaged, or does not fit the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: Context,
        n_max: int,
        options: Mapping[str, Any],
        model_options: Mapping[str, Any],
    ) -> None:
        kind = _kind(read_header(path), path)  # the engine checks the rest while it loads
        self.n_max = n_max
        self._target = target
        self._pointer: Any = None
        self._context: Context | None = None
        self._model = Model(path, load_mtp=True, **model_options)
        try:
            status = lib.pyl_draft_check(target.model.pointer, self._model.pointer, kind)
            check(status, "preparing the draft model", ModelLoadError, path=path)
            self._context = Context(
                self._model, **options, target=target, is_mtp=kind == int(lib.PYL_DRAFT_MTP)
            )
            pointer = lib.pyl_draft_init(target.pointer, self._context.pointer, kind, n_max, target.monitor)
            check_ptr(pointer, "preparing the draft model", ModelLoadError, path=path)
            self._pointer = ffi.gc(pointer, lib.pyl_draft_free)
        except BaseException:
            self.close()
            raise
        self._out: npt.NDArray[np.int32] = np.empty(n_max, np.int32)

    def process(self, ids: npt.NDArray[np.int32], pos: int) -> None:
        """Let the draft model know tokens that the target has just evaluated at `pos` and behind."""
        status = lib.pyl_draft_process(self._pointer, ffi.from_buffer("int32_t[]", ids), ids.size, pos)
        check(status, f"drafting along with {ids.size} tokens")

    def propose(self, token: int, pos: int, n_max: int) -> list[int]:
        """Return what may follow `token`, which is to be evaluated at `pos`; possibly nothing."""
        n = lib.pyl_draft_propose(
            self._pointer, token, pos, min(n_max, self.n_max), ffi.from_buffer("int32_t[]", self._out)
        )
        return [int(i) for i in self._out[: check(n, "drafting")]]

    def accept(self, n_accepted: int, pos: int) -> None:
        """Settle the last proposal: of it `n_accepted` tokens stay, and nothing from `pos` on, in both caches."""
        check(lib.pyl_draft_accept(self._pointer, n_accepted, pos), "dropping rejected tokens")

    def clear(self) -> None:
        """Forget all tokens. The draft's attention reaches a window back, so it recovers within one."""
        lib.pyl_draft_clear(self._pointer)

    def close(self) -> None:
        """Free everything, before the target context. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
        if self._context is not None:
            self._context.close()
        self._model.close()


def check_n_draft(n_draft: int, n_ubatch: int) -> None:
    """Refuse a length of proposals that cannot be evaluated at once."""
    if not isinstance(n_draft, int) or isinstance(n_draft, bool) or not 1 <= n_draft <= N_DRAFT_MAX:
        raise ArgumentError(
            "opening a draft model", key="n_draft", found=repr(n_draft), expected=f"1 to {N_DRAFT_MAX}"
        )
    if n_draft >= n_ubatch:
        raise ArgumentError(
            "opening a draft model", key="n_draft", found=n_draft, expected=f"below n_ubatch = {n_ubatch}"
        )
