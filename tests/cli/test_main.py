"""The command without a model: help, version, unknown names, and how errors end the process."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from pyllama_dsv4 import cli, errors
from pyllama_dsv4.cli.exit_codes import ExitCode, exit_code
from pyllama_dsv4.cli.terminal import AnswerWriter, clean, use_color

COMMANDS = (
    *("chat", "run", "serve", "rpc-server", "tokenize", "explain", "inspect", "plan", "convert", "restore"),
    *("verify", "translate", "quantize", "doctor", "selftest", "bench", "score"),
)
Run = Callable[..., subprocess.CompletedProcess[bytes]]

# what each class of error means to a script that called the command
CODES = {
    1: {
        "CancelledError",
        "ClosedError",
        "ContextFullError",
        "ConvertError",
        "DiskFullError",
        "InferenceError",
        "PyllamaError",
        "ServerError",
        "ThreadError",
        "UnsupportedCpuError",
        "WorkerError",
    },
    2: {"ArgumentError", "UnknownOptionError"},
    3: {
        "ChatError",
        "CheckpointError",
        "DialectError",
        "FormatError",
        "MissingKeyError",
        "MissingScaleError",
        "MissingShardError",
        "MissingTensorError",
        "ModelFileError",
        "ModelLoadError",
        "ModelNotFoundError",
        "NotGGUFError",
        "StateError",
        "TensorShapeError",
        "TileShapeError",
        "TokenizeError",
        "TruncatedFileError",
        "Type42Error",
        "UnsupportedModelError",
    },
    4: {"MemoryLimitError"},
}


# --- help ---


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)])
def test_help_fits_a_terminal_of_80_columns(run: Run, args: tuple[str, ...]) -> None:
    done = run(*args, "--help")
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("Usage: pyllama-dsv4")
    assert max(map(len, lines)) <= 80
    assert any(line.strip() == "Examples:" for line in lines)


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)])
def test_short_help_is_shorter(run: Run, args: tuple[str, ...]) -> None:
    brief, full = (run(*args, name).stdout.decode().splitlines() for name in ("-h", "--help"))
    assert brief[0] == full[0]
    assert len(brief) <= len(full)
    if args[:1] in (("chat",), ("run",), ()):
        assert len(brief) <= 30
        assert "--help" in brief[-1]


def test_help_names_every_command_in_a_section(run: Run) -> None:
    text = run("--help").stdout.decode()
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert text.index("Talk:") < text.index("Files:") < text.index("Examples:") < text.index("Exit codes:")


def test_options_are_in_sections_with_defaults(run: Run) -> None:
    text = " ".join(run("run", "--help").stdout.decode().split())
    places = [text.index(s) for s in ("Prompt:", "Model and memory:", "Sampling:", "Output:", "Examples:")]
    assert places == sorted(places)
    assert "-c, --ctx-size N Tokens that prompt and answers may hold together. [default: 8192]" in text
    assert "PYLLAMA_DSV4_TOP_K" in text


def test_help_is_fast_and_loads_no_engine() -> None:
    program = (
        "import sys, json, contextlib, io\n"
        "from pyllama_dsv4.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    modules = set(json.loads(done.stdout))
    assert not modules & {
        "pyllama_dsv4._llama",
        "pyllama_dsv4._native",
        "numpy",
        "rich",
        "prompt_toolkit",
        "gguf",
    }
    # processor time: the wall clock of a busy machine says nothing
    assert min(times) < 0.15


def test_a_shell_can_complete_names(run: Run) -> None:
    asked = {"_PYLLAMA_DSV4_COMPLETE": "bash_complete", "COMP_WORDS": "pyllama-dsv4 co", "COMP_CWORD": "1"}
    done = run(env=asked)
    assert (done.returncode, done.stdout) == (0, b"plain,convert\n")


def test_without_a_command_it_lists_the_commands(run: Run) -> None:
    done = run()
    assert done.returncode == 0
    assert done.stdout == run("-h").stdout


# --- version ---


def test_version_says_what_is_compiled_in(run: Run) -> None:
    native = pytest.importorskip(
        "pyllama_dsv4._native", reason="the engine is not built", exc_type=ImportError
    )
    done = run("--version")
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    assert lines["pyllama-dsv4"] == __import__("pyllama_dsv4").__version__
    assert len(lines["llama.cpp"]) == 40
    assert lines["patches"] == native.series_digest()
    assert "CPU" in lines["backends"].split()
    assert "CPU" in lines["system"]


# --- usage errors ---


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("caht",), "No such command: caht. Did you mean chat?"),
        (("zzz",), "No such command: zzz."),
        (("--versoin",), "--version"),
        (("run", "--tepm", "1"), "No such option: --tepm. Did you mean --temp"),
        (("run", "--ctx=1"), "No such option: --ctx. Did you mean"),
        (("run", "-nlg", "8"), "No such option: -nlg. Did you mean -ngl"),  # not -n with the value "lg"
        (("run", "x.gguf", "-p", "a", "-c", "0"), "-c"),
        (("run", "x.gguf", "-p", "a", "--top-p", "2"), "--top-p"),
        (("run", "x.gguf", "-p", "a", "-ngl", "some"), "-ngl"),
        (("run", "x.gguf", "-p", "a", "-ctk", "q4_0"), "-ctk"),
        (("run", "x.gguf", "-m", "y.gguf", "-p", "a"), "two models: x.gguf and --model y.gguf"),
        (("inspect",), "FILE"),
    ],
)
def test_usage_errors(run: Run, args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == b""
    text = done.stderr.decode()
    assert message in text
    assert text.startswith("Usage: pyllama-dsv4")
    assert "Traceback" not in text


def test_values_that_look_like_options_stay_values(run: Run) -> None:
    done = run("run", "no-such.gguf", "-p", "-nlg", "-n64", "-qv")
    assert done.returncode == 3
    assert b"no-such.gguf" in done.stderr


# --- errors and exit codes ---


def test_every_error_class_has_its_exit_code() -> None:
    assert set().union(*CODES.values()) == set(errors.__all__)
    for code, names in CODES.items():
        for name in names:
            assert exit_code(getattr(errors, name)("x")) == code, name


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 4),
        (FileNotFoundError(2, "No such file"), 3),
        (OSError(28, "No space left on device"), 1),
        (RuntimeError("odd"), 1),
        (ImportError("no engine"), 1),
    ],
)
def test_exit_codes_of_other_errors(error: Exception, code: int) -> None:
    assert exit_code(error) == code


class Fails(click.Command):
    """A command that raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("fails")
        self.error = error

    def invoke(self, ctx: click.Context) -> Any:
        raise self.error


