"""The front of serving before a stand-in engine: answers, refusals, and what goes on between the two.

`test_serving_encoder.py` has the encoder alone, `test_serving_http.py` whole servers, and `real_engine/` vLLM.
"""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")

import httpx

from processing import BlspKdSpeechRecognitionPipeline
from processing.serving.model_without_llm import load_without_llm
from tests.helpers.audio_files import encode
from tests.helpers.engine_answers import CALLS, STRUCTURED, told, told_in_pieces, who_is_told
from tests.helpers.engine_requests import TINY_WORLD, chats_of_all_kinds, input_audio, prompt_and_answer, tiny_world
from tests.helpers.fronts import NAME, audio_block, chat_of, error_of, run, running_front
from tests.helpers.prompts import clip
from tests.helpers.spoken_cases import BAD_FILES
from tests.helpers.stand_in_engine import stand_in_engine

BOTTLES = (TINY_WORLD / "clips" / "bottles.flac").read_bytes()
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def world():
    return tiny_world()


@pytest.fixture(scope="module")
def encoder_model():
    return load_without_llm(TINY_WORLD / "model", "float32")[0]


@pytest.fixture(scope="module")
def engine_app(world):
    model, processor = world
    tokenizer = AutoTokenizer.from_pretrained(TINY_WORLD / "llm")
    return stand_in_engine(model.language_model, tokenizer, processor.chat_template)


@pytest.fixture
def front(world, encoder_model, engine_app):
    """Makes fronts."""
    engine_app.state.requests.clear()

    def make(engine=engine_app, **settings):
        return running_front(encoder_model, world[1], engine, **settings)

    return make


async def ask(served, body, **changes) -> httpx.Response:
    return await served.client.post("/v1/chat/completions", json={**body, **changes})


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def pieces_of(response) -> list[dict]:
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_and_prompts_equal_those_of_generate(world, front, engine_app):
    """Of text, one clip, several clips, two turns, and a clip first; at once, and streamed."""
    model, processor = world

    async def law():
        async with front() as served:
            for kind, chat in chats_of_all_kinds(5):
                prompt, answer = prompt_and_answer(model, processor, chat, MAX_TOKENS)
                expected = processor.decode(answer, skip_special_tokens=True)
                body = {"model": NAME, "messages": input_audio(chat), "temperature": 0, "max_tokens": MAX_TOKENS}
                response = await ask(served, body, return_token_ids=True)
                assert text_of(response) == expected, kind
                speech = len(processor.tokenizer)  # the id that the engine has for vectors
                got = [0 if token >= speech - 1 else token for token in response.json()["prompt_token_ids"]]
                assert got == prompt, kind
                streamed = pieces_of(await ask(served, body, stream=True))
                assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in streamed) == expected

    run(law())


def test_fields_reach_the_engine_and_its_answer_comes_back_unchanged(front, engine_app):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    fields = {"n": 2, "stop": ["zebra"], "logprobs": True, "top_logprobs": 2, "seed": 7, "temperature": 0.5, "top_k": 3}
    fields |= {"tools": [tool], "tool_choice": "auto", "response_format": {"type": "text"}, "max_tokens": 5}

    async def law():
        async with front() as served:
            response = await ask(served, chat_of(audio_block(BOTTLES)), **fields)
            choices = response.json()["choices"]
            assert len(choices) == 2 and choices[0]["logprobs"]["content"][0]["top_logprobs"]
            usage = response.json()["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            [sent] = engine_app.state.requests
            assert {name: sent[name] for name in fields} == fields
            assert sent["model"] == "llm" and "chat_template_kwargs" not in sent
            # A turn that calls a tool has no content, and its result is a text.
            call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            turns = [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "two"},
            ]
            body = chat_of(audio_block(BOTTLES))
            assert (await ask(served, {**body, "messages": [*body["messages"], *turns]})).status_code == 200
            assert engine_app.state.requests[-1]["messages"][1:] == turns

    run(law())


