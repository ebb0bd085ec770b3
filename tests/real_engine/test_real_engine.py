"""The real vLLM: it answers as `generate` does, and the stand-in of the other tests answers as it does.

Opt-in (`pytest -m vllm -n 0`), see `helpers/real_engine.py`. Leaves out: GPUs, where partial LoRA is refused.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from processing import BlspKdProcessor
from tests.helpers.asr_data import write_asr
from tests.helpers.chat_families import FAMILIES
from tests.helpers.engine_answers import CALLS, SAMPLES, STRUCTURED, is_same, told, told_in_pieces
from tests.helpers.engine_requests import (
    as_messages,
    chats_of_all_kinds,
    embeds_part,
    prompt_and_answer,
)
from tests.helpers.real_engine import LITTLE_MEMORY, OVERLAY, PYTHON, SETTINGS, RealEngine
from tests.helpers.servers import ROOT
from tests.helpers.stand_in_engine import stand_in_engine

pytestmark = pytest.mark.vllm
NUM_REQUESTS = 200
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def stand_in(files):
    llm, tokenizer = (each.from_pretrained(files[0] / "llm") for each in (AutoModelForCausalLM, AutoTokenizer))
    template = (files[0] / "chat_template.jinja").read_text()
    return TestClient(stand_in_engine(llm, tokenizer, template, adapters={"speech": files[0] / "speech"}))


def chat(client, messages, **options):
    body = {"model": "llm", "messages": messages, "temperature": 0, "max_tokens": MAX_NEW_TOKENS, **options}
    return client.post("/v1/chat/completions", json={**body, "return_token_ids": True})


def in_pieces(client, messages, **options) -> list[dict]:
    lines = chat(client, messages, stream=True, **options).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- the same tokens --------------------------------------------------------------------------------------------------


def test_two_hundred_requests_of_all_kinds_are_answered_as_generate_does(real, models):
    """Half are streamed, a third goes through partial LoRA, a fifth comes again, and up to sixteen run at once."""
    chats = chats_of_all_kinds(NUM_REQUESTS * 4 // 5)
    chats += chats[: NUM_REQUESTS // 5]
    names = [("llm", "speech", "llm")[index // 5 % 3] for index in range(NUM_REQUESTS)]
    messages = [as_messages(*models[name], each) for name, (_, each) in zip(names, chats)]

    def ask(index):
        if index % 2:
            pieces = in_pieces(real, messages[index], model=names[index])
            ids = [piece["choices"][0].get("token_ids") or [] for piece in pieces]
            return pieces[0]["prompt_token_ids"], sum(ids, [])
        answer = chat(real, messages[index], model=names[index]).json()
        return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(NUM_REQUESTS)))
    wrong = []
    for index, (name, (kind, each), (prompt, answer)) in enumerate(zip(names, chats, answers)):
        placeholder = max(prompt) if kind != "text" else None  # its id follows the vocabulary's
        expected = prompt_and_answer(*models[name], each, MAX_NEW_TOKENS)
        if ([0 if token == placeholder else token for token in prompt], answer) != expected:
            wrong.append((index, name, kind, answer, expected[1]))
    assert wrong == []
    counters = dict(line.rpartition(" ")[::2] for line in real.get("/metrics").text.splitlines() if line[0] != "#")
    hits = [float(value) for name, value in counters.items() if name.startswith("vllm:prefix_cache_hits_total")]
    assert sum(hits) > 32 * 5, "the prefix cache took part"


def test_partial_lora_changes_answers_at_all(real, models):
    """Guards the comparison above."""
    chats = [each for kind, each in chats_of_all_kinds(30) if kind != "text"]
    differ = [
        prompt_and_answer(*models["llm"], each)[1] != prompt_and_answer(*models["speech"], each)[1] for each in chats
    ]
    assert sum(differ) > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_renders_our_template_of_every_family_as_our_processor_does(real, files, backbones, tmp_path, name):
    """Our template loops over a message's parts, so vLLM hands it the parts instead of joining them itself."""
    family = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(files[0] / "llm")
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(tmp_path)
    options = {"chat_template_kwargs": family.options}
    processor = BlspKdProcessor.from_backbones(backbones[0], tmp_path, **options)
    template = processor.chat_template
    template = template["default"] if isinstance(template, dict) else template
    spoken, text = {"type": "audio"}, {"type": "text", "text": "the red cat"}
    contents = ["the red cat", [text], [text, spoken], [spoken, spoken, text], [spoken]]
    for content in contents:
        conversation = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "ran"},
            {"role": "user", "content": [text, spoken]},
        ]
        rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
        expected = processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        part = embeds_part(torch.zeros(1, 128))
        messages = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [part if block is spoken else block for block in message["content"]]}
            for message in conversation
        ]
        body = {"model": "llm", "messages": messages, "chat_template": template, **options}
        answer = real.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        ids = answer.json()["tokens"]
        placeholder = max(ids)
        assert placeholder not in expected or placeholder == processor.audio_token_id
        assert [processor.audio_token_id if token == placeholder else token for token in ids] == expected


