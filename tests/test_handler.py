"""The endpoint handler, called directly and through a web service like that of Inference Endpoints."""

import asyncio
import gc
import io
import itertools
import json
import os
import re
import sys
import threading
from pathlib import Path

import av
import httpx
import pytest
import soundfile
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from transformers import pipeline

import processing.publishing.handler as handler_file
from tests.helpers.audio_files import encode, encode_by_ffmpeg
from tests.helpers.prompts import clip
from tests.helpers.spoken_cases import BAD_FILES, INSTRUCTION, base64_of, make_repository

ROOT = Path(__file__).parents[1]
HANDLER = Path(handler_file.__file__)
CONTENTS = encode(clip(0.5))
BASE64 = base64_of(CONTENTS)
SHORT = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def repository(tmp_path_factory, processor):
    return make_repository(tmp_path_factory.mktemp("endpoint") / "repository", processor)


@pytest.fixture(scope="module")
def handler(repository):
    return handler_file.EndpointHandler(str(repository))


@pytest.fixture(scope="module")
def answer(repository):
    pipe = pipeline("audio-text-to-text", model=str(repository), trust_remote_code=True)
    return pipe(CONTENTS, instruction=INSTRUCTION, **SHORT)


@pytest.fixture(scope="module")
def transcript(repository):
    pipe = pipeline("automatic-speech-recognition", model=str(repository), trust_remote_code=True)
    return pipe(CONTENTS, return_timestamps="word", **SHORT)


# -- a service like the one that runs handlers -------------------------------------------------------------------------

AUDIO_TYPES = ("flac", "x-flac", "mpeg", "x-mpeg-3", "wave", "wav", "x-wav", "ogg", "x-audio", "webm", "m4a", "amr")


def make_service(handler) -> Starlette:
    """As Hugging Face's inference toolkit serves a handler: its routes, content types, query strings and errors.

    A request is answered in a thread, one at a time; every exception becomes status 400 with its message.
    """
    busy = asyncio.Lock()

    def body_of(content_type: str | None, body: bytes) -> dict:
        kind = (content_type or "").split(";")[0].strip().lower()
        if kind == "application/json":
            return json.loads(body)
        if kind.removeprefix("audio/") in AUDIO_TYPES:
            return {"inputs": body}
        raise ValueError(f"Content type {content_type!r} not supported.")

    def from_query(value: str):
        if value.isnumeric():
            return int(value)
        return {"true": True, "false": False}.get(value.lower(), value)

    async def predict(request):
        try:
            data = body_of(request.headers.get("content-type"), await request.body())
            if "inputs" not in data:
                raise ValueError("The body has no 'inputs'.")
            if request.query_params and "parameters" not in data:
                data["parameters"] = {name: from_query(value) for name, value in request.query_params.items()}
            async with busy:
                return JSONResponse(await run_in_threadpool(handler, data))
        except Exception as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def health(request):
        return PlainTextResponse("Ok")

    return Starlette(
        routes=[
            Route("/", health, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/", predict, methods=["POST"]),
            Route("/predict", predict, methods=["POST"]),
        ]
    )


@pytest.fixture(scope="module")
def service(handler):
    server = uvicorn.Server(uvicorn.Config(make_service(handler), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join()


def chat(*blocks) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, *blocks]}]


# -- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["audio/wav", "audio/x-wav", "audio/wave; codecs=1"])
def test_an_audio_body_is_transcribed(service, transcript, kind):
    response = service.post("/", content=CONTENTS, headers={"content-type": kind}, params=SHORT)
    assert (response.status_code, response.json()) == (200, {"text": transcript["text"]})


