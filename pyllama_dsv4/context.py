"""One evaluation context: KV cache, positions, logits. It evaluates token ids of its sequences and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._native import check, check_ptr, ffi, lib, log_tail, run_cancellable
from .errors import (
    ArgumentError,
    CancelledError,
    ClosedError,
    ContextFullError,
    InferenceError,
    MemoryLimitError,
    ModelLoadError,
    StateError,
)
from .model import Model
from .watch import Watch

if TYPE_CHECKING:
    from .draft import Draft
    from .lora import LoraAdapter

__all__ = ["ACT_QUANT_LEVELS", "CACHE_TYPES", "FLASH_ATTN", "POOLING", "Context", "context_params"]

SHORT_S = 0.1  # a call that takes less need not be interruptible

CACHE_TYPES = {
    "f32": lib.GGML_TYPE_F32,
    "f16": lib.GGML_TYPE_F16,
    "bf16": lib.GGML_TYPE_BF16,
    "q8_0": lib.GGML_TYPE_Q8_0,
}
ACT_QUANT_LEVELS = {
    "none": lib.LLAMA_ACT_QUANT_NONE,
    "cache": lib.LLAMA_ACT_QUANT_CACHE,
    "full": lib.LLAMA_ACT_QUANT_FULL,
}
FLASH_ATTN = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
POOLING = {
    "none": lib.LLAMA_POOLING_TYPE_NONE,
    "mean": lib.LLAMA_POOLING_TYPE_MEAN,
    "cls": lib.LLAMA_POOLING_TYPE_CLS,
    "last": lib.LLAMA_POOLING_TYPE_LAST,
}


def context_params(
    *,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    n_threads: int,
    cache_type: str,
    act_quant: str = "cache",
    flash_attn: str = "auto",
    n_seq_max: int = 1,
) -> Any:
    """Return the ``llama_context_params`` of a ``Context`` with these arguments.

    Raises:
        ArgumentError: An argument is out of range.
    """
    for name, choice, choices in (
        ("cache_type", cache_type, CACHE_TYPES),
        ("act_quant", act_quant, ACT_QUANT_LEVELS),
        ("flash_attn", flash_attn, FLASH_ATTN),
    ):
        if choice not in choices:
            raise ArgumentError(
                "creating a context", key=name, found=repr(choice), expected=", ".join(choices)
            )
    for name, value in (
        ("n_ctx", n_ctx),
        ("n_batch", n_batch),
        ("n_ubatch", n_ubatch),
        ("n_threads", n_threads),
        ("n_seq_max", n_seq_max),
    ):
        if not 1 <= value < 2**31:
            raise ArgumentError(
                "creating a context", key=name, found=value, expected="a number from 1 to 2^31-1"
            )
    if cache_type == "q8_0" and flash_attn == "off":
        raise ArgumentError(
            "creating a context",
            key="flash_attn",
            found="'off' with cache_type 'q8_0'",
            expected="'on' or 'auto'",
            hint="The engine reads a quantised cache only in flash attention.",
        )
    params = lib.llama_context_default_params()
    params.n_ctx = n_ctx * n_seq_max  # the engine divides it among the sequences
    params.n_batch = min(n_batch, n_ctx)
    params.n_ubatch = min(n_ubatch, params.n_batch)
    params.n_seq_max = n_seq_max
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = CACHE_TYPES[cache_type]
    params.act_quant = ACT_QUANT_LEVELS[act_quant]
    params.flash_attn_type = FLASH_ATTN[flash_attn]
    params.no_perf = True
    # Window layers keep their window only. The V4 cache cannot drop a tail anyway, and a full-size one would take
    # 44 KB a token for Flash and let every token attend over masked cells.
    params.swa_full = False
    return params


class Context:
    """Owner of one ``llama_context``.

    Args:
        model: Stays referenced as long as the context lives.
        n_ctx: Tokens that fit into the cache.
        n_batch: Tokens per call to the engine at most.
        n_ubatch: Tokens per graph evaluation at most.
        n_threads: Threads for prefill and decode.
        cache_type: Key of ``CACHE_TYPES``.
        act_quant: Key of ``ACT_QUANT_LEVELS``; other models than DeepSeek-V4 ignore it.
        flash_attn: Key of ``FLASH_ATTN``.
        n_seq_max: Sequences, numbered from 0; each holds up to `n_ctx` tokens.
        n_rollback: Tokens that can be dropped again after their evaluation; costs V4 as many copies of its states.
        pooling: Compute embeddings, pooled by this key of ``POOLING``, or as the ``"file"`` says; None computes none.
        target: The context that this one drafts for.
        is_mtp: Of a draft model: it is a prediction block.

    Attributes:
        draft: Proposes tokens; told of all that are evaluated, and closed by its owner.
        model: As given.
        monitor: Stops a computation, also that of a draft's context.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_threads: int,
        cache_type: str,
        act_quant: str = "cache",
        flash_attn: str = "auto",
        n_seq_max: int = 1,
        n_rollback: int = 0,
        pooling: str | None = None,
        target: Context | None = None,
        is_mtp: bool = False,
    ) -> None:
        params = context_params(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            cache_type=cache_type,
            act_quant=act_quant,
            flash_attn=flash_attn,
            n_seq_max=n_seq_max,
        )
        self.model = model
        params.n_rs_seq = n_rollback
        if pooling is not None:
            params.embeddings = True
            params.pooling_type = POOLING.get(pooling, lib.LLAMA_POOLING_TYPE_UNSPECIFIED)
        if is_mtp:
            params.ctx_type = lib.LLAMA_CONTEXT_TYPE_MTP
        if target is not None:
            params.ctx_other = target.pointer
        self.monitor: Any = ffi.new("struct pyl_monitor *") if target is None else target.monitor
        log_tail(clear=True)
        pointer = lib.pyl_context_init(model.pointer, params, self.monitor)
        # the engine returns NULL for every reason and tells them apart in its log only
        is_memory = any(words in line for line in log_tail() for words in ("alloc", "output buffer"))
        check_ptr(
            pointer,
            f"creating a context of {n_ctx} tokens",
            MemoryLimitError if is_memory else ModelLoadError,
            path=model.path,
            hint="A smaller n_ctx needs less memory." if is_memory else None,
        )
        self._pointer = ffi.gc(pointer, lib.llama_free)
        self.n_vocab = model.n_vocab
        self.n_batch = int(lib.llama_n_batch(pointer))
        self.n_ctx = n_ctx
        self.n_seq_max = n_seq_max
        self.draft: Draft | None = None
        self._n_short = 1 + n_rollback
        self._n_tokens = [0] * n_seq_max
        self._logits: npt.NDArray[np.float32] | None = None
        self._step_s = float("inf")  # how long the last token took

    @property
    def pointer(self) -> Any:
        if self._pointer is None:
            raise ClosedError("the context is closed")
        return self._pointer

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache of sequence 0; also the position of the next one."""
        return self._n_tokens[0]

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last token: ``(n_vocab,) float32``, read-only.

        The array is the caller's to keep: the next evaluation makes a new one.

        Raises:
            InferenceError: Nothing has been evaluated since the last reset.
        """
        if self._logits is None:
            raise InferenceError("no logits yet", hint="Evaluate at least one token first.")
        return self._logits

    @property
    def has_logits(self) -> bool:
        """Whether ``logits`` can be read."""
        return self._logits is not None

    def set_n_threads(self, n_threads: int) -> None:
        """Use this many threads for prefill and decode from now on."""
        lib.llama_set_n_threads(self.pointer, n_threads, n_threads)

    def set_loras(self, loras: Sequence[tuple[LoraAdapter, float]]) -> None:
        """Apply these adapters, each with a scale, from now on; what is in the cache was computed with others."""
        adapters = ffi.new("struct llama_adapter_lora *[]", [adapter.pointer for adapter, _ in loras])
        scales = ffi.new("float[]", [scale for _, scale in loras])
        lib.llama_set_adapters_lora(self.pointer, adapters, len(loras), scales)

    def clear(self) -> None:
        """Forget all tokens of all sequences."""
        lib.llama_memory_clear(lib.llama_get_memory(self.pointer), True)
        self._n_tokens = [0] * len(self._n_tokens)
        self._logits = None
        if self.draft is not None:
            self.draft.clear()

    def decode(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        seq: int = 0,
        watch: Watch | None = None,
    ) -> npt.NDArray[np.float32] | None:
        """Evaluate token ids at the end of a sequence.

        Args:
            ids: Token ids in ``range(n_vocab)``.
            all_logits: Return the logits of every position.
            seq: Number of the sequence.
            watch: May stop the call.

        Returns:
            ``(len(ids), n_vocab) float32`` with `all_logits`, else None; ``logits`` has the last row.

        Raises:
            ArgumentError: An id is out of range; nothing was changed.
            ContextFullError: No room; nothing was changed.
            CancelledError, InferenceError, MemoryLimitError: all sequences were cleared.
        """
        # the loop over tokens comes here for every one of them
        if not all_logits and self.draft is None and self._step_s < SHORT_S and len(ids) == 1:
            token = ids[0]
            if type(token) is int and 0 <= token < self.n_vocab and self._n_tokens[seq] < self.n_ctx:
                self._decode_one(token, seq)
                return None
        array = self._check_ids(ids)
        if array.size == 0:
            return np.empty((0, self.n_vocab), np.float32) if all_logits else None
        n_tokens = self._n_tokens[seq]
        if n_tokens + array.size > self.n_ctx:
            raise ContextFullError(
                f"evaluating {array.size} tokens after {n_tokens}",
                found=f"{n_tokens + array.size} tokens",
                expected=f"at most n_ctx = {self.n_ctx}",
                hint="Open the model with a larger n_ctx, shorten the text, or reset().",
            )
        rows = np.empty((array.size, self.n_vocab), np.float32) if all_logits else None
        try:
            for start in range(0, array.size, self.n_batch):
                chunk = array[start : start + self.n_batch]
                is_last = start + chunk.size == array.size
                outputs = lib.PYL_OUTPUTS_ALL if all_logits else int(is_last)  # PYL_OUTPUTS_LAST is 1
                self._decode_chunk(chunk, outputs, seq, watch)
                if rows is not None:
                    for i in range(chunk.size):
                        self._copy_logits(i, rows[start + i])
                if watch is not None and array.size > 1:
                    watch.prefilled((start + chunk.size) / array.size)
            if rows is None:
                last = np.empty(self.n_vocab, np.float32)
                self._copy_logits(-1, last)
            else:
                last = rows[-1].copy()
        except BaseException:
            # after a cancelled or failed batch the engine's memory is undefined
            if self._pointer is not None:
                self.clear()
            raise
        last.flags.writeable = False
        self._logits = last
        return rows

    def _decode_one(self, token: int, seq: int) -> None:
        """Evaluate a token in this thread: a switch to another would cost more than it saves."""
        row = np.empty(self.n_vocab, np.float32)
        start_s = time.monotonic()
        out = ffi.from_buffer("float[]", row)
        try:
            status = lib.pyl_decode_one(self.pointer, token, self._n_tokens[seq], seq, out, self.n_vocab)
            if status != lib.PYL_OK:
                check(status, "evaluating a token")
            self._n_tokens[seq] += 1
        except BaseException:
            if self._pointer is not None:
                self.clear()
            raise
        self._step_s = time.monotonic() - start_s
        row.flags.writeable = False
        self._logits = row

    def _check_ids(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        try:
            wide = np.asarray(ids, dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(
                "evaluating tokens", found=type(ids).__name__, expected="token ids (int)"
            ) from error
        if wide.ndim != 1:
            raise ArgumentError(
                "evaluating tokens", found=f"{wide.ndim} dimensions", expected="a flat list of ids"
            )
        bad = np.flatnonzero((wide < 0) | (wide >= self.n_vocab))
        if bad.size:
            raise ArgumentError(
                f"evaluating tokens: id {wide[bad[0]]} at index {bad[0]} is out of range",
                expected=f"0 to {self.n_vocab - 1}",
            )
        return np.ascontiguousarray(wide, dtype=np.int32)

    def _decode_chunk(
        self, chunk: npt.NDArray[np.int32], outputs: int, seq: int, watch: Watch | None
    ) -> None:
        op = f"evaluating {chunk.size} tokens"

        def work() -> int:
            status = lib.pyl_decode(
                self.pointer,
                ffi.from_buffer("int32_t[]", chunk),
                chunk.size,
                self._n_tokens[seq],
                seq,
                outputs,
            )
            check(status, op)
            if self.draft is not None:
                pos = np.arange(self._n_tokens[seq], self._n_tokens[seq] + chunk.size, dtype=np.int32)
                self.draft.process(chunk, pos, np.full(chunk.size, seq, np.int32))
            return int(status)

        start_s = time.monotonic()
        if chunk.size <= self._n_short and self._step_s < SHORT_S:
            work()  # a thread switch would cost more than it saves
        else:
            self._run(work, watch)
        if chunk.size <= self._n_short:
            self._step_s = time.monotonic() - start_s
        self._n_tokens[seq] += chunk.size

    def _run(self, work: Callable[[], int], watch: Watch | None) -> None:
        try:
            run_cancellable(work, self.monitor, None if watch is None else watch.go_on)
        except CancelledError:
            if watch is not None:
                watch.check()  # says why
            raise

    def decode_mixed(
        self,
        steps: Sequence[tuple[int, Sequence[int]]],
        *,
        n_rows: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """Evaluate tokens of several sequences in one batch, each at the end of its own.

        Args:
            steps: Number of a sequence, and the token ids to append to it; at most ``n_batch`` ids together.
            n_rows: For every step, of how many of its last tokens logits are wanted; None wants the last only.
            watch: May stop the call.

        Returns:
            For every step the logits after its last tokens, ``(n_rows, n_vocab) float32``.

        Raises:
            ArgumentError: Ids or sequences out of range, or too many; nothing was changed.
            ContextFullError: No room in a sequence; nothing was changed.
            CancelledError, InferenceError, MemoryLimitError: all sequences were cleared.
        """
        arrays = [self._check_ids(ids) for _, ids in steps]
        n = sum(a.size for a in arrays)
        seqs = [seq for seq, _ in steps]
        if not 1 <= n <= self.n_batch or any(a.size == 0 for a in arrays) or len(set(seqs)) != len(seqs):
            raise ArgumentError(
                "evaluating a batch",
                found=f"{n} tokens of {len(steps)} sequences",
                expected=f"1 to n_batch = {self.n_batch} tokens, every sequence once",
            )
        for seq, array in zip(seqs, arrays, strict=True):
            if self._n_tokens[seq] + array.size > self.n_ctx:
                raise ContextFullError(
                    f"evaluating {array.size} tokens of sequence {seq}",
                    found=f"{self._n_tokens[seq] + array.size} tokens",
                    expected=f"at most n_ctx = {self.n_ctx}",
                )
        tokens = np.concatenate(arrays)
        starts = [self._n_tokens[seq] for seq in seqs]
        pos = np.concatenate(
            [np.arange(s, s + a.size, dtype=np.int32) for s, a in zip(starts, arrays, strict=True)]
        )
        owners = np.concatenate([np.full(a.size, s, np.int32) for s, a in zip(seqs, arrays, strict=True)])
        ends = np.cumsum([a.size for a in arrays])
        wanted = [np.arange(end - k, end) for end, k in zip(ends, n_rows or [1] * len(steps), strict=True)]
        outputs = np.zeros(n, np.int8)
        outputs[np.concatenate(wanted)] = 1

        def work() -> int:
            status = lib.pyl_decode_mixed(
                self.pointer,
                ffi.from_buffer("int32_t[]", tokens),
                ffi.from_buffer("int32_t[]", pos),
                ffi.from_buffer("int32_t[]", owners),
                ffi.from_buffer("int8_t[]", outputs),
                n,
            )
            check(status, f"evaluating {n} tokens of {len(steps)} sequences")
            if self.draft is not None:
                self.draft.process(tokens, pos, owners)
            return int(status)

        self._logits = None
        try:
            self._run(work, watch)
            for seq, array in zip(seqs, arrays, strict=True):
                self._n_tokens[seq] += array.size
            rows: list[npt.NDArray[np.float32]] = [
                np.empty((len(indices), self.n_vocab), np.float32) for indices in wanted
            ]
            for part, indices in zip(rows, wanted, strict=True):
                for row, index in zip(part, indices, strict=True):
                    self._copy_logits(int(index), row)
        except BaseException:
            if self._pointer is not None:
                self.clear()
            raise
        return rows

    def propose(self, steps: Sequence[tuple[int, int, int]]) -> list[list[int]]:
        """Return what the draft model lets follow tokens that are to be evaluated next.

        Args:
            steps: Number of a sequence, its next token, and how many more are wanted at most.

        Returns:
            A proposal for every step, possibly an empty one.
        """
        proposals: list[list[int]] = [[] for _ in steps]
        if self.draft is None:
            return proposals
        rooms = [min(n_max, self.n_ctx - self._n_tokens[seq] - 1) for seq, _, n_max in steps]
        asked = [i for i, room in enumerate(rooms) if room >= 1]
        if asked:
            requests = [(*steps[i][:2], self._n_tokens[steps[i][0]], rooms[i]) for i in asked]
            for i, proposal in zip(asked, self.draft.propose(requests), strict=True):
                proposals[i] = proposal
        return proposals

    def settle(
        self, n_accepted: int, n_rejected: int, logits: npt.NDArray[np.float32] | None, seq: int = 0
    ) -> None:
        """Drop the rejected end of a proposal that was evaluated; `logits` are those after what stays.

        Raises:
            InferenceError: It cannot be dropped; all sequences were cleared.
        """
        assert self.draft is not None
        try:
            self.draft.accept(seq, n_accepted, self._n_tokens[seq] - n_rejected)
        except BaseException:
            self.clear()
            raise
        self._n_tokens[seq] -= n_rejected
        self._logits = logits

    def drop(self, seq: int) -> None:
        """Forget the tokens of one sequence."""
        if not lib.llama_memory_seq_rm(lib.llama_get_memory(self.pointer), seq, -1, -1):
            self.clear()
            raise StateError(f"forgetting sequence {seq} failed", hint="All sequences were cleared.")
        self._n_tokens[seq] = 0
        self._logits = None
        if self.draft is not None:
            self.draft.clear(seq)

    def _copy_logits(self, index: int, out: npt.NDArray[np.float32]) -> None:
        status = lib.pyl_logits_copy(self.pointer, index, ffi.from_buffer("float[]", out), self.n_vocab)
        check(status, "reading logits")

    # --- state ---

    def save_state(self, seq: int = 0) -> bytes:
        """Return a sequence's cache as bytes, for ``restore_state`` on a context of the same model and options."""
        n = int(lib.llama_state_seq_get_size(self.pointer, seq))
        buffer = bytearray(n)
        written = ffi.new("uint64_t *")
        c_buffer = ffi.from_buffer("uint8_t[]", buffer)
        check(lib.pyl_state_seq_save(self.pointer, seq, c_buffer, n, written), "saving the state")
        if n == 0 or written[0] != n:
            raise StateError("saving the state failed", found=f"{written[0]} bytes", expected=f"{n} bytes")
        return bytes(buffer)

    def restore_state(
        self,
        state: bytes | memoryview,
        n_tokens: int,
        seq: int = 0,
        *,
        logits: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Put back what ``save_state`` returned when the sequence had `n_tokens` tokens, and `logits` after them.

        Raises:
            StateError: It is damaged, or of another model, cache or level of rounding; all sequences were cleared.
        """
        self.drop(seq)
        log_tail(clear=True)
        read = ffi.new("uint64_t *")
        c_state = ffi.from_buffer("uint8_t[]", state)
        check(lib.pyl_state_seq_load(self.pointer, seq, c_state, len(state), read), "restoring the state")
        if read[0] != len(state):
            self.clear()
            raise StateError(
                "restoring the state failed",
                found=f"{read[0]} bytes",
                expected=f"{len(state)} bytes",
                native_log=log_tail(clear=True),
            )
        self._n_tokens[seq] = n_tokens
        if logits is not None:
            logits = logits.copy()
            logits.flags.writeable = False
        self._logits = logits

    def close(self) -> None:
        """Free the cache and the compute buffers. Idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
