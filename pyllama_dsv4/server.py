"""Serving one model over HTTP: checks, the plan and the options of the server that is linked into the engine.

The server itself is upstream's; what we change in it is in ``native/server``. It runs in the calling process and takes
over its signals and its log, so it belongs to the command line: one call per process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ._native import build_info, check, drain_log, encode_path, ffi, lib, series_digest
from .context import ACT_QUANT_LEVELS
from .draft import N_DRAFT_DEFAULT, check_n_draft, check_pair
from .errors import ArgumentError, ServerError
from .header import HeaderReport
from .model import check_model
from .paging import fits_in_memory
from .placement import Placement
from .plan import N_CTX_DEFAULT, N_UBATCH_DEFAULT, Plan, plan_model
from .rpc import device_plan, endpoints, rpc_devices
from .state import model_fingerprint

__all__ = ["HOST_DEFAULT", "N_REQUESTS_DEFAULT", "PORT_DEFAULT", "run_server"]

HOST_DEFAULT = "127.0.0.1"
PORT_DEFAULT = 8080
N_REQUESTS_DEFAULT = 256
N_SLOTS_AUTO = 4
"""Slots that upstream makes when none are asked for. Each can then hold the whole context; else they divide it."""
_LEVELS = {"quiet": "1", "normal": "3", "verbose": "4"}  # errors; what happens; what happens to each request


def run_server(
    path: str | os.PathLike[str],
    *,
    host: str = HOST_DEFAULT,
    port: int = PORT_DEFAULT,
    api_key: str | None = None,
    n_slots: int | None = None,
    n_requests_max: int = N_REQUESTS_DEFAULT,
    sessions: str | os.PathLike[str] | None = None,
    n_ctx: int = N_CTX_DEFAULT,
    n_batch: int = N_UBATCH_DEFAULT,
    n_ubatch: int = N_UBATCH_DEFAULT,
    n_threads: int | None = None,
    n_gpu_layers: int | Literal["auto"] = "auto",
    n_cpu_moe: int = 0,
    tensor_overrides: Mapping[str, str] | None = None,
    split_mode: str = "layer",
    main_gpu: int = 0,
    tensor_split: Sequence[float] = (),
    use_mmap: bool = True,
    use_mlock: bool = False,
    cache_type: str = "f16",
    flash_attn: str = "auto",
    act_quant: str = "cache",
    rpc: str | Sequence[str] = (),
    draft_model: str | os.PathLike[str] | None = None,
    n_draft: int = N_DRAFT_DEFAULT,
    log: str = "normal",
    use_color: bool = False,
    args: Sequence[str] = (),
    on_plan: Callable[[Plan], None] | None = None,
) -> signal.Signals | None:
    """Serve a model until SIGINT or SIGTERM; must be called in the main thread, once per process.

    Args:
        path: GGUF file, or the first shard of a split model.
        host: Addresses to listen on, separated by commas.
        port: 0 takes a free one, which the log names.
        api_key: What clients must send; None lets everybody in.
        n_slots: Requests answered at the same time, sharing the context; None leaves it to the server.
        n_requests_max: Requests that are answered or wait; a further one gets an error 503.
        sessions: Folder in which clients may save slots. Each model, build and setting has its own folder in it, so
            that nothing is restored elsewhere.
        log: ``quiet``, ``normal`` or ``verbose``.
        use_color: Colour the log.
        args: Further options of upstream's server; they win over the ones before.
        on_plan: Called with the plan before the load.

    The other arguments are those of ``Llama``.

    Returns:
        The signal that ended the server, if one did. During the load a signal ends the process.

    Raises:
        ArgumentError: An argument is out of range, or the server does not know an option.
        FormatError, ModelFileError: The file cannot be served, or the draft model's.
        UnsupportedModelError, ModelLoadError: The draft model does not draft for this model.
        MemoryLimitError: The plan does not fit.
        WorkerError: A worker cannot be reached or is of another build.
        ServerError: The port is taken, or the server failed; its log says why.
        OSError: The folder for sessions cannot be made.
    """
    if act_quant not in ACT_QUANT_LEVELS:
        raise ArgumentError("serving", key="act_quant", found=act_quant, expected=", ".join(ACT_QUANT_LEVELS))
    placement = Placement(n_gpu_layers, n_cpu_moe, tensor_overrides or {}, split_mode, main_gpu, tensor_split)
    report = check_model(path)
    kind: str | None = None
    if draft_model is not None:
        check_n_draft(n_draft, min(n_ubatch, n_batch, n_ctx))
        kind = check_pair(path, draft_model)  # the server would end the process
    devices = rpc_devices(rpc)
    if devices and n_gpu_layers == "auto":
        n_gpu_layers = -1
    plan = plan_model(
        report,
        **device_plan(devices, n_gpu_layers, n_cpu_moe),
        n_ctx=n_ctx if n_slots is None else max(n_ctx // n_slots, 1),
        n_seq=N_SLOTS_AUTO if n_slots is None else n_slots,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        cache_type=cache_type,
        act_quant=act_quant,  # type: ignore[arg-type]  # checked above
        flash_attn=flash_attn,  # type: ignore[arg-type]  # refused there otherwise
        is_mapped=use_mmap and not use_mlock,
        draft=draft_model,
        n_draft=n_draft,
    )
    if on_plan is not None:
        on_plan(plan)
    plan.check()
    placement.check_devices(has_workers=bool(devices))
    _check_port(host, port)
    check(lib.pyl_act_quant_set_default(ACT_QUANT_LEVELS[act_quant]), "setting the level of rounding")
    if use_mmap and not use_mlock and not fits_in_memory(report):
        lib.pyl_paging_set(True)
    options = {
        "--host": host,
        "--port": port,
        "-c": n_ctx,
        "-b": n_batch,
        "-ub": min(n_ubatch, n_batch),
        "-t": lib.pyl_n_cores() if n_threads is None else n_threads,
        "-ctk": cache_type,
        "-ctv": cache_type,
        "-fa": flash_attn,
        "-lm": ("mmap+mlock" if use_mlock else "mmap") if use_mmap else ("mlock" if use_mlock else "none"),
        "-lv": _LEVELS[log],
        "--log-colors": "on" if use_color else "off",
        **({} if n_gpu_layers == "auto" else {"-ngl": "all" if n_gpu_layers == -1 else n_gpu_layers}),
        **({"-ncmoe": n_cpu_moe} if n_cpu_moe else {}),
        **(
            {"-ot": ",".join("=".join(pair) for pair in tensor_overrides.items())} if tensor_overrides else {}
        ),
        **({"-ts": ",".join(map(str, tensor_split))} if tensor_split else {}),
        **({} if split_mode == "layer" else {"-sm": split_mode}),  # a build without GPUs warns of both
        **({} if main_gpu == 0 else {"-mg": main_gpu}),
        **({} if n_slots is None else {"-np": n_slots}),
        **({"--rpc": ",".join(endpoints(rpc))} if devices else {}),
        **({} if api_key is None else {"--api-key": api_key}),
        **(
            {}
            if sessions is None
            else {"--slot-save-path": _own_folder(sessions, report, cache_type, act_quant)}
        ),
    }
    words = [b"pyllama-dsv4", b"-m", encode_path(path)]
    words += [str(word).encode() for pair in options.items() for word in pair]
    if draft_model is not None:
        words += [b"-md", encode_path(draft_model)]
        draft_options = {
            "--spec-type": f"draft-{kind}",
            "--spec-draft-n-max": n_draft,
            "-ctkd": cache_type,
            "-ctvd": cache_type,
            **({"-ngld": options["-ngl"]} if "-ngl" in options else {}),
        }
        words += [str(word).encode() for pair in draft_options.items() for word in pair]
    words += [os.fsencode(word) for word in args]
    if devices:
        lib.pyl_rpc_register()
    c_words = [ffi.new("char[]", word) for word in words]
    drain_log()
    number = check(
        lib.pyl_server_run(len(words), [*c_words, ffi.NULL], n_requests_max),
        "serving",
        ServerError,
        path=path,
    )
    return signal.Signals(number) if number else None


def _own_folder(
    sessions: str | os.PathLike[str], report: HeaderReport, cache_type: str, act_quant: str
) -> Path:
    """Make and return the folder for what this model, build and settings save: the engine's files do not say."""
    identity = (
        model_fingerprint((shard.path, shard.data_start) for shard in report.header.shards),
        build_info()["llama.cpp"],
        series_digest(),
        cache_type,
        act_quant,
    )
    folder = Path(sessions) / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken: the server finds out too, but only its log says so."""
    for address in (part.strip() for part in host.split(",")):
        if port == 0 or not address or address.endswith(".sock"):
            continue
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            raise ServerError(
                f"listening on {address}, port {port}",
                found="another program that listens there" if is_taken else error.strerror or str(error),
                hint="Choose another port." if is_taken else "Choose another address or port.",
            ) from error
