"""The command ``pyllama-dsv4 run``: where text comes from and goes to, limits, exit codes, Ctrl-C."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import TIMEOUT_S, Terminal, command

Run = Callable[..., subprocess.CompletedProcess[bytes]]
SHORT = ("-n", 12, "--temp", 0, "-c", 512)


@pytest.fixture(scope="module")
def answer(run: Run, model: Path) -> bytes:
    """The greedy continuation of ``Hello``."""
    done = run("run", model, "-p", "Hello", *SHORT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_answer_is_on_stdout_and_the_counts_are_on_stderr(run: Run, model: Path, answer: bytes) -> None:
    from pyllama_dsv4 import Llama

    with Llama(model, n_ctx=512, n_threads=1, warmup=False) as llm:
        text = "".join(llm.generate("Hello", max_tokens=12, temperature=0))
        n_prompt = llm.stats.n_tokens_prompt
    assert answer.decode() == text.removesuffix("\n") + "\n"
    done = run("run", model, "-p", "Hello", *SHORT)
    memory = r"needs [\d.]+ GB, has [\d.]+ GB, at most [\d,.]+ tokens/s\n"
    counts = (
        rf"{memory}prompt {n_prompt}, [\d.]+ t/s \| answer 12, [\d.]+ t/s \| context {n_prompt + 11} of 512\n"
    )
    assert re.fullmatch(counts, done.stderr.decode())


@pytest.mark.parametrize("way", ["pipe", "dash", "file", "model option", "environment"])
def test_prompt_and_model_come_from_where_they_are_given(
    run: Run, model: Path, answer: bytes, tmp_path: Path, way: str
) -> None:
    (tmp_path / "prompt.txt").write_text("Hello\n", encoding="utf-8")
    done = {
        "pipe": lambda: run("run", model, *SHORT, input=b"Hello\n"),
        "dash": lambda: run("run", model, "-p", "-", *SHORT, input=b"Hello\n"),
        "file": lambda: run("run", model, "-f", tmp_path / "prompt.txt", *SHORT, input=b"unread"),
        "model option": lambda: run("run", "-m", model, "-p", "Hello", *SHORT),
        "environment": lambda: run(
            "run", "-p", "Hello", "-c", 512,
            env={"PYLLAMA_DSV4_MODEL": str(model), "PYLLAMA_DSV4_N_PREDICT": "12", "PYLLAMA_DSV4_TEMP": "0"},
        ),
    }[way]()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer


def test_the_command_line_overrules_the_environment(run: Run, model: Path, answer: bytes) -> None:
    env = {"PYLLAMA_DSV4_MODEL": "no-such.gguf", "PYLLAMA_DSV4_N_PREDICT": "1"}
    done = run("run", model, "-p", "Hello", *SHORT, env=env)
    assert done.stdout == answer


def test_a_seed_repeats_the_text(run: Run, model: Path) -> None:
    texts = [run("run", model, "-p", "Hello", "-n", 8, "-s", seed).stdout for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_quiet_prints_the_answer_only(run: Run, model: Path, answer: bytes) -> None:
    done = run("run", model, "-p", "Hello", *SHORT, "-q")
    assert (done.stdout, done.stderr) == (answer, b"")


def test_verbose_prints_the_engines_log(run: Run, model: Path, answer: bytes) -> None:
    done = run("run", model, "-p", "Hello", *SHORT, "-v")
    assert done.stdout == answer
    assert b"llama_context" in done.stderr


def test_prompts_that_are_not_utf_8_are_read_with_replacement_characters(run: Run, model: Path) -> None:
    done = run("run", model, "-n", 1, input=b"caf\xe9")
    assert done.returncode == 0, done.stderr
    assert run("run", model, "-n", 1, "-p", os.fsdecode(b"caf\xe9")).returncode == 0


# --- refusals ---


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("no-such.gguf", "-p", "a"), 3, "no-such.gguf: cannot read the model file; found no such file"),
        ((".", "-p", "a"), 3, "found a directory"),
        (("empty.gguf", "-p", "a"), 3, "empty.gguf"),
        (("text.gguf", "-p", "a"), 3, "text.gguf"),
        (("cut.gguf", "-p", "a"), 3, "cut.gguf"),
        (("short.gguf", "-p", "a"), 3, "short.gguf"),
        (("good.gguf", "-f", "no-such.txt"), 3, "no-such.txt: No such file or directory"),
        (("good.gguf", "-p", "a", "-f", "b"), 2, "two prompts"),
        (("good.gguf",), 2, "standard input is empty"),
        (("good.gguf", "-p", "word " * 80, "-c", "64"), 1, "the prompt does not fit; found"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_refusals(
    run: Run, model: Path, tmp_path: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    data = model.read_bytes()
    (tmp_path / "good.gguf").symlink_to(model)
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text(
        "not a model, but longer than a GGUF header is\n" * 4, encoding="utf-8"
    )
    (tmp_path / "cut.gguf").write_bytes(data[:1000])
    (tmp_path / "short.gguf").write_bytes(data[:-1000])
    done = run("run", *args, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == b""
    text = done.stderr.decode()
    assert message in text
    assert "Traceback" not in text


# --- the end of the process ---


def test_a_reader_that_leaves_is_no_error(model: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command("run", model, "-p", "Hello", "-c", 4096),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert re.fullmatch(rb"needs [^\n]*\n", errors)
    assert process.returncode == 141


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_answer_and_keeps_what_was_written(
    model: Path, environment: dict[str, str], signum: int, code: int
) -> None:
    process = subprocess.Popen(
        command("run", model, "-p", "Hello", "-c", 8192),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signum)
    rest, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


def test_without_a_prompt_on_a_terminal_it_says_how_to_give_one(
    model: Path, terminal: Callable[..., Terminal]
) -> None:
    text, code = terminal("run", model).end()
    assert code == 2
    assert "no prompt: give -p TEXT" in text


# --- options are those of the library ---


def test_defaults_and_choices_are_the_librarys() -> None:
    pytest.importorskip("pyllama_dsv4._llama", reason="the engine is not built")
    from pyllama_dsv4 import Llama
    from pyllama_dsv4.cli import common
    from pyllama_dsv4.cli.run import run
    from pyllama_dsv4.context import CACHE_TYPES
    from pyllama_dsv4.llama import SamplingOptions
    from pyllama_dsv4.sampler import _SEED_MAX

    defaults = {name: p.default for name, p in inspect.signature(Llama).parameters.items()}
    assert set(common._LOAD_NAMES) <= set(defaults)
    assert set(common._SAMPLING_NAMES) <= set(SamplingOptions.__annotations__)
    parsed = run.make_context("run", ["x.gguf"]).params
    assert {name: parsed[name] for name in common._LOAD_NAMES} == {
        name: defaults[name] for name in common._LOAD_NAMES
    }
    assert tuple(CACHE_TYPES) == common.CACHE_TYPES
    assert common.SEED_MAX == _SEED_MAX


# --- what answers must follow, and how long they may take ---

SCHEMA = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}'


@pytest.mark.parametrize("way", ["--json-schema", "--json-schema-file", "--grammar-file"])
def test_answers_follow_a_format(run: Run, model: Path, tmp_path: Path, way: str) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA, encoding="utf-8")
    (tmp_path / "grammar.gbnf").write_text('root ::= "yes, " [0-9]', encoding="utf-8")
    value = {
        "--json-schema": SCHEMA,
        "--json-schema-file": tmp_path / "schema.json",
        "--grammar-file": tmp_path / "grammar.gbnf",
    }[way]
    done = run("run", model, "-p", "Hello", way, value, "-n", 60, "--temp", 0, "-c", 512)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    if way == "--grammar-file":
        assert re.fullmatch(r"yes, \d\n", text)
    else:
        assert isinstance(json.loads(text)["a"], bool)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-j", "{}", "--grammar-file", "x"), 2, "two formats of answers"),
        (("-j", "{"), 2, "not JSON"),
        (("-j", "[]"), 2, "no JSON object"),
        (("-j", '{"$ref": "#/nowhere"}'), 2, "nowhere"),
        (("--timeout", "0"), 2, "--timeout"),
        (("--loop-guard", "3"), 2, "--loop-guard"),
        (("--model-draft", "nothing.gguf"), 3, "nothing.gguf"),
        (("--draft-max", "99"), 2, "--draft-max"),
    ],
)
def test_formats_and_bounds_that_are_refused(
    run: Run, model: Path, args: tuple[str, ...], code: int, message: str
) -> None:
    done = run("run", model, "-p", "Hello", *args, *SHORT)
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    assert message in done.stderr.decode()


def test_a_timeout_ends_the_completion(run: Run, model: Path) -> None:
    done = run("run", model, "-p", "Hello", "--timeout", 0.5, "-c", 100_000, "--temp", 0)
    assert done.returncode == 1
    assert "timeout=0.5 seconds passed" in done.stderr.decode()
    assert done.stdout.endswith(b"\n")  # what came of it


def test_repetition_ends_the_completion(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "same.gbnf").write_text('root ::= "\\u0239" root', encoding="utf-8")
    done = run(
        "run", model, "-p", "Hello", "--grammar-file", tmp_path / "same.gbnf", "--loop-guard", 16, "-n", 400,
        "--temp", 0, "-c", 1024,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    n = int(re.search(r"answer (\d+)", done.stderr.decode())[1])  # type: ignore[index]
    assert 16 <= n < 200


def test_prefixes_are_kept_for_the_next_run(run: Run, model: Path, tmp_path: Path) -> None:
    args = ("run", model, "--prefix-cache", tmp_path / "prefixes", "-p", "word " * 600, "-c", 2048, "-n", 1)
    first, second = run(*args), run(*args)
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert b"cached" not in first.stderr
    n_cached = int(re.search(rb"\((\d[\d,]*) cached\)", second.stderr)[1].replace(b",", b""))  # type: ignore[index]
    assert n_cached > 500


def test_a_draft_model_is_used_and_counted(run: Run, tmp_path: Path) -> None:
    from pyllama_dsv4 import synth
    from pyllama_dsv4.convert import convert

    synth.write_checkpoint(
        tmp_path / "c", synth.tiny_config(vocab_size=512), seed=3, tokenizer="bytes", draft="mtp"
    )
    convert(tmp_path / "c", tmp_path / "m.gguf")
    convert(tmp_path / "c", tmp_path / "d.gguf", draft=True)
    args = ("run", tmp_path / "m.gguf", "-p", "Hello", *SHORT)
    plain, drafted = run(*args), run(*args, "--model-draft", tmp_path / "d.gguf", "--draft-max", 2)
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert re.search(r"% of \d+ drafted", drafted.stderr.decode())


def test_a_long_prompt_shows_a_bar_with_the_time_left(model: Path, terminal: Callable[..., Terminal]) -> None:
    shown = terminal("run", model, "-p", "word " * 6000, "-c", 20000, "-n", 3, "-b", 64, "-ub", 64)
    bar = re.compile(r"reading the prompt.*\d+% \d+:\d\d:\d\d")
    shown.wait(lambda: bar.search("\n".join(shown.lines())) is not None, "bar")
    text, code = shown.end()
    assert code == 0
    assert "reading the prompt" not in text  # it is taken away


def test_without_a_file_it_continues_with_the_demo_model(run: Run, model: Path) -> None:
    done = run("run", "-p", "Hello", *SHORT)
    assert done.returncode == 0, done.stderr
    assert b"this is the demo model" in done.stderr
    assert done.stdout.endswith(b"\n")
    assert run("run", "-p", "Hello", *SHORT, "-q").stdout == done.stdout
