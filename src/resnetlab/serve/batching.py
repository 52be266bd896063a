"""Dynamic batching: requests that arrive within a few milliseconds of each other are computed as one batch.

One thread computes, so the network meets one batch at a time. A request is answered with exactly its own results, is
never split, and is dropped from the queue when nobody waits for it any more.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Full(Exception):
    """The queue has no room for the request."""


@dataclass(frozen=True)
class _Request(Generic[Item, Result]):
    items: Sequence[Item]
    answer: "asyncio.Future[list[Result]]"


class Batcher(Generic[Item, Result]):
    """A bounded queue in front of one worker thread. Used from one event loop; it starts with the first request.

    Args:
        compute: Takes the items of several requests, returns a result for each, in order. Runs in the worker thread.
        size: Most items in a batch. A larger request is a batch of its own.
        wait_s: Longest that a request waits for company, in seconds.
        longest_s: Seconds that a batch may take, by what an image took in the last one. A large network on a CPU gains
            nothing from large batches, and everyone in one waits for its end.
        capacity: Most items that wait or are being computed; beyond that `submit` raises `Full`.
        coming: How many more items are on their way here. Nobody waits for company that is not coming, so that a
            single client is answered at once.
        tell: Called with the size of every batch.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result]],
        *,
        size: int,
        wait_s: float,
        capacity: int,
        longest_s: float = float("inf"),
        coming: Callable[[], int] = lambda: 1,
        tell: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.compute, self.size, self.wait_s, self.capacity = compute, size, wait_s, capacity
        self.longest_s, self.coming, self.tell = longest_s, coming, tell
        self.waiting = 0
        """Items accepted and not answered yet."""
        self._seconds = 0.0  # an item, in the last batch
        self._queue: deque[_Request[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "network")

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Have items computed with those of others; a cancelled call takes no further part.

        Raises:
            Full: There are too many already, or the batcher is closed.
        """
        if self._closing or self.waiting + len(items) > self.capacity:
            raise Full
        loop = asyncio.get_running_loop()
        request: _Request[Item, Result] = _Request(items, loop.create_future())
        self.waiting += len(items)
        self._queue.append(request)
        self._changed.set()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        try:
            return await request.answer
        finally:
            self.waiting -= len(items)

    async def close(self) -> None:
        """Answer what was accepted, then stop."""
        self._closing = True
        self._changed.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        while self._queue or not self._closing:
            if not self._queue:
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._gather()
            if batch := self._take():
                await self._answer(batch)

    async def _gather(self) -> None:
        """Wait until the batch is full, nobody else is coming, or the time is up."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.wait_s
        while not self._closing and self.coming() and sum(len(r.items) for r in self._queue) < self._room():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            if loop.time() >= until:
                return

    def _room(self) -> int:
        """Return how many items the next batch may have."""
        return max(1, int(min(self.size, self.longest_s / self._seconds if self._seconds else self.size)))

    def _take(self) -> list[_Request[Item, Result]]:
        """Return the requests that fit in a batch, oldest first, without those that were given up."""
        batch: list[_Request[Item, Result]] = []
        room = self._room()
        while self._queue:
            if self._queue[0].answer.done():
                self._queue.popleft()
                continue
            if batch and len(self._queue[0].items) > room:
                break
            batch.append(self._queue.popleft())
            room -= len(batch[-1].items)
        return batch

    async def _answer(self, batch: list[_Request[Item, Result]]) -> None:
        """Compute a batch. Where it fails each request is computed alone, so that only the culprit fails."""
        items = [item for request in batch for item in request.items]
        start = time.perf_counter()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self.compute, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} images gave {len(results)} answers")
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self._answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        self._seconds = (time.perf_counter() - start) / len(items)
        self.tell(len(items))
        at = 0
        for request in batch:
            if not request.answer.done():
                request.answer.set_result(list(results[at : at + len(request.items)]))
            at += len(request.items)
