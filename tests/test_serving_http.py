"""Whole servers on loopback: the front and a stand-in engine, both as processes, and the `openai` client.

The last tests kill the engine, and end the front.
"""

import base64
import os
import signal
import threading
import time

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")
    pytest.importorskip("openai", reason="needs the extra `serve`")

import httpx
import openai
import soundfile

from modeling_blsp_kd.training.building import LOG_MEL_MAX
from processing import BlspKdSpeechRecognitionPipeline
from processing.speech_features import with_log_mel_max
from tests.helpers.audio_files import encode
from tests.helpers.engine_requests import TINY_WORLD, tiny_world
from tests.helpers.fronts import audio_block
from tests.helpers.prompts import clip
from tests.helpers.servers import START_TIMEOUT_S, start_front, start_stand_in

pytestmark = pytest.mark.long
BOTTLES = (TINY_WORLD / "clips" / "bottles.flac").read_bytes()
WORDS = "victor had three bottles and sold two"
NAME, KEY = "tiny", "secret"
CHAT = [{"role": "user", "content": [{"type": "text", "text": "Repeat the words."}, audio_block(BOTTLES)]}]


def start_engine(folder, *options):
    template = TINY_WORLD / "model" / "chat_template.jinja"
    model = ["--model", TINY_WORLD / "llm", "--chat-template", template, "--seconds-per-token", "0.05"]
    return start_stand_in([*model, *options], folder / "engine.log")


