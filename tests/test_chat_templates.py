"""Chat templates of LLM families: the same prompt in training and afterwards, and answers that end where LLMs stop."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdDataCollator, BlspKdPipeline, BlspKdProcessor, BlspKdSpeechRecognitionPipeline
from processing.chat_templates import is_in_thought, read_options
from processing.data_collator import split_prompt
from processing.spoken_inputs import user_turn
from tests.helpers.chat_families import FAMILIES
from tests.helpers.models import make_config
from tests.helpers.prompts import CHAT_TEMPLATE, clip, make_tokenizer

AUDIO = "<|audio|>"
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "river"}}}
TEXT_CHATS = {
    "user": [{"role": "user", "content": "the red cat"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the red cat"}],
    "several turns": [
        {"role": "user", "content": "the red cat\n"},
        {"role": "assistant", "content": "<think>\na cat\n</think>\n\nran"},
        {"role": "user", "content": "to the river"},
        {"role": "assistant", "content": "and back"},
    ],
    "tools": [
        {"role": "user", "content": "the red cat"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "it ran"},
    ],
}


@pytest.fixture
def family_processor(tmp_path, backbones):
    def make(name, **kwargs):
        family = FAMILIES[name]
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": family.special})
        tokenizer.chat_template = family.template
        tokenizer.save_pretrained(tmp_path / "llm")
        kwargs = {"chat_template_kwargs": family.options, **kwargs}
        return BlspKdProcessor.from_backbones(backbones[0], tmp_path / "llm", **kwargs), tokenizer

    return make


def rendered_or_error(render, *args, **kwargs):
    try:
        return render(*args, **kwargs)
    except Exception as error:
        return str(error)


# -- the same prompt everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", TEXT_CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_text_chats_are_what_the_llms_own_template_makes(family_processor, name, chat):
    processor, llm = family_processor(name)
    messages = TEXT_CHATS[chat]
    expected_of = messages
    if FAMILIES[name].in_parts:
        as_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        expected_of = as_parts
    for add_generation_prompt in (False, True):
        call = {"add_generation_prompt": add_generation_prompt, "tools": TOOLS if chat == "tools" else None}
        own = {**call, **FAMILIES[name].options, "tokenize": False}
        expected = rendered_or_error(llm.apply_chat_template, expected_of, **own)
        assert rendered_or_error(processor.apply_chat_template, messages, **call) == expected
        as_blocks = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        assert rendered_or_error(processor.apply_chat_template, as_blocks, **call) == expected


@pytest.mark.parametrize("instruction", [None, "repeat the words"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_transcript_stands_where_the_audio_stands(family_processor, name, instruction):
    processor, _ = family_processor(name)
    spoken = processor.apply_chat_template(user_turn(instruction), add_generation_prompt=True)
    content = {"type": "text", "text": "the red cat"}
    written = processor.apply_chat_template(user_turn(instruction, content), add_generation_prompt=True)
    assert spoken.count(AUDIO) == 1 and spoken.replace(AUDIO, "the red cat") == written
    prefix, suffix, _ = split_prompt(processor, instruction, "cat")
    assert prefix + AUDIO + suffix == spoken


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reads_the_prompt_of_inference_and_ends_where_generation_stops(family_processor, name, rows):
    """Phi-3's labels went past the token that ends its turns, to the end of the text."""
    processor, _ = family_processor(name)
    batch = BlspKdDataCollator(processor)(rows)
    ends = processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].ends)
    for index, row in enumerate(rows):
        content = {"type": "audio", "audio": row["audio"]}
        inference = processor.apply_chat_template(
            user_turn(row["instruction"], content), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0].tolist()
        ids = batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()
        labels = batch["labels"][index][batch["labels"][index] != -100].tolist()
        assert ids == inference + labels
        answer, end = processor.tokenizer.decode(labels[:-1]), labels[-1]
        assert answer.strip() == row["response"] and end in ends
        teacher = batch["teacher_input_ids"][index][batch["teacher_attention_mask"][index].bool()].tolist()
        place = ids.index(processor.audio_token_id)
        num_content = int(batch["num_speech_tokens"][index])
        assert teacher[:place] + [processor.audio_token_id] + teacher[place + num_content :] == ids
        assert batch["teacher_is_content"][index].nonzero().flatten().tolist() == list(
            range(place, place + num_content)
        )
        assert processor.tokenizer.decode(teacher[place : place + num_content]) == row["text"]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"deepseek r1 distill", "gpt-oss", "granite3"}))
