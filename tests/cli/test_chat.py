"""The command ``pyllama-dsv4 chat``: on a pseudo-terminal and through pipes."""

from __future__ import annotations

import io
import os
import re
import signal
import stat
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_process import TIMEOUT_S, Terminal, command

from pyllama_dsv4 import Llama, demo, synth
from pyllama_dsv4.cli.chat import _Shown
from pyllama_dsv4.cli.terminal import AnswerWriter, Ui
from pyllama_dsv4.convert import convert

Run = Callable[..., subprocess.CompletedProcess[bytes]]
Start = Callable[..., Terminal]

PLAIN = ("-c", 2048, "-s", 5, "--color", "never")
N_NEW = 16  # what a short message and the template add to a conversation: an upper bound


class Counts(NamedTuple):
    """The line after an answer."""

    n_prompt: int
    n_cached: int
    n_answer: int
    n_context: int


def counts(text: str) -> Counts:
    found = re.search(
        r"prompt ([\d,]+)(?: \(([\d,]+) cached\))?[^|]*\| answer ([\d,]+)[^|]*\|\s+context\s+([\d,]+)\s+of",
        text,
    )
    assert found, text
    return Counts(*(int((number or "0").replace(",", "")) for number in found.groups()))


def stats(text: str) -> Counts:
    """Read the table that ``/stats`` shows."""
    prompt = re.search(r"last prompt\s+([\d,]+) tokens: ([\d,]+) cached, ([\d,]+) evaluated", text)
    answer = re.search(r"last answer\s+([\d,]+) tokens", text)
    context = re.search(r"context\s+([\d,]+) of", text)
    assert prompt
    assert answer
    assert context
    n_prompt, n_cached, n_evaluated, n_answer, n_context = (
        int(n.replace(",", "")) for n in (*prompt.groups(), answer[1], context[1])
    )
    assert n_prompt == n_cached + n_evaluated
    return Counts(n_prompt, n_cached, n_answer, n_context)


# --- on a terminal ---