def start(folder, engine):
    log = folder / "front.log"
    return start_front(TINY_WORLD / "model", engine, log, "--served_name", NAME, BLSP_KD_API_KEY=KEY)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The folder of the logs, and the engine that runs."""
    folder = tmp_path_factory.mktemp("servers")
    engine = start_engine(folder, "--enable-prompt-embeds").wait_until_ready()
    yield folder, engine
    engine.kill()


@pytest.fixture(scope="module")
def front(engines):
    front = start(*engines)
    try:
        yield front.wait_until_ready("/ready")
    finally:
        front.kill()


@pytest.fixture(scope="module")
def client(front):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEY, timeout=60, max_retries=0) as client:
        yield client


def ask(client, **options):
    return client.chat.completions.create(model=NAME, messages=CHAT, **{"temperature": 0, **options})


def running_requests(front) -> str:
    metrics = httpx.get(f"{front.url}/metrics", trust_env=False).text
    return next(line for line in metrics.splitlines() if line.startswith("blsp_kd_requests_running"))


def test_openais_client_chats(client):
    answer = ask(client, logprobs=True)
    assert answer.choices[0].message.content == WORDS
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
    times, pieces = [], []
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}):
        times.append(time.monotonic())
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == WORDS and chunk.usage == answer.usage
    # It comes in pieces, 50 ms apart, and not all at the end.
    assert times[-1] - times[0] > 0.05 * (answer.usage.completion_tokens - 2)
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME


def test_openais_client_transcribes(client):
    model, processor = tiny_world()
    expected = BlspKdSpeechRecognitionPipeline(model=model, processor=processor)(BOTTLES, return_timestamps="word")
    create = client.audio.transcriptions.create
    file = ("bottles.flac", BOTTLES)
    assert create(model=NAME, file=file).text == WORDS
    verbose = create(model=NAME, file=file, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert verbose.text == WORDS and verbose.segments[0].text == WORDS
    assert [(word.word, word.start, word.end) for word in verbose.words] == [
        (chunk["text"].strip(), *map(pytest.approx, chunk["timestamp"])) for chunk in expected["chunks"]
    ]
    for form, beginning in (("text", WORDS), ("srt", "1\n00:00:00,"), ("vtt", "WEBVTT\n\n00:00:00.")):
        assert create(model=NAME, file=file, response_format=form).startswith(beginning)


def test_openais_client_is_told_what_is_wrong(client):
    with pytest.raises(openai.BadRequestError, match="is silent"):
        client.audio.transcriptions.create(model=NAME, file=("a.wav", encode(0 * clip(0.5))))
    with pytest.raises(openai.NotFoundError, match="Ask for 'tiny'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "the cat " * 1000}])


@pytest.fixture(scope="module")
def realtime(engines):
    """OpenAI's client of a front whose model streams, which the tiny world's was not trained to do; and its session."""
    folder, engine = engines
    model, processor = tiny_world()
    model.config.streaming = {"chunk_ms": 320}
    processor.feature_extractor = with_log_mel_max(processor.feature_extractor, LOG_MEL_MAX)
    for part in (model, processor):
        part.save_pretrained(folder / "streaming")
    options = ("--served_name", NAME, "--read_ahead_tokens", 2)
    front = start_front(folder / "streaming", engine, folder / "realtime.log", *options, BLSP_KD_API_KEY=KEY)
    try:
        front.wait_until_ready("/ready")
        with openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEY, timeout=60, max_retries=0) as client:
            yield front, client, processor.listen(model, instruction="Repeat the words.", sampling_rate=16_000)
    finally:
        front.kill()


def test_openais_client_streams_speech_and_gets_the_answer_of_a_session(realtime):
    front, client, session = realtime
    samples, _ = soundfile.read(TINY_WORLD / "clips" / "bottles.flac", dtype="int16")
    session.push(samples)
    expected = "".join(session.answer(do_sample=False, max_new_tokens=8))
    audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}
    with client.realtime.connect(model=NAME) as connection:
        connection.session.update(
            session={"type": "realtime", "audio": audio, "temperature": 0, "max_output_tokens": 8}
        )
        content = [{"type": "input_text", "text": "Repeat the words."}]
        connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
        for start in range(0, len(samples), 3200):
            piece = samples[start : start + 3200].tobytes()
            connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
        connection.input_audio_buffer.commit()
        connection.response.create()
        deltas = []
        for event in connection:
            assert event.type != "error", event
            if event.type == "response.output_text.delta":
                deltas.append(event.delta)
            if event.type == "response.done":
                break
    assert "".join(deltas) == event.response.output[0].content[0].text == expected
    assert event.response.usage.output_tokens > 0
    metrics = httpx.get(f"{front.url}/metrics", trust_env=False).text
    assert 'blsp_kd_realtime_read_ahead_total{status="200"}' in metrics
    with pytest.raises(Exception, match="401"), client.with_options(api_key="wrong").realtime.connect(model=NAME):
        pass


def test_a_client_may_leave_a_stream(front, client):
    with ask(client, stream=True) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 10
    while running_requests(front) != "blsp_kd_requests_running 0.0" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running_requests(front) == "blsp_kd_requests_running 0.0"
    assert ask(client).choices[0].message.content == WORDS


def test_a_front_refuses_an_engine_that_does_not_fit(engines):
    folder, _ = engines
    engine = start_engine(folder).wait_until_ready()
    front = start(folder, engine)
    try:
        assert front.process.wait(timeout=START_TIMEOUT_S) == 1
        assert "You must set `--enable-prompt-embeds`" in front.log.read_text().splitlines()[-1]
    finally:
        front.kill()
        engine.kill()


def test_an_engine_may_die_and_come_back(engines, front, client):
    """Requests in work get errors, also streams, and do not hang; afterwards answers are right again."""
    _, engine = engines
    outcomes = []

    def use():
        try:
            outcomes.append("".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)))
        except openai.APIError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    engine.kill()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 4 and all(isinstance(each, openai.APIError) or each == WORDS for each in outcomes)
    assert any(isinstance(each, openai.APIError) for each in outcomes)
    with pytest.raises(openai.InternalServerError, match="cannot be reached"):
        ask(client)
    assert httpx.get(f"{front.url}/ready", trust_env=False).status_code == 503
    engine.start()
    engine.wait_until_ready()
    assert ask(client).choices[0].message.content == WORDS


def test_the_end_lets_running_answers_finish(front, client):
    pieces = []
    for chunk in ask(client, stream=True):
        if not pieces:
            front.process.send_signal(signal.SIGTERM)
        pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces) == WORDS
    assert front.process.wait(timeout=60) in (0, -signal.SIGTERM)
