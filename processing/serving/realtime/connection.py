"""One WebSocket: events in and out, errors as events, and the time that a session may last.

Leaves out: what is done about an event (`session.py`).
"""

import asyncio
import json
import uuid
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect
from transformers.utils import logging

from ..errors import BadRequest, ServerError, ServingError, TimedOut
from .events import read_event
from .session import Session

logger = logging.get_logger("processing.serving")

# Of an event, as JSON. The server closes connections that send more.
MAX_EVENT_BYTES = 2**22
SUBPROTOCOL = "realtime"  # that OpenAI's clients in browsers ask for
# Of RFC 6455.
POLICY_VIOLATION, INTERNAL_ERROR = 1008, 1011


class Connection:
    """A client's connection.

    Args:
        idle_s (`float`): how long the client may be silent while no answer runs.
        max_s (`float`): how long a session may last.
    """

    def __init__(self, socket: WebSocket, idle_s: float, max_s: float):
        self.socket, self.idle_s, self.max_s = socket, idle_s, max_s
        self._sending = asyncio.Lock()
        self._is_open = True

    async def run(self, session: Session):
        """Pass on events until the client goes away, or its time is over."""
        wanted = self.socket.scope.get("subprotocols", [])
        await self.socket.accept(SUBPROTOCOL if SUBPROTOCOL in wanted else None)
        try:
            async with asyncio.timeout(self.max_s):
                await self.send("session.created", session=session.shown())
                while self._is_open and (message := await self._receive(session)) is not None:
                    await self._handle(session, message.get("text"))
        except TimeoutError:
            reason = f"Nothing came for {self.idle_s:g} s, or the session lasted for {self.max_s:g} s."
            await self._send_error(TimedOut(f"{reason} Connect again."))
            await self._close(POLICY_VIOLATION)
        finally:
            self._is_open = False

    async def send(self, kind: str, **fields: Any):
        """Send an event; nothing, if the client has gone."""
        text = json.dumps({"type": kind, "event_id": f"event_{uuid.uuid4().hex[:20]}", **fields})
        async with self._sending:
            if self._is_open:
                try:
                    await self.socket.send_text(text)
                except (WebSocketDisconnect, RuntimeError):
                    self._is_open = False

    async def _receive(self, session: Session) -> Any:
        """Return the next message; None if the client has gone."""
        while True:
            try:
                async with asyncio.timeout(self.idle_s):
                    message = await self.socket.receive()
            except TimeoutError:
                if session.is_answering:
                    continue
                raise
            return None if message["type"] == "websocket.disconnect" else message

    async def _handle(self, session: Session, text: str | None):
        event_id = None
        try:
            if text is not None and len(text) > MAX_EVENT_BYTES:
                raise BadRequest(f"An event may hold {MAX_EVENT_BYTES} characters. Append audio in pieces.")
            event = read_event(text)
            event_id = event.event_id
            await session.handle(event)
        except ServingError as error:
            await self._send_error(error, event_id)
        except (TypeError, ValueError) as error:  # of samples and texts
            await self._send_error(BadRequest(str(error)), event_id)
        except Exception as error:
            logger.exception("A realtime session failed.")
            await self._send_error(ServerError(f"Something unexpected went wrong here: {type(error).__name__}."))
            await self._close(INTERNAL_ERROR)

    async def _send_error(self, error: ServingError, event_id: str | None = None):
        fields = {"type": error.kind, "code": str(error.status), "message": str(error), "param": error.param}
        await self.send("error", error={**fields, "event_id": event_id})

    async def _close(self, code: int):
        self._is_open = False
        with suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
            await self.socket.close(code)