def test_constrained_answers_and_calls_of_tools_come_back_at_once_and_in_pieces(front):
    """The LLM is told the constraint and what was said: "victor" had the bottles."""
    body = chat_of(audio_block(BOTTLES), text="Name the person.")

    async def law():
        async with front() as served:
            for kind, fields in {**STRUCTURED, **CALLS}.items():
                whole = told((await ask(served, body, **fields)).json())
                options = {"stream": True, "stream_options": {"include_usage": True}}
                assert told_in_pieces(pieces_of(await ask(served, body, **fields, **options))) == whole, kind
                assert who_is_told(whole) == "victor" or kind == "one of some values", (kind, whole)
                assert bool(whole["choices"][0]["calls"]) == (kind in CALLS)

    run(law())


def test_the_engines_refusals_pass(front):
    async def law():
        async with front() as served:
            too_long = await ask(served, chat_of(text="the cat " * 1000))
            assert "maximum context length is 512 tokens" in error_of(too_long)["message"]
            assert error_of(await ask(served, chat_of(), max_tokens=0))["param"] == "max_tokens"
            streamed = await ask(served, chat_of(audio_block(BOTTLES)), temperature=-1, stream=True)
            assert "temperature must be non-negative" in error_of(streamed)["message"]
            searched = error_of(await ask(served, chat_of(audio_block(BOTTLES)), use_beam_search=True))
            assert (searched["code"], searched["message"]) == (501, "Embedding prompt not supported for beam search")
            [turn] = chat_of(audio_block(BOTTLES))["messages"]
            marked = await ask(served, {"messages": [{"role": "<prompt_embeds>", "content": "hello"}, turn]})
            assert "Expected 1 prompt_embeds placeholder tokens" in error_of(marked)["message"]

    run(law())


def test_options_of_the_template_are_the_processors_and_then_the_clients(world, encoder_model, engine_app, tmp_path):
    """As in every other prompt of the model, see docs/chat_templates.md."""
    _, processor = world
    template = "{{- 'brief ' if brief -}}" + processor.chat_template
    processor = type(processor)(
        processor.feature_extractor, processor.tokenizer, template, chat_template_kwargs={"brief": True}
    )
    engine = stand_in_engine(world[0].language_model, AutoTokenizer.from_pretrained(TINY_WORLD / "llm"), template)

    async def law():
        async with running_front(encoder_model, processor, engine) as served:
            for given, expected in [({}, True), ({"chat_template_kwargs": {"brief": False}}, False)]:
                await ask(served, chat_of(audio_block(BOTTLES)), max_tokens=1, **given)
                assert engine.state.requests[-1]["chat_template_kwargs"] == {"brief": expected}
            unknown = await ask(served, chat_of(), chat_template_kwargs={"loud": True})
            assert error_of(unknown)["param"] == "chat_template_kwargs"

    run(law())


def test_a_clip_of_an_earlier_turn_is_not_heard_again(front):
    async def law():
        async with front() as served:
            body = chat_of(audio_block(BOTTLES))
            first = text_of(await ask(served, body))
            turns = [{"role": "assistant", "content": first}, *chat_of(audio_block(BOTTLES))["messages"]]
            await ask(served, {**body, "messages": [*body["messages"], *turns]})
            assert served.front.metrics.registry.get_sample_value("blsp_kd_batch_size_sum") == 1
            assert len(served.front.encoder.cache) == 1

    run(law())


# -- transcriptions ---------------------------------------------------------------------------------------------------


async def transcribe(served, contents=BOTTLES, **fields) -> httpx.Response:
    return await served.client.post("/v1/audio/transcriptions", files={"file": ("a.flac", contents)}, data=fields)


