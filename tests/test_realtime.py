"""Realtime sessions before a stand-in engine: answers, what the engine reads ahead, refusals, bounds.

`test_serving_http.py` has whole servers, with OpenAI's own client.
"""

import asyncio
import base64
import copy
import io
import json
import os

import httpx
import pytest
import soundfile
import torch
from transformers import AutoTokenizer

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")

from modeling_blsp_kd.training.building import LOG_MEL_MAX
from processing.serving.model_without_llm import load_without_llm
from processing.speech_features import with_log_mel_max
from tests.helpers.engine_requests import TINY_WORLD, tiny_world
from tests.helpers.fronts import NAME, run, running_front
from tests.helpers.stand_in_engine import stand_in_engine
from tests.helpers.websockets import Refused, connected

PATH = f"/v1/realtime?model={NAME}"
STREAMING = {"chunk_ms": 320, "look_ahead_ms": 80}
MAX_TOKENS = 8
RATE = 16_000


@pytest.fixture(scope="module")
def world():
    """The tiny world's model as a streaming one, which it was not trained to be, and its processor."""
    model, processor = tiny_world()
    model.config.streaming = STREAMING
    processor.feature_extractor = with_log_mel_max(processor.feature_extractor, LOG_MEL_MAX)
    return model, processor


@pytest.fixture(scope="module")
def without_llm():
    model = load_without_llm(TINY_WORLD / "model", "float32")[0]
    model.config.streaming = STREAMING
    return model


@pytest.fixture(scope="module")
def engine_app(world):
    model, processor = world
    return stand_in_engine(
        model.language_model, AutoTokenizer.from_pretrained(TINY_WORLD / "llm"), processor.chat_template
    )


@pytest.fixture
def front(world, without_llm, engine_app):
    """Makes fronts."""
    engine_app.state.requests.clear()
    engine_app.state.before_answer = None
    return lambda **settings: running_front(without_llm, world[1], engine_app, **settings)


def samples_of(name: str):
    samples, rate = soundfile.read(TINY_WORLD / "clips" / f"{name}.flac", dtype="int16")
    assert rate == RATE
    return samples


def speak(client, samples, piece=4000):
    for start in range(0, len(samples), piece):
        data = base64.b64encode(samples[start : start + piece].tobytes()).decode()
        client.send("input_audio_buffer.append", audio=data)


def update(client, **session):
    audio = {"input": {"format": {"type": "audio/pcm", "rate": RATE}, **session.pop("audio", {})}}
    client.send(
        "session.update", session={"max_output_tokens": MAX_TOKENS, "temperature": 0, "audio": audio, **session}
    )


def say(client, text, role="user"):
    content = [{"type": "output_text" if role == "assistant" else "input_text", "text": text}]
    client.send("conversation.item.create", item={"type": "message", "role": role, "content": content})


def text_of(response: dict) -> str:
    return response["response"]["output"][0]["content"][0]["text"]


def speech_rows(request: dict) -> list[int]:
    """How many vectors each clip of a request to the engine has."""
    blocks = [block for message in request["messages"] for block in message["content"] if isinstance(block, dict)]
    data = [base64.b64decode(block["data"]) for block in blocks if block["type"] == "prompt_embeds"]
    return [len(torch.load(io.BytesIO(each), weights_only=True)) for each in data]


