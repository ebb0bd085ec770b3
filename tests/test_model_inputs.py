"""Inputs and outputs of a call are those of transformers: masks of any dtype, tuples, gradients of features."""

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from tests.helpers.models import make_model
from tests.helpers.prompts import spoken_prompts

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.bool]


def padded(inputs):
    """With one position more on the left, which is padding in the first row."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids, mask = torch.cat([ids[:, :1], ids], dim=1), torch.cat([mask[:, :1], mask], dim=1)
    ids[0, 0] = mask[0, 0] = 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def inputs(processor):
    return padded(spoken_prompts(processor))


@pytest.fixture(scope="module")
def model():
    return make_model(plora=True, text={"max_position_embeddings": 1024})


@pytest.fixture(scope="module")
def long_inputs(processor):
    """Prompts of more than 256 positions, beyond which bfloat16 cannot count."""
    return padded(spoken_prompts(processor, instruction="the red cat ran to the river " * 45))


@torch.no_grad()
def logits(model, inputs, **options):
    return model(**{**inputs, **options}).logits


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("length", ["short", "long"])
def test_a_mask_of_any_dtype_is_that_of_integers(dtype, with_positions, length, model, inputs, long_inputs):
    """A float mask beside audio was a RuntimeError with position_ids, and counted wrong positions without them."""
    inputs = dict(inputs if length == "short" else long_inputs)
    mask = inputs["attention_mask"]
    assert (mask == 0).any() and (length == "short" or mask.shape[1] > 300)
    if with_positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(logits(model, inputs, attention_mask=mask.to(dtype)), logits(model, inputs))
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs.pop("position_ids", None)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**{**inputs, "attention_mask": mask.to(dtype)}, **options), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_other_masks_of_any_dtype(dtype, model, inputs):
    mask = inputs["input_features_mask"]
    assert torch.equal(logits(model, inputs, input_features_mask=mask.to(dtype)), logits(model, inputs))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_new_turn_with_a_mask_of_any_dtype(dtype, model, inputs):
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}

    def second_answer(dtype):
        first = model.generate(**{**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}, **options)
        cache = first.past_key_values
        new_turn = torch.cat([first.sequences[:, -1:], inputs["input_ids"]], dim=1)
        mask = torch.cat([cache.attention_mask.to(dtype), torch.ones_like(new_turn, dtype=dtype)], dim=1)
        second = {**inputs, "input_ids": new_turn, "attention_mask": mask, "past_key_values": cache}
        return model.generate(**second, **options).sequences

    assert torch.equal(second_answer(dtype), second_answer(torch.long))


@pytest.mark.parametrize("given", ["config", "argument"])
def test_outputs_may_be_tuples(given, model, inputs):
    """With return_dict off in the config, a call with audio failed inside: it read its own parts' outputs by name."""
    text, labels = {"input_ids": torch.arange(3, 9)[None]}, inputs["input_ids"].clone()
    calls = [lambda **options: model(**text, **options), lambda **options: model(**inputs, labels=labels, **options)]
    calls.append(
        lambda **options: model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], **options)
    )
    expected = [call() for call in calls]
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    configs = [model.config, model.config.speech_config]
    try:
        for config in configs if given == "config" else ():
            config.return_dict = False
        for call, output in zip(calls, expected):
            found = call(**({} if given == "config" else {"return_dict": False}))
            assert type(found) is tuple and len(found) == len(output.to_tuple())
            assert torch.equal(found[0], output[0])
            assert type(call(return_dict=True)) is type(output)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    finally:
        for config in configs:
            config.return_dict = True


def test_a_distillation_step_may_return_tuples(rows, collator):
    model = make_model(plora=True)
    batch = collator(rows)
    expected = model(**batch)
    model.config.return_dict = model.config.speech_config.return_dict = False
    loss, parts = model(**batch)
    assert torch.equal(loss, expected.loss) and parts.keys() == expected.loss_parts.keys()


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_features_get_a_gradient_through_a_frozen_encoder(kind, is_training, processor, inputs):
    """Features that asked for a gradient got none, without a word: the frozen encoder ran without any."""
    torch.manual_seed(0)
    model = make_model(plora={"lora_dropout": 0.0})
    if kind == "wav2vec2":
        model.audio_tower = make_waveform_encoder()
        model.config.speech_config = model.audio_tower.config
        waveforms = torch.randn(2, 4000)
        inputs = {**inputs, "input_features": waveforms, "input_features_mask": torch.ones(2, 4000).long()}
    model.freeze_backbones()
    model.train(is_training)
    forced = {"num_speech_tokens": torch.tensor([3, 5])}

    def gradient():
        features = inputs["input_features"].clone().requires_grad_()
        model(**{**inputs, **forced, "input_features": features}).logits.square().sum().backward()
        return features.grad

    found = gradient()
    assert all(parameter.grad is None for parameter in model.audio_tower.parameters())
    assert model.audio_tower.training == is_training and found.abs().max() > 1e-3
    with torch.no_grad():
        features = inputs["input_features"].clone().requires_grad_()
        assert not model(**{**inputs, **forced, "input_features": features}).logits.requires_grad
    model.audio_tower.requires_grad_(True).eval()  # the gradient of an encoder that is trained
    assert torch.equal(found, gradient())


def make_waveform_encoder():
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**options, **convolutions, feat_extract_norm="layer", do_stable_layer_norm=True)
    return Wav2Vec2Model(config).eval()


@pytest.mark.parametrize("call", ["forward", "generate", "get_audio_features"])
def test_features_without_frames_are_an_error(call, model, inputs):
    def run(features, mask):
        given = {**inputs, "input_features": features, "input_features_mask": mask}
        model.get_audio_features(features, mask) if call == "get_audio_features" else getattr(model, call)(**given)

    features, mask = inputs["input_features"], inputs["input_features_mask"].clone()
    with pytest.raises(ValueError, match=r"input_features of shape \(2, 80, 0\) hold no frames: axis 2 is time"):
        run(features[..., :0], mask[:, :0])
    mask[1] = 0
    with pytest.raises(ValueError, match="Audio 1 of the batch holds no frames: its input_features_mask is zero"):
        run(features, mask)
