"""A front under load, with clients that leave, and with an engine that is slow, silent, broken or gone."""

import asyncio
import base64
import io
import json
import os

import pytest
import torch

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")

import httpx

from processing.serving.model_without_llm import load_without_llm
from tests.helpers.audio_files import encode
from tests.helpers.fronts import audio_block, chat_of, error_of, run, running_front
from tests.helpers.models import make_model
from tests.helpers.prompts import clip

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def encoder_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return load_without_llm(folder)[0]


class Script(httpx.AsyncBaseTransport):
    """An engine that does what a test says, and counts what it was asked and what was taken from it unfinished."""

    def __init__(self, answer):
        self.answer, self.bodies, self.num_left, self.health = answer, [], 0, 200

    async def handle_async_request(self, request):
        if request.url.path == "/health":
            return httpx.Response(self.health)
        self.bodies.append(json.loads(await request.aread()))
        try:
            answered = await self.answer()
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        return answered

    def stream(self, *pieces):
        """A streamed answer of pieces, exceptions, and seconds to wait."""
        transport = self

        class Stream(httpx.AsyncByteStream):
            is_finished = False

            async def __aiter__(self):
                for piece in pieces:
                    if isinstance(piece, Exception):
                        raise piece
                    if isinstance(piece, bytes):
                        yield piece
                    else:
                        await asyncio.sleep(piece)
                self.is_finished = True

            async def aclose(self):
                transport.num_left += not self.is_finished

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())


async def completion():
    message = {"role": "assistant", "content": "yes"}
    return httpx.Response(200, json={"choices": [{"index": 0, "message": message, "token_ids": [50]}]})


def spoken(seed=0):
    return chat_of(audio_block(encode(clip(0.5, seed))))


@pytest.fixture
def front(encoder_model, processor):
    def make(answer=completion, **settings):
        engine = Script(answer)
        return engine, running_front(encoder_model, processor, engine, **settings)

    return make


# -- engines ----------------------------------------------------------------------------------------------------------


async def refuses_connections():
    raise httpx.ConnectError("refused")


async def breaks_off():
    raise httpx.RemoteProtocolError("gone")


async def is_silent():
    raise httpx.ReadTimeout("silent")


async def fails():
    return httpx.Response(500, text="out of memory")


async def knows_no_such_model():
    return httpx.Response(404, json={"error": {"message": "The model does not exist."}})


@pytest.mark.parametrize(
    "answer, status, message",
    [
        (refuses_connections, 502, "cannot be reached: ConnectError"),
        (breaks_off, 502, "cannot be reached: RemoteProtocolError"),
        (is_silent, 504, "did not answer in time"),
        (fails, 502, "answered with status 500: out of memory"),
        (knows_no_such_model, 502, "answered with status 404"),
    ],
)
def test_an_engine_that_fails_is_an_error_and_not_an_answer(answer, status, message, front):
    engine, starting = front(answer)

    async def law():
        async with starting as served:
            for body in (spoken(), {**spoken(), "stream": True}, chat_of()):
                error = error_of(await served.client.post(CHAT, json=body))
                assert error["code"] == status and message in error["message"]
            files = {"file": ("a.wav", encode(clip(0.5)))}
            assert error_of(await served.client.post("/v1/audio/transcriptions", files=files))["code"] == status
            engine.answer = completion
            assert (await served.client.post(CHAT, json=spoken())).status_code == 200
            assert served.front.metrics.registry.get_sample_value("blsp_kd_requests_running") == 0

    run(law())


@pytest.mark.parametrize(
    "broken, kind", [(httpx.ReadError("gone"), "engine_error"), (httpx.ReadTimeout("silent"), "timeout_error")]
)
def test_a_stream_that_breaks_off_ends_with_an_error(broken, kind, front):
    engine, starting = front()

    async def answer():
        return engine.stream(b'data: {"choices": []}\n\n', b'data: {"cho', broken)

    engine.answer = answer

    async def law():
        async with starting as served:
            response = await served.client.post(CHAT, json={**spoken(), "stream": True})
            events = [event for event in response.text.split("\n\n") if event]
            assert events[0] == 'data: {"choices": []}' and "[DONE]" not in response.text
            assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == kind

    run(law())


def test_ready_is_what_the_engine_is(front):
    engine, starting = front()

    async def law():
        async with starting as served:
            assert (await served.client.get("/ready")).status_code == 200
            engine.health = 503
            response = await served.client.get("/ready")
            assert (response.status_code, response.text) == (503, "The engine does not answer.")
            assert (await served.client.get("/health")).status_code == 200

    run(law())


# -- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"max_requests": 8}, {"max_waiting": 8}])
def test_every_request_beyond_the_bounds_is_refused_and_every_other_answered(bounds, front):
    engine, starting = front(**{"max_requests": 1000, "max_waiting": 1000, **bounds})

    async def law():
        async with starting as served:
            bodies = [spoken(seed) for seed in range(200)]
            responses = await asyncio.gather(*(served.client.post(CHAT, json=body) for body in bodies))
            statuses = [response.status_code for response in responses]
            assert set(statuses) == {200, 429} and statuses.count(200) == len(engine.bodies) >= 8
            for response in responses:
                if response.status_code == 429:
                    assert error_of(response)["type"] == "rate_limit_error"
                    assert int(response.headers["retry-after"]) >= 1
            assert (await served.client.post(CHAT, json=spoken(1))).status_code == 200
            value = served.front.metrics.registry.get_sample_value
            assert value("blsp_kd_waiting_clips") == value("blsp_kd_requests_running") == 0

    run(law())


