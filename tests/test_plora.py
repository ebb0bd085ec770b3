"""Partial LoRA: nothing at text positions, exact gradients under checkpointing, refusals, copies and compilation."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_blsp_kd import BlspKdForCausalLM
from tests.helpers.models import FAMILIES, base_llm, make_config, make_model, text_config
from tests.helpers.partial_lora import logits_at, prompt

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize("family", FAMILIES)
def test_text_positions_are_the_base_llm_bit_for_bit(family):
    model = make_model(family, plora=True)
    embeds, is_speech = prompt(model)
    expected = base_llm(model)(inputs_embeds=embeds).logits
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, expected)
    assert torch.equal(logits_at(model, embeds, torch.zeros_like(is_speech)), expected)
    adapted = logits_at(model, embeds, is_speech)
    # Causal: nothing changes before the first speech position; much changes at and after it.
    assert torch.equal(adapted[0, :3], expected[0, :3]) and torch.equal(adapted[1, :2], expected[1, :2])
    assert (adapted[0, 3:] - expected[0, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_lora_written_by_hand(family):
    """One CPU's rounding of float32 was more than the tolerance: in float64, both are the same."""
    model = make_model(family, plora={"r": 3, "lora_alpha": 7}).double()
    embeds, is_speech = prompt(model)
    by_hand = base_llm(model)
    for name, layer in model.language_model.named_modules():
        if hasattr(layer, "lora_A"):
            low, high = layer.lora_A["plora"].weight, layer.lora_B["plora"].weight

            def add(module, inputs, output, low=low, high=high):
                return output + is_speech[..., None] * (inputs[0] @ low.T @ high.T) * (7 / 3)

            by_hand.get_submodule(name).register_forward_hook(add)
    torch.testing.assert_close(logits_at(model, embeds, is_speech), by_hand(inputs_embeds=embeds).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "places", [[], [0], [8], [3, 4, 5], [0, 8], [2, 3, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8]], ids=lambda places: str(places)
)
def test_neighbours_and_scattered_positions_give_what_the_mask_gives(places):
    """Neighbours are cut out, scattered positions are gathered, and a graph that is compiled fills by the mask."""
    model = make_model(plora=True).double()
    embeds, _ = prompt(model)
    is_speech = torch.zeros(1, 9, dtype=torch.bool)
    is_speech[0, places] = True
    alone = logits_at(model, embeds[:1], is_speech)
    pair = logits_at(model, embeds, is_speech.expand(2, -1))
    torch.testing.assert_close(pair[:1], alone)
    with model.plora._switched_to(is_speech, None):
        torch.testing.assert_close(model.language_model(inputs_embeds=embeds[:1]).logits, alone)


def test_gradients_are_those_of_the_mask():
    model = make_model(plora={"lora_dropout": 0.0}).double()
    embeds, is_speech = prompt(model)
    parameters = model.plora.parameters

    def gradients(block):
        inputs = embeds.clone().requires_grad_()
        with block:
            logits = model.language_model(inputs_embeds=inputs).logits
        return torch.autograd.grad(logits.square().mean(), [inputs, *parameters])

    expected = gradients(model.plora._switched_to(is_speech, None))
    for actual, wanted in zip(gradients(model.plora.at(is_speech)), expected):
        torch.testing.assert_close(actual, wanted)
        assert (wanted != 0).any()


def test_dropout_keeps_the_mean_and_spread_of_the_mask():
    model = make_model(plora={"lora_dropout": 0.4}).train()
    layer = model.plora.layers[0]
    x = torch.randn(1, 4000, 32, generator=torch.Generator().manual_seed(3))[:, :1].expand(1, 4000, 32).contiguous()
    is_speech = torch.ones(1, 4000, dtype=torch.bool)
    torch.manual_seed(0)
    with model.plora.at(is_speech):
        gathered = layer(x) - layer.base_layer(x)
    with model.plora._switched_to(is_speech, None):
        masked = layer(x) - layer.base_layer(x)
    assert gathered[0, 0].ne(gathered[0, 1]).any(), "every position draws for itself"
    torch.testing.assert_close(gathered.mean(1), masked.mean(1), rtol=0.1, atol=0.1)
    torch.testing.assert_close(gathered.std(1), masked.std(1), rtol=0.1, atol=0.1)


def test_positions_are_told_once_for_all_layers(monkeypatch):
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    waits = []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *args, **kwargs: waits.append(1) or nonzero(*args, **kwargs))
    logits_at(model, embeds, is_speech)
    assert len(waits) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_covers_attention_and_mlp_but_not_the_head(family):
    model = make_model(family, plora=True)
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    head_and_embeddings = (model.get_output_embeddings(), model.get_input_embeddings())
    assert not any(hasattr(module, "lora_A") for module in head_and_embeddings)
    num_linear = sum(
        isinstance(module, torch.nn.Linear)
        for module in AutoModelForCausalLM.from_config(text_config(family)).base_model.modules()
    )
    assert len(model.plora.layers) == num_linear and adapted


