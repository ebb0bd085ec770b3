"""The stand-in for vLLM answers as `generate` does. `tests/real_engine/` compares it with vLLM itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from processing import BlspKdProcessor
from tests.helpers.chat_families import FAMILIES
from tests.helpers.engine_requests import (
    KINDS,
    TINY_WORLD,
    as_messages,
    chats_of_all_kinds,
    embeds_part,
    prompt_and_answer,
    tiny_world,
)
from tests.helpers.models import text_config
from tests.helpers.prompts import make_tokenizer

pytest.importorskip("starlette", reason="needs the extra `serve`")
from starlette.testclient import TestClient

from tests.helpers.stand_in_engine import stand_in_engine

PLACEHOLDER_ID = 384


@pytest.fixture(scope="module")
def llm():
    return AutoModelForCausalLM.from_pretrained(TINY_WORLD / "llm"), AutoTokenizer.from_pretrained(TINY_WORLD / "llm")


def start(llm, template=None, **options):
    template = template or (TINY_WORLD / "model/chat_template.jinja").read_text()
    return TestClient(stand_in_engine(*llm, template, **options))


def ask(client, messages, **options):
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, "return_token_ids": True, **options}
    return client.post("/v1/chat/completions", json=body)


@pytest.fixture(scope="module")
def plain(llm):
    return start(llm)


@pytest.mark.long
def test_it_answers_every_kind_of_chat_as_generate_does_at_once_and_in_pieces(plain):
    model, processor = tiny_world()
    for kind, chat in chats_of_all_kinds(len(KINDS)):
        prompt, expected = prompt_and_answer(model, processor, chat)
        messages = as_messages(model, processor, chat)
        answer = ask(plain, messages).json()
        ids = [0 if token == PLACEHOLDER_ID else token for token in answer["prompt_token_ids"]]
        assert (ids, answer["choices"][0]["token_ids"]) == (prompt, expected), kind
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        lines = ask(plain, messages, stream=True).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
        pieces = "".join(choice["delta"].get("content", "") for choice in choices)
        assert pieces == answer["choices"][0]["message"]["content"] != ""
        assert sum((choice.get("token_ids", []) for choice in choices), []) == expected


@pytest.mark.long
def test_partial_lora_acts_at_embedded_positions_with_the_plugin_and_everywhere_without(llm, tmp_path):
    model, processor = tiny_world(plora=True)
    model.plora.save_pretrained(tmp_path)
    clients = {plugin: start(llm, adapters={"speech": tmp_path}, has_plugin=plugin) for plugin in (True, False)}
    texts = {}
    for kind, chat in chats_of_all_kinds(len(KINDS)):
        expected = prompt_and_answer(model, processor, chat)[1]
        messages = as_messages(model, processor, chat)
        answer = ask(clients[True], messages, model="speech").json()["choices"][0]
        assert answer["token_ids"] == expected, kind
        texts[kind] = [
            ask(client, messages, model=name, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["logprob"]
            for client, name in ((clients[True], "speech"), (clients[True], "llm"), (clients[False], "speech"))
        ]
    assert texts["text"][0] == texts["text"][1] != texts["text"][2]
    assert len(set(texts["one clip"])) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_our_template_of_every_family_gives_an_engine_the_positions_of_our_processor(backbones, tmp_path, name):
    """Also with the LLM's own template, if that expects strings: the engine joins parts with line breaks, as we do."""
    family, tokenizer = FAMILIES[name], make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": family.special})
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(tmp_path)
    options = {"chat_template_kwargs": family.options}
    processor = BlspKdProcessor.from_backbones(backbones[0], tmp_path, **options)
    templates = [
        each["default"] if isinstance(each, dict) else each for each in (processor.chat_template, family.template)
    ]
    llm = AutoModelForCausalLM.from_config(text_config(vocab_size=400))
    spoken, text = {"type": "audio"}, {"type": "text", "text": "the red cat"}
    for template in templates[: 1 if family.in_parts or name == "gemma3" else 2]:
        client = start((llm, tokenizer), template=template)
        for content in ("the red cat", [text], [text, spoken], [spoken, spoken, text], [spoken]):
            turns = [content, "ran", [text, spoken]]
            chat = [{"role": role, "content": each} for role, each in zip(("user", "assistant", "user"), turns)]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            expected = [each for id in ids for each in ([-1] * 3 if id == processor.audio_token_id else [id])]
            part = embeds_part(torch.zeros(3, 32))
            messages = [
                {**turn, "content": [part if block is spoken else block for block in turn["content"]]}
                if isinstance(turn["content"], list)
                else turn
                for turn in chat
            ]
            answer = client.post("/tokenize", json={"messages": messages, **options}).json()
            placeholder = len(tokenizer)  # the engine adds its own behind the LLM's
            assert [-1 if id == placeholder else id for id in answer["tokens"]] == expected


def test_it_refuses_what_the_engine_refuses(llm, plain):
    def refusal(client, content, **options):
        answer = ask(client, [{"role": "user", "content": content}], **options)
        return answer.status_code, answer.json()["error"]["message"]

    spoken = [embeds_part(torch.zeros(2, 128))]
    assert refusal(plain, [embeds_part(torch.zeros(2, 64))])[0] == 400
    assert "hidden_size 64 does not match" in refusal(plain, [embeds_part(torch.zeros(2, 64))])[1]
    assert refusal(start(llm, prompt_embeds=False), spoken)[1].startswith("You must set `--enable-prompt-embeds`")
    assert refusal(plain, spoken, model="other")[0] == 404
    assert "maximum context length is 512" in refusal(plain, [embeds_part(torch.zeros(600, 128))])[1]
    assert ask(plain, [{"role": "user", "content": [embeds_part(torch.full((2, 128), torch.nan))]}]).status_code == 200