def test_prompt_and_labels_begin_the_finished_dialogue(family_processor, name):
    """With the options given, what is trained is the very text that the template makes of a finished dialogue."""
    processor, _ = family_processor(name)
    prefix, suffix, response = split_prompt(processor, "repeat", "the cat")
    turn = {"role": "assistant", "content": "the cat"}
    dialogue = processor.apply_chat_template([*user_turn("repeat"), turn])
    end = response.partition("the cat")[2]
    whole = prefix + AUDIO + suffix + response
    if name.startswith("glm"):  # nothing ends its turns in the text
        assert end == "<|end|>" and dialogue == whole.removesuffix(end)
    else:
        assert dialogue.startswith(whole)


# -- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "glm4.5"])
def test_a_thinking_llm_that_is_told_not_to_has_closed_its_thought_before_the_answer(family_processor, name):
    processor, _ = family_processor(name)
    _, suffix, response = split_prompt(processor, "repeat", "cat")
    assert "</think>" in suffix and "think" not in response and not is_in_thought(suffix)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_llm_that_may_think_is_warned_of(family_processor, caplog, name):
    family_processor(name, chat_template_kwargs=None)
    if FAMILIES[name].warns is None:
        assert not caplog.messages
    else:
        [message] = caplog.messages
        assert FAMILIES[name].warns in message
    caplog.clear()
    family_processor(name)
    is_settled = "enable_thinking" in FAMILIES[name].options or FAMILIES[name].warns is None
    assert bool(caplog.messages) != is_settled


@pytest.mark.parametrize(
    "text, is_in",
    [
        ("cat", False),
        ("<think>\ncat", True),
        ("<think>cat</think> ran", False),
        ("<think>a</think><think>b", True),
        ("a</think>b", False),
        ("<|channel|>analysis<|message|>cat", True),
        ("[THINK]cat[/THINK]ran", False),
    ],
)
def test_a_thought_is_open_until_it_is_closed(text, is_in):
    assert is_in_thought(text) is is_in


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_are_saved_and_hold_until_a_call_says_otherwise(family_processor, tmp_path):
    processor, llm = family_processor("qwen3")
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/processor_config.json").read_text())["chat_template_kwargs"] == {
        "enable_thinking": False
    }
    chat = TEXT_CHATS["user"]
    quick, slow = (
        llm.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, enable_thinking=thinks)
        for thinks in (False, True)
    )
    assert quick != slow
    for each in (processor, BlspKdProcessor.from_pretrained(tmp_path / "saved")):
        assert each.apply_chat_template(chat, add_generation_prompt=True) == quick
        assert each.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=True) == slow
        ids = each.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)[0]
        assert each.tokenizer.decode(ids) == quick
    other = BlspKdProcessor.from_pretrained(tmp_path / "saved", chat_template_kwargs={"enable_thinking": True})
    assert other.apply_chat_template(chat, add_generation_prompt=True) == slow


def test_another_template_gets_the_options_that_it_knows(family_processor):
    """transformers takes what a template does not know for an argument of `__call__`, which refuses it."""
    processor, _ = family_processor("qwen3")
    chat = TEXT_CHATS["user"]
    assert processor.apply_chat_template(chat, CHAT_TEMPLATE, tokenize=True).shape[0] == 1


def test_options_belong_to_their_processor(family_processor):
    options = {"enable_thinking": False}
    processor, _ = family_processor("qwen3", chat_template_kwargs=options)
    options["enable_thinking"] = True
    assert processor.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"enable_thoughts": False}, ValueError, r"does not know the option\(s\) \['enable_thoughts'\]"),
        ({"add_generation_prompt": True}, ValueError, r"holds \['add_generation_prompt'\], which apply_chat_template"),
        ({"tools": []}, ValueError, r"holds \['tools'\]"),
        (["enable_thinking"], TypeError, "must be a dict of names to values that JSON can hold"),
        ({"enable_thinking": {1, 2}}, TypeError, "values that JSON can hold"),
        ({1: True}, TypeError, "must be a dict of names"),
    ],
)
def test_options_that_cannot_be_are_refused(family_processor, options, error, message):
    with pytest.raises(error, match=message):
        family_processor("qwen3", chat_template_kwargs=options)


def test_options_of_a_command_line():
    assert read_options(None) == {}
    assert read_options('{"enable_thinking": false}') == {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ValueError, match=r"must be a JSON object such as .* got '\{enable_thinking: false\}'"):
        read_options("{enable_thinking: false}")