def test_untrained_update_is_zero():
    """LoRA injected before `post_init` lost its zero B: the LLM's own initialisation filled it with noise."""
    model = BlspKdForCausalLM(make_config(plora=True)).eval()
    for layer in model.plora.layers:
        assert (layer.lora_B["plora"].weight == 0).all()
        assert (layer.lora_A["plora"].weight != 0).any()
    embeds, is_speech = prompt(model)
    assert torch.equal(logits_at(model, embeds, is_speech), model.language_model(inputs_embeds=embeds).logits)


def test_update_stays_zero_when_a_checkpoint_lacks_it(tmp_path):
    """Missing LoRA weights came back as noise or NaN after from_pretrained."""
    make_model(plora=False).save_pretrained(tmp_path)
    model = BlspKdForCausalLM.from_pretrained(
        tmp_path,
        config=make_config(plora=True),
        key_mapping={r"(language_model\..*_proj)\.weight": r"\1.base_layer.weight"},
    )
    assert all((layer.lora_B["plora"].weight == 0).all() for layer in model.plora.layers)
    assert all(layer.lora_A["plora"].weight.isfinite().all() for layer in model.plora.layers)


def test_no_mask_is_left_behind_after_a_call_or_an_error():
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    before = model.language_model(inputs_embeds=embeds).logits
    logits_at(model, embeds, is_speech)
    with pytest.raises(RuntimeError, match="interrupted"):
        with model.plora.at(is_speech):
            raise RuntimeError("interrupted")
    assert model.plora.is_speech is None
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, before)


def test_blocks_nest_and_restore_the_outer_mask():
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    expected = logits_at(model, embeds, is_speech)
    with model.plora.at(is_speech):
        with model.plora.at(None):
            model.language_model(inputs_embeds=embeds)
        assert torch.equal(model.language_model(inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_exact_when_the_mask_changes_before_backward(use_reentrant):
    """The recomputation used the mask of a later call: silently wrong gradients."""
    model = make_model(plora={"lora_dropout": 0.0}).train()
    embeds, is_speech = prompt(model)

    def gradients():
        model.zero_grad()
        inputs = embeds.clone().requires_grad_()
        logits = logits_at(model, inputs, is_speech)
        with torch.no_grad():
            model.language_model(inputs_embeds=embeds)  # a teacher pass between forward and backward
        logits.square().mean().backward()
        return [inputs.grad, *(parameter.grad.clone() for parameter in model.plora.parameters)]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = []
    hook = model.language_model.base_model.layers[0].input_layernorm.register_forward_hook(
        lambda *_: recomputed.append(1)
    )
    for with_checkpointing, without in zip(gradients(), expected):
        assert torch.equal(with_checkpointing, without)
    hook.remove()
    assert len(recomputed) > 2, "nothing was recomputed, so this test proved nothing"


def test_deepcopy_has_a_mask_of_its_own():
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    expected = logits_at(model, embeds, is_speech)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_at(twin, embeds, is_speech), expected)
    with twin.plora.at(is_speech):
        assert model.plora.is_speech is None


@pytest.mark.long
def test_compiles_without_a_graph_break():
    model = make_model(plora=True).double()
    embeds, is_speech = prompt(model)
    compiled = torch.compile(model.language_model, backend="aot_eager", fullgraph=True)
    for mask in (is_speech, None, ~is_speech):
        with model.plora.at(mask):
            actual = compiled(inputs_embeds=embeds, use_cache=False).logits
            expected = model.language_model(inputs_embeds=embeds, use_cache=False).logits
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.long
def test_compiles_together_with_the_block():
    """A forward pass that is told its speech positions, in one graph."""
    model = make_model(plora=True).double()
    embeds, is_speech = prompt(model)
    inputs = {"inputs_embeds": embeds, "is_speech": is_speech, "use_cache": False}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    torch._dynamo.reset()


def test_save_and_load_keep_the_update(tmp_path):
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    expected = logits_at(model, embeds, is_speech)
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_at(loaded, embeds, is_speech), expected)
    assert all(parameter.requires_grad for parameter in loaded.plora.parameters)


def test_merging_is_refused_with_the_reason():
    model = make_model(plora=True)
    with pytest.raises(NotImplementedError, match="cannot be merged.*speech positions only"):
        model.plora.layers[0].merge()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="nothing to merge"):
        make_model().merge_and_unload()


def test_a_mask_that_does_not_fit_is_named():
    model = make_model(plora=True)
    embeds, is_speech = prompt(model)
    with pytest.raises(ValueError, match=r"\(2, 8\) batch.*\(2, 9, 32\)"):
        logits_at(model, embeds, is_speech[:, :-1])


def test_unknown_target_modules_are_an_error():
    with pytest.raises(ValueError, match="nonsense_proj"):
        make_model(plora={"target_modules": ["nonsense_proj"]})
