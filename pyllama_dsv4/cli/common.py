"""What ``chat`` and ``run`` share: options in llama-cli's spelling, opening a model with progress, the line of counts.

Parameter names are those of ``Llama`` and its sampling keywords, so that options are passed on as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .help import option
from .terminal import ANIMATE_AFTER_S, Ui, clean

if TYPE_CHECKING:
    from pyllama_dsv4.llama import Llama, Stats
    from pyllama_dsv4.warmup import Progress

__all__ = [
    "LayerCount",
    "Options",
    "load_options",
    "model_argument",
    "model_or_demo",
    "open_model",
    "output_options",
    "read_prompt",
    "reading_text",
    "sampling_options",
    "stats_line",
]

F = TypeVar("F", bound=Callable[..., Any])

LOAD: Final = "Model and memory"
SAMPLING: Final = "Sampling"
OUTPUT: Final = "Output"

CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0")
ACT_QUANT_LEVELS: Final = ("none", "cache", "full")
SEED_MAX: Final = 2**32 - 2
SPLIT_MODES: Final = ("none", "layer", "row", "tensor")
N_DEMO_TOKENS: Final = 256
"""Length of the answers of random weights, which do not end them, unless ``-n`` says another."""
LINE_INTERVAL_S: Final = 5.0
"""Seconds between lines of progress where nothing can be animated."""

_LOAD_NAMES: Final = (
    "n_ctx",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "n_gpu_layers",
    "n_cpu_moe",
    "tensor_overrides",
    "split_mode",
    "main_gpu",
    "tensor_split",
    "use_mmap",
    "use_mlock",
    "cache_type",
    "flash_attn",
    "act_quant",
    "rpc",
    "seed",
)
_SAMPLING_NAMES: Final = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
_FROM_FILE: Final = "what the file recommends"


class LayerCount(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions only
    """A number of layers, ``auto``, or ``all``, which becomes -1."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        if value == "all":
            return -1
        if not str(value).isdecimal():
            self.fail(f"{value!r} is not a number of layers, 'auto' or 'all'.", param, ctx)
        return int(value)


