"""The command ``pyllama-dsv4 chat``: a conversation in the terminal, or line by line through a pipe.

Owns the conversation's messages, the slash commands, and what Ctrl-C means while an answer comes. Input is
``chat_input``'s, prompts and answers are ``Llama``'s.
"""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from pyllama_dsv4.errors import (
    ArgumentError,
    CancelledError,
    ContextFullError,
    PyllamaError,
    StateError,
)

from .answers import AnswerOptions, answer_options
from .chat_input import PipeInput, Source, TerminalInput, history_path
from .common import (
    Options,
    load_options,
    model_argument,
    model_or_demo,
    open_model,
    output_options,
    reading_text,
    sampling_options,
    stats_line,
)
from .conversation import load_conversation, save_conversation
from .exit_codes import ExitCode
from .help import Command, option
from .terminal import AnswerWriter, Ui

if TYPE_CHECKING:
    from pyllama_dsv4.chat import ReasoningEffort
    from pyllama_dsv4.llama import Llama

__all__ = ["chat"]

CONVERSATION: Final = "Conversation"
WELCOME: Final = "/help shows the commands. Ctrl-C stops an answer, Ctrl-D leaves."

_HELP: Final = {
    "/help": "Show this.",
    "/think": "Let the model reason before it answers.",
    "/nothink": "Let it answer at once.",
    "/effort": "high or max: how much it reasons; off: as usual.",
    "/system": "TEXT: instructions for the whole conversation; without TEXT there are none.",
    "/temp": "X: the temperature; 0 takes the most likely token.",
    "/seed": "N: of the random numbers; without N a new one each time.",
    "/retry": "Answer the last message again.",
    "/undo": "Take the last message and its answer back.",
    "/edit": "TEXT: replaces the last message; without TEXT it comes back to be edited.",
    "/save": "FILE: keep the conversation, and what was computed of it in FILE.state.",
    "/load": "FILE: go on with a conversation that was kept.",
    "/tokens": "Show how many tokens the conversation takes; with TEXT, the tokens of TEXT.",
    "/ctx": "Show how full the context is.",
    "/reset": "Forget the conversation.",
    "/stats": "Show counts, speed, memory and settings.",
    "/quit": "Leave.",
}
_KEYS: Final = (
    ("//text", "A message that begins with a slash."),
    ('"""', "Begins a message of several lines, which ends with the same. Alt-Enter: a new line."),
    ("Ctrl-C", "Stops an answer; what came of it stays in the conversation."),
)


@click.command(
    cls=Command,
    examples=(
        "pyllama-dsv4 chat",
        "pyllama-dsv4 chat flash.gguf -c 32768 --think",
        "pyllama-dsv4 chat flash.gguf --temp 0 < questions.txt > answers.txt",
    ),
)
@option(
    "-sys", "--system-prompt", "system", metavar="TEXT", section=CONVERSATION, is_brief=True,
    help="Instructions for the whole conversation.",
)  # fmt: skip
@option(
    "--think", "is_thinking", is_flag=True, section=CONVERSATION, is_brief=True,
    help="Let the model reason before it answers.",
)  # fmt: skip
@option("--hide-thinking", is_flag=True, section=CONVERSATION, help="Do not show what it reasons.")
@option(
    "--chat-template-file", "template", type=click.Path(path_type=Path), metavar="PATH", section=CONVERSATION,
    help="Jinja template instead of the file's.",
)  # fmt: skip
@option("--no-history", is_flag=True, section=CONVERSATION, help="Do not keep messages for the arrow keys.")
@model_argument
@sampling_options
@answer_options
@load_options
@output_options
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    system: str | None,
    is_thinking: bool,
    hide_thinking: bool,
    template: Path | None,
    no_history: bool,
    **values: Any,
) -> int:
    """Talk with a model; without FILE, with the demo model.

    On a terminal: line editing, history, and the commands that /help lists. In a pipe every line is a message; the
    answers go to stdout, everything else to stderr.
    """
    options = Options.take(ctx, values)
    wanted = AnswerOptions.take(ctx, values)
    is_terminal = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    template_text = None if template is None else template.read_text(encoding="utf-8", errors="replace")
    path, max_tokens = model_or_demo(options)
    with open_model(options, path, chat_template=template_text, **wanted.load) as (llm, warmup_text):
        settings = _Settings(
            is_thinking=is_thinking,
            is_thinking_shown=not hide_thinking,
            system=system,
            max_tokens=max_tokens,
            sampling=options.sampling,
            more={**wanted.of_chat(), **wanted.generation},
        )
        # a file without a vocabulary or a usable template is refused now and not at the first message
        llm.format_chat_tokens([{"role": "user", "content": ""}])
        source: Source = PipeInput()
        if is_terminal:
            _welcome(options.ui, llm, path)
            source = TerminalInput(
                commands=tuple(_HELP),
                note=options.ui.note,
                aside=warmup_text,
                is_color=options.ui.is_color,
                history=None if no_history else history_path(),
            )
        talk = _Chat(llm, source, options.ui, AnswerWriter(options.color), settings, warmup_text)
        return talk.run(is_terminal=is_terminal)


