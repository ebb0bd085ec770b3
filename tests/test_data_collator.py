"""`BlspKdDataCollator`: teacher and student see the same dialogue, one with the transcript, one with the audio."""

import copy

import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

from processing import BlspKdDataCollator, BlspKdProcessor
from processing.data_collator import split_prompt
from tests.helpers.models import make_model
from tests.helpers.prompts import CHAT_TEMPLATE, SAMPLING_RATE, make_tokenizer

pytestmark = pytest.mark.numerical

END_OF_TURN = "<|end|>"


def rendered_dialogue(row):
    """The dialogue of one row with the transcript in it, written out by hand from the tests' template."""
    instruction = f"{row['instruction']}\n" if row.get("instruction") else ""
    return f"<|user|>{instruction}{row['text']}<|end|>\n<|assistant|>{row['response']}<|end|>"


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def unpadded(ids, mask):
    return ids[mask.bool()].tolist()


def with_template(backbones, folder, template, **tokens):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return BlspKdProcessor.from_backbones(backbones[0], folder)


@pytest.fixture
def batch(collator, rows):
    return collator(rows)


# -- laws -------------------------------------------------------------------------------------------------------------


def test_teacher_prompt_is_the_whole_rendered_dialogue(processor, batch, rows):
    for row, ids, mask in zip(rows, batch["teacher_input_ids"], batch["teacher_attention_mask"]):
        assert unpadded(ids, mask) == ids_of(processor, rendered_dialogue(row))


def test_teacher_prompt_is_what_the_llms_own_template_makes_of_the_text(processor, batch, rows):
    for row, ids, mask in zip(rows, batch["teacher_input_ids"], batch["teacher_attention_mask"]):
        question = {"role": "user", "content": f"{row['instruction']}\n{row['text']}"}
        prompt = make_tokenizer().apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        assert unpadded(ids, mask)[: len(prompt)] == prompt


def test_content_tokens_are_those_of_the_transcript_alone(processor, batch, rows):
    for index, row in enumerate(rows):
        transcript = ids_of(processor, row["text"])
        is_content = batch["teacher_is_content"][index]
        assert batch["teacher_input_ids"][index][is_content].tolist() == transcript
        assert batch["num_speech_tokens"][index] == len(transcript)
    assert batch["teacher_is_content"].sum(1).tolist() == batch["num_speech_tokens"].tolist()
    assert len(set(batch["num_speech_tokens"].tolist())) > 1  # the rows do differ


def test_student_is_the_teacher_with_one_placeholder_for_the_content(processor, batch, rows):
    for index in range(len(rows)):
        teacher = unpadded(batch["teacher_input_ids"][index], batch["teacher_attention_mask"][index])
        content = batch["teacher_is_content"][index].nonzero().flatten().tolist()
        assert content == list(range(content[0], content[-1] + 1))  # one piece
        expected = [*teacher[: content[0]], processor.audio_token_id, *teacher[content[-1] + 1 :]]
        assert unpadded(batch["input_ids"][index], batch["attention_mask"][index]) == expected


def test_expanded_student_is_as_long_as_the_teacher(processor, batch):
    student_lengths = batch["attention_mask"].sum(1)
    assert (batch["input_ids"] == processor.audio_token_id).sum(1).tolist() == [1] * len(student_lengths)
    expanded = student_lengths - 1 + batch["num_speech_tokens"]
    assert expanded.tolist() == batch["teacher_attention_mask"].sum(1).tolist()


def test_labels_are_the_response_with_its_end_of_turn_and_nothing_else(processor, batch, rows):
    for index, row in enumerate(rows):
        response = ids_of(processor, row["response"] + END_OF_TURN)
        labels = batch["labels"][index]
        is_response = labels != -100
        assert labels[is_response].tolist() == response
        assert torch.equal(batch["input_ids"][index][is_response], labels[is_response])
        last = int(batch["attention_mask"][index].sum()) - 1
        assert is_response.nonzero().flatten().tolist() == list(range(last + 1 - len(response), last + 1))
        teacher = batch["teacher_input_ids"][index]
        assert teacher[batch["teacher_is_response"][index]].tolist() == response


