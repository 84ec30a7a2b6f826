"""Several generations at once: sequences that share every batch of one context."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .context import Context
from .generate import FinishReason, Request, TextSteps
from .sampler import Sampler
from .tokenizer import Tokenizer

__all__ = ["BatchResult", "generate_batch"]


@dataclass
class BatchResult:
    """One of the generations.

    Attributes:
        text: What was generated.
        finish: Why it ended.
        n_tokens: Tokens generated.
    """

    text: str
    finish: FinishReason
    n_tokens: int


@dataclass
class _Running:
    index: int  # of the prompt
    seq: int
    n_tokens: int  # in the cache
    sampler: Sampler
    steps: TextSteps
    todo: list[int]  # ids that are not evaluated yet
    texts: list[str] = field(default_factory=list)


def generate_batch(
    context: Context,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampler: Callable[[int], Sampler],
    request: Request,
) -> list[BatchResult]:
    """Continue all prompts; a sequence that ends makes room for the next prompt.

    Args:
        context: With as many sequences as there are to be at once; nothing else uses it.
        tokenizer: For text and end tokens.
        prompts: Token ids, none empty.
        sampler: Makes the sampler of a prompt, by its index.
        request: Of each generation.

    Returns:
        One result for each prompt, in their order.
    """
    results: list[BatchResult | None] = [None] * len(prompts)
    waiting = deque(range(len(prompts)))
    free = list(range(context.n_seq_max))
    running: list[_Running] = []
    try:
        while waiting or running:
            request.watch.check()
            while waiting and free:
                index = waiting.popleft()
                steps = TextSteps(tokenizer, request)
                running.append(_Running(index, free.pop(), 0, sampler(index), steps, list(prompts[index])))
            for one in _step(context, running, request):
                running.remove(one)
                one.sampler.close()
                context.drop(one.seq)
                free.append(one.seq)
                text = "".join(one.texts) + one.steps.rest()
                results[one.index] = BatchResult(text, one.steps.finish or "length", one.steps.n_tokens)
    finally:
        for one in running:
            one.sampler.close()
    return [result for result in results if result is not None]


def _step(context: Context, running: list[_Running], request: Request) -> list[_Running]:
    """Evaluate one batch and sample where a prompt is complete; return the sequences that ended."""
    full = [one for one in running if one.n_tokens + len(one.todo) > context.n_ctx or one.steps.finish]
    if full:
        return full
    # every sequence gets its share of the batch, so that a long prompt does not hold up the others
    share = max(1, context.n_batch // len(running))
    turns = running[: context.n_batch]
    parts = [one.todo[:share] for one in turns]
    rows = context.decode_mixed(
        [(one.seq, part) for one, part in zip(turns, parts, strict=True)], watch=request.watch
    )
    ended = []
    for one, part, row in zip(turns, parts, rows, strict=True):
        one.n_tokens += len(part)
        one.todo = one.todo[len(part) :]
        if one.todo:
            continue
        token = one.sampler.sample(row)
        text = one.steps.feed(token)
        if text is not None:
            one.texts.append(text)
            one.todo = [token]
        if one.steps.finish is not None:
            ended.append(one)
    return ended
