"""A published repository serves itself: stock `transformers serve` answers the `openai` client as `generate` answers.

One server for the file, in a process that cannot import this package nor reach a network, on loopback.
"""

import base64
import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import soundfile
import torch
from transformers.utils.import_utils import is_serve_available

from processing.publishing.elsewhere import PACKAGES
from processing.publishing.verify import as_hub_cache
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.servers import free_port
from tests.test_hub_loading import REPO_ID

if is_serve_available():
    import openai

START_TIMEOUT_S = 120
MAX_NEW_TOKENS = 8
CONTEXT_LENGTH = 2048
LONGEST_OF_CLIP = 16 + 15  # tokens of a transcript of 0.6 s

# What the `transformers` command does, where neither the package nor any other machine is there.
SERVER = f"""
import sys

PACKAGES = {PACKAGES!r}


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def watch(event, args):
    if event == "socket.connect" or (event == "socket.getaddrinfo" and args[0] != "127.0.0.1"):
        raise OSError(f"no network in this test: {{event}} {{args}}")


sys.meta_path.insert(0, NotInstalled())
sys.addaudithook(watch)
from transformers.cli.transformers import main

main()
"""


# -- the server -------------------------------------------------------------------------------------------------------


class Server:
    """`transformers serve REPO_ID`, from an empty folder and a Hub cache that holds just that repository."""

    def __init__(self, repository, folder):
        self.log_path = folder / "log"
        self.url = f"http://127.0.0.1:{free_port()}"
        hf_home = folder / "hf_home"
        as_hub_cache(repository, hf_home, REPO_ID)
        script = folder / "serve.py"
        script.write_text(SERVER)
        (folder / "empty").mkdir()
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        settings = {"HOME": str(folder), "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", self.url.split(":")[-1]]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", script, "serve", REPO_ID, *options],
                cwd=folder / "empty",
                env={**kept, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"The server did not start (exit code {self.process.poll()}):\n{self.log[-3000:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def model(processor):
    """Small and random; its answers are printable, since pieces of a stream are whole characters."""
    model = make_model(plora=True, text={"max_position_embeddings": CONTEXT_LENGTH})
    texts = processor.tokenizer.batch_decode([[index] for index in range(len(processor.tokenizer))])
    special = set(processor.tokenizer.all_special_ids)
    model.generation_config.suppress_tokens = [
        index for index, text in enumerate(texts) if index in special or not (text.isascii() and text.isprintable())
    ]
    return model


@pytest.fixture(scope="module")
def server(model, processor, tmp_path_factory):
    if not is_serve_available():
        if os.environ.get("CI"):
            pytest.fail("CI tests serving: install this package with its extra `serve`.")
        pytest.skip("needs the extra `serve` (openai, fastapi, uvicorn)")
    folder = tmp_path_factory.mktemp("serve")
    model.save_pretrained(folder / "repository")
    processor.save_pretrained(folder / "repository")
    server = Server(folder / "repository", folder)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as client:
        yield client


def connect(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)


# -- what is asked ----------------------------------------------------------------------------------------------------


def file_of(waveform, format="wav") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SAMPLING_RATE, format=format.upper())
    return buffer.getvalue()


def input_audio(contents: bytes, format="wav") -> dict:
    data = base64.b64encode(contents).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": format}}


def audio(duration_s=0.6, seed=0, format="wav") -> dict:
    return input_audio(file_of(clip(duration_s, seed), format), format)


def user(*content) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def answer_of(model, processor, messages, **options) -> str:
    """The text that `generate` answers here, in a process with the package."""

    def block(content):
        if content["type"] == "input_audio":
            return {"type": "audio", "bytes": base64.b64decode(content["input_audio"]["data"])}
        return content

    conversation = [
        {**message, "content": content if isinstance(content, str) else [block(part) for part in content]}
        for message in messages
        for content in [message["content"]]
    ]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **options}
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True)


def ask(client, messages, **options):
    options = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model=REPO_ID, messages=messages, **options)


def text_of(client, messages, **options) -> str:
    return ask(client, messages, **options).choices[0].message.content