def test_two_turns_are_answered_as_a_session_in_this_process_does(world, front, engine_app):
    """And while one speaks, the engine reads what has been said, and nothing else."""
    model, processor = world
    session, expected = processor.listen(model, instruction="Repeat the words.", sampling_rate=RATE), []
    for name in ("bottles", "digits"):
        session.push(samples_of(name))
        expected.append("".join(session.answer(do_sample=False, max_new_tokens=MAX_TOKENS)))

    async def law():
        async with front(read_ahead_tokens=3) as served, connected(served.app, PATH) as client:
            assert (await client.next())["session"]["model"] == NAME
            update(client)
            await client.until("session.updated")
            for name, answer in zip(("bottles", "digits"), expected):
                engine_app.state.requests.clear()
                say(client, "Repeat the words.")
                speak(client, samples_of(name))
                client.send("input_audio_buffer.commit")
                item = (await client.until("input_audio_buffer.committed"))["item_id"]
                client.send("response.create")
                done = await client.until("response.done")
                assert done["response"]["status"] in ("completed", "incomplete") and text_of(done) == answer
                deltas = [each["delta"] for each in client.received if each["type"] == "response.output_text.delta"]
                assert "".join(deltas).endswith(answer)
                assert done["response"]["usage"]["output_tokens"] > 0
                ahead, last = engine_app.state.requests[:-1], engine_app.state.requests[-1]
                counts = [speech_rows(request)[-1] for request in ahead]
                assert counts and counts == sorted(set(counts)) and counts[-1] <= speech_rows(last)[-1]
                assert all(each["max_tokens"] == 1 and not each.get("stream") for each in ahead)
                added = [e for e in client.received if e["type"] == "conversation.item.added"]
                assert item in [each["item"]["id"] for each in added]

    run(law())


def test_a_turn_is_transcribed_if_a_client_asks_for_that(world, front):
    model, processor = world
    session = processor.listen(model, instruction=processor.transcription_instruction, sampling_rate=RATE)
    session.push(samples_of("soup"))
    expected = "".join(session.answer(do_sample=False))
    event = "conversation.item.input_audio_transcription"

    async def law():
        async with front() as served, connected(served.app, PATH) as client:
            update(client, audio={"transcription": {"model": NAME}})
            speak(client, samples_of("soup"))
            client.send("input_audio_buffer.commit")
            item = (await client.until("input_audio_buffer.committed"))["item_id"]
            done = await client.until(f"{event}.completed")
            assert done["transcript"] == expected and done["item_id"] == item and done["usage"]["output_tokens"] > 0
            deltas = [each["delta"] for each in client.received if each["type"] == f"{event}.delta"]
            assert len(deltas) > 1 and "".join(deltas) == expected

    run(law())


def test_silence_ends_a_turn_if_a_client_asks_for_that(front):
    silence = samples_of("bottles")[:1] * 0

    async def law():
        async with front() as served, connected(served.app, PATH) as client:
            update(client, audio={"turn_detection": {"type": "server_vad", "silence_duration_ms": 500}})
            say(client, "Repeat the words.")
            speak(client, samples_of("bottles"))
            speak(client, silence.repeat(RATE))
            await client.until("response.done")
            kinds = [event["type"] for event in client.received]
            order = ["speech_started", "speech_stopped", "committed"]
            places = [kinds.index(f"input_audio_buffer.{name}") for name in order]
            assert places == sorted(places) and places[-1] < kinds.index("response.created")
            started, stopped, committed = (client.received[place] for place in places)
            assert started["item_id"] == stopped["item_id"] == committed["item_id"]
            assert (
                0
                < started["audio_start_ms"]
                < stopped["audio_end_ms"]
                < 1000 * samples_of("bottles").size / RATE + 1000
            )

    run(law())


def test_a_cancelled_answer_stays_as_far_as_it_was_said(front, engine_app):
    async def law():
        release = asyncio.Event()

        async def wait(body):
            await release.wait()

        async with front() as served, connected(served.app, PATH) as client:
            update(client)
            say(client, "Repeat the words.\nthe red cat")
            engine_app.state.before_answer = wait
            client.send("response.create")
            await client.until("response.created")
            client.send("response.create")
            assert "is running" in (await client.next())["error"]["message"]
            client.send("response.cancel", event_id="mine")
            done = await client.until("response.done")
            assert done["response"]["status"] == "cancelled" and done["response"]["output"] == []
            client.send("response.cancel", event_id="mine")
            error = (await client.next())["error"]
            assert error["event_id"] == "mine" and "No response" in error["message"]
            release.set()
            engine_app.state.before_answer = None
            client.send("response.create")
            assert (await client.until("response.done"))["response"]["status"] in ("completed", "incomplete")

    run(law())


