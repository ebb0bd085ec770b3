"""Partial LoRA put on or taken off while loading; any other override that would leave weights random is refused."""

import json
import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.whisper.modeling_whisper import sinusoids

from modeling_blsp_kd import BlspKdForCausalLM
from tests.helpers.models import SMALL_CFORMER, make_model, text_config
from tests.helpers.prompts import spoken_prompts

pytestmark = pytest.mark.numerical

TEXT = torch.arange(3, 12)[None]
OFFLOADED = {
    "audio_tower": "cpu",
    "adapter": "cpu",
    "language_model.model.embed_tokens": "cpu",
    "language_model.model.rotary_emb": "cpu",
    "language_model.model.layers.0": "cpu",
    "language_model.model.layers.1": "disk",
    "language_model.model.norm": "cpu",
    "language_model.lm_head": "cpu",
}
FORMS = {
    "full": {},
    "sharded": {"max_shard_size": "20KB"},
    "thin": {},
}


def logits(model, inputs):
    with torch.no_grad():
        return model(**{**inputs, "input_features": inputs["input_features"].to(model.dtype)}).logits


@pytest.fixture(scope="module")
def inputs(processor):
    return spoken_prompts(processor)


@pytest.fixture(scope="module")
def folders(backbones, tmp_path_factory):
    """Checkpoints of every form with and without partial LoRA."""
    root = tmp_path_factory.mktemp("checkpoints")
    for plora in (True, False):
        for form, options in FORMS.items():
            torch.manual_seed(0)
            model = BlspKdForCausalLM.from_backbones(
                *backbones, audio_token_id=300, adapter=SMALL_CFORMER, plora=plora, thin=form == "thin"
            )
            for parameter in model.plora.parameters if plora else []:
                parameter.data.normal_(std=0.3)
            model.save_pretrained(root / f"{form}-{plora}", **options)
    return root


def without_partial_lora(model):
    """Logits of text and speech without partial LoRA."""
    for layer in model.plora.layers:
        torch.nn.init.zeros_(layer.lora_B["plora"].weight)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_taken_off_the_llm_is_as_it_was(form, options, folders, inputs, tmp_path, messages):
    """An LLM with random linear layers came out, and a load report: PEFT's names did not fit the bare LLM."""
    folder = folders / f"{form}-True"
    trained = BlspKdForCausalLM.from_pretrained(folder, **options)
    audio, text = logits(trained, inputs), trained(input_ids=TEXT).logits
    model = BlspKdForCausalLM.from_pretrained(folder, plora=False, **options)
    assert model.plora is None and model.config.plora is None and not model.training
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    assert not hasattr(model.language_model, "peft_config")
    assert torch.equal(model(input_ids=TEXT).logits, text)
    assert torch.equal(logits(model, inputs), logits(without_partial_lora(trained), inputs))
    assert not torch.equal(logits(model, inputs), audio)
    assert any("28 trained weights of partial LoRA" in message and "left out" in message for message in messages)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BlspKdForCausalLM.from_pretrained(tmp_path, **options), inputs), logits(model, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_put_on_it_answers_as_before_and_can_be_trained(form, options, folders, inputs, tmp_path):
    folder = folders / f"{form}-False"
    expected = logits(BlspKdForCausalLM.from_pretrained(folder, **options), inputs)
    model = BlspKdForCausalLM.from_pretrained(folder, plora={"r": 3}, **options)
    assert model.config.plora["r"] == model.plora.lora_config.r == 3
    assert torch.equal(logits(model, inputs), expected) and not any(module.training for module in model.modules())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if name.startswith("language_model")} == {
        name for name in model.state_dict() if ".plora." in name
    }
    assert {parameter.dtype for parameter in model.plora.parameters} == {model.adapter.output_proj.weight.dtype}
    for parameter in model.plora.parameters:
        parameter.data.normal_(std=0.3)
    changed = logits(model, inputs)
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BlspKdForCausalLM.from_pretrained(tmp_path, **options), inputs), changed)


@pytest.mark.parametrize("plora", [True, False])
def test_with_a_part_on_disk(plora, folders, inputs, tmp_path):
    folder = folders / f"full-{not plora}"
    expected = logits(BlspKdForCausalLM.from_pretrained(folder, plora=plora), inputs)
    model = BlspKdForCausalLM.from_pretrained(folder, plora=plora, device_map=OFFLOADED, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model, inputs), expected)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about devices that are not here