def _unlimited(_ctx: click.Context, _param: click.Parameter, value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _workers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | tuple[()]:
    return value or ()


def _overrides(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, str] | None:
    from pyllama_dsv4.placement import parse_overrides

    return parse_overrides(value) if value else None


def _shares(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Sequence[float]:
    from pyllama_dsv4.placement import parse_shares

    return parse_shares(value) if value else ()


def model_argument(function: F) -> F:
    """Add FILE and ``-m FILE``."""
    path = click.Path(path_type=Path)
    function = click.argument("file", required=False, type=path)(function)
    return option(
        "-m",
        "--model",
        type=path,
        metavar="FILE",
        section=LOAD,
        is_brief=True,
        help="The model; the same as the argument FILE.",
    )(function)


def load_options(function: F) -> F:
    """Add the options that become arguments of ``Llama``."""
    positive = click.IntRange(1)
    options = (
        option(
            "-c", "--ctx-size", "n_ctx", type=positive, metavar="N", default=8192, section=LOAD, is_brief=True,
            help="Tokens that prompt and answers may hold together.",
        ),
        option(
            "-b", "--batch-size", "n_batch", type=positive, metavar="N", default=512, section=LOAD,
            help="Tokens per call to the engine.",
        ),
        option(
            "-ub", "--ubatch-size", "n_ubatch", type=positive, metavar="N", default=512, section=LOAD,
            help="Tokens evaluated at once; more is faster and takes more memory.",
        ),
        option(
            "-t", "--threads", "n_threads", type=positive, metavar="N", default_text="physical cores",
            section=LOAD, is_brief=True, help="CPU threads.",
        ),
        option(
            "-ngl", "--n-gpu-layers", "n_gpu_layers", type=LayerCount(), metavar="N|auto|all", default="auto",
            section=LOAD, is_brief=True, help="Layers to place on GPUs.",
        ),
        option(
            "-ncmoe", "--n-cpu-moe", "n_cpu_moe", type=click.IntRange(0), metavar="N", default=0, section=LOAD,
            help="First layers whose routed experts stay in host memory.",
        ),
        option(
            "-ot", "--override-tensor", "tensor_overrides", metavar="PATTERN=BUFFER,...", callback=_overrides,
            section=LOAD, help="Where tensors go whose name PATTERN finds, such as exps=CPU.",
        ),
        option(
            "-sm", "--split-mode", "split_mode", type=click.Choice(SPLIT_MODES), metavar="none|layer|row|tensor",
            default="layer", section=LOAD, help="How several GPUs share the model.",
        ),
        option(
            "-mg", "--main-gpu", "main_gpu", type=click.IntRange(0), metavar="N", default=0, section=LOAD,
            help="The GPU that holds everything with -sm none.",
        ),
        option(
            "-ts", "--tensor-split", "tensor_split", metavar="N,N,...", callback=_shares,
            default_text="free memory", section=LOAD, help="Shares of the GPUs.",
        ),
        option(
            "-ctk", "--cache-type-k", "cache_type", type=click.Choice(CACHE_TYPES), metavar="TYPE",
            default="f16", section=LOAD, help=f"Type of the KV cache, K and V alike: {', '.join(CACHE_TYPES)}.",
        ),
        option(
            "-fa", "--flash-attn", "flash_attn", type=click.Choice(("auto", "on", "off")), metavar="on|off|auto",
            default="auto", section=LOAD, help="Attention in one operation: faster, with F16 rounding inside.",
        ),
        option(
            "--act-quant", "act_quant", type=click.Choice(ACT_QUANT_LEVELS), metavar="LEVEL", default="cache",
            section=LOAD,
            help="What is rounded as in DeepSeek's code: cache (KV and indexer rows), full (inputs of products too), "
            "none.",
        ),
        option(
            "--mmap/--no-mmap", "use_mmap", default=True, section=LOAD,
            help="Map the file (the default), or read it into memory.",
        ),
        option(
            "--rpc", "rpc", metavar="HOST:PORT,...", callback=_workers, section=LOAD,
            help="Workers on other machines that hold the model's layers; see rpc-server.",
        ),
        option("--mlock", "use_mlock", is_flag=True, section=LOAD, help="Keep the model's pages in memory."),
    )  # fmt: skip
    for add in reversed(options):
        function = add(function)
    return function


def sampling_options(function: F) -> F:
    """Add the options that become sampling keywords, and ``-n``."""
    options = (
        option(
            "-n", "--n-predict", "--predict", "max_tokens", type=click.IntRange(-1), metavar="N",
            callback=_unlimited, default_text="-1, until the model ends", section=SAMPLING, is_brief=True,
            help="Tokens to generate at most.",
        ),
        option(
            "--temp", "temperature", type=click.FloatRange(0), metavar="X", default_text=_FROM_FILE,
            section=SAMPLING, is_brief=True, help="Temperature; 0 takes the most likely token.",
        ),
        option(
            "--top-k", "top_k", type=click.IntRange(0), metavar="N", default_text=_FROM_FILE, section=SAMPLING,
            help="Keep the N most likely tokens; 0 keeps all.",
        ),
        option(
            "--top-p", "top_p", type=click.FloatRange(0, 1, min_open=True), metavar="X",
            default_text=_FROM_FILE, section=SAMPLING,
            help="Keep the most likely tokens with this probability together.",
        ),
        option(
            "--min-p", "min_p", type=click.FloatRange(0, 1), metavar="X", default_text=_FROM_FILE,
            section=SAMPLING, help="Drop tokens less likely than this share of the most likely.",
        ),
        option(
            "--repeat-penalty", "repeat_penalty", type=click.FloatRange(0, min_open=True), metavar="X",
            default_text="1, off", section=SAMPLING, help="Divides the logits of recent tokens.",
        ),
        option(
            "-s", "--seed", "seed", type=click.IntRange(-1, SEED_MAX), metavar="N", callback=_unlimited,
            default_text="-1, a new one each time", section=SAMPLING, is_brief=True,
            help="Equal seeds give equal text.",
        ),
    )  # fmt: skip
    for add in reversed(options):
        function = add(function)
    return function


def output_options(function: F) -> F:
    """Add colour, ``--quiet`` and ``--verbose``."""
    options = (
        option(
            "--color", type=click.Choice(("auto", "always", "never")), metavar="WHEN", default="auto",
            section=OUTPUT, help="auto (on a terminal, unless NO_COLOR is set), always or never.",
        ),
        option("-q", "--quiet", is_flag=True, section=OUTPUT, help="No progress and no counts, only errors."),
        option("-v", "--verbose", is_flag=True, section=OUTPUT, help="The engine's log on stderr."),
    )  # fmt: skip
    for add in reversed(options):
        function = add(function)
    return function


@dataclass(frozen=True)
class Options:
    """The shared options of one call, sorted.

    Attributes:
        path: The model file; None when none was given.
        load: Keywords for ``Llama``.
        sampling: Keywords for generating; only those that were given.
        max_tokens: None for no limit.
        is_limited: Whether ``-n`` was given.
        color: ``auto``, ``always`` or ``never``.
        ui: For everything but the answer.
        is_verbose: Whether the engine's log goes to stderr.
    """

    path: Path | None
    load: dict[str, Any]
    sampling: dict[str, Any]
    max_tokens: int | None
    is_limited: bool
    color: str
    ui: Ui
    is_verbose: bool

    @classmethod
    def take(cls, ctx: click.Context, values: dict[str, Any]) -> Options:
        """Take the shared options out of a command's parameters.

        Raises:
            click.UsageError: FILE and ``--model`` differ.
        """
        file, model = values.pop("file"), values.pop("model")
        if file is not None and model is not None and file != model:
            if ctx.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"two models: {file} and --model {model}. Give one of them.", ctx=ctx)
            model = None  # the environment's, overruled
        color, is_verbose = values.pop("color"), values.pop("verbose")
        max_tokens_source = ctx.get_parameter_source("max_tokens")
        options = cls(
            path=file or model,
            load={name: values.pop(name) for name in _LOAD_NAMES if name in values},
            sampling={k: v for k in _SAMPLING_NAMES if (v := values.pop(k, None)) is not None},
            max_tokens=values.pop("max_tokens", None),
            is_limited=max_tokens_source is not click.core.ParameterSource.DEFAULT,
            color=color,
            ui=Ui(color=color, is_quiet=values.pop("quiet"), is_verbose=is_verbose),
            is_verbose=is_verbose,
        )
        if is_verbose:
            _log_to_stderr()
        return options


def _log_to_stderr() -> None:
    import logging

    class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def format(self, record: logging.LogRecord) -> str:
            return clean(super().format(record))  # names in it come from the file

    handler = _Handler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
    logger = logging.getLogger("pyllama_dsv4")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


class _LoadProgress:
    """Shows ``Progress`` of the load: a bar on a terminal, a line now and then elsewhere. Keeps the warm-up's."""

    def __init__(self, ui: Ui, name: str) -> None:
        self._ui = ui
        self._text = f"loading {clean(name)}"
        self._start_s = self._line_s = time.monotonic()
        self._update: Callable[[float], None] | None = None
        self.stop: Callable[[], None] = lambda: None
        self.warmup: Progress | None = None

    def __call__(self, event: Progress) -> None:
        if event.stage == "warmup":
            self.warmup = event  # from the warm-up's thread: only kept
        elif self._ui.is_animated:
            self._show_bar(event.fraction)
        elif not self._ui.is_quiet and time.monotonic() - self._line_s >= LINE_INTERVAL_S:
            self._line_s = time.monotonic()
            self._ui.note(f"{self._text}: {event.fraction:.0%}")

    def _show_bar(self, fraction: float) -> None:
        if self._update is None and fraction < 1 and time.monotonic() - self._start_s > ANIMATE_AFTER_S:
            from rich import progress as rich

            columns = (
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.TaskProgressColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
            )
            bar = rich.Progress(*columns, console=self._ui.console(), transient=True)
            task = bar.add_task(self._text, total=1.0)
            self.stop = bar.stop  # first: an interrupt may come in the middle of the start
            bar.start()
            self._update = lambda done: bar.update(task, completed=done)
        if self._update is not None:
            self._update(fraction)


def model_or_demo(options: Options) -> tuple[Path, int | None]:
    """Return the model to open and the limit of its answers; the demo model, with a note, if no file was named."""
    if options.path is not None:
        return options.path, options.max_tokens
    from pyllama_dsv4.demo import demo_model, demo_note, is_trained

    options.ui.note(demo_note())
    if is_trained():
        return demo_model(), options.max_tokens
    max_tokens = options.max_tokens
    if not options.is_limited:
        max_tokens = N_DEMO_TOKENS
        options.ui.note(f"Random weights do not end an answer: each ends after {max_tokens} tokens, or -n N.")
    with options.ui.waiting("building the demo model, once"):
        return demo_model(), max_tokens


@contextmanager
def open_model(options: Options, path: Path, **more: Any) -> Iterator[tuple[Llama, Callable[[], str]]]:
    """Open a model, showing the load; close it at the end.

    Args:
        options: The load options.
        path: The model file.
        more: Further keywords for ``Llama``.

    Yields:
        The model, and a function that says in a few words how far its warm-up is: ``""`` when it has ended.
    """
    from pyllama_dsv4._native import drain_log
    from pyllama_dsv4.llama import Llama

    progress = _LoadProgress(options.ui, path.name)
    try:
        llm = Llama(path, **options.load, progress=progress, **more)
    finally:
        progress.stop()
        drain_log()
    with llm:
        if not options.ui.is_quiet:
            options.ui.note(llm.plan.with_bandwidth().line())

        def warmup_text() -> str:
            event = progress.warmup
            if event is None or llm.warmup is None or not llm.warmup.is_running:
                return ""
            left = "" if event.eta_s is None else f", {_duration(event.eta_s)} left"
            return f"reading ahead {event.fraction:.0%} of {event.n_bytes_total / 1e9:.1f} GB{left}"

        try:
            yield llm, warmup_text
        finally:
            drain_log()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def read_prompt(ctx: click.Context, prompt: str | None, file: Path | None) -> str:
    """Return the text of ``-p``, ``-f`` or a pipe.

    One line end at its end is the file's or the pipe's, not the prompt's.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("two prompts: give -p or -f, not both.", ctx=ctx)
    if file is not None:
        data = file.read_bytes()
    elif prompt is not None and prompt != "-":
        # arguments that are not UTF-8 arrive with surrogates
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    elif prompt is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give -p TEXT, -f FILE, or a prompt in a pipe.", ctx=ctx)
    else:
        data = sys.stdin.buffer.read()
    text = data.decode("utf-8", "replace").removesuffix("\n")
    if not text and prompt is None and file is None:
        raise click.UsageError("no prompt: standard input is empty. Give -p TEXT or -f FILE.", ctx=ctx)
    return text


def stats_line(stats: Stats, n_tokens: int, n_ctx: int, reading: str = "") -> str:
    """Return the counts of a prompt and its answer, and how full the context is, in one line.

    Args:
        stats: The counts.
        n_tokens: Tokens in the context.
        n_ctx: Its size.
        reading: See ``reading_text``.
    """
    cached = f" ({stats.n_tokens_cached:,} cached)" if stats.n_tokens_cached else ""
    return (
        f"prompt {stats.n_tokens_prompt:,}{cached}{_speed(stats.prefill_tokens_per_s)}"
        f" | answer {stats.n_tokens_generated:,}{_speed(stats.decode_tokens_per_s)}{_accepted(stats)}{reading}"
        f" | context {n_tokens:,} of {n_ctx:,}"
    )


def reading_text(tokens_per_s: float, n_bytes: int, bandwidth: float) -> str:
    """Return what decoding read: bytes per token, and per second beside what this machine can read."""
    size = f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
    return f", {size} a token: {tokens_per_s * n_bytes / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s"


def _accepted(stats: Stats) -> str:
    rate = stats.acceptance_rate
    return "" if rate is None else f", {rate:.0%} of {stats.n_tokens_drafted:,} drafted"


def _speed(tokens_per_s: float) -> str:
    return f", {tokens_per_s:.1f} t/s" if tokens_per_s else ""
