"""Pipelines name what they refuse, and fetch URLs only where that is allowed."""

import gc
import http.server
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from processing import url_fetching
from tests.helpers.prompts import SAMPLING_RATE
from tests.helpers.spoken_cases import BAD_FILES, base64_of
from tests.pipelines.cases import CONTENTS, DATA_URL, WAVEFORM, chat, clips_of_all_durations, text_of

# -- what is refused --------------------------------------------------------------------------------------------------

AUDIO_BLOCK = {"type": "audio", "audio": (WAVEFORM, SAMPLING_RATE)}
BAD_INPUTS = {
    **BAD_FILES,
    "None": (None, "There is nothing to hear: expected a clip, a chat, or several of them, got None"),
    "empty list": ([], r"There is nothing to hear: .* got \[\]"),
    "int": (7, "shape|Expected audio"),
    "nested lists": ([["a.wav"]], "Expected audio as a path, bytes, dict"),
    "strings array": (np.array(["a", "b"]), "Expected audio as a path, bytes, dict"),
    "missing file": ("nowhere.wav", "Audio file not found: 'nowhere.wav'"),
    "folder": (Path(__file__).parent, "Audio file not found"),
    "bare base64": (base64_of(CONTENTS), r"cannot be an audio file: File name too long"),
    "rate of 0": ((WAVEFORM, 0), "whole number of Hz .* got 0"),
    "negative rate": ((WAVEFORM, -16_000), "whole number of Hz .* got -16000"),
    "rate of text": ({"array": WAVEFORM, "sampling_rate": "16k"}, "whole number of Hz .* got '16k'"),
    "array of 20 channels": (np.full((400, 20), 0.5), r"got an array of shape \(400, 20\)"),
    "dict without audio": (
        {"sampling_rate": 16_000},
        "An audio dict needs 'array', 'raw', 'bytes', 'base64' or 'path'",
    ),
    "bad base64": ({"base64": "no!"}, "is not valid base64"),
    "bad data URL": ("data:audio/wav,abc", "Expected a data URL"),
    "http": ("http://localhost:9/a.wav", r"Fetching 'http://localhost:9/a\.wav' is not allowed.*allowed_url_prefixes"),
    "https in a dict": ({"url": "https://a.org/a.wav"}, "Fetching 'https://a.org/a.wav' is not allowed"),
    "https as a path": ({"path": "https://a.org/a.wav"}, "Audio is read from files, not from URLs"),
    "file URL": (f"file://{__file__}", "Fetching 'file://.*' is not allowed"),
    "ftp": ("ftp://a.org/a.wav", "Fetching 'ftp://a.org/a.wav' is not allowed"),
    "unknown field": ({"audio": CONTENTS, "transcript": "a"}, r"but this one also has \['transcript'\]"),
    "instruction twice": ({"audio": CONTENTS, "text": "a", "instruction": "b"}, "either 'instruction' or 'text'"),
    "placeholder": ({"audio": CONTENTS, "text": "<|audio|>"}, "The instruction holds the audio placeholder"),
    "instruction of bytes": (
        {"audio": CONTENTS, "text": b"a"},
        "The instruction must be a string, got <class 'bytes'>",
    ),
}
BAD_CHATS = {
    "without audio": ([{"role": "user", "content": "hello"}], "The chat holds no audio. Give at least one block"),
    "unknown block": (
        chat({"type": "image", "path": "a.png"}),
        "of type 'text', 'audio', 'audio_url' or 'input_audio', got {'type'",
    ),
    "block without audio": (chat(AUDIO_BLOCK, {"type": "audio"}), r"The audio block {'type': 'audio'} holds no audio"),
    "audio under another name": (
        chat({"type": "audio", "file": "a.wav"}),
        r"The audio block {'type': 'audio', 'file': 'a.wav'} holds no audio\. Write {'type': 'audio', 'audio': clip}",
    ),
    "audio twice": (
        chat({**AUDIO_BLOCK, "url": DATA_URL}),
        r"(?s)The audio block {'type': 'audio', .* holds audio under \['audio', 'url'\]\. Leave one of them",
    ),
    "input_audio without data": (
        chat({"type": "input_audio", "input_audio": {"id": "a"}}),
        "The audio block {'type': 'input_audio', .*} holds no audio",
    ),
    "audio_url that is not allowed": (
        chat({"type": "audio_url", "audio_url": {"url": "https://a.org/a.wav"}}),
        "Fetching 'https://a.org/a.wav' is not allowed",
    ),
    "block of text": (chat("a.wav"), "A block of a message is a dict of type"),
    "content of None": ([{"role": "user", "content": None}], "content of a message is a string or a list of blocks"),
    "message without role": ([*chat(AUDIO_BLOCK), {"content": "a"}], "must have a 'role' and 'content' key"),
    "placeholder": (chat(AUDIO_BLOCK, instruction="<|audio|>"), "The text of a block holds the audio placeholder"),
    "no text": (chat({"type": "text"}), "The text of a block must be a string, got <class 'NoneType'>"),
    "bad file": (chat({"type": "audio", "path": "nowhere.wav"}), "Audio file not found: 'nowhere.wav'"),
    "input_audio of a URL": (chat({"type": "input_audio", "input_audio": {"data": "http://a"}}), "not valid base64"),
}
ERRORS = (ValueError, TypeError, FileNotFoundError)


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_is_refused_and_the_next_clip_answered(both, expected, kind):
    inputs, message = BAD_INPUTS[kind]
    for pipe in both:
        with pytest.raises(ERRORS, match=message):
            pipe(inputs)
        assert text_of(pipe(CONTENTS)) == expected[0]


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_a_bad_chat_is_refused_and_the_next_clip_answered(answers, expected, kind):
    inputs, message = BAD_CHATS[kind]
    with pytest.raises(ERRORS, match=message):
        answers(inputs)
    assert text_of(answers(CONTENTS)) == expected[0]