def test_padding_is_on_the_right_masked_and_unlabelled(processor, batch):
    for ids, mask in [("input_ids", "attention_mask"), ("teacher_input_ids", "teacher_attention_mask")]:
        ids, mask = batch[ids], batch[mask]
        lengths = mask.sum(1, keepdim=True)
        assert int(lengths.max()) == ids.shape[1] and int(lengths.min()) < ids.shape[1]
        assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths).long())
        assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    is_padding = batch["teacher_attention_mask"] == 0
    assert not (batch["teacher_is_content"] | batch["teacher_is_response"])[is_padding].any()


def test_a_row_alone_equals_itself_in_a_batch_and_order_is_kept(collator, rows, batch):
    for order in ([2, 0, 1], [1], [0], [2]):
        part = collator([rows[index] for index in order])
        for name, values in part.items():
            reference = batch[name][order]
            if values.ndim > 1:
                reference = reference[..., : values.shape[-1]]
            assert torch.equal(values, reference), name


def test_types_are_what_the_model_takes(batch):
    booleans = {"teacher_is_content", "teacher_is_response"}
    for name, values in batch.items():
        expected = torch.bool if name in booleans else torch.float32 if name == "input_features" else torch.long
        assert values.dtype == expected, name
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "teacher_input_ids",
        "teacher_attention_mask",
        *booleans,
        "num_speech_tokens",
        "input_features",
        "input_features_mask",
    }


def test_features_made_ahead_of_time_equal_those_of_the_audio(collator, processor, rows, batch):
    ahead = []
    for row in rows:
        mel = processor.extract_features([row["audio"]])["input_features"][0]
        ahead.append({**{name: row[name] for name in ("text", "instruction", "response")}, "input_features": mel})
    for convert in (lambda mel: mel, torch.from_numpy, np.ndarray.tolist):
        again = collator([{**row, "input_features": convert(row["input_features"])} for row in ahead])
        for name, values in batch.items():
            assert torch.equal(values, again[name]), name


@pytest.mark.parametrize("kind", ["waveform", "filter bank"])
def test_rows_hold_the_features_of_any_encoder(processor, rows, kind):
    """Log-mel has time last, waveforms and filter bank frames have it first."""
    if kind == "waveform":
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    else:
        extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
    other = BlspKdProcessor(extractor, processor.tokenizer, chat_template=processor.chat_template)
    collator = BlspKdDataCollator(other)
    expected = collator(rows)
    assert expected["input_features"].shape[2:] == (() if kind == "waveform" else (160,))
    assert expected["input_features"].shape[:2] == expected["input_features_mask"].shape
    ahead = []
    for row in rows:
        made = other.extract_features([row["audio"]])["input_features"][0]
        ahead.append({**{name: row[name] for name in ("text", "instruction", "response")}, "input_features": made})
    assert len({len(row["input_features"]) for row in ahead}) > 1
    again = collator(ahead)
    assert all(torch.equal(again[name], values) for name, values in expected.items())


def test_a_distillation_step_takes_the_batch_as_it_is(batch):
    output = make_model(plora=True)(**batch)
    assert output.loss.isfinite()
    assert output.loss_parts["input_kl"][1] == batch["num_speech_tokens"].sum()
    assert output.loss_parts["response_kl"][1] == (batch["labels"] != -100).sum()


def test_rows_are_not_changed(collator, rows):
    def plain(rows):
        return [{**row, "audio": {**row["audio"], "array": row["audio"]["array"].tolist()}} for row in rows]

    before = copy.deepcopy(rows)
    collator(rows)
    assert plain(rows) == plain(before)


@pytest.mark.parametrize("instruction", [None, ""])
def test_the_instruction_may_be_left_out(collator, processor, rows, instruction):
    row = {**rows[0], "instruction": instruction}
    expected = ids_of(processor, rendered_dialogue(row))
    assert collator([row])["teacher_input_ids"][0].tolist() == expected
    del row["instruction"]
    assert collator([row])["teacher_input_ids"][0].tolist() == expected


# -- templates --------------------------------------------------------------------------------------------------------


def test_a_template_whose_assistant_turn_differs_from_its_prompt_ends_with_eos(backbones, tmp_path, rows):
    """Some templates put more into the prompt (an empty thought, say) than into finished assistant turns."""
    template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>(think){% endif %}")
    processor = with_template(backbones, tmp_path, template)
    prefix, suffix, response = split_prompt(processor, "repeat", "cat")
    assert (prefix, suffix, response) == ("<|user|>repeat\n", "<|end|>\n<|assistant|>(think)", "cat<|end|>")
    batch = BlspKdDataCollator(processor)(rows[:1])
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == ids_of(processor, rows[0]["response"] + END_OF_TURN)