def test_a_conversation(model: Path, terminal: Start) -> None:
    """Two turns, /think, Ctrl-C in the middle of an answer, and the next turn answers."""
    chat = terminal("chat", model, "-n", 30, *PLAIN)
    assert "/help shows the commands" in chat.prompt()

    first = counts(chat.ask("Hello there"))
    assert first.n_cached == 0
    assert 0 < first.n_answer <= 30
    assert first.n_context == first.n_prompt + first.n_answer - 1  # the last token has not been evaluated
    assert stats(chat.ask("/stats")) == first

    second = counts(chat.ask("And then?"))
    assert second.n_cached == first.n_context  # the first turn, its answer included, is not evaluated again
    assert second.n_prompt - second.n_cached <= N_NEW
    assert stats(chat.ask("/stats")) == second

    assert "thinking is on" in chat.ask("/think")
    answer = chat.ask("Think about it")
    assert answer.startswith("thinking:\n")
    third = counts(answer)
    assert third.n_cached == second.n_context
    assert "thinking is off" in chat.ask("/nothink")
    assert "thinking:" not in chat.ask("Never mind")

    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_what_decoding_read_stands_beside_what_memory_gives(model: Path, run: Run) -> None:
    result = run("chat", model, *PLAIN, "-n", 20, input=b"Hello\nAnd then?\n")
    assert result.returncode == 0, result.stderr
    found = re.findall(
        r"answer [\d,]+, ([\d.]+) t/s, ([\d.]+) MB a token:\s+([\d.]+) of ([\d.]+) GB/s",
        result.stderr.decode(),
    )
    assert len(found) == 2
    assert found[0][3] == found[1][3]  # measured once
    with Llama(model, n_ctx=2048) as llm:
        plain = llm.token_bytes.total
        llm.eval([1] * 600)  # caches are counted in steps of 256
        assert llm.token_bytes.total > plain
    for speed, size, rate, _ in found:
        assert float(size) == pytest.approx(plain / 1e6, rel=0.05)
        assert float(rate) == pytest.approx(float(speed) * float(size) / 1e3, abs=0.06)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, *PLAIN)
    chat.prompt()

    def stop(text: str) -> str:
        start = chat.row + 1
        chat.keys(text + "\r")
        chat.wait(lambda: "".join(chat.lines(start)) != "", "answer")
        chat.keys("\x03")
        return chat.prompt(start)

    text = stop("Hello")
    assert "stopped | prompt" in text
    stopped = counts(text)
    assert stopped.n_answer < 2000

    after = counts(stop("Go on"))
    assert (
        after.n_cached == stopped.n_context
    )  # what came of the answer is in the conversation and in the cache
    assert after.n_prompt - after.n_cached <= N_NEW
    assert after.n_answer > 0
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_ctrl_c_while_the_message_is_read_takes_it_back(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-c", 20000, "-n", 5)
    chat.prompt()
    first = counts(chat.ask("Hello"))
    start = chat.row
    chat.keys("\x1b[200~" + "word " * 3000 + "\x1b[201~\r")
    chat.wait_for("reading the message", start)
    chat.keys("\x03")
    chat.wait_for("the message is taken back", start)
    text = chat.prompt(start + 1)
    assert "reading the message" not in text  # the spinner is gone
    second = counts(chat.ask("Hello again"))
    assert second.n_cached > 0
    assert second.n_prompt <= first.n_prompt + first.n_answer + N_NEW
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_ctrl_c_at_the_prompt(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, *PLAIN)
    chat.prompt()
    chat.keys("half a message")
    chat.wait_for("half a message")
    start = chat.row + 1
    chat.keys("\x03")  # takes the line back
    assert chat.prompt(start) == ""
    chat.keys("\x03")
    assert "Ctrl-C again leaves" in chat.prompt(start + 1)
    chat.keys("\x03")
    text, code = chat.end()
    assert code == 130
    assert "Traceback" not in text


def test_ctrl_d_leaves(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, *PLAIN)
    chat.prompt()
    chat.keys("\x04")
    assert chat.end()[1] == 0


def test_sigterm_leaves_the_terminal_as_it_was(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, *PLAIN)
    # held open: the last close would reset it
    tty = os.open(os.readlink(f"/proc/{chat.child.pid}/fd/0"), os.O_RDWR | os.O_NOCTTY)
    before = termios.tcgetattr(tty)
    chat.prompt()
    assert termios.tcgetattr(tty) != before  # raw, for line editing
    chat.child.kill(signal.SIGTERM)
    chat.child.wait()
    after = termios.tcgetattr(tty)
    os.close(tty)
    text, code = chat.end()
    assert code == 143
    assert after == before
    assert "Traceback" not in text


def test_messages_of_several_lines(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-n", 3, *PLAIN)
    chat.prompt()
    one = counts(chat.ask("a b c")).n_prompt

    def n_prompt(keys: str) -> int:
        chat.ask("/reset")
        start = chat.row
        chat.keys(keys)
        chat.wait_for("context", start)
        text = chat.prompt(start + 1)
        assert "  a b c" in text.splitlines()  # indented below the prompt
        return counts(text).n_prompt

    quoted = n_prompt('"""\ra b c\ra b c\ra b c"""\r')
    typed = n_prompt("a b c\x1b\ra b c\x1b\ra b c\r")  # Alt-Enter
    pasted = n_prompt("\x1b[200~a b c\na b c\na b c\x1b[201~\r")
    assert one < quoted == typed == pasted
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_history_is_kept_for_its_owner_only(model: Path, terminal: Start, tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    for text in ("the first message", "\x1b[A"):  # the second chat gets it with the arrow key
        chat = terminal("chat", model, "-n", 2, *PLAIN, env=env)
        chat.prompt()
        counts(chat.ask(text))
        assert "> the first message" in chat.lines()
        chat.keys("\x04")
        assert chat.end()[1] == 0
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.read_text(encoding="utf-8").count("+the first message") == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_history_on_request(model: Path, terminal: Start, tmp_path: Path) -> None:
    chat = terminal("chat", model, "-n", 2, "--no-history", *PLAIN, env={"XDG_STATE_HOME": str(tmp_path)})
    chat.prompt()
    chat.ask("secret")
    chat.keys("\x04")
    chat.end()
    assert list(tmp_path.iterdir()) == []


def test_commands(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-n", 4, *PLAIN)
    chat.prompt()
    table = chat.ask("/help")
    for name in ("/help", "/think", "/nothink", "/reset", "/stats", "/quit", "//text", "Ctrl-C"):
        assert name in table
    assert "the conversation is forgotten" in chat.ask("/rese\t")  # the tab key completes
    assert "Did you mean /stats?" in chat.ask("/stat")
    assert "found -1.0" in chat.ask("/temp -1")
    assert "expected a number" in chat.ask("/seed x")
    assert "the temperature is 0" in chat.ask("/temp 0")
    assert "found 'low', expected high, max or off" in chat.ask("/effort low")

    greedy = chat.ask("Hello")
    short = counts(greedy).n_prompt
    chat.ask("/reset")
    assert chat.ask("Hello").split("prompt")[0] == greedy.split("prompt")[0]
    chat.ask("/reset")
    chat.ask("/system Answer in rhyme, always.")
    assert counts(chat.ask("Hello")).n_prompt > short
    table = chat.ask("/stats")
    assert "Answer in rhyme, always." in table
    assert "temperature 0.0" in table
    chat.ask("/system")
    chat.ask("/reset")
    assert counts(chat.ask("Hello")).n_prompt == short
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_a_full_context_is_said_and_reset_helps(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-c", 96, "-s", 5, "--color", "never")
    chat.prompt()
    text = chat.ask("Hello")
    assert "the context of 96 tokens is full" in text
    assert counts(text).n_context == 96
    text = chat.ask("Go on")
    assert re.search(r"does not fit: found|does not fit: \d+ tokens, at most n_ctx = 96", text)
    assert "/reset starts a new conversation" in " ".join(text.split())
    chat.ask("/reset")
    assert counts(chat.ask("Hello")).n_cached == 0
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


@pytest.mark.parametrize("columns", [40, 200])
def test_notes_are_broken_between_words(model: Path, terminal: Start, columns: int) -> None:
    chat = terminal("chat", model, "-n", 2, *PLAIN, columns=columns)
    lines = chat.prompt().splitlines()
    assert max(map(len, lines)) <= max(columns, len(model.name) + 1)
    assert "/help shows the commands. Ctrl-C stops an answer, Ctrl-D leaves." in " ".join(lines)
    assert counts(" ".join(chat.ask("Hello").split())).n_answer == 2


def test_colours_on_a_terminal(model: Path, terminal: Start) -> None:
    dim = {}
    for env in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        chat = terminal("chat", model, "-n", 5, "--think", "-c", 512, env=env)
        chat.prompt()
        chat.ask("Hello")
        chat.keys("\x04")
        chat.end()
        dim[tuple(env)] = b"\x1b[2mthinking:" in chat.raw
    assert dim == {(): True, ("NO_COLOR",): False, ("TERM",): False}


def test_thinking_can_be_hidden(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-n", 5, "--think", "--hide-thinking", *PLAIN)
    chat.prompt()
    text = chat.ask("Hello")
    assert counts(text).n_answer == 5
    assert text.strip().startswith("prompt")


@pytest.mark.parametrize("is_thinking_shown", [True, False])
def test_reasoning_stands_apart_from_the_answer(is_thinking_shown: bool) -> None:
    stream = io.StringIO()
    writer = AnswerWriter("always", stream)
    writer.is_terminal = True
    shown = _Shown(writer, Ui(), is_thinking_shown=is_thinking_shown)
    for reasoning, content in (("Let me", ""), (" see.", ""), ("", "It"), ("", " is.")):
        shown.add(reasoning, content)
    shown.close()
    dim = "\x1b[2mthinking:\n\x1b[0m\x1b[2mLet me\x1b[0m\x1b[2m see.\x1b[0m\n\n"
    assert stream.getvalue() == (dim if is_thinking_shown else "") + "It is.\n"


# --- through pipes ---


def test_a_pipe_is_answered_line_by_line(run: Run, model: Path) -> None:
    args = ("chat", model, "-c", 512, "-n", 8, "--temp", 0)
    done = run(*args, input=b"Hello\n\nAnd then?\n")
    assert done.returncode == 0
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("prompt")]
    first, second = map(counts, lines)
    assert second.n_cached == first.n_context
    assert b"\x1b" not in done.stdout + done.stderr
    # stdout has the answers and nothing else
    alone = run(*args, input=b"Hello\n").stdout
    assert done.stdout.startswith(alone)
    assert run(*args, "-q", input=b"Hello\n\nAnd then?").stdout == done.stdout
    assert run(*args, "-q", input=b"Hello\n").stderr == b""


def test_the_answer_is_the_librarys(run: Run, model: Path) -> None:
    from pyllama_dsv4 import Llama

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    with Llama(model, n_ctx=512, n_threads=1, warmup=False) as llm:
        answer = llm.create_chat_completion(messages, max_tokens=12, temperature=0)
    text = answer["choices"][0]["message"]["content"]
    done = run(
        "chat", model, "-c", 512, "-n", 12, "--temp", 0, "-q", "-sys", "Be brief.", input=b'"""\na\nb\n"""\n'
    )
    assert done.stdout.decode() == text.removesuffix("\n") + "\n"


def test_a_message_that_begins_with_a_slash(run: Run, model: Path) -> None:
    from pyllama_dsv4 import Llama

    with Llama(model, n_ctx=512, n_threads=1, warmup=False) as llm:
        one, two = (
            llm.create_chat_completion([{"role": "user", "content": text}], max_tokens=8, temperature=0)
            for text in ("/Hello", "//Hello")
        )
    assert one["choices"] != two["choices"]
    done = run("chat", model, "-c", 512, "-n", 8, "--temp", 0, input=b"//Hello\n")
    assert done.stdout.decode().removesuffix("\n") == one["choices"][0]["message"]["content"].removesuffix(
        "\n"
    )


def test_thinking_stays_out_of_a_piped_answer(run: Run, model: Path) -> None:
    done = run("chat", model, "-c", 512, "-n", 8, "--think", input=b"Hello\n")
    assert done.returncode == 0
    assert done.stdout == b""  # random weights do not finish thinking within 8 tokens
    _, _, notes = done.stderr.partition(b"\n")  # behind the line of what the model needs
    assert notes.startswith(b"thinking:\n")


def test_commands_in_a_pipe(run: Run, model: Path) -> None:
    args = ("chat", model, "-c", 512, "-n", 2)
    done = run(*args, input=b"/stats\n/quit\nHello\n")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"last prompt" in done.stderr
    done = run(*args, input=b"/stast\nHello\n")
    assert done.returncode == 1  # a script is told
    assert b"no such command: /stast. Did you mean /stats?" in done.stderr
    assert counts(done.stderr.decode()).n_answer == 2


def test_messages_that_are_not_utf_8(run: Run, model: Path) -> None:
    done = run("chat", model, "-c", 512, "-n", 2, input=b"caf\xe9 \xff\n")
    assert done.returncode == 0, done.stderr


def test_a_conversation_that_does_not_fit_fails(run: Run, model: Path) -> None:
    done = run("chat", model, "-c", 64, "-n", 2, input=b"Hello\n" + b"word " * 100 + b"\nHello\n")
    assert done.returncode == 1
    assert b"the conversation does not fit" in done.stderr
    assert done.stderr.count(b"prompt ") == 2  # the third message is answered: the second was taken back


def test_ctrl_c_ends_a_piped_chat(model: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command("chat", model, "-c", 8192, "-n", 8000),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Hello\nHello\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert errors.count(b"prompt ") == 1
    assert b"Traceback" not in errors


# --- files ---


def test_without_a_file_it_talks_with_the_demo_model_and_says_so(run: Run, model: Path) -> None:
    done = run("chat", "--temp", 0, input=b"What is 17 + 25?\n")
    assert done.returncode == 0, done.stderr
    text = done.stderr.decode()
    if demo.is_trained():
        assert "not an assistant" in text
        assert done.stdout == b"42\n"
        return
    assert "random weights" in text
    assert "answers are noise" in text
    assert "ended by -n 256" in text or counts(text).n_answer < 256
    limited = run("chat", "--temp", 0, "-n", 4, input=b"Hello\n")
    assert counts(limited.stderr.decode()).n_answer == 4
    assert len(list(model.parent.glob("*.gguf"))) == 1  # built once


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("no-such.gguf",), 3, "no such file"),
        (("{model}", "--chat-template-file", "no-such.jinja"), 3, "no-such.jinja: No such file"),
        (("{model}", "--temp", "-1"), 2, "--temp"),
        (("{model}", "--sytem", "x"), 2, "No such option: --sytem"),
    ],
)
def test_refusals(run: Run, model: Path, args: tuple[str, ...], code: int, message: str) -> None:
    done = run("chat", *(arg.format(model=model) for arg in args), input=b"Hello\n")
    assert done.returncode == code
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_ctrl_c_during_the_load(model: Path, terminal: Start, tmp_path: Path) -> None:
    """A file that takes seconds to read: one layer of Flash, without its data."""
    from pyllama_dsv4.machine import available_bytes

    n_bytes = available_bytes()
    if n_bytes is not None and n_bytes < 8e9:
        pytest.skip(f"needs 8 GB of memory, {n_bytes / 1e9:.1f} are free")
    config = synth.flash_config(num_hidden_layers=1, num_hash_layers=1, compress_ratios=[0, 0])
    path = synth.write_sparse_native(tmp_path / "one-layer.gguf", config, tokenizer=None)
    chat = terminal("chat", path, "--no-mmap", "-c", 512)
    chat.wait_for("loading one-layer.gguf")
    chat.keys("\x03")
    text, code = chat.end()
    assert code == 130
    assert text.strip() == ""  # the bar is taken away


def test_a_broken_template_is_an_error_of_the_input(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for %}", encoding="utf-8")
    done = run("chat", model, "--chat-template-file", tmp_path / "broken.jinja", input=b"Hello\n")
    assert done.returncode == 3
    assert b"template" in done.stderr


def test_a_file_without_a_vocabulary_is_refused_before_the_first_message(
    run: Run, model: Path, tmp_path: Path
) -> None:
    synth.write_checkpoint(tmp_path / "checkpoint", seed=1)
    convert(tmp_path / "checkpoint", tmp_path / "ids.gguf")
    done = run("chat", tmp_path / "ids.gguf", input=b"")
    assert done.returncode == 3
    assert b"no vocabulary" in done.stderr


# --- formats and bounds of answers ---


def test_answers_of_a_chat_follow_a_schema(run: Run, model: Path) -> None:
    import json

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    done = run(
        "chat", model, "-j", json.dumps(schema), "-n", 200, "--temp", 0, "-c", 2048, input=b"Hello\nAgain\n"
    )
    assert done.returncode == 0, done.stderr
    values = re.findall(r"\{[^}]*\}", done.stdout.decode())
    assert len(values) == 2
    assert all(isinstance(json.loads(value)["a"], bool) for value in values)


def test_a_timeout_keeps_what_came_of_the_answer(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-c", 20000, "--temp", 0, "--timeout", 1.5)
    chat.prompt()
    text = chat.ask("Hello")
    assert "timeout=1.5 seconds passed" in text
    assert "stopped | prompt" in text
    first = counts(text)
    second = counts(chat.ask("Go on"))
    assert second.n_cached == first.n_context
    chat.keys("/quit\r")
    assert chat.end()[1] == 0


def test_a_long_message_shows_a_bar_with_the_time_left(model: Path, terminal: Start) -> None:
    chat = terminal("chat", model, "-c", 20000, "-n", 3, "-b", 64, "-ub", 64)
    chat.prompt()
    start = chat.row
    chat.keys("\x1b[200~" + "word " * 6000 + "\x1b[201~\r")
    bar = re.compile(r"reading the message.*\d+% \d+:\d\d:\d\d")
    chat.wait(lambda: bar.search("\n".join(chat.lines(start))) is not None, "bar")
    assert "reading the message" not in chat.prompt(start + 1)
    chat.keys("/quit\r")
    assert chat.end()[1] == 0