def test_an_engine_that_fails_ends_the_answer_and_not_the_session(world, without_llm):
    broken = httpx.MockTransport(lambda request: httpx.Response(500, text="out of memory"))

    async def law():
        async with running_front(without_llm, world[1], broken, read_ahead_tokens=1) as served:
            async with connected(served.app, PATH) as client:
                update(client)
                speak(client, samples_of("soup"))
                client.send("input_audio_buffer.commit")
                await client.until("input_audio_buffer.committed")
                for _ in range(2):
                    client.send("response.create")
                    response = (await client.until("response.done"))["response"]
                    assert response["status"] == "failed" and response["output"] == []
                    error = response["status_details"]["error"]
                    assert error["code"] == "502" and "out of memory" in error["message"]
            assert b'realtime_read_ahead_total{status="502"}' in served.front.metrics.render()

    run(law())


def test_a_client_that_leaves_stops_its_answer(front, engine_app):
    async def law():
        stopped = asyncio.Event()

        async def wait(body):
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        async with front() as served:
            async with connected(served.app, PATH) as client:
                say(client, "the red cat")
                engine_app.state.before_answer = wait
                client.send("response.create")
                await client.until("response.created")
                while len(engine_app.state.requests) == 0:
                    await asyncio.sleep(0.01)
            await asyncio.wait_for(stopped.wait(), timeout=10)
            assert b"blsp_kd_realtime_sessions 0.0" in served.front.metrics.render()

    run(law())


def test_what_is_wrong_is_told_in_an_error_event_and_the_session_goes_on(front):
    good = base64.b64encode(samples_of("bottles").tobytes()).decode()
    wrong = [
        ({"type": "input_audio_buffer.append", "audio": "?"}, "no base64"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "16-bit"),
        ({"type": "input_audio_buffer.append"}, "audio"),
        ({"type": "input_audio_buffer.commit"}, "too little speech"),
        ({"type": "response.create"}, "nothing to answer"),
        ({"type": "response.create", "response": {"tools": []}}, "tools"),
        ({"type": "session.update", "session": {"voice": "x"}}, "voice"),
        ({"type": "session.update", "session": {"model": "other"}}, "not served"),
        (
            {"type": "session.update", "session": {"audio": {"input": {"transcription": {"language": "en"}}}}},
            "language",
        ),
        ({"type": "conversation.item.delete", "item_id": "x"}, "no item"),
        ({"type": "conversation.item.create", "item": {"type": "function_call"}}, "item"),
        ({"type": "output_audio_buffer.clear"}, "Unknown type"),
        ([], "JSON object"),
    ]

    async def law():
        async with front(max_duration_s=2.0) as served, connected(served.app, PATH) as client:
            await client.until("session.created")
            for event, message in wrong:
                client.send_text(json.dumps(event))
                told = await client.next()
                assert told["type"] == "error" and message in told["error"]["message"], (event, told)
            client.send_text("{")
            assert "no JSON" in (await client.next())["error"]["message"]
            say(client, "a <|audio|> in a text")
            assert "<|audio|>" in (await client.next())["error"]["message"]
            for _ in range(2):
                client.send("input_audio_buffer.append", audio=good)
            assert "may last 2 s" in (await client.next())["error"]["message"]
            client.send("input_audio_buffer.clear")
            await client.until("input_audio_buffer.cleared")

    run(law())


def test_sessions_are_bounded(front, without_llm, world):
    bare = copy.copy(without_llm)
    bare.config = copy.deepcopy(without_llm.config)
    bare.config.streaming = None

    async def refusal(served, path=PATH, headers=None):
        with pytest.raises(Refused) as refused:
            async with connected(served.app, path, headers):
                pass
        return refused.value.status, refused.value.error["message"]

    async def law():
        async with front(max_sessions=1, session_idle_s=0.2, api_key="key") as served:
            assert (await refusal(served))[0] == 401
            headers = {"authorization": "Bearer key"}
            assert (await refusal(served, "/v1/realtime?model=other", headers))[0] == 404
            async with connected(served.app, PATH, headers) as client:
                assert (await refusal(served, headers=headers))[0] == 429
                await client.until("session.created")
                assert "0.2 s" in (await client.next())["error"]["message"]
                assert (await client.next())["type"] == "websocket.close"
            async with connected(served.app, PATH, headers) as client:
                await client.until("session.created")
        async with front() as served:
            served.front.encoder.model = bare
            status, message = await refusal(served)
            assert status == 400 and "reads whole clips" in message

    run(law())