@pytest.mark.parametrize("plora", [True, False])
def test_with_quantisation(plora, folders, inputs):
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    given = BlspKdForCausalLM.from_pretrained(folders / f"full-{not plora}", **options)
    switched = BlspKdForCausalLM.from_pretrained(folders / f"full-{not plora}", plora=plora, **options)
    given = given if plora else without_partial_lora(given)
    assert torch.equal(logits(switched, inputs), logits(given, inputs))


@pytest.mark.parametrize("plora", [True, False])
def test_by_other_entries(plora, folders, inputs):
    folder = folders / f"full-{not plora}"
    expected = logits(BlspKdForCausalLM.from_pretrained(folder, plora=plora), inputs)
    config = BlspKdForCausalLM.config_class.from_pretrained(folder, plora=plora)
    before = config.to_dict()
    model, loading = BlspKdForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert torch.equal(logits(model, inputs), expected) and config.to_dict() == before
    assert len(loading["missing_keys" if plora else "unexpected_keys"]) == 28
    model = AutoModelForCausalLM.from_pretrained(folder, plora=plora)
    assert torch.equal(logits(model, inputs), expected) and (model.plora is not None) == plora


def test_options_of_the_config_stay_out_of_the_generation_config(folders, tmp_path):
    """`plora=False` was saved as `"plora": null` there, and so was every other option that was given."""
    given = {"plora": False, "distillation": {"quantity": 0.5}, "freeze_speech_encoder": False}
    BlspKdForCausalLM.from_pretrained(folders / "full-True", **given).save_pretrained(tmp_path)
    before, after = (
        json.loads((each / "generation_config.json").read_text()) for each in (folders / "full-True", tmp_path)
    )
    assert after == before


def test_what_is_stored_anyway_is_not_touched(folders, inputs, messages):
    for plora in (True, False):
        expected = logits(BlspKdForCausalLM.from_pretrained(folders / f"full-{plora}"), inputs)
        model = BlspKdForCausalLM.from_pretrained(folders / f"full-{plora}", plora=plora)
        assert torch.equal(logits(model, inputs), expected)
    assert messages == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"plora": {"nonsense": 3}}, "Unknown option.*nonsense"),
        ({"plora": {"r": 3}}, "lora_A.plora.weight is .16, .* instead of .3,"),
        (
            {"plora": {"target_modules": ["q_proj"]}},
            "lacks weights.*random.*down_proj.weight.*only plora may be switched",
        ),
        ({"adapter": {"type": "cformer", "num_pre_layers": 2}}, r"lacks weights.*adapter\.\w+_layers"),
        (
            {"adapter": "subsampler", "distillation": {"input_kl": 0.0, "quantity": 0.0}},
            "lacks weights.*random.*adapter",
        ),
        ({"text_config": text_config(num_hidden_layers=3)}, r"lacks weights.*model\.layers\.2"),
        ({"text_config": text_config("qwen2")}, "lacks weights.*bias"),
    ],
    ids=str,
)
def test_an_override_that_would_leave_weights_random_is_refused(options, message, folders):
    with pytest.raises(ValueError, match=message):
        BlspKdForCausalLM.from_pretrained(folders / "full-True", **options)


def test_a_state_dict_of_ones_own_may_lack_weights():
    """A state dict is taken as far as it goes; weights that it lacks are drawn as for a new model."""
    model = make_model()
    given = {"language_model.model.norm.weight": torch.full((32,), 3.0)}
    loaded = BlspKdForCausalLM.from_pretrained(None, config=model.config, state_dict=given)
    positions = model.audio_tower.embed_positions.weight
    assert torch.equal(positions, sinusoids(*positions.shape))
    assert torch.equal(loaded.audio_tower.embed_positions.weight, positions)
    assert torch.equal(loaded.language_model.model.norm.weight, given["language_model.model.norm.weight"])
    drawn = loaded.language_model.model.layers[0].mlp.up_proj.weight
    assert drawn.std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.2)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@pytest.fixture
def messages(monkeypatch):
    """The messages at level WARNING and above."""
    transformers.logging.set_verbosity_warning()
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "modeling_blsp_kd")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)
