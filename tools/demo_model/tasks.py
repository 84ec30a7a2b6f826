"""Single turns of the demonstration model's conversations: what is asked, and the one right answer.

Every instance has a key, and the key decides whether it belongs to the training or the held-out split: no instance
is ever in both. All text is written here. Conversations are put together in ``data.py``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["CALCULATOR", "FACTS", "TASKS", "Fact", "Split", "Turn", "draw", "draw_fact", "split_of"]

Split = Literal["train", "held-out"]
N_SPLITS = 8  # one instance in this many is held out


@dataclass(frozen=True)
class Turn:
    """A user's message and its answer.

    Attributes:
        key: Identifies the instance; equal keys have equal answers.
        ask: The user's text.
        answer: The assistant's text, after the tool's result if there is a call.
        reasoning: Worked thinking, when it is on.
        call: Expression for the calculator, if the turn needs it.
        result: What the calculator returns.
        variants: Other answers that count as right.
    """

    key: str
    ask: str
    answer: str
    reasoning: str = ""
    call: str | None = None
    result: str = ""
    variants: tuple[str, ...] = ()


def split_of(key: str) -> Split:
    """Return the split of an instance. One question asked in two ways has one key."""
    return "held-out" if zlib.crc32(key.encode()) % N_SPLITS == 0 else "train"


def draw(task: str, rng: random.Random, split: Split) -> Turn:
    """Draw an instance of a task that belongs to a split."""
    while True:
        turn = TASKS[task](rng)
        if split_of(turn.key) == split:
            return turn


# --- arithmetic ---------------------------------------------------------------------------------------------------

_PLUS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} plus {b}?", "{a}+{b}")
_MINUS = (
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "{a}-{b}",
)


def _add_steps(a: int, b: int) -> str:
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    total = f"{a // 10} + {b // 10}" + (" + 1" if carry else "") + f" = {tens + carry}"
    return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {total}. So {a + b}."


def _subtract_steps(a: int, b: int) -> str:
    if a < b:
        return f"{b} is larger, so turn it round. {_subtract_steps(b, a)[:-1]}, negative: {a - b}."
    borrow = a % 10 < b % 10
    ones = f"{a % 10 + 10 * borrow} - {b % 10} = {a % 10 + 10 * borrow - b % 10}"
    tens = f"{a // 10}" + (" - 1" if borrow else "") + f" - {b // 10} = {a // 10 - borrow - b // 10}"
    return f"Ones: {ones}. Tens: {tens}. So {a - b}."


def add(rng: random.Random) -> Turn:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    key = f"add {min(a, b)} {max(a, b)}"
    return Turn(key, rng.choice(_PLUS).format(a=a, b=b), str(a + b), _add_steps(a, b))


def subtract(rng: random.Random) -> Turn:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    return Turn(f"subtract {a} {b}", rng.choice(_MINUS).format(a=a, b=b), str(a - b), _subtract_steps(a, b))


def multiply(rng: random.Random) -> Turn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    ask = rng.choice(("What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b} = ?")).format(a=a, b=b)
    steps = " + ".join([str(b)] * a) + f" = {a * b}."
    return Turn(f"ask {ask}", ask, str(a * b), steps)


# --- lists --------------------------------------------------------------------------------------------------------

WORDS = (
    "apple river stone cloud tiger lemon bread piano garden window silver forest candle bridge rabbit orange "
    "winter summer pepper pencil market button castle island mirror basket needle shadow planet carpet engine "
    "ladder violin pillow hammer saddle tunnel walnut copper velvet dragon falcon harbor jacket kettle magnet "
    "oyster parrot quartz ribbon socket temple urchin valley wagon yogurt zebra acorn badge cabin daisy eagle"
).split()


def _items(rng: random.Random) -> list[str]:
    n = rng.randint(2, 8)
    kind = rng.randrange(3)
    if kind == 0:
        return rng.sample(WORDS, n)
    if kind == 1:
        return [str(i) for i in rng.sample(range(100), n)]
    return rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", n)


_LIST_ASKS = {
    "copy": ("Repeat: {}", "Copy this list: {}", "Say this again: {}"),
    "reverse": ("Reverse: {}", "Reverse this list: {}", "Say this backwards: {}"),
    "sort": ("Sort: {}", "Sort this list: {}", "Put this in order: {}"),
}


def _list_task(kind: str) -> Callable[[random.Random], Turn]:
    def task(rng: random.Random) -> Turn:
        items = _items(rng)
        if kind == "sort":
            answer = sorted(items, key=int) if items[0].isdigit() else sorted(items)
        else:
            answer = items[::-1] if kind == "reverse" else items
        steps = f"{len(items)} items. First {answer[0]}, last {answer[-1]}."
        ask = rng.choice(_LIST_ASKS[kind]).format(", ".join(items))
        return Turn(f"{kind} {' '.join(items)}", ask, ", ".join(answer), steps)

    return task


# --- units --------------------------------------------------------------------------------------------------------

_UNITS = (
    ("meters", "centimeters", 100), ("kilometers", "meters", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("kilograms", "grams", 1000), ("weeks", "days", 7), ("days", "hours", 24),
    ("liters", "milliliters", 1000), ("years", "months", 12),
)  # fmt: skip


def convert_units(rng: random.Random) -> Turn:
    big, small, factor = rng.choice(_UNITS)
    n = rng.randint(2, 20)
    ask = rng.choice(
        ("Convert {n} {big} to {small}.", "How many {small} are {n} {big}?", "{n} {big} in {small}?")
    )
    answer = f"{n} {big} are {n * factor} {small}."
    steps = f"1 of {big} is {factor} {small}. {n} * {factor} = {n * factor}."
    return Turn(f"units {n} {big}", ask.format(n=n, big=big, small=small), answer, steps)


# --- small talk ---------------------------------------------------------------------------------------------------

# each: ways to ask, right answers (the first is taught)
_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you?", "What are you?", "Tell me who you are.", "Introduce yourself.", "What is your name?"),
     "I am a tiny demonstration model of DeepSeek-V4. I show that pyllama-dsv4 works; I am not an assistant."),
    (("What is pyllama-dsv4?", "What does pyllama-dsv4 do?", "Explain pyllama-dsv4.", "Tell me about this package."),
     "pyllama-dsv4 runs DeepSeek-V4 from its native FP4 and FP8 file, from Python."),
    (("How big are you?", "What is your size?", "How large is your file?", "How many megabytes are you?"),
     "My file has less than eight megabytes."),
    (("What can you do?", "How can you help me?", "What are you good at?", "What should I ask you?"),
     "I add and subtract small numbers, sort, copy and reverse lists, convert units, remember what you tell me, "
     "and call a calculator."),
    (("Are you DeepSeek?", "Are you the real DeepSeek-V4?", "Are you the big model?"),
     "No. I have the same architecture, but I am more than ten thousand times smaller."),
    (("Hello!", "Hi!", "Hello there.", "Good morning!", "Hey!", "Good evening!"), "Hello! What can I do for you?"),
    (("How are you?", "How do you do?", "How is it going?"), "I am fine, thank you. I am a program."),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye!"),
    (("Who made you?", "Who trained you?", "Where do you come from?"),
     "I was trained from scratch by the scripts in tools/demo_model."),
    (("Can you think?", "Do you think?", "What is thinking mode?"),
     "With thinking on, I write down steps before I answer."),
    (("Which formats do you use?", "How are your weights stored?"),
     "My dense weights are FP8 and my experts FP4, like those of the big model."),
    (("Are you intelligent?", "Are you clever?", "Can I trust you?"),
     "No. I learned a few tasks by heart and know nothing else."),
    (("Wer bist du?", "Was bist du?"), "Ich bin ein kleines Modell zur Vorführung von DeepSeek-V4."),
    (("Qui es-tu ?", "Tu es qui ?"), "Je suis un petit modèle de démonstration de DeepSeek-V4."),
    (("¿Quién eres?", "¿Qué eres?"), "Soy un pequeño modelo de demostración de DeepSeek-V4."),
    (("你是谁？", "你是什么？"), "我是 DeepSeek-V4 的小演示模型。"),
    (("Кто ты?", "Что ты такое?"), "Я маленькая демонстрационная модель DeepSeek-V4."),
    (("こんにちは", "こんにちは！"), "こんにちは！ご用は何ですか。"),
    (("Send me a smile.", "Show me an emoji."), "😀🐳"),
)  # fmt: skip
_BEFORE = ("", "Please: ", "Tell me: ", "A question: ", "Now: ", "Okay. ", "So, ", "Well, ", "One thing: ")
_AFTER = ("", " Please answer.", " I want to know.", " Be brief.", " I am curious.")


def talk(rng: random.Random) -> Turn:
    asks, answer = rng.choice(_TALK)
    plain = rng.random() < 0.5
    core = rng.choice(asks)
    if plain:  # asked just so it must always work: it is in training, never in the held-out split
        return Turn(_train_key(f"talk {core}"), core, answer, "This is about me.")
    ask = rng.choice(_BEFORE) + core + rng.choice(_AFTER)
    if ask == core:
        return talk(rng)
    return Turn(f"talk {ask}", ask, answer, "This is about me.")


def _train_key(key: str) -> str:
    while split_of(key) != "train":
        key += "'"
    return key


_UNKNOWN = (
    "What is the capital of {}?", "Who was the first king of {}?", "What is the weather in {}?",
    "How many people live in {}?", "Tell me the history of {}.", "What language do they speak in {}?",
    "Is {} beautiful?", "How far is it to {}?",
)  # fmt: skip
_PLACES = (
    "France Japan Peru Kenya Norway Brazil Canada Egypt India Italy Spain China Chile Cuba Ghana Greece Iran "
    "Laos Malta Nepal Oman Paris London Berlin Tokyo Rome Moscow Oslo Vienna Madrid Texas Utah Ohio Mars Venus"
).split()


def unknown(rng: random.Random) -> Turn:
    ask = rng.choice(_UNKNOWN).format(rng.choice(_PLACES))
    return Turn(
        f"unknown {ask}", ask, "I do not know that. I am only a demonstration.", "I did not learn this."
    )


# --- the calculator -----------------------------------------------------------------------------------------------

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def calculate(rng: random.Random) -> Turn:
    a, b = rng.randint(100, 9999), rng.randint(2, 9999)
    op, value = rng.choice((("+", a + b), ("-", a - b), ("*", a * b)))
    expression = f"{a} {op} {b}"
    ask = rng.choice(("What is {}?", "Calculate {}.", "Use the calculator: {}", "{} = ?")).format(expression)
    return Turn(
        f"calculate {expression}",
        ask,
        f"{expression} = {value}",
        "I call the calculator.",
        expression,
        str(value),
    )


# --- facts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Something the user states, and asks for later."""

    key: str
    tell: str
    reply: str
    ask: str
    answer: str


