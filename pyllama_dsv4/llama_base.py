"""What every ``Llama`` does before it generates: opening, closing, facts, text, evaluation, sampling.

Owns the native objects (model, context, tokenizer, sampler, session, warm-up), keeps them together and closes them in
order, and refuses use after close, after a fork and from two threads. Completions and chats are the layers above.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from ._native import build_info, lib, logger, series_digest
from .chat_engine import ChatEngine
from .context import Context, context_params
from .draft import N_DRAFT_DEFAULT, Draft, DraftModel, check_draft, check_n_draft
from .embeddings import check_embeddings
from .errors import ArgumentError, ClosedError, ContextFullError, ThreadError, UnsupportedModelError
from .header import HeaderReport, read_header
from .lora import LoraAdapter
from .machine import working_set_bytes
from .model import Model, check_model
from .options import keyword_names, refuse_unknown
from .paging import PagingCounts, fits_in_memory, paging_counts
from .placement import Placement
from .plan import N_CTX_DEFAULT, Plan, TokenBytes, plan_model
from .prefix_cache import BYTES_MAX, PrefixCache
from .rpc import device_plan, rpc_devices
from .sampler import SAMPLING_NAMES, Sampler, SamplingOptions, SamplingParams
from .session import Session
from .state import model_fingerprint
from .stats import Stats
from .tokenizer import Tokenizer
from .turns import Turns
from .warmup import Progress, Warmup

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["LlamaBase"]


def _sampling_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters that the file recommends."""
    keys = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in keys.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _n_threads_default() -> int:
    n_cores = int(lib.pyl_n_cores())
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, min(n_cores, len(affinity(0)) if affinity else n_cores))


class _Use:
    """See ``LlamaBase._use``; a class, because the loop over tokens comes here for every one of them."""

    def __init__(self, llm: LlamaBase) -> None:
        self._llm = llm
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._owner: int | None = None  # thread that holds the lock

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            raise ThreadError(
                "this Llama was opened by the parent of this process",
                hint="Engine threads do not survive a fork; open the model again in the child.",
            )
        me = threading.get_ident()
        if self._owner == me:
            raise ThreadError(
                "this Llama was used by a callback of its own call",
                hint="A callback may look at what it is given; use the Llama after the call.",
            )
        self._lock.acquire()
        if self._llm._is_closed:
            self._lock.release()
            raise ClosedError("this Llama is closed")
        self._owner = me

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()