# -- the placeholder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["idefics3", "llava_next"])
def test_templates_that_expect_parts_get_parts(family_processor, name):
    """Given a string they wrote no content at all, and so no placeholder."""
    processor, llm = family_processor(name)
    blind = llm.apply_chat_template([{"role": "user", "content": "repeat"}], tokenize=False, add_generation_prompt=True)
    assert "repeat" not in blind
    chat = [{"role": "system", "content": "Be brief."}, *user_turn("repeat")]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert f"repeat\n{AUDIO}" in prompt and "Be brief." in prompt


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
    ],
    ids=["lost", "twice", "out of place"],
)
def test_a_template_without_the_placeholder_is_refused(backbones, tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not write the audio placeholder .* once and in its place.* Set the"):
        BlspKdProcessor.from_backbones(backbones[0], tmp_path)


def test_a_chat_that_loses_an_audio_is_refused(processor):
    """A template that leaves out earlier turns gave a prompt without the audio, which the model then did not hear."""
    last_only = processor.chat_template.replace("for message in messages %}<", "for message in messages[-1:] %}<")
    assert last_only != processor.chat_template
    chat = [*user_turn("repeat"), {"role": "assistant", "content": "cat"}, {"role": "user", "content": "again"}]
    with pytest.raises(ValueError, match=r"has 1 audio\(s\), but its text holds 0 '<\|audio\|>' placeholder"):
        processor.apply_chat_template(chat, last_only)
    chat[0]["content"][1]["audio"] = clip(0.3)
    with pytest.raises(ValueError, match="holds 0 .* but 1 audio.* If a chat template made the text"):
        processor.apply_chat_template(chat, last_only, tokenize=True)


# -- the real templates that a library ships --------------------------------------------------------------------------

TRL_TEMPLATES = (
    sorted(Path(find_spec("trl").origin).parent.glob("chat_templates/*.jinja")) if find_spec("trl") is not None else []
)


@pytest.mark.skipif(not TRL_TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_trl(backbones, tmp_path, path):
    template = path.read_text()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    processor = BlspKdProcessor.from_backbones(backbones[0], tmp_path)
    for instruction in (None, "repeat the words"):
        spoken = processor.apply_chat_template(user_turn(instruction), add_generation_prompt=True)
        content = {"type": "text", "text": "the red cat"}
        written = processor.apply_chat_template(user_turn(instruction, content), add_generation_prompt=True)
        assert spoken.count(AUDIO) == 1 and spoken.replace(AUDIO, "the red cat") == written
        prefix, suffix, response = split_prompt(processor, instruction, "ran")
        assert prefix + AUDIO + suffix == spoken and response.strip().startswith("ran")
    row = {"audio": (clip(0.3), 16_000), "text": "the red cat", "instruction": "repeat the words", "response": "ran"}
    batch = BlspKdDataCollator(processor)([row])
    prompt = processor(
        processor.apply_chat_template(user_turn("repeat the words"), add_generation_prompt=True),
        row["audio"],
        add_special_tokens=False,
    )
    assert torch.equal(batch["input_ids"][0, : prompt["input_ids"].shape[1]], prompt["input_ids"][0])


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(backbones, tmp_path_factory):
    """The folder of a model whose LLM closes a thought in the prompt if it is told to, trained to think."""
    folder = tmp_path_factory.mktemp("thinker")
    tokenizer = make_tokenizer()
    quick = "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}(no thought){% endif %}{% endif %}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", quick)
    tokenizer.save_pretrained(folder / "llm")
    options = {"enable_thinking": True}
    processor = BlspKdProcessor.from_backbones(backbones[0], folder / "llm", chat_template_kwargs=options)
    BlspKdForCausalLM(make_config()).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("pipeline_class", [BlspKdPipeline, BlspKdSpeechRecognitionPipeline])
def test_pipelines_use_the_saved_options_unless_told_otherwise(thinker, pipeline_class):
    model, processor = BlspKdForCausalLM.from_pretrained(thinker), BlspKdProcessor.from_pretrained(thinker)

    def prompt(made_with=None, called_with=None):
        pipe = pipeline_class(model=model, processor=processor, chat_template_kwargs=made_with)
        seen = []
        apply = processor.apply_chat_template
        processor.apply_chat_template = lambda *args, **kwargs: seen.append(apply(*args, **kwargs)) or seen[-1]
        try:
            pipe((clip(0.3), 16_000), max_new_tokens=2, chat_template_kwargs=called_with)
        finally:
            del processor.apply_chat_template
        return seen[-1]

    quick, slow = {"enable_thinking": False}, {"enable_thinking": True}
    assert prompt() == prompt(slow) == prompt(quick, slow) == prompt(called_with=slow)
    assert prompt(quick) == prompt(slow, quick) == prompt(called_with=quick)
    assert prompt(quick).endswith("(no thought)") and not prompt().endswith("(no thought)")
    with pytest.raises(ValueError, match=r"does not know the option\(s\) \['thoughts'\]"):
        pipeline_class(model=model, processor=processor, chat_template_kwargs={"thoughts": 1})