# -- the stand-in -----------------------------------------------------------------------------------------------------

SPOKEN = [{"type": "text", "text": "Name the person."}, embeds_part(torch.zeros(4, 128))]
REFUSED = {
    "other width": [embeds_part(torch.zeros(4, 64))],
    "integers": [embeds_part(torch.zeros(4, 128, dtype=torch.int32))],
    "no rows": [embeds_part(torch.zeros(0, 128))],
    "not base64": [{"type": "prompt_embeds", "data": "***"}],
    "no data": [{"type": "prompt_embeds", "data": ""}],
    "longer than the context": [embeds_part(torch.zeros(600, 128))],
    "the engine's placeholder": "a <prompt_embeds> b",
    "audio": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_the_stand_in_refuses_in_the_engines_words(real, stand_in, content):
    answers = [chat(client, [{"role": "user", "content": content}]) for client in (real, stand_in)]
    errors = [answer.json()["error"] for answer in answers]
    for error in errors:
        error["message"] = error["message"].partition(" (parameter=")[0]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert errors[0] == errors[1]


UNFIT_FIELDS = {
    "several greedy answers": {"n": 2},
    "a call without tools": {"tool_choice": "required"},
    "beams": {"messages": [{"role": "user", "content": SPOKEN}], "use_beam_search": True},
    "one place of vectors too many": {
        "messages": [{"role": "<prompt_embeds>", "content": "hi"}, {"role": "user", "content": SPOKEN}]
    },
    "a tool that is not there": {**CALLS["a call of one tool"], "tools": CALLS["a call of some tool"]["tools"]},
}


@pytest.mark.parametrize("fields", UNFIT_FIELDS.values(), ids=UNFIT_FIELDS.keys())
def test_the_stand_in_refuses_fields_in_the_engines_words(real, stand_in, fields):
    fields = {"messages": [{"role": "user", "content": "hi"}], **fields}
    first, second = (chat(client, **fields) for client in (real, stand_in))
    assert first.status_code == second.status_code >= 400
    assert first.json()["error"] == second.json()["error"]


def test_the_stand_in_refuses_other_models(real, stand_in):
    answers = [chat(client, [{"role": "user", "content": "hi"}], model="other") for client in (real, stand_in)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json()["error"]["type"] == answers[1].json()["error"]["type"]


def shape_of(value):
    """The names and types in an answer of the stand-in, which the engine's must have."""
    if isinstance(value, dict):
        return {name: type(each) if name in ("id", "created") else shape_of(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape_of(each) for each in value]
    return type(value) if value is None or isinstance(value, (bool, float)) else value


def within(part, whole) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and within(part[name], whole[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(within, part, whole))
    return part == whole


OPTIONS = {
    "plain": {},
    "log-probs": {"logprobs": True, "top_logprobs": 2},
    "a stop string": {"stop": ["three"], "max_tokens": 12},
    "cut": {"max_tokens": 2},
    "biased": {"logit_bias": {"372": -100.0}},
    "through partial LoRA": {"model": "speech"},
    **STRUCTURED,
    **CALLS,
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_stand_in_answers_as_the_engine(real, stand_in, models, options):
    for _, each in chats_of_all_kinds(5):
        messages = as_messages(*models["llm"], each)
        ours, theirs = answers_of(stand_in, messages, options), answers_of(real, messages, options)
        assert within(shape_of(ours), shape_of(theirs))


def answers_of(client, messages, options) -> dict:
    """What a client is answered at once, which must be the same in pieces."""
    answer = chat(client, messages, **options).json()
    pieces = told_in_pieces(in_pieces(client, messages, **options, stream_options={"include_usage": True}))
    assert is_same(pieces, told(answer)), (pieces, answer)
    return answer


def test_both_sample_as_many_answers_as_they_are_asked_for(real, stand_in):
    """Each draws from another generator, which the seed repeats."""
    for client in (real, stand_in):
        answer = answers_of(client, [{"role": "user", "content": "hi"}], SAMPLES)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


def test_the_stand_in_lists_its_models_as_the_engine(real, stand_in):
    ours, theirs = (client.get("/v1/models").json()["data"] for client in (stand_in, real))
    for one, other in itertools.zip_longest(ours, theirs):
        assert {name: one[name] for name in ("id", "parent")} == {name: other[name] for name in ("id", "parent")}
    assert ours[0]["max_model_len"] == theirs[0]["max_model_len"]


def test_rows_that_are_no_numbers_must_not_reach_the_engine(real, stand_in):
    """It answers status 200 with an empty text, and so does the stand-in. The front refuses such rows."""
    content = [embeds_part(torch.full((4, 128), torch.nan))]
    for client in (real, stand_in):
        answer = chat(client, [{"role": "user", "content": content}])
        assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "")


# -- partial LoRA is refused where it would be wrong ------------------------------------------------------------------


def test_one_slot_of_loras_must_stay_free(files, tmp_path):
    options = list(files[1])
    options[options.index("--max-loras") + 1] = "1"
    engine = RealEngine(options, tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match=r"1 LoRA\(s\) need --max-loras 2, but it is 1"):
            engine.wait_until_ready()
    finally:
        engine.stop()


def test_without_the_plugin_the_lora_acts_everywhere(files, models, tmp_path):
    """This is what the front has to find out at its start."""
    engine = RealEngine(files[1], tmp_path / "log", VLLM_PLUGINS="none")
    try:
        engine.wait_until_ready()
        with httpx.Client(base_url=engine.url, timeout=600) as client:
            messages = [{"role": "user", "content": "Repeat the words.\nvictor had three bottles"}]
            first = [
                chat(client, messages, model=name, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
                for name in ("llm", "speech")
            ]
            assert abs(first[0]["logprob"] - first[1]["logprob"]) > 1e-3
    finally:
        engine.stop()


# -- training data ----------------------------------------------------------------------------------------------------


def test_training_rows_are_those_of_transformers_also_after_a_kill(tmp_path):
    asr = write_asr(tmp_path / "asr")
    common = ["--manifest", asr / "asr.jsonl", "--templates", "repeat", "continue", "--batch_size", "1"]
    common += ["--max_new_tokens", "16", "--dtype", "float32"]

    def command(python, output, *more):
        return [python, ROOT / "examples/make_training_data.py", *common, "--output", asr / output, *more]

    subprocess.run(command(sys.executable, "here.jsonl"), check=True, cwd=ROOT)
    vllm_options = json.dumps({"gpu_memory_utilization": LITTLE_MEMORY, "enforce_eager": True})
    there = command(PYTHON, "there.jsonl", "--engine", "vllm", "--vllm_options", vllm_options)
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(OVERLAY)}
    killed = subprocess.Popen(there, cwd=ROOT, env=environment)
    part = asr / "there.parts" / "part-00000.jsonl"
    while not (part.exists() and part.stat().st_size):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (asr / "there.jsonl").exists()
    subprocess.run(there, check=True, cwd=ROOT, env=environment)
    rows = {
        name: [json.loads(line) for line in (asr / f"{name}.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    }
    assert {row.pop("engine") for row in rows["here"]} == {"transformers"}
    assert {row.pop("engine") for row in rows["there"]} == {"vllm"}
    assert len(rows["here"]) > 10 and rows["here"] == rows["there"]
