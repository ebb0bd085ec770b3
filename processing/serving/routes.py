"""The routes: chats, transcriptions, models, health and metrics.

Leaves out: what holds for all requests (`middleware.py`), and how they are put together (`app.py`).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from .errors import BadRequest, TimedOut
from .front import Front
from .protocol import ChatRequest, TranscriptionRequest
from .requests import ROOM_FOR_OTHER_FIELDS, read_body, replayed, until_gone
from .speech_parts import budget_of, read_messages
from .transcript_forms import needs_words, write
from .transcription import Transcriber


class Routes:
    """The endpoints of one front."""

    def __init__(self, front: Front):
        self.front, self.transcriber = front, Transcriber(front)
        self.since = int(time.time())
        settings = front.settings
        # Base64 makes four characters of three bytes, and JSON up to six bytes of a character.
        self.max_chat_bytes = 4 * settings.max_audio_bytes // 3 + 6 * settings.max_text_chars + ROOM_FOR_OTHER_FIELDS
        self.max_form_bytes = settings.max_audio_bytes + ROOM_FOR_OTHER_FIELDS

    async def chat_completions(self, request: Request) -> Response:
        chat = ChatRequest.read(await read_body(request, self.max_chat_bytes))
        self.front.check_model(chat.model)
        return await until_gone(request, self._answer(chat))

    async def _answer(self, chat: ChatRequest) -> Response:
        front = self.front
        try:
            async with asyncio.timeout(front.settings.encoder_timeout_s):  # it may fetch audio
                read = await asyncio.to_thread(
                    read_messages, chat.messages, front.settings, front.processor.audio_token
                )
        except TimeoutError as error:
            raise TimedOut("The audio was not read in time.") from error
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error), "messages") from error
        body = front.request_to_engine(chat.body, read.messages, await front.encode(read.clips))
        if not chat.stream:
            response = await front.engine.ask(body)
        else:
            begin = time.monotonic()
            response = await front.engine.open_stream(body)
            if response.status_code == 200:
                pieces = front.engine.pieces_of(response, begin)
                first = await anext(pieces, b"")
                return StreamingResponse(_chained(first, pieces), media_type="text/event-stream")
        return Response(response.content, response.status_code, media_type="application/json")

    async def transcriptions(self, request: Request) -> Response:
        body = await read_body(request, self.max_form_bytes)
        try:
            form = await replayed(request, body).form(max_files=1, max_fields=50)
        except HTTPException as error:  # of Starlette: the form is broken
            raise BadRequest(f"The form cannot be read: {error.detail}") from error
        asked = TranscriptionRequest.read(form)
        self.front.check_model(asked.model)
        return await until_gone(request, self._transcribe(asked))

    async def _transcribe(self, asked: TranscriptionRequest) -> Response:
        budget = budget_of(self.front.settings)
        try:
            # In a thread, because the duration of some files is that of all their packets.
            contents = await asyncio.to_thread(budget.read, await asked.file.read())
        except ValueError as error:
            raise BadRequest(str(error), "file") from error
        transcript = await self.transcriber.transcribe(contents, asked.temperature, needs_words(asked))
        return write(transcript, asked, budget.duration_s)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self.front.check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.front.name, "object": "model", "created": self.since, "owned_by": "blsp-kd"}
        return {**card, "max_model_len": self.front.facts.max_model_len}

    async def health(self, request: Request) -> Response:
        """Answer as long as this process does."""
        return PlainTextResponse("OK")

    async def ready(self, request: Request) -> Response:
        """Answer with 200 if a request would be answered, with 503 otherwise."""
        is_ready = self.front.encoder.is_open and await self.front.engine.is_healthy()
        return PlainTextResponse("OK" if is_ready else "The engine does not answer.", 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.front.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _chained(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece
