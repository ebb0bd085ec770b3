"""Chats through `BlspKdProcessor`: audio blocks, and exactly what the LLM's own template gives."""

import base64
import copy

import jinja2
import pytest
import soundfile
import torch
from tokenizers.processors import TemplateProcessing

from tests.helpers.audio_files import StandInDecoder, encode
from tests.helpers.chats import assert_same, text_block, tokenized, user
from tests.helpers.prompts import CHAT_TEMPLATE, SAMPLING_RATE, clip, make_tokenizer, spoken_prompts

pytestmark = pytest.mark.numerical

AUDIO = "<|audio|>"
# Shapes of templates that LLMs really have: white space at the start, a namespace, messages reassigned, a named loop.
LLM_TEMPLATES = {
    "tests": CHAT_TEMPLATE,
    "starts with a newline": "\n\n" + CHAT_TEMPLATE,
    "starts with spaces": "  " + CHAT_TEMPLATE,
    "starts with a stripping block": "  \n{%- for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n",
    "system split off": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = '' %}"
        "{% endif %}{% for message in loop_messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
        "{% if loop.first %} ({{ system }}){% endif %}{{ eos_token }}{% endfor %}"
    ),
    "messages reassigned": (
        "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}"
        "{%- set messages = messages[1:] %}{%- endif %}{%- set ns = namespace(last=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{{- loop.index0 ~ message.content ~ ns.last }}{%- endfor %}"
    ),
    "macro over messages": (
        "{% macro turn(message) %}<{{ message.role }}>{{ message.content }}{{ messages | length }}{% endmacro %}"
        "{% for message in messages %}{{ turn(message) }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}<quick>{% endif %}"
    ),
}
DIALOGUE = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "the red cat\n"},
    {"role": "assistant", "content": "ran"},
    {"role": "user", "content": "to {{ the }} river"},
]


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_a_block_may_hold_audio_in_any_key(processor, tmp_path):
    waveform = clip(0.4)
    path = tmp_path / "clip.wav"
    soundfile.write(path, waveform, SAMPLING_RATE, subtype="FLOAT")
    blocks = [
        {"audio": waveform},
        {"audio": (waveform, SAMPLING_RATE)},
        {"audio": {"array": waveform, "sampling_rate": SAMPLING_RATE}},
        {"audio": str(path)},
        {"audio": path.read_bytes()},
        {"path": str(path)},
        {"bytes": path.read_bytes()},
        {"url": f"data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}"},
        {"audio": None, "path": str(path)},
        {"bytes": path.read_bytes(), "path": "not there.wav"},
        {"base64": base64.b64encode(path.read_bytes()).decode()},
        {"raw": waveform, "sampling_rate": SAMPLING_RATE},
        {"audio": waveform, "sampling_rate": SAMPLING_RATE},
        {"audio": {"array": waveform}, "sampling_rate": SAMPLING_RATE},
        {"audio": StandInDecoder(waveform)},
    ]
    expected = processor(f"<|user|>{AUDIO}<|end|>\n<|assistant|>", (waveform, SAMPLING_RATE))
    for block in blocks:
        assert_same(tokenized(processor, user({"type": "audio", **block})), expected)


def test_a_block_may_be_that_of_another_framework(processor):
    """They reached the template as they were, which refused them, or were taken for a place to fill."""
    waveform = clip(0.4)
    data = base64.b64encode(encode(waveform)).decode()
    url = f"data:audio/wav;base64,{data}"
    blocks = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": url}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "audio_url", "audio_url": url},
        {"type": "audio", "audio_url": url},
        {"type": "audio", "data": data, "mime_type": "audio/wav"},
        {"type": "audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": None, "audio": waveform},
        {"audio": waveform},
    ]
    expected = processor(f"<|user|>{AUDIO}<|end|>\n<|assistant|>", (waveform, SAMPLING_RATE))
    for block in blocks:
        given = copy.deepcopy(block)
        assert_same(tokenized(processor, user(block)), expected)
        assert str(block) == str(given), "the caller's chat is left alone"
        assert processor.apply_chat_template(user(block)) == f"<|user|>{AUDIO}<|end|>\n"


@pytest.mark.parametrize(
    "block, message",
    [
        (
            {"type": "audio", "file": "a.wav"},
            r"The audio block {'type': 'audio', 'file': 'a.wav'} holds no audio\. Write",
        ),
        ({"type": "audio_url", "url": None}, "The audio block {'type': 'audio_url', 'url': None} holds no audio"),
        ({"type": "input_audio", "input_audio": "a"}, "The audio block .* holds no audio"),
        ({"type": "audio", "audio": "a.wav", "url": "b"}, r"holds audio under \['audio', 'url'\]\. Leave one"),
        ({"type": "audio_url", "audio_url": {"url": "https://a.org/a.wav"}}, "must be a string of base64"),
        ({"type": "audio", "audio": {"url": "/etc/a.wav"}}, "must be a string of base64"),
        ({"type": "audio", "audio": "https://a.org/a.wav"}, "from files, not from URLs"),
    ],
)
def test_an_audio_block_that_cannot_be_read_is_named(block, message, processor):
    """A name for the clip that is not known made the block a place to fill, and the error was about counts."""
    with pytest.raises(ValueError, match=message):
        tokenized(processor, user(block))


def test_blocks_are_one_line_each_in_their_order(processor):
    conversation = user(text_block("repeat"), {"type": "audio"}, text_block("the words"), {"type": "audio"})
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == f"<|user|>repeat\n{AUDIO}\nthe words\n{AUDIO}<|end|>\n<|assistant|>"


def test_text_only_and_audio_conversations_in_one_batch(processor):
    conversations = [
        user("the red cat"),
        [
            {"role": "system", "content": "be brief"},
            *user({"type": "audio", "audio": clip(0.3, seed=1)}),
            {"role": "assistant", "content": "cat"},
            *user(text_block("and"), {"type": "audio", "audio": clip(0.6, seed=2)}),
        ],
        user(text_block("river")),
        user({"type": "audio", "audio": clip(0.2, seed=3)}, text_block("river")),
    ]
    inputs = tokenized(processor, conversations)
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    assert prompts[0] == "<|user|>the red cat<|end|>\n<|assistant|>"
    assert prompts[1] == (
        f"<|system|>be brief<|end|>\n<|user|>{AUDIO}<|end|>\n<|assistant|>cat<|end|>\n<|user|>and\n{AUDIO}<|end|>\n"
        "<|assistant|>"
    )
    clips = [clip(0.3, seed=1), clip(0.6, seed=2), clip(0.2, seed=3)]
    assert_same(inputs, processor(prompts, clips, sampling_rate=SAMPLING_RATE))
    assert (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist() == [0, 2, 0, 1]
    assert inputs["input_features_mask"].sum(1).tolist() == [30, 60, 20]


def test_spoken_prompts_of_a_batch_equal_those_alone(processor):
    batch = spoken_prompts(processor, durations_s=(0.5, 1.3))
    alone = spoken_prompts(processor, durations_s=(0.5,))
    assert torch.equal(batch["input_ids"][0], alone["input_ids"][0])
    assert torch.equal(batch["input_features"][0, :, :50], alone["input_features"][0])


@pytest.mark.parametrize("name", LLM_TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_messages_give_exactly_what_the_llms_own_template_gives(other_processor, name, add_generation_prompt):
    """White space at the start of an LLM's template was stripped by the block put before it."""
    other = other_processor(LLM_TEMPLATES[name])
    llm = make_tokenizer()
    llm.chat_template = LLM_TEMPLATES[name]
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": False}
    for messages in (DIALOGUE, DIALOGUE[1:], DIALOGUE[1:2]):
        expected = llm.apply_chat_template(messages, tokenize=False, **options)
        assert other.apply_chat_template(messages, **options) == expected
        as_blocks = [{**message, "content": [text_block(message["content"])]} for message in messages]
        assert other.apply_chat_template(as_blocks, **options) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE], ids=["no bos", "bos"])
def test_token_ids_are_those_of_the_llms_own_template(other_processor, template):
    """A BOS that the tokenizer adds and the template lacks (as Zephyr's) stood in prompts, but not in training."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    other = other_processor(template, tokenizer)
    assert other.tokenizer("cat")["input_ids"][0] == 1  # it does add one to bare text
    expected = tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True)["input_ids"]
    assert tokenized(other, DIALOGUE)["input_ids"][0].tolist() == expected
    batch = tokenized(other, [DIALOGUE, user({"type": "audio", "audio": clip(0.1)})])
    assert (batch["input_ids"] == 1).sum(1).tolist() == [template.count("bos_token")] * 2


def test_tools_reach_the_llms_template(other_processor):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    expected = make_tokenizer().apply_chat_template(DIALOGUE, chat_template=template, tools=tools, tokenize=False)
    assert "look" in expected
    assert other_processor(template).apply_chat_template(DIALOGUE, tools=tools) == expected


def test_named_templates_stay_named(other_processor):
    """LLMs with several templates (Command R: default, tool_use, rag) could not be joined: dict plus str."""
    other = other_processor({"default": CHAT_TEMPLATE, "shout": "{{ messages[0].content | upper }}!"})
    conversation = user(text_block("cat"), {"type": "audio"})
    assert other.apply_chat_template(conversation) == f"<|user|>cat\n{AUDIO}<|end|>\n"
    assert other.apply_chat_template(user("cat"), "shout") == "CAT!"


def test_an_llm_without_a_chat_template_gets_the_plain_one(other_processor):
    other = other_processor(None)
    conversation = [*user(text_block("repeat"), {"type": "audio"}), {"role": "assistant", "content": "cat"}]
    assert other.apply_chat_template(conversation[:1], add_generation_prompt=True) == f"<s>repeat\n{AUDIO}\n"
    assert other.apply_chat_template(conversation) == f"<s>repeat\n{AUDIO}\ncat<|end|>"


def test_an_unknown_block_is_named(processor):
    with pytest.raises(jinja2.TemplateError, match="must be of type 'text' or 'audio', got 'image'"):
        processor.apply_chat_template(user(text_block("look"), {"type": "image", "url": "cat.png"}))


def test_an_llm_without_pad_token_pads_with_its_eos(other_processor):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    other = other_processor(tokenizer=tokenizer)
    inputs = other(["cat", "the red cat"])
    assert inputs["input_ids"][0, 0] == other.tokenizer.eos_token_id
    assert inputs["attention_mask"][0, 0] == 0


def test_the_llms_other_special_tokens_survive_the_audio_token(other_processor):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    other = other_processor(tokenizer=tokenizer)
    assert {"<|user|>", AUDIO} <= set(other.tokenizer.all_special_tokens)
    assert other.tokenizer.convert_tokens_to_ids("<|user|>") == tokenizer.convert_tokens_to_ids("<|user|>")
