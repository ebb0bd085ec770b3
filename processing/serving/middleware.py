"""What holds for every request before a route sees it: the key, the number that is answered at once, and the count.

A request counts until the last byte of its answer is sent, streams included. Realtime sessions need the key, too, and
are bounded by `realtime/sessions.py`.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from .errors import Busy, ServingError, Unauthorized
from .metrics import Metrics

PROTECTED = "/v1/"


class Gate:
    """ASGI middleware.

    Args:
        api_key (`str`, *optional*): that requests to `PROTECTED` must have.
        max_requests (`int`): that are answered at once; beyond, they are refused.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_requests: int):
        self.app, self.metrics, self.api_key, self.max_requests = app, metrics, api_key, max_requests
        self.num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] not in ("http", "websocket") or not scope["path"].startswith(PROTECTED):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            try:
                self._check_key(scope)
            except ServingError as error:
                await WebSocket(scope, receive, send).send_denial_response(error.response())
            else:
                await self.app(scope, receive, send)
            return

        async def counting(message: Message):
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(self._route_of(scope), message["status"]).inc()
            await send(message)

        self._hold(1)
        try:
            self._check_key(scope)
            if self.num_running > self.max_requests:
                raise Busy(f"{self.max_requests} requests are being answered, as many as are at once.")
            await self.app(scope, receive, counting)
        except ServingError as error:
            await error.response()(scope, receive, counting)
        finally:
            self._hold(-1)

    def _hold(self, num_requests: int):
        self.num_running += num_requests
        self.metrics.requests_running.set(self.num_running)

    def _check_key(self, scope: Scope):
        if self.api_key is not None:
            given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                raise Unauthorized("The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.")

    @staticmethod
    def _route_of(scope: Scope) -> str:
        # Not the path of a client's own making, of which there may be any number.
        route = scope.get("route")
        return "none" if route is None else route.path
