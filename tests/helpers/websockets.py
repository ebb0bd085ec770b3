"""A client of a WebSocket in the process of its ASGI app, without a server: what a test sends and gets are events."""

import asyncio
import json
from contextlib import asynccontextmanager

TIMEOUT_S = 60


class Refused(Exception):
    """The app did not accept the connection."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"{status}: {body!r}")
        self.status, self.error = status, json.loads(body)["error"]


class Client:
    """Events of a connection; `received` has all of them."""

    def __init__(self):
        self.to_app, self.from_app = asyncio.Queue(), asyncio.Queue()
        self.received: list[dict] = []

    def send(self, kind: str, **fields):
        self.send_text(json.dumps({"type": kind, **fields}))

    def send_text(self, text: str):
        self.to_app.put_nowait({"type": "websocket.receive", "text": text})

    async def message(self) -> dict:
        return await asyncio.wait_for(self.from_app.get(), TIMEOUT_S)

    async def next(self) -> dict:
        """Return the next event, or what closed the connection."""
        message = await self.message()
        event = json.loads(message["text"]) if message["type"] == "websocket.send" else message
        self.received.append(event)
        return event

    async def until(self, *kinds: str) -> dict:
        """Return the next event of one of these types."""
        while (event := await self.next())["type"] not in kinds:
            assert event["type"] not in ("error", "websocket.close"), event
        return event


@asynccontextmanager
async def connected(app, path: str, headers: dict | None = None):
    """Connect, and leave at the end.

    Raises:
        Refused: the app answers with an HTTP response.
    """
    client = Client()
    path, _, query = path.partition("?")
    scope = {"type": "websocket", "path": path, "query_string": query.encode(), "subprotocols": [], "app": app}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope["extensions"] = {"websocket.http.response": {}}
    client.to_app.put_nowait({"type": "websocket.connect"})
    task = asyncio.ensure_future(app(scope, client.to_app.get, client.from_app.put))
    try:
        first = await client.message()
        if first["type"] == "websocket.http.response.start":
            raise Refused(first["status"], (await client.message())["body"])
        assert first["type"] == "websocket.accept"
        yield client
        client.to_app.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await asyncio.wait_for(task, TIMEOUT_S)
    finally:
        task.cancel()
