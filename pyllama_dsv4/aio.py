"""``AsyncLlama``: a ``Llama`` for asyncio. Calls run in one thread of their own; the event loop never waits.

Calls of several tasks queue in that thread. Cancelling a task, or closing an iterator, stops its generation within a
step and leaves the ``Llama`` usable.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CancelledError, PyllamaError
from .llama import Llama
from .responses import ChatCompletion, ChatCompletionChunk, Completion, Embeddings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncLlama"]

T = TypeVar("T")


class AsyncLlama:
    """The generating methods of a ``Llama`` as coroutines; everything else is at ``llm``.

    Args:
        llm: Closed by ``close``. Other threads may go on using it: they take turns.
    """

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self._executor = ThreadPoolExecutor(1, "pyllama-dsv4-async")
        self._turn = asyncio.Lock()

    async def create_completion(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Return ``Llama.create_completion`` without `stream`."""
        return await self._call(
            lambda stop: self.llm.create_completion(prompt, stop_event=stop, **options), options
        )

    async def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> ChatCompletion:
        """Return ``Llama.create_chat_completion`` without `stream`."""
        return await self._call(
            lambda stop: self.llm.create_chat_completion(messages, stop_event=stop, **options), options
        )

    async def generate_batch(
        self, prompts: Sequence[str | Sequence[int]], **options: Any
    ) -> list[Completion]:
        """Return ``Llama.generate_batch``."""
        return await self._call(
            lambda stop: self.llm.generate_batch(prompts, stop_event=stop, **options), options
        )

    async def create_embedding(
        self, input: str | Sequence[str | Sequence[int]], **options: Any
    ) -> Embeddings:
        """Return ``Llama.create_embedding``."""
        return await self._call(
            lambda stop: self.llm.create_embedding(input, stop_event=stop, **options), options
        )

    def generate(self, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[str]:
        """Iterate over ``Llama.generate``."""
        return self._iterate(lambda stop: self.llm.generate(prompt, stop_event=stop, **options), options)

    def stream_completion(self, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[Completion]:
        """Iterate over ``Llama.create_completion`` with `stream`."""
        return self._iterate(
            lambda stop: self.llm.create_completion(prompt, stream=True, stop_event=stop, **options), options
        )

    def stream_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> AsyncIterator[ChatCompletionChunk]:
        """Iterate over ``Llama.create_chat_completion`` with `stream`."""
        return self._iterate(
            lambda stop: self.llm.create_chat_completion(messages, stream=True, stop_event=stop, **options),
            options,
        )

    async def _call(self, work: Callable[[threading.Event], T], options: dict[str, Any]) -> T:
        stop = options.pop("stop_event", None) or threading.Event()
        async with self._turn:
            running = asyncio.get_running_loop().run_in_executor(self._executor, work, stop)
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                stop.set()
                with suppress(PyllamaError):
                    await running
                raise

    async def _iterate(
        self, make: Callable[[threading.Event], Iterator[T]], options: dict[str, Any]
    ) -> AsyncIterator[T]:
        stop = options.pop("stop_event", None) or threading.Event()
        loop = asyncio.get_running_loop()
        async with self._turn:
            items: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

            def pump() -> None:
                def put(is_item: bool, value: Any) -> None:
                    loop.call_soon_threadsafe(items.put_nowait, (is_item, value))

                try:
                    for item in make(stop):
                        put(True, item)
                except BaseException as error:
                    put(False, error)
                else:
                    put(False, None)

            running = loop.run_in_executor(self._executor, pump)
            try:
                while True:
                    is_item, value = await items.get()
                    if is_item:
                        yield value
                    elif value is not None:
                        raise value
                    else:
                        return
            finally:
                stop.set()
                with suppress(CancelledError):
                    await asyncio.shield(running)

    async def close(self) -> None:
        """Close the ``Llama`` after what is running. Idempotent."""
        async with self._turn:
            await asyncio.get_running_loop().run_in_executor(None, self.llm.close)
            self._executor.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