def test_clips_that_are_not_heard_in_time(front):
    engine, starting = front(encoder_timeout_s=0.2)

    async def law():
        async with starting as served:
            forward, let_go = served.front.encoder._forward, asyncio.Event()
            loop = asyncio.get_running_loop()

            def slow(features):
                asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result(30)
                return forward(features)

            served.front.encoder._forward = slow
            error = error_of(await served.client.post(CHAT, json=spoken()))
            assert error["code"] == 504 and "not encoded within 0.2 s" in error["message"]
            let_go.set()
            assert engine.bodies == []

    run(law())


def test_an_unexpected_error_is_told_in_the_same_form(front):
    engine, starting = front()

    async def law():
        async with starting as served:
            served.front.request_to_engine = None
            error = error_of(await served.client.post(CHAT, json=chat_of()))
            assert error["code"] == 500 and "TypeError" in error["message"]

    run(law())


# -- clients that leave -----------------------------------------------------------------------------------------------


class Client:
    """One request straight to the app, whose client leaves when `left` is set."""

    def __init__(self, app, body):
        self.left, self.sent, self.has_sent = asyncio.Event(), [], asyncio.Event()
        body = json.dumps(body).encode()
        self.received = iter([{"type": "http.request", "body": body, "more_body": False}])
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("front", 80)}
        scope |= {"client": ("client", 1), "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        self.task = asyncio.ensure_future(app(scope, self.receive, self.send))

    async def receive(self):
        for message in self.received:
            return message
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if message.get("body"):
            self.has_sent.set()


async def eventually(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def test_the_engine_stops_when_the_client_leaves(front):
    """Whether it waits for the whole answer, or reads a stream."""
    engine, starting = front()

    async def slow():
        await asyncio.sleep(60)

    async def endless():
        return engine.stream(b'data: {"choices": []}\n\n', 60.0)

    async def law():
        async with starting as served:
            for answer, body in ((slow, spoken()), (endless, {**spoken(), "stream": True})):
                engine.answer, engine.num_left, engine.bodies = answer, 0, []
                client = Client(served.app, body)
                await eventually(lambda: engine.bodies)
                if answer is endless:
                    await asyncio.wait_for(client.has_sent.wait(), 10)
                client.left.set()
                await asyncio.wait_for(client.task, 10)
                await eventually(lambda: engine.num_left == 1)
            value = served.front.metrics.registry.get_sample_value
            assert value("blsp_kd_requests_running") == 0 and value("blsp_kd_cancelled_requests_total") == 1

    run(law())


def test_a_clip_whose_client_left_is_not_encoded(front):
    engine, starting = front()

    async def law():
        async with starting as served:
            encoder, loop, let_go, batches = served.front.encoder, asyncio.get_running_loop(), asyncio.Event(), []
            forward = encoder._forward

            def held(features):
                batches.append(len(features))
                asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result(30)
                return forward(features)

            encoder._forward = held
            first = Client(served.app, spoken(1))
            await eventually(lambda: batches == [1])
            second = Client(served.app, spoken(2))
            await eventually(lambda: len(encoder._waiting) == 1)
            second.left.set()
            await asyncio.wait_for(second.task, 10)
            await eventually(lambda: encoder._waiting[0].future.cancelled())
            let_go.set()
            await asyncio.wait_for(first.task, 30)
            await asyncio.to_thread(encoder.close)
            assert batches == [1] and len(engine.bodies) == 1

    run(law())


# -- what the engine gets ---------------------------------------------------------------------------------------------


def test_audio_goes_to_partial_lora_and_text_to_the_llm(front):
    engine, starting = front(adapter="speech")

    async def law():
        async with starting as served:
            for body in (spoken(), chat_of()):
                await served.client.post(CHAT, json=body)
            assert [body["model"] for body in engine.bodies] == ["speech", "llm"]

    run(law())


def test_a_placeholder_within_the_vocabulary_is_never_generated_after_audio(front, encoder_model, monkeypatch):
    """As in `generate`: it would need a clip in the next turn."""
    monkeypatch.setattr(encoder_model.config, "audio_token_id", 299)
    engine, starting = front()

    async def law():
        async with starting as served:
            for body in (spoken(), chat_of()):
                await served.client.post(CHAT, json={**body, "logit_bias": {"7": 1}})
            assert [body["logit_bias"] for body in engine.bodies] == [{"7": 1, "299": -100}, {"7": 1}]

    run(law())


def test_vectors_are_sent_in_the_dtype_of_choice(front):
    async def law():
        sent = {}
        for dtype in ("float32", "bfloat16"):
            engine, starting = front(speech_dtype=dtype)
            async with starting as served:
                await served.client.post(CHAT, json=spoken())
                [message] = engine.bodies[0]["messages"]
                data = base64.b64decode(message["content"][1]["data"])
                sent[dtype] = torch.load(io.BytesIO(data), weights_only=True)
        assert sent["bfloat16"].dtype == torch.bfloat16 and sent["float32"].dtype == torch.float32
        assert torch.equal(sent["bfloat16"], sent["float32"].bfloat16())

    run(law())
