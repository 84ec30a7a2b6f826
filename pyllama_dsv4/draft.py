"""A draft model beside a context: it proposes tokens, and the model evaluates several of them at once.

Owns the draft model, its contexts and upstream's drafting between it and the model. What a proposal is worth is
decided by the token loops (``generate.py``, ``batch.py``): only tokens that the sampler chooses anyway are kept. Files
are those of ``convert --draft``: MTP of the preview, DSpark of 0731.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import check, check_ptr, ffi, lib
from .context import Context
from .errors import ArgumentError, ModelLoadError, UnsupportedModelError
from .header import Header, read_header
from .model import Model
from .plan import draft_kind

__all__ = [
    "N_DRAFT_DEFAULT",
    "N_DRAFT_MAX",
    "Draft",
    "DraftModel",
    "check_draft",
    "check_n_draft",
    "check_pair",
]

N_DRAFT_DEFAULT = 3
N_DRAFT_MAX = 16


_KINDS = {"mtp": lib.PYL_DRAFT_MTP, "dspark": lib.PYL_DRAFT_DSPARK, "dflash": lib.PYL_DRAFT_DFLASH}


def check_draft(header: Header, path: str | os.PathLike[str]) -> str:
    """Return how a file drafts: ``mtp``, ``dspark`` or ``dflash``.

    Raises:
        UnsupportedModelError: It does not.
    """
    kind = draft_kind(header)
    if kind is not None:
        return kind
    raise UnsupportedModelError(
        "opening a draft model",
        path=path,
        found=f"a model of '{header.architecture}' that drafts nothing",
        expected="an MTP or DSpark file",
        hint="pyllama-dsv4 convert --draft writes one from a checkpoint.",
    )


class DraftModel:
    """Owner of a draft model's weights, and how it drafts.

    Args:
        path: The file.
        target: The model that it drafts for.
        options: Keywords of ``Model``.

    Attributes:
        kind: As ``check_draft`` says.
        model: The weights.

    Raises:
        UnsupportedModelError: Not a draft model.
        ModelLoadError: It is damaged, or does not fit the model.
    """

    def __init__(self, path: str | os.PathLike[str], target: Model, options: Mapping[str, Any]) -> None:
        self.kind = check_draft(read_header(path), path)  # the engine checks the rest while it loads
        self.model = Model(path, load_mtp=True, **options)
        try:
            status = lib.pyl_draft_check(target.pointer, self.model.pointer, _KINDS[self.kind])
            check(status, "preparing the draft model", ModelLoadError, path=path)
        except BaseException:
            self.model.close()
            raise

    def close(self) -> None:
        """Free the weights, after every ``Draft`` of them. Idempotent."""
        self.model.close()


class Draft:
    """Owner of one ``pyl_draft``.

    Args:
        model: Stays open as long as this.
        target: The context that it drafts for; made with ``n_rollback`` = `n_max`.
        n_max: Tokens in a proposal at most.
        options: Those of `target`, for the draft's context.

    Attributes:
        n_max: As given.

    Raises:
        ModelLoadError, MemoryLimitError: There is no context for it.
    """

    def __init__(self, model: DraftModel, target: Context, n_max: int, options: Mapping[str, Any]) -> None:
        self.n_max = n_max
        self._target = target
        self._pointer: Any = None
        self._context = Context(model.model, **options, target=target, is_mtp=model.kind == "mtp")
        try:
            pointer = lib.pyl_draft_init(
                target.pointer, self._context.pointer, _KINDS[model.kind], n_max, target.monitor
            )
            check_ptr(pointer, "preparing the draft model", ModelLoadError, path=model.model.path)
            self._pointer = ffi.gc(pointer, lib.pyl_draft_free)
        except BaseException:
            self.close()
            raise
        self._requests = ffi.new("struct pyl_draft_request[]", target.n_seq_max)
        self._out: npt.NDArray[np.int32] = np.empty((target.n_seq_max, n_max), np.int32)
        self._n_out: npt.NDArray[np.int32] = np.empty(target.n_seq_max, np.int32)

    def process(
        self, ids: npt.NDArray[np.int32], pos: npt.NDArray[np.int32], seqs: npt.NDArray[np.int32]
    ) -> None:
        """Let the draft model know tokens that the target has just evaluated, with positions and sequences.

        Args:
            ids: ``(n,) int32``; those of one sequence stand together.
            pos: ``(n,) int32``.
            seqs: ``(n,) int32``.
        """
        arrays = [ffi.from_buffer("int32_t[]", array) for array in (ids, pos, seqs)]
        check(
            lib.pyl_draft_process(self._pointer, *arrays, ids.size), f"drafting along with {ids.size} tokens"
        )

    def propose(self, requests: Sequence[tuple[int, int, int, int]]) -> list[list[int]]:
        """Return for each request what may follow its token; possibly nothing.

        Args:
            requests: A sequence's number, the token that it evaluates next, where, and how many tokens may follow at
                most; every sequence once.
        """
        for i, (seq, token, pos, n_max) in enumerate(requests):
            self._requests[i] = (seq, token, pos, min(n_max, self.n_max))
        status = lib.pyl_draft_propose(
            self._pointer,
            self._requests,
            len(requests),
            self.n_max,
            ffi.from_buffer("int32_t[]", self._out),
            ffi.from_buffer("int32_t[]", self._n_out),
        )
        check(status, "drafting")
        return [self._out[i, : self._n_out[i]].tolist() for i in range(len(requests))]

    def accept(self, seq: int, n_accepted: int, pos: int) -> None:
        """Settle a sequence's last proposal: `n_accepted` of it stay, and nothing from `pos` on, in both caches."""
        check(lib.pyl_draft_accept(self._pointer, seq, n_accepted, pos), "dropping rejected tokens")

    def clear(self, seq: int | None = None) -> None:
        """Forget the tokens of a sequence, or of all.

        The draft's attention reaches a window back, so it recovers within one.
        """
        lib.pyl_draft_clear(self._pointer, -1 if seq is None else seq)

    def close(self) -> None:
        """Free everything but the model, before the target context. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
        self._context.close()


def check_pair(path: str | os.PathLike[str], draft: str | os.PathLike[str]) -> str:
    """Check that a file drafts for a model, from both headers; return how, as ``check_draft``.

    Raises:
        UnsupportedModelError, ModelLoadError: as ``DraftModel``.
    """
    check_draft(read_header(draft), draft)  # before the model's vocabulary is read
    options: dict[str, Any] = {"use_mmap": False, "no_alloc": True}
    with Model(path, **options) as model:
        draft_model = DraftModel(draft, model, options)
        draft_model.close()
        return draft_model.kind


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
