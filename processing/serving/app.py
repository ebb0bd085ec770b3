"""Put the front together: its ASGI app, and the server that runs it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import BadRequest, ServerError, ServingError
from .front import Front
from .middleware import Gate
from .requests import ClientGone
from .routes import Routes

# What nginx writes into its log for a client that has closed the connection; nobody reads it.
CLIENT_CLOSED_REQUEST = 499


def make_app(front: Front) -> Starlette:
    """Return the ASGI app of a front, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(front.ears.close)
        await front.engine.close()

    async def tell(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServingError)
        return error.response()

    async def tell_gone(request: Request, error: Exception) -> Response:
        front.metrics.cancelled.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        wrapped = BadRequest(f"{request.method} {request.url.path}: {error.detail}.")
        wrapped.status = error.status_code
        return wrapped.response()

    async def tell_unexpected(request: Request, error: Exception) -> Response:
        return ServerError(f"Something unexpected went wrong here: {type(error).__name__}.").response()

    routes, get, post = Routes(front), ["GET"], ["POST"]
    gate = Middleware(Gate, front.metrics, api_key=front.settings.api_key, max_requests=front.settings.max_requests)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat_completions, methods=post),
            Route("/v1/audio/transcriptions", routes.transcriptions, methods=post),
            Route("/v1/models", routes.models, methods=get),
            Route("/v1/models/{name:path}", routes.model, methods=get),
            Route("/health", routes.health, methods=get),
            Route("/ready", routes.ready, methods=get),
            Route("/metrics", routes.metrics, methods=get),
        ],
        middleware=[gate],
        exception_handlers={
            ServingError: tell,
            ClientGone: tell_gone,
            ClientDisconnect: tell_gone,
            HTTPException: tell_http,
            Exception: tell_unexpected,
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
        timeout_graceful_shutdown=round(settings.shutdown_s),
        log_level="info",
    )