def test_a_transcript_and_its_words_equal_those_of_the_pipeline(world, front):
    model, processor = world
    expected = BlspKdSpeechRecognitionPipeline(model=model, processor=processor)(BOTTLES, return_timestamps="word")

    async def law():
        async with front() as served:
            assert (
                (await transcribe(served)).json()["text"] == expected["text"] == "victor had three bottles and sold two"
            )
            assert (await transcribe(served, response_format="text", model=NAME)).text == f"{expected['text']}\n"
            wanted = {"response_format": "verbose_json", "timestamp_granularities[]": ["word", "segment"]}
            verbose = (await transcribe(served, **wanted)).json()
            words = [(word["word"], word["start"], word["end"]) for word in verbose["words"]]
            assert [word for word, *_ in words] == expected["text"].split()
            times = torch.tensor([word[1:] for word in words])
            assert torch.equal(times, torch.tensor([chunk["timestamp"] for chunk in expected["chunks"]]))
            [segment] = verbose["segments"]
            assert (segment["text"], segment["start"], segment["end"]) == (expected["text"], words[0][1], words[-1][2])
            assert 0 < segment["end"] <= verbose["duration"]
            srt = (await transcribe(served, response_format="srt")).text
            assert srt.startswith("1\n00:00:00,") and srt.endswith(f"\n{expected['text']}\n")
            vtt = (await transcribe(served, response_format="vtt")).text
            assert vtt.startswith("WEBVTT\n\n00:00:00.") and vtt.endswith(f"\n{expected['text']}\n")

    run(law())


@pytest.mark.numerical
def test_a_long_recording_is_transcribed_in_the_chunks_of_the_pipeline(world, front):
    model, processor = world
    pipeline = BlspKdSpeechRecognitionPipeline(model=model, processor=processor)
    expected = pipeline(BOTTLES, return_timestamps="word", chunk_length_s=1.2)

    async def law():
        async with front(chunk_length_s=1.2) as served:
            verbose = await transcribe(served, response_format="verbose_json", **{"timestamp_granularities[]": "word"})
            assert verbose.json()["text"] == expected["text"]
            times = torch.tensor([(word["start"], word["end"]) for word in verbose.json()["words"]])
            # The chunks are encoded in one batch.
            torch.testing.assert_close(times, torch.tensor([chunk["timestamp"] for chunk in expected["chunks"]]))

    run(law())


BAD_FIELDS = [
    ({"response_format": "docx"}, "response_format", "Input should be 'json'"),
    ({"language": "en"}, "language", "told no language"),
    ({"prompt": "be brief"}, "prompt", "belongs to it"),
    ({"stream": "true"}, "stream", "not streamed"),
    ({"beam": "4"}, "beam", "Extra inputs"),
    ({"model": "whisper-1"}, "model", "Ask for 'tiny'"),
    ({"timestamp_granularities[]": "word"}, "timestamp_granularities", "needs response_format 'verbose_json'"),
    ({"temperature": "hot"}, "temperature", "valid number"),
]


def test_fields_of_a_transcription_are_checked(front):
    async def law():
        async with front() as served:
            for fields, param, message in BAD_FIELDS:
                error = error_of(await transcribe(served, **fields))
                assert error["param"] == param and message in error["message"], fields
            assert (await transcribe(served, language="")).status_code == 200

    run(law())


# -- what is refused --------------------------------------------------------------------------------------------------

