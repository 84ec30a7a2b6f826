"""One loaded model: weights and metadata. Contexts, tokenizer and sampling live in their own modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from ._native import check_ptr, encode_path, ffi, lib, run_cancellable, text
from .errors import ClosedError, ModelLoadError, UnsupportedModelError
from .header import HeaderReport, check_header, read_header
from .placement import Placement

__all__ = ["Model", "check_model"]


# Architectures that the engine knows and loads, but does not evaluate by themselves, and why.
# Source: src/llama-context.cpp (ctx_other), src/llama-model.cpp:llama_model_has_encoder.
_INCOMPLETE: Final = dict.fromkeys(
    ("dflash", "eagle3", "gemma4-assistant"),
    "It drafts for another model and runs beside it only. Open that one, with draft_model=FILE.",
) | dict.fromkeys(("t5", "t5encoder"), "It begins with an encoder, which this package does not run.")


def check_model(path: str | os.PathLike[str]) -> HeaderReport:
    """Check the header of a file that is to be loaded.

    A V4 file is checked in full; others the engine checks by itself, if it knows them at all.

    Raises:
        FormatError, ModelFileError: It cannot be loaded.
        UnsupportedModelError: It would load, but cannot be evaluated by itself.
    """
    header = read_header(path)
    if header.architecture in _INCOMPLETE:
        raise UnsupportedModelError(
            "the model cannot be run by itself",
            path=header.path,
            key="general.architecture",
            found=repr(header.architecture),
            hint=_INCOMPLETE[header.architecture],
        )
    is_other = header.architecture not in (None, "deepseek4") and bool(
        lib.pyl_knows_architecture((header.architecture or "").encode("utf-8"))
    )
    return check_header(header, any_architecture=is_other)


def _load_mode(use_mmap: bool, use_mlock: bool) -> int:
    if use_mmap:
        return lib.LLAMA_LOAD_MODE_MMAP_MLOCK if use_mlock else lib.LLAMA_LOAD_MODE_MMAP
    return lib.LLAMA_LOAD_MODE_MLOCK if use_mlock else lib.LLAMA_LOAD_MODE_NONE


class Model:
    """Owner of one ``llama_model``.

    Args:
        path: GGUF file (first shard of a split model). Check it with ``header.check_header`` first.
        n_gpu_layers: Layers placed on GPUs; negative means all. Ignored where `placement` is given.
        use_mmap: Map the file instead of reading it into memory.
        use_mlock: Keep the pages in memory.
        use_extra_bufts: Let the CPU backend repack weights into new memory. Never for DeepSeek-V4: the repacked
            copy would be as large as the file.
        vocab_only: Load metadata and vocabulary only: for tokens and templates.
        devices: ``ggml_backend_dev_t`` that layers may be placed on; empty lets the engine choose.
        placement: Where the model is to lie, in full.
        context_params: ``llama_context_params`` for which memory is left where the placement is found automatically.
        load_mtp: Load prediction blocks as well: the file is a draft model.
        no_alloc: Read no weights: what the model is can be asked, and nothing evaluated.
        on_progress: Called with the fraction 0..1 about every 50 ms; returning False cancels the load.

    Raises:
        ModelLoadError: The engine refused the file; ``native_log`` says why.
        MemoryLimitError: Not enough memory.
        CancelledError: `on_progress` returned False.
        WorkerError: A worker was lost.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int | Literal["auto"] = 0,
        use_mmap: bool = True,
        use_mlock: bool = False,
        use_extra_bufts: bool = False,
        vocab_only: bool = False,
        devices: Sequence[Any] = (),
        placement: Placement | None = None,
        context_params: Any = None,
        load_mtp: bool = False,
        no_alloc: bool = False,
        on_progress: Callable[[float], bool] | None = None,
    ) -> None:
        self.path = Path(path)
        params = lib.llama_model_default_params()
        placement = Placement(n_gpu_layers=n_gpu_layers) if placement is None else placement
        params.load_mode = _load_mode(use_mmap, use_mlock)
        params.use_extra_bufts = use_extra_bufts
        placed = placement.apply(params, path, context_params)
        params.load_mtp = load_mtp
        params.no_alloc = no_alloc
        params.vocab_only = vocab_only
        c_devices = ffi.new("ggml_backend_dev_t[]", [*devices, ffi.NULL])
        if devices:
            params.devices = c_devices
        monitor = ffi.new("struct pyl_monitor *")
        c_path = ffi.new("char[]", encode_path(path))

        def load() -> Any:
            pointer = lib.pyl_model_load(c_path, params, monitor)
            # the reason is kept per thread: translate it in the thread that made the call
            return check_ptr(pointer, "loading the model", ModelLoadError, path=self.path)

        on_poll = None if on_progress is None else lambda: on_progress(float(monitor.progress))
        self._pointer = ffi.gc(run_cancellable(load, monitor, on_poll), lib.llama_model_free)
        ffi.release(placed)  # the load has read it

    @property
    def pointer(self) -> Any:
        """The ``llama_model *``.

        Raises:
            ClosedError: after ``close()``.
        """
        if self._pointer is None:
            raise ClosedError("the model is closed", path=self.path)
        return self._pointer

    @property
    def vocab(self) -> Any:
        """The ``llama_vocab *``, valid as long as the model is open."""
        return lib.llama_model_get_vocab(self.pointer)

    @property
    def n_ctx_train(self) -> int:
        return int(lib.llama_model_n_ctx_train(self.pointer))

    @property
    def n_vocab(self) -> int:
        return int(lib.llama_vocab_n_tokens(self.vocab))

    @property
    def n_params(self) -> int:
        return int(lib.llama_model_n_params(self.pointer))

    @property
    def n_bytes(self) -> int:
        """Size of all tensors."""
        return int(lib.llama_model_size(self.pointer))

    @property
    def desc(self) -> str:
        """The engine's one-line description: architecture, size label, file type."""
        buffer = ffi.new("char[]", 256)
        lib.llama_model_desc(self.pointer, buffer, 256)
        return text(buffer)

    def metadata(self) -> dict[str, str]:
        """Return the scalar metadata of the file as the engine prints it; arrays are abbreviated."""

        def read(getter: Any, index: int) -> str:
            n = getter(self.pointer, index, ffi.NULL, 0)
            buffer = ffi.new("char[]", max(n, 0) + 1)
            getter(self.pointer, index, buffer, max(n, 0) + 1)
            return text(buffer)

        return {
            read(lib.llama_model_meta_key_by_index, i): read(lib.llama_model_meta_val_str_by_index, i)
            for i in range(lib.llama_model_meta_count(self.pointer))
        }

    def close(self) -> None:
        """Free the weights. Idempotent; contexts of this model must be closed before."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
