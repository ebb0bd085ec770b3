"""Evaluation with the answers of a server: what it is asked, and the same predictions as with the model here."""

import base64
import json
from functools import partial

import httpx
import pytest

from processing.evaluation import served_answers
from processing.evaluation.served_answers import ServedAnswers
from processing.evaluation.systems import Systems
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip

URL = "http://server/v1"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def rows():
    return [
        {
            "id": str(index),
            "audio": {"array": clip(0.5 + 0.4 * index, seed=index), "sampling_rate": SAMPLING_RATE},
            "text": text,
            "instruction": "repeat the words",
            "answer": "cat",
        }
        for index, text in enumerate(["the red cat", "ran to the river", "cat"])
    ]


@pytest.fixture
def serve(monkeypatch):
    """Let a function from the bodies of chat requests to responses be the server at `URL`."""

    def start(answer, models=("mine",)):
        def handle(request):
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": name} for name in models]})
            assert request.url.path == "/v1/chat/completions"
            return answer(json.loads(request.content))

        transport = httpx.MockTransport(handle)
        monkeypatch.setattr(served_answers.httpx, "Client", partial(httpx.Client, transport=transport))

    return start


def said(text):
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def test_predictions_are_those_of_the_model_here(model, processor, rows, serve):
    """The server is the model itself, which decodes what it is sent, as a front does."""
    seen = []

    def block(part):
        if part["type"] != "input_audio":
            return part
        return {"type": "audio", "bytes": base64.b64decode(part["input_audio"]["data"])}

    def answer(body):
        seen.append(body)
        chat = [{**message, "content": list(map(block, message["content"]))} for message in body["messages"]]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        output = model.generate(**inputs, max_new_tokens=body["max_tokens"], do_sample=body["temperature"] > 0)
        return said(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    serve(answer)
    options = {"tasks": ("answers", "transcripts"), "max_new_tokens": 6}
    here = Systems(model, processor, **options)
    there = Systems(None, processor, answers=ServedAnswers(URL, SAMPLING_RATE), **options)
    for system in ("text", "speech", "blind"):
        assert there.predict(system, rows) == here.predict(system, rows)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in seen} == {("mine", 0, 6)}


def test_options_of_the_chat_template_go_along(serve):
    serve(lambda body: said(json.dumps(body["chat_template_kwargs"])))
    answers = ServedAnswers(URL + "/", SAMPLING_RATE, {"enable_thinking": False})
    assert answers([[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]], 4) == [
        '{"enable_thinking": false}'
    ]


def test_a_full_queue_is_waited_for(serve, monkeypatch):
    full = [httpx.Response(429, headers={"Retry-After": "2"}), httpx.Response(429)]
    waited = []
    monkeypatch.setattr(served_answers.time, "sleep", waited.append)
    serve(lambda body: full.pop() if full else said(" yes "))
    answers = ServedAnswers(URL, SAMPLING_RATE)
    assert answers([[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]], 4) == ["yes"]
    assert waited == [1.0, 2.0]


def test_a_server_that_refuses_is_named_with_its_reason(serve):
    serve(lambda body: httpx.Response(400, json={"error": {"message": "too long"}}))
    with pytest.raises(ValueError, match="http://server/v1 answered with status 400: .*too long"):
        ServedAnswers(URL, SAMPLING_RATE)([[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]], 4)
    serve(said, models=())
    with pytest.raises(ValueError, match="serves no model"):
        ServedAnswers(URL, SAMPLING_RATE)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"The server at http://127.0.0.1:9/v1 does not answer \(ConnectError"):
        ServedAnswers("http://127.0.0.1:9/v1", SAMPLING_RATE)
