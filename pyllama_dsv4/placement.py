"""Which device holds what of a model: layers, experts, single tensors.

Owns the checks of these options and their translation for the engine. What needs how much memory is told beforehand
by ``plan``; here the engine's own fitting is used where nothing was asked for.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ._native import build_info, check, check_ptr, encode_path, ffi, lib
from .errors import ArgumentError

__all__ = ["SPLIT_MODES", "Placement", "parse_overrides", "parse_shares"]

logger = logging.getLogger("pyllama_dsv4")

SPLIT_MODES = ("none", "layer", "row", "tensor")

MARGIN_BYTES = 1 << 30
"""Free memory that fitting leaves on each GPU: what others use, and the engine's scratch."""

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_WHAT = "placing the model"


def parse_overrides(value: str) -> dict[str, str]:
    """Return ``PATTERN=BUFFER,...``, llama.cpp's spelling on the command line, as a mapping.

    Raises:
        ArgumentError: A part has no ``=``.
    """
    pairs = {}
    for part in value.split(","):
        pattern, sign, buffer = part.rpartition("=")
        if not sign or not pattern or not buffer:
            raise ArgumentError(
                "reading tensor overrides", found=repr(part), expected="PATTERN=BUFFER, such as exps=CPU"
            )
        pairs[pattern] = buffer
    return pairs


def parse_shares(value: str) -> list[float]:
    """Return ``3,1`` or ``3/1`` as numbers.

    Raises:
        ArgumentError: A part is no number.
    """
    try:
        return [float(part) for part in re.split(r"[,/]", value)]
    except ValueError:
        raise ArgumentError(
            "reading shares of GPUs", found=repr(value), expected="numbers, such as 3,1"
        ) from None


@dataclass(frozen=True)
class Placement:
    """Where a model is to lie.

    Args:
        n_gpu_layers: Layers on GPUs, from the last to the first; negative means all; ``"auto"`` what fits.
        n_cpu_moe: First layers whose routed experts stay in host memory.
        tensor_overrides: Regular expression over tensor names -> device buffer (``"CPU"``, ``"CUDA0"``).
        split_mode: How several GPUs share the model: ``"layer"``, ``"row"``, ``"tensor"``, or ``"none"``.
        main_gpu: The GPU that holds everything with ``split_mode="none"``.
        tensor_split: Shares of the GPUs; empty takes their free memory.

    Raises:
        ArgumentError: A value is out of range.
    """

    n_gpu_layers: int | Literal["auto"] = "auto"
    n_cpu_moe: int = 0
    tensor_overrides: Mapping[str, str] = field(default_factory=dict)
    split_mode: str = "layer"
    main_gpu: int = 0
    tensor_split: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.split_mode not in SPLIT_MODES:
            raise ArgumentError(
                _WHAT, key="split_mode", found=repr(self.split_mode), expected=", ".join(SPLIT_MODES)
            )
        if self.n_gpu_layers != "auto" and not isinstance(self.n_gpu_layers, int):
            raise ArgumentError(
                _WHAT, key="n_gpu_layers", found=repr(self.n_gpu_layers), expected="a number, or 'auto'"
            )
        for key, value in (("n_cpu_moe", self.n_cpu_moe), ("main_gpu", self.main_gpu)):
            if value < 0:
                raise ArgumentError(_WHAT, key=key, found=value, expected="0 or more")
        if any(not 0 <= share < float("inf") for share in self.tensor_split):
            raise ArgumentError(
                _WHAT, key="tensor_split", found=list(self.tensor_split), expected="numbers from 0 on"
            )
        for pattern in self.tensor_overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ArgumentError(
                    _WHAT,
                    key="tensor_overrides",
                    found=f"{pattern!r} ({error})",
                    expected="a regular expression over tensor names",
                ) from error

    def check_devices(self, *, has_workers: bool = False) -> None:
        """Refuse layers for GPUs where there is none; ``"auto"`` goes on without.

        Raises:
            ArgumentError: `n_gpu_layers` is a number other than 0, and no device was found.
        """
        if has_workers or lib.llama_supports_gpu_offload():
            return
        backends = build_info()["backends"]
        if self.n_gpu_layers == "auto":
            logger.info("no GPU was found (backends in this build: %s): the model stays on the CPU", backends)
        elif self.n_gpu_layers != 0:
            is_gpu_build = backends != "CPU"
            raise ArgumentError(
                _WHAT,
                key="n_gpu_layers",
                found=f"{self.n_gpu_layers}, but no device was found (backends in this build: {backends})",
                expected="a GPU that the build supports",
                hint="Check the driver (nvidia-smi), or leave n_gpu_layers at 'auto' to go on without a GPU."
                if is_gpu_build
                else "This build is for CPUs (docs/cuda.md: how to build for NVIDIA GPUs); 0 or 'auto' use the CPU.",
            )

    def apply(self, params: Any, path: str | os.PathLike[str], context: Any = None) -> Any:
        """Write the placement into ``llama_model_params``.

        Args:
            params: Changed in place.
            path: The model; read where the engine is to find what fits.
            context: ``llama_context_params`` that the memory must hold, too; None does not fit anything.

        Returns:
            What must be kept until the load has ended.

        Raises:
            ArgumentError: A buffer that does not exist, or too many shares.
        """
        placement = ffi.gc(check_ptr(lib.pyl_placement_init(), _WHAT), lib.pyl_placement_free)
        is_auto = self.n_gpu_layers == "auto"
        has_gpu = bool(lib.llama_supports_gpu_offload())
        params.split_mode = getattr(lib, f"LLAMA_SPLIT_MODE_{self.split_mode.upper()}")
        params.main_gpu = self.main_gpu
        if is_auto and not has_gpu:
            params.n_gpu_layers = 0
        elif not is_auto:
            params.n_gpu_layers = self.n_gpu_layers
        overrides = {
            **self.tensor_overrides,  # first: the first pattern that finds wins
            **{rf"^blk\.{layer}{_EXPERTS}": "CPU" for layer in range(self.n_cpu_moe)},
        }
        for pattern, buffer in overrides.items():
            check(
                lib.pyl_placement_override(placement, pattern.encode(), buffer.encode()),
                _WHAT,
                ArgumentError,
                key="tensor_overrides",
                found=f"{pattern}={buffer}",
            )
        if self.tensor_split:
            shares = [float(share) for share in self.tensor_split]
            check(
                lib.pyl_placement_split(placement, shares, len(shares)),
                _WHAT,
                ArgumentError,
                key="tensor_split",
                found=shares,
            )
        if is_auto and has_gpu and context is not None and not overrides and not self.tensor_split:
            c_params = ffi.new("struct llama_model_params *", params)
            c_context = ffi.new("struct llama_context_params *", context)
            if lib.pyl_placement_fit(placement, encode_path(path), MARGIN_BYTES, c_params, c_context) == 1:
                ffi.buffer(ffi.addressof(params))[:] = ffi.buffer(c_params)[:]
            else:
                logger.warning("what fits on the GPUs could not be found: all layers go there")
        else:
            lib.pyl_placement_apply(placement, ffi.addressof(params))
        return placement
