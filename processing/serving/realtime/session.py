"""One session: what is done about each event of a client.

While one speaks, the engine reads the turn so far again and again, for one token each, so that its prefix cache holds
all but the last positions when the turn ends. Leaves out: the WebSocket (`connection.py`), the fields of events
(`events.py`), and what is made of samples (`live_speech.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from ..errors import BadRequest, ServingError
from ..front import Front
from .answer import Answer
from .conversation import STREAMED, Conversation, new_id, shown
from .events import SessionOptions
from .live_speech import LiveSpeech
from .transcript import transcribe


class Session:
    """A conversation, the speech of its current turn, and the answer that is running.

    Args:
        front ([`Front`]).
        send: sends an event.
        thread: encodes.

    Raises:
        ValueError: the model reads whole clips.
    """

    def __init__(self, front: Front, send: Callable[..., Awaitable[None]], thread: Executor):
        self.front, self._send, self._thread = front, send, thread
        self.options = SessionOptions(model=front.name)
        self.conversation = Conversation(front)
        self._answering: asyncio.Task | None = None
        self._reading_ahead: asyncio.Task | None = None
        self._transcribing: set[asyncio.Task] = set()
        self._earlier_s = 0.0  # of audio, in turns that are over
        self._begin_turn()
        self._handlers: dict[str, Callable[[Any], Awaitable[None]]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.delete": self._delete_item,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    @property
    def is_answering(self) -> bool:
        return self._answering is not None and not self._answering.done()

    def shown(self) -> dict:
        """Return the session in the form of the protocol."""
        return {"object": "realtime.session", **self.options.model_dump()}

    async def handle(self, event: Any):
        """Do what an event asks for.

        Raises:
            ServingError, TypeError, ValueError: that cannot be done. The session goes on.
        """
        await self._handlers[event.type](event)

    def stop(self):
        """Stop what is running, because the client has gone."""
        for task in (self._answering, self._reading_ahead, *self._transcribing):
            if task is not None:
                task.cancel()

    async def _update(self, event: Any):
        options = self.options.updated(event.session)
        transcription = options.audio.input.transcription
        for name in (options.model, transcription and transcription.model):
            self.front.check_model(name)
        self.conversation.check_texts(options.instructions)
        if options.audio != self.options.audio:
            if self._speech.duration_s > 0:
                raise BadRequest("audio cannot change while the buffer holds some. Commit or clear it first.", "audio")
            self.options = options
            self._begin_turn()
        self.options = options
        await self._send("session.updated", session=self.shown())

    async def _create_item(self, event: Any):
        texts = [part.text for part in event.item.content]
        self.conversation.check_texts(self.options.instructions, *texts)
        previous = self.conversation.last_id
        await self._tell(self.conversation.add_text(event.item.role, texts, event.item.id), previous)

    async def _delete_item(self, event: Any):
        self.conversation.delete(event.item_id)
        await self._send("conversation.item.deleted", item_id=event.item_id)

    async def _tell(self, item: dict, previous: str | None, is_complete: bool = True):
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self._send(kind, previous_item_id=previous, item=shown(item, is_complete))

    # -- speech -------------------------------------------------------------------------------------------------------

    def _begin_turn(self):
        rate = self.options.audio.input.format.rate
        self._speech = LiveSpeech(self.front.encoder.model, self.front.processor, rate, self.options.rule)
        self._item_id = new_id("item")  # that the turn will have
        self._num_read = 0  # speech tokens of the turn that the engine has read

    def _end_turn(self):
        self._earlier_s += self._speech.duration_s
        self._begin_turn()

    @property
    def _now_ms(self) -> int:
        """Return how much audio the session has had."""
        return round(1000 * (self._earlier_s + self._speech.duration_s))

    async def _append(self, event: Any):
        speech, detection = self._speech, self.options.audio.input.turn_detection
        had_begun, max_s = speech.num_tokens > 0, self.front.settings.max_duration_s
        await self._encode(speech.push, event.samples())
        if speech.duration_s > max_s:
            self._end_turn()
            if speech.num_tokens:  # else there was nothing but silence
                raise BadRequest(f"A turn may last {max_s:g} s, so the buffer is cleared. Commit it earlier.")
            return
        if detection is not None and speech.num_tokens and not had_begun:
            await self._send("input_audio_buffer.speech_started", item_id=self._item_id, audio_start_ms=self._now_ms)
            if detection.interrupt_response:
                await self._stop_response()
        if detection is None or not speech.has_ended:
            self._read_ahead()
            return
        await self._send("input_audio_buffer.speech_stopped", item_id=self._item_id, audio_end_ms=self._now_ms)
        await self._commit()
        if detection.create_response and not self.is_answering:
            await self._create_response()

    async def _commit(self, event: Any = None):
        speech_tokens = await self._encode(self._speech.finish)
        previous = self.conversation.last_id
        item = self.conversation.add_speech(self._item_id, speech_tokens)
        self._end_turn()
        await self._send("input_audio_buffer.committed", previous_item_id=previous, item_id=item["id"])
        await self._tell(item, previous)
        if self.options.audio.input.transcription is not None:
            request = self.conversation.transcript_request(item["id"])
            task = asyncio.create_task(transcribe(self.front, self._send, item["id"], request))
            self._transcribing.add(task)
            task.add_done_callback(self._transcribing.discard)

    async def _clear(self, event: Any):
        self._end_turn()
        await self._send("input_audio_buffer.cleared")

    async def _encode(self, function: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _read_ahead(self):
        """Have the engine read the turn so far, unless it reads or answers already, or there is little new."""
        num_new = self._speech.num_tokens - self._num_read
        is_reading = self._reading_ahead is not None and not self._reading_ahead.done()
        if is_reading or self.is_answering or num_new < self.front.settings.read_ahead_tokens:
            return
        self._num_read = self._speech.num_tokens
        body = {"max_tokens": 1, "temperature": 0}
        request = self.conversation.request(body, self.options.instructions, self._speech.speech_tokens)
        self._reading_ahead = asyncio.create_task(self._ask(request))

    async def _ask(self, request: dict):
        # What is wrong with the engine the answer will tell. Only its time depends on this.
        try:
            status = (await self.front.engine.ask(request)).status_code
        except ServingError as error:
            status = error.status
        self.front.metrics.read_ahead.labels(status).inc()

    # -- answers ------------------------------------------------------------------------------------------------------

    async def _create_response(self, event: Any = None):
        if self.is_answering:
            raise BadRequest("A response is running. Cancel it, or wait for response.done.")
        given = {} if event is None else event.response.model_dump(exclude_none=True)
        options = self.options.updated(given)
        self.conversation.check_texts(options.instructions)
        body = dict(STREAMED)
        if isinstance(options.max_output_tokens, int):
            body["max_tokens"] = options.max_output_tokens
        if options.temperature is not None:
            body["temperature"] = options.temperature
        request = self.conversation.request(body, options.instructions)
        self._answering = asyncio.create_task(self._respond(request))

    async def _respond(self, request: dict):
        async def after_reading() -> dict:
            if self._reading_ahead is not None:
                await asyncio.wait([self._reading_ahead])  # the engine would read the same twice
            return request

        answer = Answer(self.front, self._send)
        found = await answer.run(after_reading)
        item = None
        if answer.text or found["status"] == "completed":  # what was said stays, as far as it was
            previous = self.conversation.last_id
            item = self.conversation.add_text("assistant", [answer.text], answer.item_id)
            await self._tell(item, previous, found["status"] == "completed")
        await answer.finish(item, **found)

    async def _cancel_response(self, event: Any):
        if not self.is_answering:
            raise BadRequest("No response is running.")
        await self._stop_response()

    async def _stop_response(self):
        if self._answering is not None and self.is_answering:
            self._answering.cancel()
            await asyncio.wait([self._answering])
