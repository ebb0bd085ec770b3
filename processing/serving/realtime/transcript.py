"""A transcript of a turn, if a client asks for one: the LLM repeats what was said, as for `/v1/audio/transcriptions`.

Leaves out: words with their times.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import ServingError
from ..front import Front
from .answer import chunks_of, failure, usage_of

EVENT = "conversation.item.input_audio_transcription"


async def transcribe(front: Front, send: Callable[..., Awaitable[None]], item_id: str, request: dict):
    """Send the transcript of an item as it comes.

    Args:
        send: sends an event.
        request: to the engine, which asks for it.
    """
    place: dict[str, Any] = {"item_id": item_id, "content_index": 0}
    pieces: list[str] = []
    usage = None
    try:
        async for chunk in chunks_of(front, request):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                if text := choice["delta"].get("content"):
                    pieces.append(text)
                    await send(f"{EVENT}.delta", **place, delta=text)
    except ServingError as error:
        await send(f"{EVENT}.failed", **place, error=failure(error)["error"])
    else:
        counts = {"type": "tokens", **(usage_of(usage) or {})}
        await send(f"{EVENT}.completed", **place, transcript="".join(pieces), usage=counts)
