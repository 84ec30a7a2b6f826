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
        n_tokens_drafted: Tokens that a draft model proposed.
        n_tokens_accepted: How many of them were what the sampler chose.
    """

    text: str
    finish: FinishReason
    n_tokens: int
    n_tokens_drafted: int
    n_tokens_accepted: int


@dataclass
class _Running:
    index: int  # of the prompt
    seq: int
    n_tokens: int  # in the cache
    sampler: Sampler
    steps: TextSteps
    todo: list[int]  # ids that are not evaluated yet
    texts: list[str] = field(default_factory=list)
    is_prompt: bool = True
    n_drafted: int = 0
    n_accepted: int = 0


def generate_batch(
    context: Context,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampler: Callable[[int], Sampler],
    request: Request,
) -> list[BatchResult]:
    """Continue all prompts; a sequence that ends makes room for the next prompt.

    Args:
        context: With as many sequences as there are to be at once; nothing else uses it. Its draft model, if it has
            one, proposes for all of them together.
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
                results[one.index] = BatchResult(
                    text, one.steps.finish or "length", one.steps.n_tokens, one.n_drafted, one.n_accepted
                )
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
    proposals = _proposals(context, turns, request, share - 1)
    parts = [[*one.todo[:share], *more] for one, more in zip(turns, proposals, strict=True)]
    all_rows = context.decode_mixed(
        [(one.seq, part) for one, part in zip(turns, parts, strict=True)],
        n_rows=[1 + len(more) for more in proposals],
        watch=request.watch,
    )
    ended = []
    for one, part, more, rows in zip(turns, parts, proposals, all_rows, strict=True):
        one.n_tokens += len(part)
        one.todo = one.todo[len(part) - len(more) :]
        if one.todo:
            continue
        one.is_prompt = False
        n_accepted = 0
        for i, row in enumerate(rows):
            token = one.sampler.sample(row)
            text = one.steps.feed(token)
            if text is not None:
                one.texts.append(text)
            if one.steps.finish is not None or token not in more[i : i + 1]:
                break
            n_accepted += 1
        one.n_drafted += len(more)
        one.n_accepted += n_accepted
        if one.steps.finish is not None:
            ended.append(one)
            continue
        one.todo = [token]
        if more:
            n_rejected = len(more) - n_accepted
            context.settle(n_accepted, n_rejected, None, one.seq)
            one.n_tokens -= n_rejected
    return ended


def _proposals(context: Context, turns: list[_Running], request: Request, n_max: int) -> list[list[int]]:
    """Return for every sequence what a draft model lets follow its newest token: at most `n_max` tokens."""
    steps = []
    for one in turns:
        n_left = context.n_ctx if request.max_tokens is None else request.max_tokens - one.steps.n_tokens - 1
        steps.append((one.seq, one.todo[0], 0 if one.is_prompt else min(n_max, n_left)))
    return context.propose(steps)
