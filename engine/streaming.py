"""Requests driven by the engine's own thread, awaited in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import suppress

from .completions import RequestMaker, group
from .llm.request import Request
from .llm.rollouts import Rollouts
from .types import StreamChunk


async def stream(
    rollouts: Rollouts, maker: RequestMaker, requests: Sequence[Request], *, only_ends: bool = False
) -> AsyncGenerator[StreamChunk, None]:
    """Chunks as steps make them, or only the last one of each completion, with all of it.

    Leaving the iteration early, or cancelling it, aborts what has not ended.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[StreamChunk | Exception]()
    places = {id(request): index for index, request in enumerate(requests)}
    given = [0] * len(requests)

    def put(item: StreamChunk | Exception) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def on_change(request: Request) -> None:  # called in the stepping thread
        if request.error is not None:
            put(request.error)
            return
        if only_ends and not request.finished:
            return
        index = places[id(request)]
        put(_chunk(maker, request, index, given[index]))
        given[index] = request.num_new

    for request in requests:
        request.on_change = on_change
    rollouts.serve()
    rollouts.submit(group(requests))
    left = len(requests)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item.completion is not None
            yield item
    finally:
        if left:
            await _abort(rollouts, places)


async def _abort(rollouts: Rollouts, chosen: Container[int]) -> None:
    """Abort the requests with these ids; it waits for a step to end, but not in the event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # a stream that was forgotten, and collected after its loop had ended
        rollouts.abort(lambda request: id(request) in chosen)
        return
    await asyncio.to_thread(rollouts.abort, lambda request: id(request) in chosen)


def _chunk(maker: RequestMaker, request: Request, index: int, start: int) -> StreamChunk:
    return StreamChunk(
        index=index,
        token_ids=request.tokens[len(request.prompt) + start :],
        logprobs=request.logprobs[start:],
        text=None if request.text is None else request.text.take(final=request.finished),
        completion=maker.complete(request) if request.finished else None,
    )
