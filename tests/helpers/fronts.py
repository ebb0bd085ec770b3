"""A front and its engine in one process: what tests of serving ask, and how."""

import asyncio
import base64
import dataclasses
from collections.abc import Coroutine
from contextlib import asynccontextmanager

import httpx

from processing.serving.app import make_app
from processing.serving.clip_encoder import ClipEncoder
from processing.serving.engine import Engine
from processing.serving.engine_check import EngineFacts
from processing.serving.front import Front
from processing.serving.metrics import Metrics
from processing.serving.settings import Settings

NAME = "tiny"
ENGINE_URL = "http://engine/v1"


@dataclasses.dataclass
class Running:
    """A front that is asked by `client`; `front` is what its routes share."""

    front: Front
    client: httpx.AsyncClient
    app: object


@asynccontextmanager
async def running_front(encoder_model, processor, engine_app, adapter=None, **settings):
    """A front before an engine's ASGI app (or a transport of httpx), which is not checked."""
    encoder_options = ("max_frames", "max_waiting", "cache_bytes", "num_decoders")
    settings = Settings(**{"engine": ENGINE_URL, "api_key": None, **settings})
    metrics = Metrics()
    transport = engine_app if isinstance(engine_app, httpx.AsyncBaseTransport) else httpx.ASGITransport(engine_app)
    engine = Engine(ENGINE_URL, metrics, settings.engine_api_key, settings.engine_timeout_s, transport)
    options = {name: getattr(settings, name) for name in encoder_options}
    encoder = ClipEncoder(encoder_model, processor, metrics, **options)
    front = Front(NAME, settings, processor, encoder, engine, EngineFacts("llm", adapter, 512), metrics)
    app = make_app(front)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=60) as client:
            yield Running(front, client, app)


def run(coroutine: Coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=100))


def audio_block(contents: bytes) -> dict:
    data = base64.b64encode(contents).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def chat_of(*blocks, text="Repeat the words.") -> dict:
    content = [{"type": "text", "text": text}, *blocks]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0}


def error_of(response: httpx.Response) -> dict:
    """The error in a response, whose form is checked."""
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["code"] == response.status_code >= 400
    return body["error"]