class LlamaBase:
    """An open model with one context; see ``Llama``."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int = N_CTX_DEFAULT,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int | Literal["auto"] = "auto",
        n_cpu_moe: int = 0,
        tensor_overrides: Mapping[str, str] | None = None,
        split_mode: Literal["none", "layer", "row", "tensor"] = "layer",
        main_gpu: int = 0,
        tensor_split: Sequence[float] = (),
        use_mmap: bool = True,
        use_mlock: bool = False,
        cache_type: str = "f16",
        act_quant: Literal["none", "cache", "full"] = "cache",
        flash_attn: Literal["auto", "on", "off"] = "auto",
        seed: int | None = None,
        chat_template: str | None = None,
        progress: Callable[[Progress], bool | None] | None = None,
        rpc: str | Sequence[str] = (),
        embedding: bool = False,
        pooling_type: Literal["none", "mean", "cls", "last"] | None = None,
        lora_path: str | os.PathLike[str] | None = None,
        lora_scale: float = 1.0,
        draft_model: str | os.PathLike[str] | None = None,
        n_draft: int = N_DRAFT_DEFAULT,
        prefix_cache: str | os.PathLike[str] | None = None,
        prefix_cache_bytes: int = BYTES_MAX,
        warmup: bool = True,
        page_experts: bool | None = None,
        verbose: bool = False,
        **unknown: NoReturn,
    ) -> None:
        """Open a model.

        Args:
            model_path: GGUF file: DeepSeek-V4 in the native or the upstream dialect, or any other model that the
                pinned llama.cpp runs. The first shard of a split model.
            n_ctx: Tokens the context holds.
            n_batch: Tokens per call to the engine at most.
            n_ubatch: Tokens evaluated at once at most; more is faster for prompts and takes more memory.
            n_threads: CPU threads; None takes the physical cores that this process may use.
            n_gpu_layers: ``"auto"`` places on GPUs what fits there, experts leaving first, and goes on without a GPU;
                or a number, which without a GPU is an error; negative means all.
            n_cpu_moe: First layers whose routed experts stay in host memory.
            tensor_overrides: Regular expression over tensor names -> device buffer, such as ``{"exps": "CPU"}``.
            split_mode: How several GPUs share the model: by ``"layer"``, ``"row"``, ``"tensor"``, or ``"none"``.
            main_gpu: The GPU that holds everything with ``split_mode="none"``.
            tensor_split: Shares of the GPUs; empty takes their free memory.
            use_mmap: Map the file. Pages are then read when they are needed, and ahead of that by a background thread.
            use_mlock: Keep the model's pages in memory.
            cache_type: Type of the KV cache: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
            flash_attn: ``"on"``, ``"off"`` or ``"auto"``: attention in one operation, which needs less memory and is
                faster for long contexts, but rounds to F16 inside.
            act_quant: What is rounded to FP8 and FP4 as DeepSeek's own code does it: ``none``, ``cache`` (rows that are
                kept and the indexer's queries, which the model was trained with) or ``full`` (also the inputs of all
                FP8 and FP4 products). Other models ignore it.
            seed: Of all sampling that gives none itself; None draws one per generation. Equal seeds give equal text on
                the same build, threads and batch sizes.
            chat_template: Jinja text instead of the file's chat template, or ``"preview"`` or ``"0731"`` for V4's own.
            progress: Called with a ``Progress`` during the load (in this thread or a helper's) and the warm-up (from
                the warm-up's thread); returning False cancels the load or stops the warm-up.
            rpc: Workers on other machines (``pyllama-dsv4 rpc-server``) as ``"host:port"``; they hold the layers that
                a GPU would, by default all. Nothing is encrypted: text can be guessed from what travels.
            embedding: The model is to give embeddings; refused by name where upstream's graph has none (DeepSeek-V4).
            pooling_type: How ``embed`` makes one vector of a text; ``"none"`` gives one for each token, None does what
                the file says.
            lora_path: As ``load_lora``, with `lora_scale`.
            lora_scale: See `lora_path`.
            draft_model: A file of ``convert --draft``, which proposes tokens: the model evaluates several at once and
                keeps those that it chooses itself, so the text is the one without. ``stats.acceptance_rate`` counts.
            n_draft: Tokens in a proposal at most.
            prefix_cache: Folder in which evaluated prompts are kept for this and other processes; None keeps them in
                memory only. Belongs to the model, the build and the settings that a cache depends on.
            prefix_cache_bytes: Size of that folder at most; what was used longest ago is removed.
            warmup: Read the mapped file into the page cache in the background, as far as memory reaches.
            page_experts: Announce the experts that a token has chosen to the system, which then reads just these, many
                at once; None does so if memory cannot hold the file. Holds for the process.
            verbose: Print the engine's log to stderr through ``logging``.

        Attributes:
            plan: What the load takes and yields, made before it.

        Raises:
            ModelNotFoundError, ModelFileError, FormatError and its subclasses: the file, before the engine sees it.
            ModelLoadError: The engine refused the file.
            MemoryLimitError: Not enough memory for the model or the context.
            WorkerError: A worker cannot be reached or is of another build; or, from every method that evaluates, it was
                lost. Close the ``Llama`` then, and open another.
            CancelledError: `progress` returned False.
            ArgumentError, UnknownOptionError: an argument.

        Threads may share it: generations queue, first come, first served. Close it, or use it as a context manager; a
        forked child must open its own.
        """
        refuse_unknown("Llama", unknown, keyword_names(LlamaBase.__init__))
        if verbose:
            _log_to_stderr()
        self._step = _Use(self)
        self._turns = Turns()
        self._warmup: Warmup | None = None
        self._engine: ChatEngine | None = None
        self._sampler: Sampler | None = None
        self._is_closed = False
        self._chat_template = chat_template
        self._draft: Draft | None = None
        self._draft_model: DraftModel | None = None
        self._loras: dict[LoraAdapter, float] = {}
        self._is_embedding = embedding
        self._pooling = pooling_type
        self._n_rollback = 0 if draft_model is None else n_draft
        self._cache_type = cache_type
        self._act_quant = act_quant
        self._seed = SamplingParams(seed=seed).seed  # checked there
        self.stats = Stats()

        if draft_model is not None:
            check_n_draft(n_draft, min(n_ubatch, n_batch, n_ctx))
        devices = rpc_devices(rpc)
        if devices and n_gpu_layers == "auto":
            n_gpu_layers = -1
        placement = Placement(
            n_gpu_layers=n_gpu_layers,
            n_cpu_moe=n_cpu_moe,
            tensor_overrides=tensor_overrides or {},
            split_mode=split_mode,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
        )
        self._report: HeaderReport = check_model(model_path)
        if draft_model is not None:
            self._check_draft(draft_model)
        self.plan: Plan = plan_model(
            self._report,
            **device_plan(devices, n_gpu_layers, n_cpu_moe),
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            cache_type=cache_type,
            act_quant=act_quant,
            flash_attn=flash_attn,
            is_mapped=use_mmap and not use_mlock,
            draft=draft_model,
            n_draft=self._n_rollback,
        )
        logger.info("%s: %s", self._report.header.path, self.plan.line())
        self.plan.check()
        placement.check_devices(has_workers=bool(devices))
        self._context_options: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "n_threads": _n_threads_default() if n_threads is None else n_threads,
            "cache_type": cache_type,
            "act_quant": act_quant,
            "flash_attn": flash_attn,
        }
        self._model = Model(
            model_path,
            placement=placement,
            context_params=context_params(**self._context_options),
            use_mmap=use_mmap,
            use_mlock=use_mlock,
            devices=[device.pointer for device in devices],
            on_progress=None if progress is None else lambda f: progress(Progress("load", f)) is not False,
        )
        if page_experts is None and use_mmap and not use_mlock and not fits_in_memory(self._report):
            page_experts = True
        if page_experts is not None:  # a model that fits leaves it as others of the process want it
            lib.pyl_paging_set(page_experts)
        try:
            if embedding:
                check_embeddings(self._model, pooling_type)
            self._context = Context(self._model, **self._context_options, n_rollback=self._n_rollback)
        except BaseException:
            self._model.close()
            raise
        if draft_model is not None:
            try:
                self._open_draft(
                    draft_model, n_draft, n_gpu_layers=n_gpu_layers, use_mmap=use_mmap, use_mlock=use_mlock
                )
            except BaseException:
                self._context.close()
                self._model.close()
                raise
        self._tokenizer = Tokenizer(self._model)
        try:
            disk = (
                None
                if prefix_cache is None
                else PrefixCache(prefix_cache, self._state_identity(), prefix_cache_bytes)
            )
        except BaseException:
            for owner in (self._draft, self._draft_model, self._context, self._model):
                if owner is not None:
                    owner.close()
            raise
        self._session = Session(self._context, disk)
        if lora_path is not None:
            try:
                self.load_lora(lora_path, lora_scale)
            except BaseException:
                self.close()
                raise
        self._sampling_defaults = _sampling_defaults(self._report.header.metadata)
        if progress is not None:
            progress(Progress("load", 1.0))
        if use_mmap and warmup and not use_mlock:
            self._warmup = Warmup(_warm_ranges(self._report), progress)
            self._warmup.start()

    def _check_draft(self, path: str | os.PathLike[str]) -> None:
        check_draft(read_header(path), path)
        if self._report.header.architecture != "deepseek4":
            raise UnsupportedModelError(
                "opening a draft model",
                path=path,
                found=f"a model of '{self._report.header.architecture}'",
                expected="one of deepseek4 to draft for",
            )

    def _open_draft(self, path: str | os.PathLike[str], n_draft: int, **model_options: Any) -> None:
        self._draft_model = DraftModel(path, self._model, model_options)
        try:
            self._draft = Draft(self._draft_model, self._context, n_draft, self._context_options)
        except BaseException:
            self._draft_model.close()
            raise
        self._context.draft = self._draft

    # --- lifetime ---

    def close(self) -> None:
        """Stop the warm-up and free everything. Idempotent."""
        if self._is_closed:
            return
        with self._use():  # another thread's step ends first
            self._is_closed = True
            if self._warmup is not None:
                self._warmup.stop()
            drafting = (self._draft, self._draft_model)
            for owner in (self._engine, self._sampler, *drafting, self._context, *self._loras, self._model):
                if owner is not None:
                    owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return f"<Llama {self._model.path.name}: closed>"
        return f"<Llama {self._model.path.name}: {self.desc}, n_ctx={self._context.n_ctx}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Llama cannot be pickled; pass its path and open it again in the other process")

    def _use(self) -> _Use:
        """Keep the native objects for one step; refuse use after close, after a fork and from a callback of a step.

        Other threads wait.
        """
        return self._step

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Like ``_use``, for what changes the sequence: generations of other threads end first."""
        if self._is_closed:
            raise ClosedError("this Llama is closed")
        with self._turns.take(), self._use():
            yield

    # --- facts ---

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata, typed; arrays are read when looked into."""
        return self._report.header.metadata

    def _state_identity(self) -> dict[str, str]:
        identity = {
            "model": self.fingerprint,
            "engine": build_info()["llama.cpp"],
            "patches": series_digest(),
            "cache type": self._cache_type,
            "act_quant": self._act_quant,
        }
        if self._loras:
            identity["lora"] = " ".join(f"{a.digest}*{scale}" for a, scale in self._loras.items())
        if self._n_rollback:
            identity["n_draft"] = str(self._n_rollback)  # copies of V4's states
        return identity

    @property
    def system_fingerprint(self) -> str:
        """What answers depend on besides the request: pinned commit, patches, and the model's ``fingerprint``."""
        loras = "".join(f"_{adapter.digest}*{scale}" for adapter, scale in self._loras.items())
        return f"fp_{build_info()['llama.cpp'][:10]}_{series_digest()}_{self.fingerprint}{loras}"

    @property
    def report(self) -> HeaderReport:
        """What the header check found: dialect, types, derived keys."""
        return self._report

    @property
    def n_vocab(self) -> int:
        return self._context.n_vocab

    @property
    def n_ctx(self) -> int:
        return self._context.n_ctx

    @property
    def token_bytes(self) -> TokenBytes:
        """Bytes that evaluating one more token reads: weights, and the caches of the tokens evaluated so far."""
        options = self._context_options
        return plan_model(
            self._report,
            n_ctx=max(self.n_tokens, 1),
            cache_type=options["cache_type"],
            act_quant=options["act_quant"],
            flash_attn=options["flash_attn"],
        ).token

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was made for."""
        return self._model.n_ctx_train

    @property
    def desc(self) -> str:
        """One line: architecture, size, file type."""
        return self._model.desc

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache."""
        return self._session.n_tokens

    @property
    def working_set_bytes(self) -> int | None:
        """Resident memory of this process, mapped file pages included; None when the system does not say."""
        return working_set_bytes()

    @property
    def paging(self) -> PagingCounts:
        """Chosen experts of this process and what of them was not in memory; counted where they are announced."""
        return paging_counts()

    @property
    def warmup(self) -> Warmup | None:
        """The background reader of the file, if one was started."""
        return self._warmup

    # --- saved states ---

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the model's header and tensor table, 16 hex digits."""
        return model_fingerprint((shard.path, shard.data_start) for shard in self._report.header.shards)

    # --- text ---

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the token ids of `text`; see ``Tokenizer.tokenize``."""
        with self._use():
            return self._tokenizer.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of token ids; see ``Tokenizer.detokenize``."""
        with self._use():
            return self._tokenizer.detokenize(ids, special=special)

    def token_to_bytes(self, token: int) -> bytes:
        """Return the bytes one token stands for; special tokens give their text."""
        with self._use():
            return self._tokenizer.token_to_bytes(token)

    # --- adapters ---

    @property
    def loras(self) -> Mapping[LoraAdapter, float]:
        """The adapters in use, with their scales."""
        return dict(self._loras)

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> LoraAdapter:
        """Apply a LoRA adapter from now on; what was evaluated is forgotten.

        Args:
            path: GGUF file of upstream's ``convert_lora_to_gguf.py``.
            scale: Factor of its part, beside the adapter's own alpha.

        Raises:
            UnsupportedModelError, TensorShapeError, FormatError: It does not fit the model, or has a tensor that
                upstream's graph would leave out without a word (of V4 ``attn_output_a`` and ``output``).
            ModelLoadError: The engine refused it.
        """
        scale = _checked_scale(scale)
        with self._change():
            adapter = LoraAdapter(path, self._model, self._report)
            self._loras[adapter] = scale
            self._apply_loras()
        return adapter

    def set_lora_scale(self, adapter: LoraAdapter, scale: float) -> None:
        """Give an adapter another scale; what was evaluated is forgotten."""
        scale = _checked_scale(scale)
        with self._change():
            self._check_lora(adapter)
            self._loras[adapter] = scale
            self._apply_loras()

    def remove_lora(self, adapter: LoraAdapter) -> None:
        """Stop applying an adapter and free it; what was evaluated is forgotten."""
        with self._change():
            self._check_lora(adapter)
            del self._loras[adapter]
            self._apply_loras()
            adapter.close()

    def _check_lora(self, adapter: LoraAdapter) -> None:
        if adapter not in self._loras:
            raise ArgumentError(
                "LoRA adapters",
                key="adapter",
                found=repr(adapter),
                expected="one that load_lora of this Llama returned",
            )

    def _apply_loras(self) -> None:
        self._context.set_loras(list(self._loras.items()))
        self._session.set_identity(self._state_identity())
        self._drop_sampler()

    # --- evaluation ---

    def reset(self) -> None:
        """Forget all evaluated tokens."""
        with self._change():
            self._session.reset()
            self._drop_sampler()

    @overload
    def eval(self, ids: Sequence[int]) -> None: ...
    @overload
    def eval(self, ids: Sequence[int], *, logits: Literal["all"]) -> npt.NDArray[np.float32]: ...

    def eval(
        self, ids: Sequence[int], *, logits: Literal["last", "all"] = "last"
    ) -> npt.NDArray[np.float32] | None:
        """Evaluate token ids after those in the cache.

        Args:
            ids: Token ids.
            logits: ``"all"`` returns the logits of every given position.

        Returns:
            ``(len(ids), n_vocab) float32`` for ``"all"``, else None.

        Raises:
            ArgumentError: An id is out of range, or another value of `logits`.
            ContextFullError: No room; nothing was changed.
        """
        if logits not in ("last", "all"):
            raise ArgumentError(
                "evaluating tokens", key="logits", found=repr(logits), expected="'last' or 'all'"
            )
        with self._change():
            return self._session.eval(ids, all_logits=logits == "all")

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last evaluated token: ``(n_vocab,) float32``, read-only; yours to keep."""
        with self._use():
            return self._context.logits

    def _params(self, options: SamplingOptions) -> SamplingParams:
        values = {**self._sampling_defaults, "seed": self._seed, **options}
        return SamplingParams(**values)

    def _drop_sampler(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()

    def sample(self, **sampling: Unpack[SamplingOptions]) -> int:
        """Return the next token id for the present logits; it is not evaluated.

        Args:
            sampling: See ``SamplingOptions``. Calls with equal options go on with the same random numbers.
        """
        refuse_unknown("sample", [k for k in sampling if k not in SAMPLING_NAMES], SAMPLING_NAMES)
        with self._use():
            params = self._params(sampling)
            if self._sampler is None or self._sampler.params != params:
                self._drop_sampler()
                self._sampler = Sampler(params, self._model, self.n_ctx)
            return self._sampler.sample(self._context.logits)

    def _check_fits(self, n_tokens: int) -> None:
        if n_tokens > self.n_ctx:
            raise ContextFullError(
                "the prompt does not fit",
                found=f"{n_tokens} tokens",
                expected=f"at most n_ctx = {self.n_ctx}",
                hint="Open the model with a larger n_ctx, or shorten the prompt.",
            )


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ArgumentError("LoRA adapters", key="scale", found=repr(scale), expected="a finite number")
    return float(scale)


def _warm_ranges(report: HeaderReport) -> list[tuple[Path, int, int]]:
    """Return the file ranges of all tensors, those that every token needs before the routed experts."""
    header = report.header
    dense: list[tuple[Path, int, int]] = []
    experts: list[tuple[Path, int, int]] = []
    for tensor in header.tensors:
        part = (Path(header.shards[tensor.shard].path), tensor.start, tensor.n_bytes)
        (experts if "_exps" in tensor.name else dense).append(part)
    merged: list[tuple[Path, int, int]] = []
    for path, start, n_bytes in dense + experts:
        if merged and merged[-1][0] == path and 0 <= start - (merged[-1][1] + merged[-1][2]) < 4096:
            merged[-1] = (path, merged[-1][1], start + n_bytes - merged[-1][1])
        else:
            merged.append((path, start, n_bytes))
    return merged


def _log_to_stderr() -> None:
    import logging

    if not any(isinstance(h, logging.StreamHandler) for h in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
