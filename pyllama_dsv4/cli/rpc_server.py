"""The command ``pyllama-dsv4 rpc-server``: lends this machine to another; the work is ``pyllama_dsv4.rpc``."""

from __future__ import annotations

import logging
from typing import Any, Final

import click

from .common import Options, output_options
from .help import Command, option

__all__ = ["rpc_server"]

WORKER: Final = "Worker"


@click.command(
    "rpc-server",
    cls=Command,
    examples=(
        "pyllama-dsv4 rpc-server --host 192.168.1.12",
        "pyllama-dsv4 rpc-server --port 50053 -t 16 --cache",
        "pyllama-dsv4 run flash.gguf --rpc 192.168.1.12:50052 -p 'Once'",
    ),
)
@option(
    "--host", metavar="HOST", default="127.0.0.1", section=WORKER, is_brief=True,
    help="Address to listen on; that of a network in which everybody is trusted.",
)  # fmt: skip
@option(
    "--port", type=click.IntRange(0, 65535), metavar="PORT", default=50052, section=WORKER, is_brief=True,
    help="Port to listen on; 0 takes a free one.",
)  # fmt: skip
@option(
    "-t", "--threads", "n_threads", type=click.IntRange(1), metavar="N", default_text="physical cores",
    section=WORKER, is_brief=True, help="CPU threads.",
)  # fmt: skip
@option(
    "--cache", "use_cache", is_flag=True, section=WORKER, is_brief=True,
    help="Keep large weights on disk, so that they are not sent again.",
)  # fmt: skip
@output_options
@click.pass_context
def rpc_server(
    ctx: click.Context, /, host: str, port: int, n_threads: int | None, use_cache: bool, **values: Any
) -> None:
    """Lend this machine to one that runs a model: its GPUs, or else its memory and cores.

    The other names it with --rpc, and sends the weights of the layers that it is to hold; both need the same version
    of this program. One client at a time. There is no authentication and no encryption: whoever reaches the port can
    use and read this memory. Ctrl-C ends it.
    """
    options = Options.take(ctx, {**values, "file": None, "model": None})
    from pyllama_dsv4.rpc import is_loopback, run_worker

    ui = options.ui
    cache = None
    if use_cache:
        from platformdirs import user_cache_path

        cache = user_cache_path("pyllama-dsv4") / "rpc"
        ui.note(f"weights are kept in {cache}")

    def on_start(address: str, number: int) -> None:
        who = "" if is_loopback(address) else f" Everybody who can reach {address} can use this machine."
        ui.warn(f"the protocol has no authentication and no encryption.{who}")
        name = f"[{address}]" if ":" in address and not address.startswith("[") else address
        ui.note(f"listening on {name}:{number}; Ctrl-C ends it")

    def on_client(is_there: bool) -> None:
        ui.note("a client has come" if is_there else "the client has left")

    if not options.is_verbose:
        handler = _Warnings(ui.warn)
        logging.getLogger("pyllama_dsv4").addHandler(handler)
    run_worker(host=host, port=port, n_threads=n_threads, cache=cache, on_start=on_start, on_client=on_client)


class _Warnings(logging.Handler):
    """Shows who was refused."""

    def __init__(self, warn: Any) -> None:
        super().__init__(logging.WARNING)
        self._warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        self._warn(record.getMessage())