def _welcome(ui: Ui, llm: Llama, path: Path) -> None:
    n_bytes = sum(tensor.n_bytes for tensor in llm.report.header.tensors)
    name = llm.metadata.get("general.name") or llm.desc
    ui.note(f"{path.name}: {name}, {n_bytes / 1e9:.2f} GB; context of {llm.n_ctx:,} tokens.")
    if llm.warmup is not None and llm.warmup.n_bytes_total < n_bytes:
        ui.note(
            f"Memory has room for {llm.warmup.n_bytes_total / 1e9:.1f} GB of it: the rest is read from the disk"
            " again and again, which sets the speed."
        )
    ui.note(WELCOME)


@dataclass
class _Settings:
    is_thinking: bool
    is_thinking_shown: bool
    system: str | None
    max_tokens: int | None
    sampling: dict[str, Any]
    more: dict[str, Any]
    effort: ReasoningEffort | None = None


@dataclass
class _Answer:
    """What has come of an answer."""

    content: str = ""
    reasoning: str = ""
    finish: str = ""
    unparsed: str | None = None

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


@dataclass
class _Totals:
    n_answers: int = 0
    n_tokens_evaluated: int = 0
    n_tokens_generated: int = 0


class _Interrupts:
    """What Ctrl-C does while an answer comes: a wish at first, an exception where a wish would not be heard.

    An exception in the middle of a step would cost the tokens in the cache. So once tokens come, the first Ctrl-C
    only sets ``is_wished``, to be looked at between two of them; while the prompt is read, and the second time, it
    is a KeyboardInterrupt.

    Args:
        is_heard: Tells whether somebody will look soon.
    """

    def __init__(self, is_heard: Callable[[], bool]) -> None:
        self._is_heard = is_heard
        self.is_wished = False

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        if self.is_wished or not self._is_heard():
            raise KeyboardInterrupt
        self.is_wished = True