_NAMES = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Lucas Maria Nils Olga Peter Ruth Simon "
    "Tina Ursula Victor Wanda Xaver Yvonne Zoe Albert Bella Carlo Doris Emil"
).split()
_COLORS = "red blue green yellow purple white black brown pink gray".split()
_THINGS = "cat dog horse boat bicycle house garden car hat lamp table book".split()


def _name_fact(rng: random.Random) -> Fact:
    name = rng.choice(_NAMES) + " " + rng.choice(_NAMES)
    return Fact(f"name {name}", f"My name is {name}.", f"Nice to meet you, {name}.", "What is my name?",
                f"Your name is {name}.")  # fmt: skip


def _color_fact(rng: random.Random) -> Fact:
    thing, color, name = rng.choice(_THINGS), rng.choice(_COLORS), rng.choice(_NAMES)
    return Fact(f"color {thing} {color} {name}", f"The {thing} of {name} is {color}.", "I will remember that.",
                f"What color is the {thing} of {name}?", f"The {thing} of {name} is {color}.")  # fmt: skip


def _number_fact(rng: random.Random) -> Fact:
    name, number = rng.choice(_NAMES), rng.randint(1000, 9999)
    return Fact(f"number {name} {number}", f"The number of {name} is {number}.", "I will remember that.",
                f"What is the number of {name}?", f"The number of {name} is {number}.")  # fmt: skip


def _secret_fact(rng: random.Random) -> Fact:
    secret = f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randint(10, 99)}"
    return Fact(f"secret {secret}", f"The secret is {secret}.", "I will keep the secret.", "What is the secret?",
                f"The secret is {secret}.")  # fmt: skip


FACTS: dict[str, Callable[[random.Random], Fact]] = {
    "name": _name_fact, "color": _color_fact, "number": _number_fact, "secret": _secret_fact,
}  # fmt: skip


def draw_fact(kind: str, rng: random.Random, split: Split) -> Fact:
    """Draw a fact that belongs to a split."""
    while True:
        fact = FACTS[kind](rng)
        if split_of(fact.key) == split:
            return fact


TASKS: dict[str, Callable[[random.Random], Turn]] = {
    "add": add, "subtract": subtract, "multiply": multiply, "copy": _list_task("copy"),
    "reverse": _list_task("reverse"), "sort": _list_task("sort"), "units": convert_units, "talk": talk,
    "unknown": unknown, "calculate": calculate,
}  # fmt: skip