def test_a_thought_that_only_finished_turns_have_is_not_a_response(backbones, tmp_path):
    """Qwen3's template writes an empty thought into finished turns, which became part of the labels."""
    thought = "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}"
    processor = with_template(backbones, tmp_path, CHAT_TEMPLATE.replace("{{ message.content }}", thought))
    assert split_prompt(processor, "repeat", "cat")[2] == "cat<|end|>"


@pytest.mark.parametrize("response", ["end", "|", "cat<", "assistant"])
def test_an_answer_that_the_end_of_the_turn_contains_ends_where_it_ends(processor, response):
    """The answer 'end' was found again in '<|end|>', so its turn ended with 'end|>'."""
    assert split_prompt(processor, "repeat", response)[2] == response + END_OF_TURN


def test_a_template_with_a_beginning_keeps_it_once(backbones, tmp_path, rows):
    processor = with_template(backbones, tmp_path, "{{ bos_token }}" + CHAT_TEMPLATE)
    batch = BlspKdDataCollator(processor)(rows)
    for ids in (batch["input_ids"], batch["teacher_input_ids"]):
        assert (ids[:, 0] == processor.tokenizer.bos_token_id).all()
        assert (ids == processor.tokenizer.bos_token_id).sum() == len(rows)


def test_an_llm_without_a_chat_template(backbones, tmp_path, rows):
    processor = with_template(backbones, tmp_path, None)
    row = rows[0]
    batch = BlspKdDataCollator(processor)([row])
    expected = f"<s>{row['instruction']}\n{row['text']}\n{row['response']}<|end|>"
    assert batch["teacher_input_ids"][0].tolist() == ids_of(processor, expected)
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == ids_of(processor, row["response"] + END_OF_TURN)


def test_white_space_after_the_end_of_the_turn_is_no_label(processor):
    assert CHAT_TEMPLATE.count("<|end|>\n") == 1
    assert split_prompt(processor, None, "cat")[2] == "cat<|end|>"


def test_padding_is_masked_even_if_the_pad_token_is_the_end_of_turn(backbones, tmp_path, rows):
    """LLMs without a pad token pad with their eos; masking by token id then hides the real end of turn."""
    processor = with_template(backbones, tmp_path, CHAT_TEMPLATE, pad_token=None)
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    batch = BlspKdDataCollator(processor)(rows)
    for row, labels in zip(rows, batch["labels"]):
        assert labels[labels != -100].tolist() == ids_of(processor, row["response"] + END_OF_TURN)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["text", "response"])
@pytest.mark.parametrize("value", ["missing", None, "", "  \n", 5])
def test_text_and_response_must_be_there(collator, rows, field, value):
    row = {**rows[1], field: value}
    if value == "missing":
        del row[field], row["instruction"]
    with pytest.raises(ValueError, match=rf"Row 1 of the batch needs a non-empty string '{field}', got") as error:
        collator([rows[0], row])
    assert "array" not in str(error.value)  # the samples would fill the screen


def test_audio_must_be_named(collator, rows):
    """A misspelt name of the field made a row of text only, without a word."""
    row = {("audios" if name == "audio" else name): value for name, value in rows[1].items()}
    with pytest.raises(ValueError, match=r"Row 1 of the batch has no 'audio' \(its fields: \['audios'.*'text'\]\)"):
        collator([rows[0], row])


@pytest.mark.parametrize("field", ["text", "response", "instruction"])
def test_a_placeholder_in_any_text_is_refused(collator, rows, field):
    """In an instruction it ended in 'too many values to unpack (expected 2)'."""
    row = {**rows[1], field: "the <|audio|> cat"}
    with pytest.raises(ValueError, match=r"Row 1 of the batch holds the audio placeholder '<\|audio\|>' in its"):
        collator([rows[0], row])


def test_an_unusable_clip_is_named_by_its_row(collator, rows):
    row = {**rows[1], "audio": (np.zeros(8000), SAMPLING_RATE)}
    with pytest.raises(ValueError, match="Audio 1 of the batch: the audio array is silent"):
        collator([rows[0], row])
