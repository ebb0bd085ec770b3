"""A LoRA of the user's own on top of a trained model, and partial LoRA as a standard PEFT folder."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modeling_blsp_kd import BlspKdForCausalLM, plora
from tests.helpers.models import FAMILIES, base_llm, make_model
from tests.helpers.partial_lora import logits_at, prompt
from tests.helpers.prompts import spoken_prompts

pytestmark = [
    pytest.mark.numerical,
    # PEFT takes partial LoRA for a LoRA that somebody forgot on the model.
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    # Of `delete_adapter`, which looks for another adapter to activate.
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
TEXT = {"input_ids": torch.arange(3, 12)[None]}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def lora_config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def with_own_lora(model, train=True, **options) -> PeftModel:
    """The user's steps. `train`: B is not zero, as after training."""
    torch.manual_seed(5)
    own = get_peft_model(model.requires_grad_(False), lora_config(**options)).eval()
    if train:
        for name, parameter in own.named_parameters():
            if "lora_B.default" in name:
                parameter.data.normal_(std=0.3)
    return own


@torch.no_grad()
def answers(model, speech):
    """Logits after a text prompt and after audio prompts."""
    return model(**TEXT).logits, model(**speech).logits


def are_equal(first, second) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(first, second)]


@pytest.fixture(scope="module")
def speech(processor):
    return spoken_prompts(processor)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_plora", [True, False])