@pytest.fixture
def fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run a command that raises; return exit code and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def call(error: BaseException) -> tuple[int, str]:
        monkeypatch.setattr(cli._cli, "get_command", lambda ctx, name: Fails(error))
        code = cli.main(["run"])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    yield call
    signal.signal(signal.SIGTERM, before)


def test_an_error_is_one_message(fail: Callable[..., tuple[int, str]]) -> None:
    error = errors.Type42Error(
        "tensor 'a\x1b[2J' is odd", path="x.gguf", found="1", expected="2", hint="Do it again"
    )
    code, text = fail(error)
    assert code == 3
    # what a file says cannot command the terminal
    assert text == "Error: x.gguf: tensor 'a␛[2J' is odd; found 1, expected 2. Do it again\n"


def test_the_option_behind_n_ctx_is_named(fail: Callable[..., tuple[int, str]]) -> None:
    assert fail(errors.MemoryLimitError("no room")) == (4, "Error: no room\nThe option -c sets n_ctx.\n")


def test_a_bug_is_said_to_be_one_without_a_traceback(fail: Callable[..., tuple[int, str]]) -> None:
    code, text = fail(ZeroDivisionError("by zero"))
    assert code == 1
    assert text == "Error: this is a bug: ZeroDivisionError: by zero (-v shows where)\n"


