"""A waveform without a prompt, as speech-to-text servers pass it: the transcript alone comes back."""

import numpy as np
import pytest
import torch

from modeling_blsp_kd.transcription import longest_transcript
from processing.spoken_inputs import user_turn
from tests.helpers.chats import tokenized
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip

SHORT = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model(plora=True)


@pytest.fixture(scope="module")
def asked(processor):
    return tokenized(processor, user_turn(processor.transcription_instruction, {"type": "audio", "audio": clip(0.8)}))


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor])
def test_a_waveform_alone_becomes_its_features_and_the_prompt_for_a_transcript(processor, asked, wrap):
    inputs = processor(wrap(clip(0.8)), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert torch.equal(inputs.pop("transcription_prompt_ids"), asked["input_ids"])
    assert sorted(inputs) == ["input_features", "input_features_mask"]
    assert all(torch.equal(inputs[name], asked[name]) for name in inputs)


def test_texts_in_an_array_stay_texts(processor):
    assert torch.equal(processor(np.array(["the cat"]))["input_ids"], processor(["the cat"])["input_ids"])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"return_timestamps": True}])
def test_generate_returns_the_transcript_without_the_prompt(model, processor, asked, options):
    length = asked["input_ids"].shape[1]
    expected = model.generate(**asked, **SHORT, **options)
    answer = model.generate(**processor(clip(0.8), sampling_rate=SAMPLING_RATE), **SHORT, **options)
    if "return_timestamps" not in options:
        assert torch.equal(answer, expected[:, length:])
        return
    assert torch.equal(answer.sequences, expected.sequences[:, length:])
    assert torch.equal(answer.token_timestamps.nan_to_num(), expected.token_timestamps[:, length:].nan_to_num())


def test_a_transcript_is_as_long_as_speech_can_be_unless_the_call_says_otherwise(model, processor):
    """Servers give no length, and the default of `generate` would end every transcript after twenty tokens."""
    inputs = processor(clip(0.8), sampling_rate=SAMPLING_RATE)
    limit = longest_transcript(model.config.speech_config, inputs["input_features"])
    assert limit == 16 + 20
    endless = {"min_new_tokens": limit, "do_sample": False}
    assert model.generate(**inputs, **endless).shape[1] == limit
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= 3


def test_other_prompts_beside_it_are_refused(model, processor, asked):
    inputs = processor(clip(0.8), sampling_rate=SAMPLING_RATE)
    with pytest.raises(ValueError, match="go with input_features, and without any other prompts"):
        model.generate(input_ids=asked["input_ids"], **inputs)
    with pytest.raises(ValueError, match="go with input_features"):
        model.generate(transcription_prompt_ids=inputs["transcription_prompt_ids"])
