"""Read the bodies of requests up to a limit, and stop the work for a client that has gone away."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request

from .errors import TooLarge

# Of a form or of JSON, besides the audio in it.
ROOM_FOR_OTHER_FIELDS = 2**20


class ClientGone(Exception):
    """The client has closed its connection."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        TooLarge: it holds more than `max_bytes`; it is then not read to its end.
    """
    promised = request.headers.get("content-length", "")
    body = bytearray()
    if not (promised.isdecimal() and int(promised) > max_bytes):
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                break
        else:
            return bytes(body)
    raise TooLarge(f"The request holds more than {max_bytes} bytes, which is the limit. Compress or split its audio.")


def replayed(request: Request, body: bytes) -> Request:
    """Return a request whose body, which was read already, can be read again."""

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, receive)


async def until_gone(request: Request, work: Coroutine) -> Any:
    """Return the result of a coroutine, which is cancelled if the client goes away.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request):
    while (await request.receive())["type"] != "http.disconnect":
        pass