def test_only_the_own_lora_trains(with_plora, speech):
    model = make_model(plora=with_plora)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = with_own_lora(model, train=False).train()
    trainable = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all(".default." in name for name in trainable)

    labels = speech["input_ids"].masked_fill(~speech["attention_mask"].bool(), -100)
    optimizer = torch.optim.AdamW([parameter for parameter in own.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = own(**speech, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses
    after = {
        name.replace("q_proj.base_layer", "q_proj").replace("v_proj.base_layer", "v_proj"): value
        for name, value in model.state_dict().items()
        if ".default." not in name
    }
    before = {
        name.replace("q_proj.base_layer", "q_proj").replace("v_proj.base_layer", "v_proj"): value
        for name, value in before.items()
    }
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_get_peft_model_freezes_the_rest_by_itself_without_partial_lora():
    own = get_peft_model(make_model(plora=False), lora_config())
    trainable = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


def test_a_model_that_was_not_frozen_first_is_warned_about(speech, monkeypatch):
    """Its adapter or partial LoRA would be trained too, and be missing in what PEFT saves."""
    messages = []
    monkeypatch.setattr(plora.logger, "warning_once", messages.append)
    get_peft_model(make_model(plora=True), lora_config())(**speech)
    assert messages and "Call model.requires_grad_(False) before get_peft_model" in messages[0]
    messages.clear()
    with_own_lora(make_model(plora=True))(**speech)
    make_model(plora=True)(**speech)
    assert not messages


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_plora", [True, False])
def test_untrained_it_changes_nothing_and_trained_it_changes_all(with_plora, speech):
    model = make_model(plora=with_plora)
    before = answers(model, speech)
    own = with_own_lora(model, train=False)
    assert are_equal(answers(own, speech), before) == [True, True]
    own = with_own_lora(make_model(plora=with_plora))
    for changed, original in zip(answers(own, speech), before):
        assert (changed - original).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_both_written_by_hand(family):
    model = make_model(family, plora={"r": 3, "lora_alpha": 7})
    # Other layers than PLoRA's all, and under names that every family has.
    own = with_own_lora(model, target_modules=r".*language_model.*\.(q_proj|v_proj|qkv_proj|query_key_value)")
    embeds, is_speech = prompt(model)
    everywhere, speech_only = base_llm(model), base_llm(model)
    num_own = 0
    for name, layer in model.language_model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        matrices = {key: (layer.lora_A[key].weight, layer.lora_B[key].weight) for key in layer.lora_A}
        num_own += "default" in matrices

        def add(module, inputs, output, matrices=matrices, use_plora=True):
            if "default" in matrices:
                low, high = matrices["default"]
                output = output + (inputs[0] @ low.T @ high.T) * (6 / 4)
            if use_plora:
                low, high = matrices["plora"]
                output = output + is_speech[..., None] * (inputs[0] @ low.T @ high.T) * (7 / 3)
            return output

        def add_own_only(*args, add=add):
            return add(*args, use_plora=False)

        speech_only.get_submodule(name).register_forward_hook(add)
        everywhere.get_submodule(name).register_forward_hook(add_own_only)
    assert num_own >= 2
    with torch.no_grad():
        torch.testing.assert_close(
            logits_at(own.base_model.model, embeds, is_speech),
            speech_only(inputs_embeds=embeds).logits,
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(
            model.language_model(inputs_embeds=embeds).logits,
            everywhere(inputs_embeds=embeds).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_switched_off_it_is_the_model_before(speech):
    model = make_model(plora=True)
    before = answers(model, speech)
    own = with_own_lora(model)
    changed = answers(own, speech)
    with own.disable_adapter():
        assert are_equal(answers(own, speech), before) == [True, True]
    assert are_equal(answers(own, speech), changed) == [True, True]
    assert are_equal(changed, before) == [False, False]


def test_it_generates_for_a_batch_what_it_generates_alone(processor):
    own = with_own_lora(make_model(plora=True))
    durations_s = (0.4, 1.5)
    both = spoken_prompts(processor, durations_s)
    outputs = own.generate(**both, **GREEDY)[:, both["input_ids"].shape[1] :]
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in both.items()}
        num_mel = int(alone["input_features_mask"].sum())
        alone["input_features"] = alone["input_features"][..., :num_mel]
        alone["input_features_mask"] = alone["input_features_mask"][:, :num_mel]
        output = own.generate(**alone, **GREEDY)[:, both["input_ids"].shape[1] :]
        assert torch.equal(output[0], outputs[row])
    with own.disable_adapter():
        without = own.generate(**both, **GREEDY)[:, both["input_ids"].shape[1] :]
    assert not torch.equal(without, outputs), "the LoRA had no part in it, so this test proved nothing"


# -- saving, taking off, merging --------------------------------------------------------------------------------------


def test_its_folder_loads_bit_for_bit(speech, tmp_path):
    model = make_model(plora=True)
    model.save_pretrained(tmp_path / "model")
    own = with_own_lora(model)
    expected = answers(own, speech)
    own.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(BlspKdForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "own")
    assert are_equal(answers(loaded, speech), expected) == [True, True]


def test_its_folder_holds_it_alone(tmp_path):
    """PEFT saved partial LoRA with it, and put it over the partial LoRA of the model that it was loaded onto."""
    with_own_lora(make_model(plora=True)).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not {name for name in names if "plora" in name} and len(names) == 2 * 2 * 2
    other = make_model(plora=True, seed=1)
    before = [parameter.clone() for parameter in other.plora.parameters]
    PeftModel.from_pretrained(other, tmp_path)
    assert all(torch.equal(now, then) for now, then in zip(other.plora.parameters, before))


@pytest.mark.parametrize("method", ["merge_and_unload", "unload", "merge_adapter"])
def test_it_is_not_merged_over_partial_lora(method, speech):
    own = with_own_lora(make_model(plora=True))
    before = answers(own, speech)
    with pytest.raises(NotImplementedError, match="cannot be merged.*speech positions only.*use PEFT's delete_adapter"):
        getattr(own, method)()
    assert are_equal(answers(own, speech), before) == [True, True]


def test_it_is_merged_where_there_is_no_partial_lora(speech):
    own = with_own_lora(make_model(plora=False))
    expected = answers(own, speech)
    merged = own.merge_and_unload()
    assert type(merged) is BlspKdForCausalLM and not any("lora" in name for name in merged.state_dict())
    for actual, wanted in zip(answers(merged, speech), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["default", "z"])  # PEFT activates what is left, in alphabetical order
def test_taken_off_it_leaves_the_model_before(name, speech, tmp_path):
    """PEFT then activated partial LoRA by its name: speech positions got it twice."""
    model = make_model(plora=True)
    before = answers(model, speech)
    own = get_peft_model(model.requires_grad_(False), lora_config(init_lora_weights=False), adapter_name=name)
    assert are_equal(answers(own, speech), before) == [False, False]
    own.delete_adapter(name)
    assert are_equal(answers(model, speech), before) == [True, True]
    assert own.base_model.model is model  # PEFT itself cannot be called without any adapter
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert are_equal(answers(loaded, speech), before) == [True, True]


@pytest.mark.parametrize("second", ["other", "z"])
def test_one_of_two_taken_off_leaves_the_other(second, speech):
    model = make_model(plora=True)
    own = with_own_lora(model)
    expected = answers(own, speech)
    own.add_adapter(second, lora_config(init_lora_weights=False))
    own.set_adapter(second)
    assert are_equal(answers(own, speech), expected) == [False, False]
    own.delete_adapter(second)
    own.set_adapter("default")
    assert are_equal(answers(own, speech), expected) == [True, True]


# -- partial LoRA as a PEFT folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_partial_lora_is_a_lora_for_the_bare_llm(family, tmp_path):
    model = make_model(family, plora={"r": 3, "lora_alpha": 7})
    model.plora.save_pretrained(tmp_path, base_model_name_or_path="org/llm")
    assert LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "org/llm"
    bare = PeftModel.from_pretrained(base_llm(model), tmp_path)
    embeds, is_speech = prompt(model)
    with torch.no_grad():
        expected = logits_at(model, embeds, torch.ones_like(is_speech))
        torch.testing.assert_close(bare(inputs_embeds=embeds).logits, expected)
        assert not torch.allclose(expected, logits_at(model, embeds, is_speech), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_partial_lora_reads_back_bit_for_bit(family, tmp_path):
    model = make_model(family, plora=True)
    model.plora.save_pretrained(tmp_path)
    other = make_model(family, plora=True)
    for parameter in other.plora.parameters:
        parameter.data.normal_()
    other.plora.load_pretrained(tmp_path)
    for name, parameter in model.plora.named_parameters.items():
        assert torch.equal(other.plora.named_parameters[name], parameter), name
    assert all(parameter.requires_grad for parameter in other.plora.parameters)


@pytest.mark.parametrize(
    "options, text, message",
    [
        ({"r": 5}, {}, "its rank should be 5, but is 4"),
        ({"lora_alpha": 2}, {}, "its lora_alpha should be 2, but is 16"),
        (
            {"target_modules": ["q_proj"]},
            {},
            r"its weights should be \[\], but is \[\('base_model.model.model.layers.0",
        ),
        ({}, {"num_hidden_layers": 3}, r"its weights should be \[\('base_model.model.model.layers.2"),
        ({}, {"hidden_size": 48}, "does not fit this model's partial LoRA"),
    ],
    ids=["rank", "alpha", "modules", "depth", "width"],
)
def test_a_folder_that_does_not_fit_is_named(options, text, message, tmp_path):
    make_model(plora={"r": 4}).plora.save_pretrained(tmp_path)
    model = make_model(plora={"r": 4, **options}, text=text)
    before = [parameter.clone() for parameter in model.plora.parameters]
    with pytest.raises(ValueError, match=message):
        model.plora.load_pretrained(tmp_path)
    assert all(torch.equal(now, then) for now, then in zip(model.plora.parameters, before)), "half of it was read"