def test_an_interrupt_is_quiet(fail: Callable[..., tuple[int, str]]) -> None:
    code, text = fail(KeyboardInterrupt())
    assert (code, text.strip()) == (130, "")


@pytest.mark.parametrize("args", [("--help",), ("run", "-h")])
def test_a_pipe_without_a_reader_is_quiet(run: Run, args: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*args, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_stdout_is_an_error(run: Run) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = run("--version", stdout=full)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr


def test_exit_codes_are_what_a_shell_shows() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3, 4, 130, 141, 143]


# --- progress where nothing can be animated ---


def test_progress_of_a_load_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyllama_dsv4._native", reason="the engine is not built", exc_type=ImportError)
    from pyllama_dsv4.cli import common
    from pyllama_dsv4.cli.terminal import Ui
    from pyllama_dsv4.warmup import Progress

    def shown(ui: Ui, interval_s: float) -> str:
        monkeypatch.setattr(common, "LINE_INTERVAL_S", interval_s)
        progress = common._LoadProgress(ui, "x.gguf")
        for event in (Progress("load", 0.5), Progress("warmup", 0.25), Progress("load", 1.0)):
            progress(event)
        progress.stop()
        assert progress.warmup == Progress("warmup", 0.25)  # kept for the prompt, never printed
        return capsys.readouterr().err

    assert shown(Ui(), 0) == "loading x.gguf: 50%\nloading x.gguf: 100%\n"
    assert shown(Ui(), 60) == ""
    assert shown(Ui(is_quiet=True), 0) == ""


# --- text for terminals ---


def test_clean_text_holds_no_control_characters_but_newline_and_tab() -> None:
    every = "".join(map(chr, range(0x100)))
    text = clean(every)
    left = [c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0]
    assert left == ["\t", "\n"]
    assert [c for c in every if c.isprintable()] == [c for c in text if c in every and c.isprintable()]
    assert clean("日本 é 😀\r\n") == "日本 é 😀\n"


def shown_on_a_terminal(text: str, color: str) -> str:
    master, slave = os.openpty()
    with os.fdopen(master, "rb", 0) as screen, os.fdopen(slave, "w", encoding="utf-8") as stream:
        writer = AnswerWriter(color, stream)
        writer.write(text, is_dim=True)
        writer.end_line()
        data = b""
        while not data.endswith(b"\n"):  # a terminal gives what there is, not all of it
            data += screen.read(1000)
        return data.decode().replace("\r\n", "\n")


def test_a_models_text_cannot_command_the_terminal() -> None:
    assert shown_on_a_terminal("a\x1b[2Jb\rc\x07 \x9b31m", "never") == "a␛[2Jbc␇ \ufffd31m\n"
    assert shown_on_a_terminal("a\x1b[2J", "always") == "\x1b[2ma␛[2J\x1b[0m\n"


def test_a_models_text_reaches_a_file_as_it_is() -> None:
    stream = io.StringIO()
    AnswerWriter("auto", stream).write("a\x1b[2Jb\r\n", is_dim=True)
    assert stream.getvalue() == "a\x1b[2Jb\r\n"


@pytest.mark.parametrize(
    ("mode", "env", "is_terminal", "expected"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"NO_COLOR": ""}, True, True),  # no-color.org: not empty
        ("auto", {"TERM": "dumb"}, True, False),
        ("always", {"NO_COLOR": "1"}, False, True),
        ("never", {}, True, False),
    ],
)
def test_colours(
    monkeypatch: pytest.MonkeyPatch, mode: str, env: dict[str, str], is_terminal: bool, expected: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    assert use_color(mode, stream) is expected