@pytest.mark.parametrize("format, subtype", [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_audio_of_other_formats(service, format, subtype):
    contents = encode(clip(0.5), format=format, subtype=subtype)
    kind = {"FLAC": "flac", "OGG": "ogg", "MP3": "mpeg"}[format]
    response = service.post("/predict", content=contents, headers={"content-type": f"audio/{kind}"}, params=SHORT)
    assert response.status_code == 200 and response.json()["text"]


@pytest.mark.parametrize("wanted", ["word", "true"])
def test_the_query_string_asks_for_timestamps(service, transcript, wanted):
    params = {**SHORT, "return_timestamps": wanted}
    response = service.post("/", content=CONTENTS, headers={"content-type": "audio/wav"}, params=params)
    assert response.status_code == 200
    assert response.json() == json.loads(json.dumps(transcript))
    assert response.json()["chunks"][0]["timestamp"][1] > 0


TRANSCRIBED = {
    "base64": BASE64,
    "data URL": f"data:audio/wav;base64,{BASE64}",
    "audio": {"audio": BASE64},
    "audio, no instruction": {"audio": BASE64, "instruction": None},
}


@pytest.mark.parametrize("kind", TRANSCRIBED)
def test_json_without_an_instruction_is_transcribed(service, transcript, kind):
    response = service.post("/", json={"inputs": TRANSCRIBED[kind], "parameters": SHORT})
    assert (response.status_code, response.json()) == (200, {"text": transcript["text"]})


ANSWERED = {
    "instruction": ({"audio": BASE64, "instruction": INSTRUCTION}, {}),
    "text": ({"audio": BASE64, "text": INSTRUCTION}, {}),
    "parameter": (BASE64, {"instruction": INSTRUCTION}),
    "audio and parameter": ({"audio": BASE64}, {"instruction": INSTRUCTION}),
    "chat": (chat({"type": "audio", "audio": BASE64}), {}),
    "chat of base64": (chat({"type": "audio", "base64": BASE64}), {}),
    "chat of a data URL": (chat({"type": "audio", "url": f"data:audio/wav;base64,{BASE64}"}), {}),
    "chat of audio_url": (chat({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{BASE64}"}}), {}),
    "chat of data": (chat({"type": "audio", "data": BASE64, "mime_type": "audio/wav"}), {}),
    "chat of input_audio": (chat({"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}), {}),
}


@pytest.mark.parametrize("kind", ANSWERED)
def test_json_with_an_instruction_is_answered(service, answer, kind):
    inputs, parameters = ANSWERED[kind]
    response = service.post("/", json={"inputs": inputs, "parameters": {**SHORT, **parameters}})
    assert (response.status_code, response.json()) == (200, answer)


def test_media_that_the_service_decoded_is_taken_too(handler, answer):
    """Newer versions of the toolkit decode base64 themselves, wherever it stands in a chat."""
    assert handler({"inputs": chat({"type": "audio", "base64": CONTENTS}), "parameters": SHORT}) == answer
    assert handler({"inputs": {"audio": bytearray(CONTENTS), "text": INSTRUCTION}, "parameters": SHORT}) == answer


def test_parameters_reach_generate(handler, transcript):
    shorter = handler({"inputs": CONTENTS, "parameters": {"max_new_tokens": 2}})["text"]
    assert transcript["text"].startswith(shorter) and len(shorter) < len(transcript["text"])
    for nest in ("generate_kwargs", "generation_parameters"):
        assert handler({"inputs": CONTENTS, "parameters": {nest: {"max_new_tokens": 2}}}) == {"text": shorter}
    sampled = {"do_sample": "true", "temperature": "5.5", "top_p": 0.9, "top_k": 50, **SHORT}
    texts = {handler({"inputs": CONTENTS, "parameters": sampled})["text"] for _ in range(4)}
    assert len(texts) > 1


def test_long_audio_in_chunks(service):
    contents = encode(clip(2.5))
    parameters = {"chunk_length_s": 1, "stride_length_s": 0.2, **SHORT, "return_timestamps": "word"}
    response = service.post("/", json={"inputs": base64_of(contents), "parameters": parameters})
    assert response.status_code == 200
    assert response.json()["chunks"][-1]["timestamp"][1] > 1.5


def test_health(service):
    assert service.get("/health").status_code == service.get("/").status_code == 200


def test_requests_at_the_same_time_are_all_answered(service, answer):
    statuses = []

    def ask(inputs):
        statuses.append(service.post("/", json={"inputs": inputs, "parameters": SHORT}).status_code)

    threads = [threading.Thread(target=ask, args=[inputs]) for inputs in (BASE64, "no!", BASE64, None, BASE64, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 3 + [400] * 3
    test_json_with_an_instruction_is_answered(service, answer, "instruction")


# -- what is refused --------------------------------------------------------------------------------------------------

NOT_BASE64 = "is not valid base64: .* Paths and URLs are not opened: send the file itself"
BAD_INPUTS = {
    "None": (None, "A request needs 'inputs': an audio file, base64 of one"),
    "int": (7, "'inputs' must be an audio file, base64 of one, .* got int. One request takes one input"),
    "empty list": ([], "'inputs' must be an audio file, .* got list"),
    "list of audio": ([BASE64, BASE64], "'inputs' must be an audio file, .* got list. One request takes one input"),
    "nested lists": ([[{"role": "user"}]], "'inputs' must be an audio file, .* got list"),
    "empty object": ({}, r"'inputs' needs 'audio', and may have 'instruction' \(or 'text'\), but has \[\]"),
    "unknown field": ({"audio": BASE64, "path": "a.wav"}, r"'inputs' needs 'audio', .* but has \['audio', 'path'\]"),
    "array": ({"array": [0.1], "sampling_rate": 16_000}, "'inputs' needs 'audio'"),
    "audio of type int": ({"audio": 7}, "Audio must be a file's contents or base64 of them, got int"),
    "audio of a dict": ({"audio": {"path": "a.wav"}}, "Audio must be a file's contents or base64 of them, got dict"),
    "instruction of type int": ({"audio": BASE64, "text": 7}, "The parameter 'instruction' must be of type str, got 7"),
    "empty instruction": ({"audio": BASE64, "text": " "}, "'instruction' must be within 1 and 4000 characters"),
    "long instruction": ({"audio": BASE64, "text": "a" * 4001}, "'instruction' must be within 1 and 4000 characters"),
    "instruction twice": ({"audio": BASE64, "text": "a", "instruction": "b"}, "'inputs' has both 'instruction' and"),
    "placeholder": ({"audio": BASE64, "text": "<|audio|>"}, "The instruction holds the audio placeholder"),
    "bad base64": ("not base64!", NOT_BASE64),
    "cut base64": (BASE64[:-3], NOT_BASE64),
    "path": ("clip.wav", NOT_BASE64),
    "absolute path": ("/etc/passwd", NOT_BASE64),
    "path that is base64": ("/proc/self/environ12", "the audio of 15 bytes cannot be decoded"),
    "path traversal": ("../../../etc/passwd", NOT_BASE64),
    "http": ("http://127.0.0.1:9/a.wav", NOT_BASE64),
    "https": ({"audio": "https://example.org/a.wav"}, NOT_BASE64),
    "file URL": ("file:///etc/passwd", NOT_BASE64),
    "ftp": ("ftp://example.org/a.wav", NOT_BASE64),
    "data URL of text": ("data:text/plain,hello world", NOT_BASE64),
    "chat without audio": ([{"role": "user", "content": "hello"}], "The chat holds no audio"),
    "chat of an image": (chat({"type": "image", "url": "http://a/b.png"}), "A block of a message is {'type': 'text'"),
    "chat of a path": (chat({"type": "audio", "path": "/etc/passwd"}), NOT_BASE64),
    "chat of a URL": (chat({"type": "audio", "url": "http://127.0.0.1:9/a.wav"}), NOT_BASE64),
    "two blocks, one file": (chat({"type": "audio", "audio": BASE64}, {"type": "audio"}), "needs one 'audio', base64"),
    "two files, one block": (
        chat({"type": "audio", "audio": BASE64, "path": BASE64}),
        r"holds audio under \['audio', 'path'\]",
    ),
    "block of text": (chat("a.wav"), "A block of a message is {'type': 'text'"),
    "message without content": ([{"role": "user"}], "A message has a 'role' and a 'content'"),
    "message of more": ([{"role": "user", "content": "a", "tool_calls": []}], "A message has a 'role' and a 'content'"),
    "role of type int": ([{"role": 1, "content": "a"}], "A message has a 'role' and a 'content'"),
    "chat placeholder": (
        [*chat({"type": "audio", "audio": BASE64}), {"role": "user", "content": "<|audio|>"}],
        "The content of a message holds the audio placeholder",
    ),
    "wordy chat": (
        [{"role": "user", "content": "the cat " * 4000}, *chat({"type": "audio", "audio": BASE64})],
        r"The request takes \d+ tokens \(text and max_new_tokens\), but at most 4096 are served",
    ),
}


def refused(response, message):
    assert response.status_code == 400
    error = response.json()["error"]
    assert re.search(message, error), error
    assert "passwd:" not in error and "root:" not in error


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_is_refused_and_the_next_request_answered(service, transcript, kind):
    inputs, message = BAD_INPUTS[kind]
    refused(service.post("/", json={"inputs": inputs, "parameters": SHORT}), message)
    test_an_audio_body_is_transcribed(service, transcript, "audio/wav")


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_every_place(service, kind):
    contents, message = BAD_FILES[kind]
    refused(service.post("/", content=contents, headers={"content-type": "audio/wav"}), message)
    refused(service.post("/", json={"inputs": chat({"type": "audio", "audio": base64_of(contents)})}), message)


BAD_PARAMETERS = {
    "unknown": ({"beam_size": 2}, r"Unknown parameter\(s\) \['beam_size'\]. Known are \['instruction'"),
    "remote code": (
        {"model": "a/b", "custom_generate": "a/b"},
        r"Unknown parameter\(s\) \['custom_generate', 'model'\]",
    ),
    "allowed URLs": ({"allowed_url_prefixes": ["http://a/"]}, r"Unknown parameter\(s\) \['allowed_url_prefixes'\]"),
    "nested unknown": ({"generate_kwargs": {"cache": 1}}, r"Unknown parameter\(s\) \['cache'\]"),
    "nested type": ({"generate_kwargs": [1]}, "The parameter 'generate_kwargs' must be an object, got list"),
    "twice": ({"generate_kwargs": {"top_k": 2}, "top_k": 3}, r"\['top_k'\] given twice, within 'generate_kwargs'"),
    "list": ([1], "'parameters' must be an object, got list"),
    "negative": ({"max_new_tokens": -1}, "'max_new_tokens' must be within 1 and 1024, got -1"),
    "huge": ({"max_new_tokens": 10**9}, "'max_new_tokens' must be within 1 and 1024, got 1000000000"),
    "no int": ({"max_new_tokens": 2.5}, "'max_new_tokens' must be of type int, got 2.5"),
    "no number": ({"max_new_tokens": "many"}, "'max_new_tokens' must be of type int, got 'many'"),
    "truth for int": ({"max_new_tokens": True}, "'max_new_tokens' must be of type int, got True"),
    "int for truth": ({"do_sample": 1}, "'do_sample' must be of type bool, got 1"),
    "cold": ({"do_sample": True, "temperature": 0}, r"'temperature' must be within 0\.01 and 10\.0, got 0\.0"),
    "not a number": ({"do_sample": True, "temperature": "nan"}, "'temperature' must be within .* got nan"),
    "useless": ({"temperature": 0.7}, r"\['temperature'\] are for sampling. Add 'do_sample': true"),
    "timestamps": ({"return_timestamps": "char"}, "'return_timestamps' must be one of .* got 'char'"),
    "timestamps of answers": (
        {"instruction": "a", "return_timestamps": "word"},
        r"\['return_timestamps'\] are for transcription: an audio without an instruction",
    ),
    "instruction": ({"instruction": ["a"]}, r"'instruction' must be of type str, got \['a'\]"),
    "margins alone": ({"stride_length_s": 1}, "stride_length_s is of chunks"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_bad_parameters_are_refused(service, kind):
    parameters, message = BAD_PARAMETERS[kind]
    refused(service.post("/", json={"inputs": BASE64, "parameters": parameters}), message)


def test_the_handler_takes_options_as_object_or_json():
    options = {"enable_thinking": False}
    for given in (options, json.dumps(options)):
        assert handler_file.read_parameters({"chat_template_kwargs": given}) == {"chat_template_kwargs": options}
    with pytest.raises(ValueError, match=r"'chat_template_kwargs' must be a JSON object, got 'enable_thinking'"):
        handler_file.read_parameters({"chat_template_kwargs": "enable_thinking"})
    with pytest.raises(TypeError, match=r"'chat_template_kwargs' must be of type dict, got \[1\]"):
        handler_file.read_parameters({"chat_template_kwargs": [1]})
    with pytest.raises(ValueError, match="'chat_template_kwargs' must be within 0 and 1000 characters"):
        handler_file.read_parameters({"chat_template_kwargs": {"a": "b" * 1000}})


def test_an_instruction_is_given_once(handler):
    data = {"inputs": {"audio": BASE64, "text": "a"}, "parameters": {"instruction": "b"}}
    with pytest.raises(ValueError, match="The instruction is given twice, in 'inputs' and in 'parameters'"):
        handler(data)
    with pytest.raises(ValueError, match="A chat holds its instructions itself"):
        handler({"inputs": chat({"type": "audio", "audio": BASE64}), "parameters": {"instruction": "b"}})


@pytest.mark.parametrize("data", [None, [], "inputs", {}, {"parameters": {}}])
def test_a_request_without_inputs_is_refused(handler, data):
    with pytest.raises(ValueError, match="A request needs 'inputs'"):
        handler(data)


def test_the_clips_of_phones_count_together(handler, monkeypatch):
    """The length of files that libsndfile does not read was not counted."""
    block = {"type": "audio", "audio": base64_of(encode_by_ffmpeg(clip(1.0), "webm", "libopus", coded_rate=48_000))}
    monkeypatch.setattr(handler_file, "MAX_DURATION_S", 1.5)
    assert handler({"inputs": chat(block), "parameters": SHORT})["generated_text"]
    with pytest.raises(ValueError, match=r"The audio lasts 2\.0 s, but at most 1\.5 s are served"):
        handler({"inputs": chat(block, block), "parameters": SHORT})


@pytest.mark.parametrize("as_text", [True, False])
def test_a_huge_body_is_refused_before_it_is_decoded(handler, as_text, monkeypatch):
    monkeypatch.setattr(handler_file, "MAX_AUDIO_BYTES", 2 * len(CONTENTS) - 1)
    monkeypatch.setattr(
        sys.modules[handler.audio_budget.__module__], "audio_info", lambda file: pytest.fail("it was read")
    )
    audio = "A" * 8 * len(CONTENTS) if as_text else bytes(2 * len(CONTENTS))
    with pytest.raises(ValueError, match=r"The audio takes more than \d+ bytes, which is the limit"):
        handler({"inputs": audio})


def test_the_clips_of_a_chat_count_together(handler, answer, monkeypatch):
    monkeypatch.setattr(handler_file, "MAX_DURATION_S", 0.9)
    block = {"type": "audio", "audio": BASE64}
    assert handler({"inputs": chat(block), "parameters": SHORT}) == answer
    with pytest.raises(ValueError, match=r"The audio lasts 1\.0 s, but at most 0\.9 s are served"):
        handler({"inputs": chat(block, block), "parameters": SHORT})


def test_no_file_is_opened_for_a_request(handler, monkeypatch):
    """Audio is read from memory alone: whatever a request names, no file of the server is looked at for it."""
    phone, read, looked_at = encode_by_ffmpeg(clip(0.5), "ipod", "aac"), [], []
    open_sound, open_av, is_file = soundfile.SoundFile, av.open, Path.is_file
    monkeypatch.setattr(soundfile, "SoundFile", lambda source: read.append(source) or open_sound(source))
    monkeypatch.setattr(av, "open", lambda source, **options: read.append(source) or open_av(source, **options))
    monkeypatch.setattr(Path, "is_file", lambda path: looked_at.append(path) or is_file(path))
    for contents in (CONTENTS, phone):
        handler({"inputs": base64_of(contents), "parameters": SHORT})
    assert len(read) == 4, "the watch does not see what is read"
    for inputs, _ in BAD_INPUTS.values():
        with pytest.raises((ValueError, TypeError)):
            handler({"inputs": inputs, "parameters": SHORT})
    assert {type(source) for source in read} == {io.BytesIO}
    assert looked_at == []


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_bad_requests_leave_no_memory_behind(handler, answer):
    requests = [{"inputs": inputs} for inputs, _ in BAD_INPUTS.values()]
    requests += [{"inputs": BASE64, "parameters": parameters} for parameters, _ in BAD_PARAMETERS.values()]
    requests += [{"inputs": contents} for contents, _ in BAD_FILES.values()]

    def round_of_errors():
        for request in requests:
            with pytest.raises((ValueError, TypeError)):
                handler(request)

    round_of_errors()
    before = resident_bytes()
    for _ in range(4):
        round_of_errors()
    assert resident_bytes() - before < 8 * 2**20
    assert handler({"inputs": {"audio": BASE64, "text": INSTRUCTION}, "parameters": SHORT}) == answer


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_handler_stands_alone():
    """The service imports it as a top-level module: it has no siblings to import from."""
    text = HANDLER.read_text()
    assert not re.search(
        r"^\s*(from\s+\.|import\s+(processing|modeling_blsp_kd)|from\s+(processing|modeling))", text, re.M
    )


def test_requirements_are_those_of_the_shipped_files(repository):
    """An endpoint's image has older versions of most, so each third-party import must be named, as in setup.cfg."""
    wanted = dict(re.findall(r"^([\w-]+)(>=\S+)$", HANDLER.with_name("requirements.txt").read_text(), re.M))
    packaged = dict(re.findall(r"^    ([\w-]+)(>=\S+)$", (ROOT / "setup.cfg").read_text(), re.M))
    assert wanted == {name: packaged[name] for name in wanted}
    texts = [path.read_text() for path in (*repository.glob("*.py"), HANDLER)]
    imported = set(itertools.chain(*(re.findall(r"^(?:import|from) (\w+)", text, re.M) for text in texts)))
    imported |= {"av"}  # under `try:`
    brought = {"numpy", "huggingface_hub", "packaging"}  # by transformers
    third_party = imported - set(sys.stdlib_module_names) - brought
    assert third_party <= set(wanted), third_party - set(wanted)
