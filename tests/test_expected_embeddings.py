"""Speech tokens as expected embeddings of the LLM's tokens: against a literal average, in the model, in training."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_blsp_kd import BlspKdConfig, expected_embeddings
from tests.helpers.models import SMALL_CFORMER, make_config, make_model

pytestmark = pytest.mark.numerical

EXPECTED = {**SMALL_CFORMER, "output": "expected_embedding", "output_temperature": 0.5}


def literal_average(states, weight, temperature=1.0):
    """For each state the sum over the vocabulary of probability times embedding, in float64."""
    averages = []
    for state in states.double():
        logits = torch.stack([state @ row / temperature for row in weight.double()])
        averages.append(sum(p * row for p, row in zip(torch.exp(logits - logits.logsumexp(0)), weight.double())))
    return torch.stack(averages)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_averages_and_gradients_are_the_literal_ones(monkeypatch, rows_at_once, temperature):
    monkeypatch.setattr(expected_embeddings, "MOST_LOGITS", 20 * rows_at_once)
    torch.manual_seed(0)
    embeddings = nn.Embedding(20, 6)
    states = torch.randn(1, 5, 6, requires_grad=True)
    given = expected_embeddings.expected_embeddings(states, embeddings, temperature)
    expected = literal_average(states[0], embeddings.weight, temperature)
    torch.testing.assert_close(given[0], expected.float())
    direction = torch.randn(5, 6, dtype=torch.float64)
    [actual] = torch.autograd.grad((given[0].double() * direction).sum(), states, retain_graph=True)
    [literal] = torch.autograd.grad((expected * direction).sum(), states)
    torch.testing.assert_close(actual, literal)
    assert torch.autograd.grad(given.sum(), embeddings.weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_token_that_is_certain_gives_what_the_llm_reads_for_it(family):
    """Gemma 3 multiplies its embeddings as it looks them up."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "pad_token_id": 0}
    embeddings = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).get_input_embeddings()
    ids = torch.tensor([[3, 17], [39, 3]])
    # The state whose logits are 1000 at the token and 0 elsewhere; it exists, as there are more columns than needed.
    embeddings.weight.data = torch.linalg.qr(torch.randn(40, 40))[0][:, :32]
    states = 1000 * torch.linalg.pinv(embeddings.weight.data)[:, ids].movedim(0, -1)
    with torch.no_grad():
        read = embeddings(ids)
        certain = torch.softmax(states @ embeddings.weight.T, -1).gather(-1, ids[..., None]).squeeze(-1) > 1 - 1e-6
        given = expected_embeddings.expected_embeddings(states, embeddings)
    assert certain.any()
    torch.testing.assert_close(given[certain], read[certain])


def test_only_what_the_llm_reads_is_averaged(collator, rows):
    """The transcript is read off the same states, so the loss of a recognition warm-up is that of a projection."""
    losses = {"transcript_ce": 1.0, "quantity": 1.0, "response_kl": 0.0, "input_kl": 0.0}
    plain, averaged = (make_model(adapter=adapter, distillation=losses) for adapter in (SMALL_CFORMER, EXPECTED))
    averaged.load_state_dict(plain.state_dict())
    batch = collator(rows)
    clips = {name: batch[name] for name in ("input_features", "input_features_mask", "num_speech_tokens")}
    with torch.no_grad():
        of_plain, of_averaged = plain.get_audio_features(**clips), averaged.get_audio_features(**clips)
        assert torch.equal(of_plain.pooler_output, of_plain.token_states)
        assert torch.equal(of_averaged.token_states, of_plain.token_states)
        weight = averaged.get_input_embeddings().weight
        for states, vectors in zip(of_averaged.token_states, of_averaged.pooler_output):
            torch.testing.assert_close(vectors, literal_average(states, weight, temperature=0.5).float())
    parts = [model.train()(**batch).loss_parts["transcript_ce"] for model in (plain, averaged)]
    assert torch.equal(*parts)


def test_the_adapter_is_trained_through_the_average(collator, rows):
    losses = {"response_kl": 1.0, "input_kl": 0.0, "quantity": 0.0}
    model = make_model(adapter=EXPECTED, distillation=losses).train()
    model(**collator(rows)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.adapter.output_proj.parameters())
    assert model.get_input_embeddings().weight.grad is None


def test_the_option_is_stored_and_others_are_refused(tmp_path):
    make_config(adapter=EXPECTED).save_pretrained(tmp_path)
    stored = BlspKdConfig.from_pretrained(tmp_path).adapter
    assert (stored["output"], stored["output_temperature"]) == ("expected_embedding", 0.5)
    assert (make_config().adapter["output"], make_config().adapter["output_temperature"]) == ("projection", 1.0)
    with pytest.raises(ValueError, match="output must be one of .'projection', 'expected_embedding'.*got 'mean'"):
        make_config(adapter={**SMALL_CFORMER, "output": "mean"})
    for temperature in (0, -1.0, "low", float("nan"), True):
        with pytest.raises(ValueError, match=f"output_temperature must be above 0.*got {temperature!r}"):
            make_config(adapter={**EXPECTED, "output_temperature": temperature})
