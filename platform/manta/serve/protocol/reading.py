"""A request's body, of a limited size, and whether its client is still there."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from manta.serve.refusal import Refusal

T = TypeVar("T")

MOST_BYTES = 8 << 20  # of a body


class Gone(Exception):
    """The client has gone away; nobody reads an answer any more."""


async def body_of(request: Request, most: int = MOST_BYTES) -> bytes:
    """The body. Raises Refusal as soon as it is known to be larger than `most` bytes."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise _too_large(most)
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise _too_large(most)
    return bytes(found)


def _too_large(most: int) -> Refusal:
    return Refusal(f"the body has more than {most:,} bytes, the most that are read", status=413)


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises Gone then."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for pending in (task, left):
            pending.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
