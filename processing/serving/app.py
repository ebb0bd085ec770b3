"""Put the front together: its ASGI app, and the server that runs it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from .errors import BadRequest, ServerError, ServingError
from .front import Front
from .middleware import Gate
from .realtime.connection import MAX_EVENT_BYTES
from .realtime.sessions import Realtime
from .requests import ClientGone
from .routes import Routes

# What nginx writes into its log for a client that has closed the connection; nobody reads it.
CLIENT_CLOSED_REQUEST = 499


def make_app(front: Front) -> Starlette:
    """Return the ASGI app of a front, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        realtime.close()
        await asyncio.to_thread(front.encoder.close)
        await front.engine.close()

    async def answer_error(request: Request, error: Exception) -> Response:
        return cast(ServingError, error).response()

    async def answer_gone_client(request: Request, error: Exception) -> Response:
        front.metrics.cancelled.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def answer_http_error(request: Request, error: Exception) -> Response:
        http = cast(HTTPException, error)
        wrapped = BadRequest(f"{request.method} {request.url.path}: {http.detail}.")
        wrapped.status = http.status_code
        return wrapped.response()

    async def answer_unexpected(request: Request, error: Exception) -> Response:
        return ServerError(f"Something unexpected went wrong here: {type(error).__name__}.").response()

    routes, realtime, get, post = Routes(front), Realtime(front), ["GET"], ["POST"]
    gate = Middleware(Gate, front.metrics, api_key=front.settings.api_key, max_requests=front.settings.max_requests)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat_completions, methods=post),
            Route("/v1/audio/transcriptions", routes.transcriptions, methods=post),
            WebSocketRoute("/v1/realtime", realtime.serve),
            Route("/v1/models", routes.models, methods=get),
            Route("/v1/models/{name:path}", routes.model, methods=get),
            Route("/health", routes.health, methods=get),
            Route("/ready", routes.ready, methods=get),
            Route("/metrics", routes.metrics, methods=get),
        ],
        middleware=[gate],
        exception_handlers={
            ServingError: answer_error,
            ClientGone: answer_gone_client,
            ClientDisconnect: answer_gone_client,
            HTTPException: answer_http_error,
            Exception: answer_unexpected,
        },
        lifespan=lifespan,
    )


def serve(front: Front):
    """Serve until SIGTERM or SIGINT; requests that are being answered are finished first, for `shutdown_s`."""
    settings = front.settings
    uvicorn.run(
        make_app(front),
        host=settings.host,
        port=settings.port,
        ws_max_size=MAX_EVENT_BYTES,
        timeout_graceful_shutdown=round(settings.shutdown_s),
        log_level="info",
    )