@pytest.mark.parametrize("kind", ["text", "silence"])
def test_a_bad_file_is_named(answers, tmp_path, kind):
    path = tmp_path / "speech.wav"
    path.write_bytes(BAD_FILES[kind][0])
    with pytest.raises(ValueError, match=r"speech\.wav (cannot be decoded|is silent)"):
        answers(path)


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (2, 0), (2, 1)])
def test_of_many_inputs_the_bad_one_is_named(answers, expected, batch_size, num_workers):
    def clips():
        yield from clips_of_all_durations()[:2]
        yield b"noise"
        yield CONTENTS

    results = answers(clips(), batch_size=batch_size, num_workers=num_workers)
    assert [text_of(result) for result in itertools.islice(results, 2)] == expected[:2]
    with pytest.raises(ValueError, match="Input 2: the audio of 5 bytes cannot be decoded"):
        next(results)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_bad_input_leaves_no_memory_behind(answers):
    def round_of_errors():
        for inputs, _ in [*BAD_INPUTS.values(), *BAD_CHATS.values()]:
            with pytest.raises(ERRORS):
                answers(inputs)
        answers(CONTENTS)

    round_of_errors()
    before = resident_bytes()
    for _ in range(3):
        round_of_errors()
    # The clip that is too long alone takes 38 MB while it is read.
    assert resident_bytes() - before < 8 * 2**20


# -- URLs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web():
    """A server on loopback: `/clips/` is for everybody, `/secret/` is not."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = []

        def do_GET(self):
            self.asked.append(self.path)
            target = {"/clips/moved.wav": "/clips/a.wav", "/clips/out.wav": "/secret/a.wav"}.get(self.path)
            if target:
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
            elif self.path.endswith("a.wav"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(CONTENTS)
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", Handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_are_fetched_where_that_is_allowed(both, expected, web):
    root, _ = web
    allowed = {"allowed_url_prefixes": [f"{root}clips/"]}
    for pipe in both:
        for name in ("a.wav", "moved.wav"):
            assert text_of(pipe(f"{root}clips/{name}", **allowed)) == expected[0]
            assert text_of(pipe({"url": f"{root}clips/{name}"}, **allowed)) == expected[0]
    assert text_of(both[0](chat({"type": "audio", "url": f"{root}clips/a.wav"}), **allowed)) == expected[0]


@pytest.mark.parametrize(
    "name",
    [
        "secret/a.wav",
        "clips/../secret/a.wav",
        "clips/%2e%2e/secret/a.wav",
        "clips/%2E%2E%5Csecret/a.wav",
        "clips/out.wav",
    ],
)
def test_urls_elsewhere_are_not_fetched(answers, web, name):
    root, asked = web
    with pytest.raises(ValueError, match="Fetching '.*' is not allowed"):
        answers(root + name, allowed_url_prefixes=[f"{root}clips/"])
    assert not any("secret" in path for path in asked)


def test_a_url_that_is_not_there_is_an_error(answers, web):
    root, _ = web
    with pytest.raises(ValueError, match=r"clips/none\.mp3' cannot be fetched: HTTP Error 404"):
        answers(f"{root}clips/none.mp3", allowed_url_prefixes=[root])


def test_a_large_file_is_not_fetched_to_its_end(answers, web, monkeypatch):
    root, _ = web
    monkeypatch.setattr(url_fetching, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"a\.wav' holds more than 1000 bytes"):
        answers(f"{root}clips/a.wav", allowed_url_prefixes=[root])


def test_a_slow_server_is_given_up(answers, web, monkeypatch):
    root, _ = web
    monkeypatch.setattr(url_fetching, "TIMEOUT_S", -1.0)
    with pytest.raises(ValueError, match=r"a\.wav' was not fetched within -1 s"):
        answers(f"{root}clips/a.wav", allowed_url_prefixes=[root])


@pytest.mark.parametrize("prefix", ["", "https://", "https://host", "host/", "ftp://host/", "file:///"])
def test_a_prefix_without_a_whole_host_is_refused(answers, prefix):
    """`https://host` would also have allowed `https://host.elsewhere.org`."""
    with pytest.raises(ValueError, match="An allowed URL prefix looks like 'https://host/'"):
        answers("https://host.elsewhere.org/a.wav", allowed_url_prefixes=[prefix])