CONVERSATIONS = {
    "wav": [user("repeat the words", audio(format="wav"))],
    "mp3": [user("repeat the words", audio(format="mp3"))],
    "flac": [user("repeat the words", audio(format="flac"))],
    "ogg": [user("repeat the words", audio(format="ogg"))],
    "audio alone": [user(audio(seed=1))],
    "text alone": [{"role": "user", "content": "the red cat ran to the river"}],
    "two audios, one 20 times the other": [user(audio(0.2, seed=2), "and", audio(4.0, seed=3), "repeat the words")],
    "a later turn": [
        {"role": "system", "content": "the words"},
        user("repeat the words", audio(seed=4)),
        {"role": "assistant", "content": "the red cat"},
        user("and the river", audio(0.9, seed=5)),
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "repeat"},
    ],
    "longer than an encoder window": [user("repeat the words", audio(31.5))],
}


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_it_answers_as_generate_does_at_once_and_in_pieces(client, model, processor, messages):
    expected = answer_of(model, processor, messages)
    assert expected
    answer = ask(client, messages)
    assert answer.choices[0].message.content == expected
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "length")
    assert answer.usage.completion_tokens == MAX_NEW_TOKENS
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, messages, stream=True)]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 1


def test_answers_depend_on_the_audio(model, processor):
    """Guards the comparisons above: answers that ignored the audio would be equal, too."""
    answers = {answer_of(model, processor, [user("repeat the words", audio(seed=seed))]) for seed in range(4)}
    assert len(answers) > 1


@pytest.mark.long
def test_requests_at_the_same_time_keep_their_audio(client, model, processor):
    conversations = [[user("repeat the words", audio(0.3 + 0.4 * seed, seed))] for seed in range(4)]
    expected = [answer_of(model, processor, messages) for messages in conversations]
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(lambda messages: text_of(client, messages), conversations)) == expected


@pytest.mark.long
def test_an_answer_ends_at_a_stop_string(client, model, processor):
    """The server passes the processor as `tokenizer`, and stop strings failed on its missing vocabulary."""
    messages = CONVERSATIONS["wav"]
    stop = answer_of(model, processor, messages)[2:4]
    expected = answer_of(model, processor, messages, stop_strings=[stop], tokenizer=processor.tokenizer)
    answer = ask(client, messages, stop=[stop])
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens < MAX_NEW_TOKENS


@pytest.mark.long
def test_the_responses_api_answers_likewise(client, model, processor):
    content = [{"type": "input_text", "text": "repeat the words"}, audio()]
    response = client.responses.create(
        model=REPO_ID,
        input=[{"role": "user", "content": content}],
        max_output_tokens=MAX_NEW_TOKENS,
        temperature=0,
        stream=False,
    )
    assert response.output_text == answer_of(model, processor, CONVERSATIONS["wav"])


@pytest.mark.long
def test_it_is_among_the_models(client):
    assert [model.id for model in client.models.list()] == [REPO_ID]


@pytest.mark.long
def test_a_stream_may_be_left(client, model, processor):
    messages = CONVERSATIONS["wav"]
    with ask(client, messages, stream=True, max_tokens=1000) as stream:
        next(iter(stream))
    assert text_of(client, messages) == answer_of(model, processor, messages)


# -- bad requests -----------------------------------------------------------------------------------------------------


def assert_refused(server, content, reason):
    seen = len(server.log)
    # A connection of its own: the server closes one on which a request failed.
    with connect(server) as client, pytest.raises(openai.InternalServerError):
        ask(client, [user("repeat the words", content)])
    # The stock server tells the reason to its log alone, and only after it answered.
    deadline = time.monotonic() + 10
    while reason not in server.log[seen:] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reason in server.log[seen:]