WAV = encode(clip(0.5))
BAD_CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "messages of a text": ({"messages": "hello"}, "messages"),
    "a message of a text": ({"messages": ["hello"]}, "'role' and a 'content'"),
    "no role": ({"messages": [{"content": "hello"}]}, "'role' and a 'content'"),
    "content of a number": ({"messages": [{"role": "user", "content": 7}]}, "a text or a list of blocks"),
    "a block of text": ({"messages": [{"role": "user", "content": ["hello"]}]}, "A block of a message is"),
    "text of a number": ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "A block of"),
    "placeholder": (chat_of(text="<|audio|>"), "holds the audio placeholder"),
    "place of vectors": (chat_of(text="<prompt_embeds>"), "the engine keeps for itself"),
    "half a surrogate pair": (chat_of(text="say \ud800"), "no Unicode"),
    "an image": (chat_of({"type": "image_url", "image_url": {"url": "http://a/b.png"}}), "A block of a message is"),
    "vectors": (chat_of({"type": "prompt_embeds", "data": "AAAA"}), "A block of a message is"),
    "a path": (chat_of({"type": "audio", "path": "/etc/passwd"}), "is not valid base64"),
    "a path as audio": (chat_of({"type": "audio", "audio": "/etc/passwd"}), "is not valid base64"),
    "a file URL": (chat_of({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}), "is not valid base64"),
    "a URL": (chat_of({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:9/a.wav"}}), "are not opened"),
    "a URL as data": (chat_of({"type": "input_audio", "input_audio": {"data": "https://a/b.wav"}}), "are not opened"),
    "no data": (chat_of({"type": "input_audio", "input_audio": {"format": "wav"}}), "holds no audio"),
    "data of numbers": (chat_of({"type": "audio", "audio": [0.1, 0.2]}), "contents or base64 of them, got list"),
    "an array": (chat_of({"type": "audio", "array": [0.1], "sampling_rate": 16000}), "needs one 'audio', base64"),
    "two clips in a block": (chat_of({"type": "audio", "audio": "AAAA", "path": "a"}), "holds audio under"),
    "a template": ({**chat_of(), "chat_template": "{{ 1 }}"}, "'chat_template' is not accepted here"),
    "another machine's cache": ({**chat_of(), "ec_transfer_params": {"a": 1}}, "'ec_transfer_params' is not accepted"),
    "vectors beside messages": ({**chat_of(), "prompt_embeds": "AAAA"}, "'prompt_embeds' is not accepted here"),
    "log-probs of speech": ({**chat_of(audio_block(WAV)), "prompt_logprobs": 0}, "are for text alone"),
    "an echo of speech": ({**chat_of(audio_block(WAV)), "echo": True}, "are for text alone"),
    "options of a list": ({**chat_of(), "chat_template_kwargs": []}, "'chat_template_kwargs' is wrong"),
    "an argument as option": ({**chat_of(), "chat_template_kwargs": {"tools": []}}, "tools"),
    "stream of a text": ({**chat_of(), "stream": "yes"}, "'stream' is wrong"),
    "bias of a list": ({**chat_of(), "logit_bias": [1]}, "'logit_bias' is wrong"),
    **{name: (chat_of(audio_block(contents)), None) for name, (contents, _) in BAD_FILES.items()},
}


def test_bad_input_is_refused_and_the_next_request_answered(front, engine_app):
    async def law():
        async with front() as served:
            expected = text_of(await ask(served, chat_of(audio_block(BOTTLES))))
            engine_app.state.requests.clear()
            for kind, (body, message) in BAD_CHATS.items():
                content, kind_of_content = json.dumps(body).encode(), {"content-type": "application/json"}
                response = await served.client.post("/v1/chat/completions", content=content, headers=kind_of_content)
                assert response.status_code == 400, (kind, response.text)
                error = error_of(response)
                assert error["type"] == "invalid_request_error" and "root:" not in error["message"], kind
                assert message is None or message in error["message"], (kind, error)
            assert engine_app.state.requests == []
            for name, (contents, _) in BAD_FILES.items():
                assert (await transcribe(served, contents)).status_code == 400, name
            assert text_of(await ask(served, chat_of(audio_block(BOTTLES)))) == expected

    run(law())


def test_bodies_that_are_no_json_are_refused(front):
    async def law():
        async with front() as served:
            for contents in (b"", b"no json", b"[]", b"[" * 100_000, b'{"messages": NaN}', b"\xff\xfe", b'{"messages"'):
                error = error_of(await served.client.post("/v1/chat/completions", content=contents))
                assert "JSON" in error["message"] and error["code"] == 400, contents[:20]

    run(law())


def test_forms_that_are_broken_are_refused(front):
    async def law():
        async with front() as served:
            url = "/v1/audio/transcriptions"
            for options in [
                {"content": b"no form", "headers": {"content-type": "multipart/form-data; boundary=x"}},
                {"content": b"no form", "headers": {"content-type": "multipart/form-data"}},
                {"json": {"file": "a.wav"}},
                {"data": {"file": "a.wav"}},
                {"files": [("file", ("a", WAV)), ("file", ("b", WAV))]},
            ]:
                assert error_of(await served.client.post(url, **options))["code"] == 400, options

    run(law())


def test_limits_of_size_and_duration(front):
    async def law():
        async with front(max_audio_bytes=20_000, max_text_chars=100, max_duration_s=2) as served:
            two_clips = chat_of(audio_block(WAV), audio_block(encode(clip(0.4))))
            assert "more than 20000 bytes" in error_of(await ask(served, two_clips))["message"]
            long = chat_of(audio_block(encode(clip(2.5, rate=2000), 2000, subtype="PCM_16")))
            assert "at most 2 s are served" in error_of(await ask(served, long))["message"]
            assert "at most 100 are served" in error_of(await ask(served, chat_of(text="a" * 101)))["message"]
            huge = await ask(served, chat_of(text="a" * 2**21))
            assert error_of(huge)["code"] == 413
            assert error_of(await transcribe(served, bytes(2**21)))["code"] == 413

    run(law())


def test_audio_is_fetched_from_allowed_addresses_alone(front, monkeypatch):
    asked = []

    def fetch(url, prefixes):
        asked.append((url, prefixes))
        return BOTTLES

    monkeypatch.setattr("processing.serving.speech_parts.fetch_audio", fetch)
    url = {"type": "audio_url", "audio_url": {"url": "https://clips.example/a.flac"}}

    async def law():
        async with front() as served:
            assert error_of(await ask(served, chat_of(url)))["code"] == 400 and asked == []
        async with front(allowed_url_prefixes=["https://clips.example/"]) as served:
            assert text_of(await ask(served, chat_of(url))) == "victor had three bottles and sold two"
            assert asked == [("https://clips.example/a.flac", ("https://clips.example/",))]
        with pytest.raises(ValueError, match="allowed_url_prefixes"):
            async with front(allowed_url_prefixes=["https://clips.example"]):
                pass
        monkeypatch.undo()
        async with front(allowed_url_prefixes=["https://other.example/"]) as served:
            assert "is not allowed" in error_of(await ask(served, chat_of(url)))["message"]

    run(law())


def test_a_key_is_asked_for(front, engine_app):
    async def law():
        async with front(api_key="secret", engine_api_key="other") as served:
            for headers, status in [({}, 401), ({"Authorization": "Bearer wrong"}, 401)]:
                response = await served.client.get("/v1/models", headers=headers)
                assert error_of(response)["code"] == status and response.headers["www-authenticate"] == "Bearer"
            served.client.headers["Authorization"] = "Bearer secret"
            [card] = (await served.client.get("/v1/models")).json()["data"]
            assert (card["id"], card["max_model_len"]) == (NAME, 512)
            assert served.front.engine.client.headers["Authorization"] == "Bearer other"
            assert (await served.client.get("/health", headers={"Authorization": ""})).status_code == 200

    run(law())


def test_other_routes_and_names(front):
    async def law():
        async with front() as served:
            assert (await served.client.get(f"/v1/models/{NAME}")).json()["id"] == NAME
            assert error_of(await served.client.get("/v1/models/gpt"))["code"] == 404
            assert error_of(await ask(served, chat_of(), model="gpt"))["code"] == 404
            assert error_of(await served.client.get("/v1/chat/completions"))["code"] == 405
            assert error_of(await served.client.post("/v1/embeddings", json={}))["code"] == 404
            assert (await served.client.get("/ready")).status_code == 200
            text_of(await ask(served, chat_of(audio_block(BOTTLES)), model=None))
            metrics = (await served.client.get("/metrics")).text
            for line in [
                'blsp_kd_requests_total{route="/v1/chat/completions",status="200"} 1.0',
                'blsp_kd_requests_total{route="none",status="404"} 1.0',
                "blsp_kd_encoder_seconds_count 1.0",
                "blsp_kd_engine_first_byte_seconds_count",
                "blsp_kd_requests_running 0.0",
                "blsp_kd_waiting_clips 0.0",
            ]:
                assert line in metrics

    run(law())
