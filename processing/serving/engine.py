"""The engine behind the front: one HTTP client, whose answers pass through as they come.

Follows the OpenAI API of vLLM. Leaves out: whether engine and model fit together (`engine_check.py`).
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import httpx

from .errors import EngineUnreachable, ServingError, TimedOut, error_event
from .metrics import Metrics

CONNECT_TIMEOUT_S = 5.0
# Refusals that are about the front, not about a client's request.
NOT_OF_THE_CLIENT = (401, 403, 404)
NOT_IMPLEMENTED = 501


class Engine:
    """An engine's API.

    Args:
        url (`str`): address of the API, with its `/v1`.
        api_key (`str`, *optional*).
        timeout_s (`float`): how long the engine may be silent.
        transport: of httpx, for tests.
    """

    def __init__(
        self,
        url: str,
        metrics: Metrics,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.url, self.metrics = url.rstrip("/"), metrics
        self.client = httpx.AsyncClient(
            base_url=f"{self.url}/",
            # Bytes pass unchanged, so they must not be compressed for the front.
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=False,
        )

    async def ask(self, body: dict) -> httpx.Response:
        """Return the whole answer to a chat, of status 200 or a refusal that is the client's to read.

        Raises:
            EngineUnreachable, TimedOut: there is none.
        """
        begin = time.monotonic()
        response = await self._send(body)
        with self._explained():
            try:
                await response.aread()
            finally:
                await response.aclose()
        self.metrics.engine_s.observe(time.monotonic() - begin)
        return response

    async def open_stream(self, body: dict) -> httpx.Response:
        """Return the answer to a chat that is streamed, as `ask` does, but unread; a refusal is read.

        The caller reads it with `pieces_of`, which closes it.
        """
        response = await self._send(body)
        if response.status_code != 200:
            with self._explained():
                await response.aread()
        return response

    async def pieces_of(self, response: httpx.Response, begin: float) -> AsyncGenerator[bytes, None]:
        """Yield a streamed answer as it comes; if it breaks off, the last piece is an event that tells the error.

        Args:
            response: of `open_stream`.
            begin: when that was called, by `time.monotonic`.
        """
        try:
            with self._explained():
                async for piece in response.aiter_bytes():
                    yield piece
        except ServingError as error:
            yield b"\n\n" + error_event(error)
        finally:
            await response.aclose()
            self.metrics.engine_s.observe(time.monotonic() - begin)

    async def models(self) -> list[dict]:
        """Return what the engine tells of its models.

        Raises:
            EngineUnreachable, TimedOut: it does not answer with a list of them.
        """
        with self._explained():
            response = await self.client.get("models")
            if response.status_code != 200:
                raise EngineUnreachable(
                    f"{self.url}/models answers with status {response.status_code}. --engine is the address of an "
                    "OpenAI API, such as http://localhost:8000/v1."
                )
            return response.json()["data"]

    async def is_healthy(self) -> bool:
        """Return whether the engine says so itself."""
        try:
            response = await self.client.get(f"{self.url.removesuffix('/v1')}/health", timeout=CONNECT_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def wait_until_healthy(self, timeout_s: float):
        """Wait for an engine that is still loading its model.

        Raises:
            EngineUnreachable: it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not await self.is_healthy():
            if time.monotonic() > deadline:
                raise EngineUnreachable(
                    f"The engine at {self.url} was not ready within {timeout_s:g} s. Start it, or correct --engine."
                )
            await asyncio.sleep(0.5)

    async def close(self):
        await self.client.aclose()

    async def _send(self, body: dict) -> httpx.Response:
        begin = time.monotonic()
        with self._explained():
            # Not httpx' own `json`, which fails on half of a surrogate pair.
            content, kind = json.dumps(body), {"Content-Type": "application/json"}
            request = self.client.build_request("POST", "chat/completions", content=content, headers=kind)
            response = await self.client.send(request, stream=True)
        self.metrics.engine_first_byte_s.observe(time.monotonic() - begin)
        is_refused = response.status_code == NOT_IMPLEMENTED  # as beam search is for speech
        if (response.status_code >= 500 and not is_refused) or response.status_code in NOT_OF_THE_CLIENT:
            with self._explained():
                text = (await response.aread())[:500].decode(errors="replace")
            await response.aclose()
            raise EngineUnreachable(f"The engine answered with status {response.status_code}: {text}")
        return response

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise TimedOut("The engine did not answer in time.") from error
        except httpx.HTTPError as error:
            raise EngineUnreachable(f"The engine cannot be reached: {type(error).__name__}.") from error
