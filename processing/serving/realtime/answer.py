"""An answer that is being streamed: the engine's chunks, as the events of a response.

Leaves out: the conversation, and when it is answered (`session.py`).
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from transformers.utils import logging

from ..errors import EngineRefused, ServerError, ServingError
from ..front import Front
from .conversation import new_id, shown

logger = logging.get_logger("processing.serving")


class Answer:
    """One response.

    Args:
        front ([`Front`]).
        send: sends an event.
    """

    def __init__(self, front: Front, send: Callable[..., Awaitable[None]]):
        self.front, self._send = front, send
        self.id, self.item_id = new_id("resp"), new_id("item")
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    async def run(self, request: Callable[[], Awaitable[dict]]) -> dict[str, Any]:
        """Ask the engine, and pass on its answer. Cancelled, it stops there.

        Args:
            request: makes the request to the engine.

        Returns:
            `dict`: `status`, `status_details` and `usage` of the response.
        """
        begin, status, details, usage = time.monotonic(), "completed", None, None
        place = {"response_id": self.id, "item_id": self.item_id, "output_index": 0, "content_index": 0}
        try:
            await self._send("response.created", response=self.shown("in_progress"))
            async for chunk in chunks_of(self.front, await request()):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    if text := choice["delta"].get("content"):
                        if not self._pieces:
                            self.front.metrics.first_delta_s.observe(time.monotonic() - begin)
                        self._pieces.append(text)
                        await self._send("response.output_text.delta", **place, delta=text)
                    if choice.get("finish_reason") == "length":
                        status, details = "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
        except asyncio.CancelledError:
            status, details = "cancelled", {"type": "cancelled", "reason": "client_cancelled"}
        except ServingError as error:
            status, details = "failed", failure(error)
        except Exception as error:
            logger.exception("A realtime response failed.")
            status = "failed"
            details = failure(ServerError(f"Something unexpected went wrong here: {type(error).__name__}."))
        if self._pieces:
            await self._send("response.output_text.done", **place, text=self.text)
        return {"status": status, "status_details": details, "usage": usage_of(usage)}

    def shown(self, status: str, **fields: Any) -> dict:
        """Return the response in the form of the protocol."""
        about = {"object": "realtime.response", "id": self.id, "status": status, "output_modalities": ["text"]}
        return {**about, "output": [], **fields}

    async def finish(self, item: dict | None, status: str, **fields: Any):
        """Tell that the response is over, and the item that it left, if it said anything."""
        output = [] if item is None else [shown(item, status == "completed")]
        for each in output:
            await self._send("response.output_item.done", response_id=self.id, output_index=0, item=each)
        await self._send("response.done", response=self.shown(status, **fields, output=output))


async def chunks_of(front: Front, body: dict) -> AsyncGenerator[dict, None]:
    """Yield the chunks of the engine's answer to a request.

    Raises:
        ServingError: there is none, or it breaks off.
    """
    engine, begin = front.engine, time.monotonic()
    stream = await engine.open_stream(body)
    if stream.status_code != 200:
        raise EngineRefused(stream.status_code, stream.content)
    rest = b""
    async with aclosing(engine.pieces_of(stream, begin)) as pieces:
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerError(str(chunk["error"].get("message")))
                    yield chunk


def failure(error: ServingError) -> dict:
    """Return an error in the form of a response's details."""
    return {"type": "failed", "error": {"type": error.kind, "code": str(error.status), "message": str(error)}}


def usage_of(usage: dict | None) -> dict | None:
    """Return the engine's usage in the form of the protocol."""
    if usage is None:
        return None
    read, written = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
    return {**counts, "input_token_details": {"cached_tokens": cached}}