BAD_CONTENT = {
    "not base64": (
        {"type": "input_audio", "input_audio": {"data": "***", "format": "wav"}},
        "is not valid base64",
    ),
    "no audio file": (input_audio(b"no audio at all"), "cannot be decoded"),
    "an empty file": (input_audio(b""), "cannot be decoded"),
    "cut in its header": (input_audio(file_of(clip(0.6))[:20]), "cannot be decoded"),
    "silence": (input_audio(file_of(np.zeros(SAMPLING_RATE))), "is silent"),
    "shorter than a window": (audio(0.01), "is too short"),
    "longer than the context": (audio(80.0), f"the LLM's context holds {CONTEXT_LENGTH}"),
    "a placeholder in the text": ({"type": "text", "text": "<|audio|>"}, "but 0 audio(s) were given"),
    "an image": (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        "must be of type 'text' or 'audio'",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("content, reason", BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_content_is_an_error_that_the_server_survives(client, server, model, processor, content, reason):
    assert_refused(server, content, reason)
    messages = CONVERSATIONS["text alone"]
    assert text_of(client, messages) == answer_of(model, processor, messages)


@pytest.mark.long
def test_a_stream_tells_its_error(client):
    with pytest.raises(openai.APIError) as raised:
        list(ask(client, [user(audio(80.0))], stream=True))
    assert f"the LLM's context holds {CONTEXT_LENGTH}" in raised.value.body


@pytest.mark.long
@pytest.mark.parametrize("format", ["wav", "flac"])
def test_a_file_is_transcribed(client, server, model, processor, format):
    """The server calls processors with nothing but audio there, as encoder-decoder models take it."""
    turn = [user(processor.transcription_instruction, audio(format=format))]
    expected = answer_of(model, processor, turn, max_new_tokens=LONGEST_OF_CLIP)
    file = (f"clip.{format}", file_of(clip(0.6), format))
    assert client.audio.transcriptions.create(model=REPO_ID, file=file).text == expected
    # The server streams bare text, which the client does not read.
    fields = {"model": REPO_ID, "stream": "true"}
    streamed = httpx.post(f"{server.url}/v1/audio/transcriptions", data=fields, files={"file": file}, timeout=60).text
    pieces = [line.removeprefix("data: ") for line in streamed.split("\n\n")[:-1]]
    assert "".join(pieces) == expected and len(pieces) > 1


@pytest.mark.long
def test_a_file_that_is_no_audio_is_refused_and_the_server_goes_on(client, server, model, processor):
    with connect(server) as other, pytest.raises(openai.InternalServerError):
        other.audio.transcriptions.create(model=REPO_ID, file=("clip.wav", b"no audio"))
    messages = CONVERSATIONS["text alone"]
    assert text_of(client, messages) == answer_of(model, processor, messages)


# What a client might write for the server to read, and why it is not.
FOREIGN = {
    "a path": (lambda path: str(path), "must be a string of base64"),
    "a file URL": (lambda path: path.as_uri(), "must be a string of base64"),
    "an address": (lambda path: "http://127.0.0.1/clip.wav", "must be a string of base64"),
    "a dict": (lambda path: {"path": str(path)}, "must be a string of base64"),
    "numbers": (lambda path: [0.1, 0.2], "must be a string of base64"),
    "a path in a data URL": (lambda path: f"data:audio/wav,{path}", "Expected a data URL"),
}


@pytest.fixture(scope="module")
def private_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("private") / "clip.wav"
    path.write_bytes(file_of(clip(0.6)))
    return path


@pytest.mark.long
@pytest.mark.parametrize("foreign, reason", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_server_reads_no_file_and_no_address_for_its_clients(server, private_path, foreign, reason):
    """A server passes what clients write as `audio_url` on as the `url` of a block, and files named there were read."""
    value = foreign(private_path)
    assert_refused(server, {"type": "audio_url", "audio_url": {"url": value}}, reason)
    assert_refused(server, {"type": "input_audio", "input_audio": {"data": value}}, reason)


@pytest.mark.parametrize("foreign, reason", FOREIGN.values(), ids=FOREIGN.keys())
def test_the_url_of_a_block_names_nothing_to_read(processor, private_path, foreign, reason):
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template([user({"type": "audio", "url": foreign(private_path)})], tokenize=True)


def test_a_name_in_the_letters_of_base64_is_not_read_either(processor, private_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").write_bytes(private_path.read_bytes())
    with pytest.raises(ValueError, match="the audio of 3 bytes cannot be decoded"):
        processor.apply_chat_template([user({"type": "audio", "url": "clip"})], tokenize=True)


def test_the_url_of_a_block_holds_the_audio_itself(processor):
    contents = file_of(clip(0.6))
    data = base64.b64encode(contents).decode()
    wrapped = base64.encodebytes(contents).decode()

    def tokenized(**block):
        conversation = [user("repeat the words", {"type": "audio", **block})]
        return processor.apply_chat_template(conversation, tokenize=True, return_dict=True)

    expected = tokenized(bytes=contents)
    for url in (data, wrapped, f"data:audio/wav;base64,{data}", f"data:;base64,{wrapped}"):
        inputs = tokenized(url=url)
        assert sorted(inputs) == sorted(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected), url[:30]


@pytest.mark.parametrize("text", [[clip(0.1)], [1, 2]])
def test_text_is_text(processor, text):
    """Clips given first, as processors without text take them, ended in `'float' object has no attribute 'count'`.

    One bare waveform is transcribed, see `test_transcription.py`.
    """
    with pytest.raises(TypeError, match="Expected text as a string or a list of strings.*Pass clips as audio="):
        processor(text, sampling_rate=SAMPLING_RATE)