@dataclass
class _Chat:
    """One conversation.

    Attributes:
        llm: The model.
        source: Gives messages.
        ui: Takes everything but answers.
        writer: Takes answers.
        settings: May change between answers.
        warmup_text: See ``open_model``.
    """

    llm: Llama
    source: Source
    ui: Ui
    writer: AnswerWriter
    settings: _Settings
    warmup_text: Callable[[], str]
    _messages: list[dict[str, Any]] = field(default_factory=list)
    _totals: _Totals = field(default_factory=_Totals)
    _has_failed: bool = False
    _is_over: bool = False
    _bandwidth: float | None = None  # of this machine's memory, measured after the first answer

    def run(self, *, is_terminal: bool) -> int:
        """Talk until the source ends or the user leaves; return the exit code."""
        while not self._is_over:
            try:
                text = self.source.read()
            except EOFError:
                break
            try:
                self._take(text)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
        return ExitCode.FAILED if self._has_failed and not is_terminal else ExitCode.OK

    def _take(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("/") and not text.startswith("//"):
            self._command(text)
        elif self._answer(text[1:] if text.startswith("//") else text).finish == "interrupted":
            raise KeyboardInterrupt  # a terminal goes on, a pipe ends

    def _fail(self, text: str) -> None:
        self._has_failed = True
        self.ui.error(text)

    # --- answers ---

    def _answer(self, text: str) -> _Answer:
        """Show the answer to a message and return it; if there is none, the message is taken back."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = _Answer()
        before = self.llm.stats
        try:
            self._generate(messages, answer)
        except ContextFullError as error:
            self._fail(
                f"the conversation does not fit: {error.found}, {error.expected}. The message is taken back."
                " /reset starts a new conversation; a larger -c gives it more room."
            )
            return answer
        except CancelledError as error:
            self._fail(str(error))
            if not (answer.content or answer.reasoning):
                self.ui.note("stopped before the answer began: the message is taken back")
                return answer
            answer.finish = "timeout"
        except PyllamaError as error:
            self._fail(str(error))
            return answer
        except KeyboardInterrupt:
            answer.finish = "interrupted"
        stats = self.llm.stats
        if stats is not before:
            self._totals.n_answers += 1
            self._totals.n_tokens_evaluated += stats.n_tokens_prompt - stats.n_tokens_cached
            self._totals.n_tokens_generated += stats.n_tokens_generated
        if answer.finish == "interrupted" and not (answer.content or answer.reasoning):
            self.ui.note("stopped before the answer began: the message is taken back")
            return answer
        self._messages = [*messages, answer.message()]
        self._close_answer(answer)
        return answer

    def _close_answer(self, answer: _Answer) -> None:
        stats = self.llm.stats
        counts = stats_line(stats, self.llm.n_tokens, self.llm.n_ctx, self._reading())
        if answer.finish in ("interrupted", "timeout"):
            counts = f"stopped | {counts}"
        elif answer.finish == "loop":
            counts += " | ended by --loop-guard"
        elif answer.finish == "length" and stats.n_tokens_generated == self.settings.max_tokens:
            counts += f" | ended by -n {self.settings.max_tokens}"
        self.ui.note(counts)
        if answer.unparsed is not None:
            self.ui.note(
                "The answer does not follow the model's format; it is shown as far as it could be read."
            )
        if answer.finish == "length" and stats.n_tokens_generated != self.settings.max_tokens:
            self._fail(
                f"the context of {self.llm.n_ctx:,} tokens is full; the answer is cut off."
                " /reset starts a new conversation; a larger -c gives it more room."
            )

    def _reading(self) -> str:
        """What decoding read, where that is this machine's memory alone, and once for every token."""
        speed = self.llm.stats.decode_tokens_per_s
        if not speed or self.llm.plan.gpus or self.llm.stats.n_tokens_drafted:
            return ""
        n_bytes = self.llm.token_bytes.total
        if self._bandwidth is None:
            from pyllama_dsv4.machine import read_bandwidth

            self._bandwidth = read_bandwidth(n_bytes)
        return reading_text(speed, n_bytes, self._bandwidth)

    def _generate(self, messages: list[dict[str, Any]], answer: _Answer) -> None:
        """Stream the answer to the screen and into `answer`."""
        settings, llm, before = self.settings, self.llm, self.llm.stats
        system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        with (
            closing(_Shown(self.writer, self.ui, is_thinking_shown=settings.is_thinking_shown)) as shown,
            self.ui.waiting("thinking" if settings.is_thinking else "reading the message") as waiting,
            _Interrupts(is_heard=lambda: llm.stats is not before) as interrupts,
            closing(  # type: ignore[type-var]  # it is a generator
                llm.create_chat_completion(
                    [*system, *messages],
                    stream=True,
                    thinking=settings.is_thinking,
                    reasoning_effort=settings.effort if settings.is_thinking else None,
                    max_tokens=settings.max_tokens,
                    on_prefill=waiting.advance,
                    **settings.more,
                    **settings.sampling,
                )
            ) as chunks,
        ):
            for chunk in chunks:
                choice = chunk["choices"][0]
                reasoning = choice["delta"].get("reasoning_content", "")
                content = choice["delta"].get("content", "")
                answer.reasoning += reasoning
                answer.content += content
                if content or (reasoning and settings.is_thinking_shown):
                    waiting.stop()
                    shown.add(reasoning, content)
                if choice["finish_reason"] is not None:
                    answer.finish = choice["finish_reason"]
                    answer.unparsed = choice.get("unparsed")
                    break
                if interrupts.is_wished:
                    answer.finish = "interrupted"
                    break

    # --- commands ---

    def _command(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name not in _HELP:
            near = difflib.get_close_matches(name, _HELP, n=1)
            hint = f"Did you mean {near[0]}?" if near else "/help lists them."
            self._fail(f"no such command: {name}. {hint} A message that begins with a slash begins with two.")
            return
        try:
            getattr(self, f"_do_{name[1:]}")(argument.strip())
        except (PyllamaError, OSError) as error:
            self._fail(str(error))

    def _do_help(self, _: str) -> None:
        self.ui.table([*_HELP.items(), *_KEYS])

    def _do_think(self, _: str) -> None:
        self.settings.is_thinking = True
        self.ui.note("thinking is on")

    def _do_nothink(self, _: str) -> None:
        self.settings.is_thinking = False
        self.ui.note("thinking is off")

    def _do_effort(self, argument: str) -> None:
        efforts: dict[str, ReasoningEffort | None] = {"high": "high", "max": "max", "off": None}
        if argument not in efforts:
            raise ArgumentError("/effort", found=repr(argument), expected="high, max or off")
        self.settings.effort = efforts[argument]
        hint = "" if self.settings.is_thinking else "; /think turns thinking on"
        self.ui.note(f"effort is {argument}{hint}")

    def _do_system(self, argument: str) -> None:
        self.settings.system = argument or None
        self.ui.note("the system prompt is set" if argument else "there is no system prompt")

    def _do_temp(self, argument: str) -> None:
        self._set_sampling("temperature", argument, float)
        self.ui.note(f"the temperature is {argument}")

    def _do_seed(self, argument: str) -> None:
        if argument:
            self._set_sampling("seed", argument, int)
        else:
            self.settings.sampling["seed"] = None
        self.ui.note(f"the seed is {argument or 'a new one each time'}")

    def _set_sampling(self, name: str, argument: str, kind: Callable[[str], Any]) -> None:
        from pyllama_dsv4.sampler import SamplingParams

        try:
            value = kind(argument)
        except ValueError:
            raise ArgumentError("sampling", key=name, found=repr(argument), expected="a number") from None
        SamplingParams(**{name: value})  # checks the range
        self.settings.sampling[name] = value

    def _take_back(self) -> str:
        """Take back the last message and its answer; return the message."""
        i = len(self._messages) - 1
        while i >= 0 and self._messages[i]["role"] != "user":
            i -= 1
        if i < 0:
            raise ArgumentError("there is no message yet")
        text = str(self._messages[i]["content"])
        self._messages = self._messages[:i]
        return text

    def _answer_instead(self, text: str) -> None:
        before = self._messages
        last = self._take_back()
        if self._answer(text or last).finish in ("", "interrupted") and len(self._messages) < len(before):
            self._messages = before  # no answer came of it: the old one stays

    def _do_retry(self, _: str) -> None:
        self._answer_instead("")

    def _do_undo(self, _: str) -> None:
        text = self._take_back()
        self.ui.note(f"taken back: {text.splitlines()[0] if text else ''}")

    def _do_edit(self, argument: str) -> None:
        if argument:
            self._answer_instead(argument)
        else:
            self.source.prefill(self._take_back())

    def _do_save(self, argument: str) -> None:
        path = _conversation_path("/save", argument)
        save_conversation(
            path,
            self._messages,
            system=self.settings.system,
            thinking=self.settings.is_thinking,
            effort=self.settings.effort,
        )
        self.llm.save_state_file(f"{path}.state")
        self.ui.note(f"kept in {path} and {path}.state")

    def _do_load(self, argument: str) -> None:
        path = _conversation_path("/load", argument)
        kept = load_conversation(path)
        self._messages = kept.messages
        self.settings.system, self.settings.is_thinking = kept.system, kept.thinking
        self.settings.effort = kept.effort
        n = sum(message["role"] == "user" for message in kept.messages)
        try:
            self.llm.load_state_file(f"{path}.state")
        except (StateError, ContextFullError, OSError) as error:
            self.ui.note(f"{n} messages; the next one evaluates them again ({error})")
        else:
            self.ui.note(f"{n} messages; {self.llm.n_tokens:,} tokens need not be evaluated again")

    def _do_tokens(self, argument: str) -> None:
        if argument:
            ids = self.llm.tokenize(argument)
            pieces = " ".join(repr(self.llm.token_to_bytes(i).decode("utf-8", "replace")) for i in ids)
            self.ui.say(f"{len(ids)} tokens: {pieces}")
            return
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        if not (system or self._messages):
            self.ui.say("0 tokens")
            return
        ids = self.llm.format_chat_tokens([*system, *self._messages], add_generation_prompt=False)
        self.ui.say(f"{len(ids):,} tokens in {len(self._messages)} messages")

    def _do_ctx(self, _: str) -> None:
        n, n_ctx = self.llm.n_tokens, self.llm.n_ctx
        self.ui.say(
            f"{n:,} of {n_ctx:,} tokens evaluated ({n / n_ctx:.0%}); the model was made for {self.llm.n_ctx_train:,}"
        )

    def _do_reset(self, _: str) -> None:
        self._messages = []
        self.llm.reset()
        self.ui.note("the conversation is forgotten")

    def _do_quit(self, _: str) -> None:
        self._is_over = True

    def _do_stats(self, _: str) -> None:
        stats, totals, settings = self.llm.stats, self._totals, self.settings
        n_evaluated = stats.n_tokens_prompt - stats.n_tokens_cached
        memory = self.llm.working_set_bytes
        sampling = ", ".join(f"{k} {v}" for k, v in settings.sampling.items()) or "as the file recommends"
        self.ui.table(
            [
                ("model", self.llm.desc.replace(" ?B", "")),  # what the engine says of sizes it does not know
                ("context", f"{self.llm.n_tokens:,} of {self.llm.n_ctx:,} tokens"),
                (
                    "last prompt",
                    f"{stats.n_tokens_prompt:,} tokens: {stats.n_tokens_cached:,} cached,"
                    f" {n_evaluated:,} evaluated in {stats.prefill_s:.2f} s ({stats.prefill_tokens_per_s:.1f} t/s)",
                ),
                (
                    "last answer",
                    f"{stats.n_tokens_generated:,} tokens in {stats.decode_s:.2f} s"
                    f" ({stats.decode_tokens_per_s:.1f} t/s)",
                ),
                (
                    "since start",
                    f"{totals.n_answers:,} answers, {totals.n_tokens_evaluated:,} tokens evaluated,"
                    f" {totals.n_tokens_generated:,} generated",
                ),
                ("memory", "unknown" if memory is None else f"{memory / 1e9:.2f} GB resident"),
                ("read ahead", self._read_ahead()),
                ("experts", self._experts()),
                ("thinking", f"{'on' if settings.is_thinking else 'off'}, effort {settings.effort or 'off'}"),
                ("sampling", sampling),
                ("system", settings.system or "none"),
            ]
        )

    def _read_ahead(self) -> str:
        warmup = self.llm.warmup
        if warmup is None:
            return "no"
        return self.warmup_text() or f"{warmup.n_bytes / 1e9:.2f} GB of the file"

    def _experts(self) -> str:
        counts = self.llm.paging
        if not counts.n_bytes:
            return "mapped"
        return f"announced to the system; {counts.hit_rate:.0%} were in memory"


def _conversation_path(command: str, argument: str) -> Path:
    if not argument:
        raise ArgumentError(command, found="no file", expected=f"{command} FILE")
    return Path(argument).expanduser()


class _Shown:
    """The screen's part of one answer: reasoning dim and apart, then the answer.

    Where stdout is not a terminal it gets the answer only; the reasoning goes to stderr.
    """

    def __init__(self, writer: AnswerWriter, ui: Ui, *, is_thinking_shown: bool) -> None:
        self._writer = writer
        self._thoughts = writer if writer.is_terminal else AnswerWriter(writer.color, sys.stderr)
        self._is_shown = is_thinking_shown and (writer.is_terminal or not ui.is_quiet)
        self._is_thinking = False

    def add(self, reasoning: str, content: str) -> None:
        if reasoning and self._is_shown:
            if not self._is_thinking:
                self._is_thinking = True
                self._thoughts.write("thinking:\n", is_dim=True)
            self._thoughts.write(reasoning, is_dim=True)
        if content:
            if self._is_thinking:
                self._is_thinking = False
                self._thoughts.end_line()
                self._thoughts.write("\n")
            self._writer.write(content)

    def close(self) -> None:
        """End the last line."""
        self._thoughts.end_line()
        self._writer.end_line()
