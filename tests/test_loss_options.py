"""Losses beyond the paper's: divergence, weights of tokens, end of turn, alignment inside the LLM, each literally.

Leaves out: the paper's losses (`test_modeling.py`) and the kernel of the divergences (`test_distillation.py`).
"""

import pytest
import torch

from modeling_blsp_kd.distillation_step import ItemCounts
from modeling_blsp_kd.row_weights import answer_weights
from modeling_blsp_kd.training.batch_counts import count_items
from modeling_blsp_kd.training.building import warn_of_endless_answers
from processing.evaluation.systems import paper_losses
from tests.helpers.literal_losses import literal_sums, literal_weights
from tests.helpers.models import embed_the_transcript, make_model
from tests.helpers.trainers import NUM_ROWS, make_trainer

pytestmark = pytest.mark.numerical

REVERSE = {"divergence": "reverse", "early_tokens": 2, "early_weight": 3.0, "end_of_turn_kl": 0.5}
JSD = {"divergence": "jsd", "jsd_beta": 0.3, "hardest_share": 0.4, "end_of_turn_kl": 0.5}
INSIDE = {"layer_alignment": 0.7, "alignment_layers": [0, 2]}


@pytest.mark.parametrize("options", [REVERSE, {**JSD, **INSIDE}, {**INSIDE, "alignment_distance": "mse"}])
def test_a_step_with_these_options_equals_a_literal_one(options, collator, rows):
    weights = {"response_kl": 0.8, "input_kl": 0.6, "quantity": 0.0, **options}
    model = make_model("gemma2", plora=True, distillation=weights)
    batch = collator(rows)
    output = model(**batch)
    expected = literal_sums(model, batch)
    num_response = int((batch["labels"] != -100).sum())
    num_content = int(batch["teacher_is_content"].sum())
    counts = {"response_kl": num_response, "input_kl": num_content, "end_of_turn_kl": len(rows)}
    counts["layer_alignment"] = num_content
    wanted = {name for name in counts if weights.get(name)}
    assert set(output.loss_parts) == wanted | {"response_agreement", "token_count_accuracy", "token_count_error"}
    loss = 0
    for name in wanted:
        total, count = output.loss_parts[name].tolist()
        assert count == counts[name]
        assert total == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-4), name
        loss = loss + weights[name] * expected[name] / counts[name]
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-4, atol=1e-4)
    parameter = model.adapter.output_proj.bias
    gradients = [torch.autograd.grad(each, parameter)[0] for each in (output.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_text_after_text_is_aligned_in_every_layer(collator, rows):
    """Where speech tokens are the transcript's own embeddings, no distance is left, so layers and places agree."""
    for distance in ("cosine", "mse"):
        options = {"layer_alignment": 1.0, "alignment_layers": [0, 1, 2], "alignment_distance": distance}
        model = make_model(distillation=options)
        batch = collator(rows)
        embed_the_transcript(model, batch)
        total, count = model(**batch).loss_parts["layer_alignment"]
        assert abs(total / count) < 1e-6


@pytest.mark.parametrize("share, early", [(0.1, 0), (0.5, 3), (1.0, 2)])
def test_weights_average_one_in_each_answer(share, early):
    """So the count of a step is that of its response tokens, however they lie in batches and processes."""
    num_tokens = torch.tensor([10, 0, 1, 30])
    values = torch.rand(41, generator=torch.Generator().manual_seed(0))
    weights = answer_weights(values, num_tokens, early, 4.0, share)
    for kls, actual in zip(values.split(num_tokens.tolist()), weights.split(num_tokens.tolist())):
        options = {"hardest_share": share, "early_tokens": early, "early_weight": 4.0}
        expected = literal_weights(kls.tolist(), options) if len(kls) else []
        torch.testing.assert_close(actual, torch.tensor(expected))
        assert actual.sum().item() == pytest.approx(len(kls), rel=1e-5)


@pytest.mark.parametrize("options", [REVERSE, {**JSD, **INSIDE}])
def test_accumulation_changes_neither_loss_nor_weights(options, tmp_path, processor, collator):
    results = []
    for accumulation in (1, 4):
        trainer = make_trainer(
            tmp_path,
            processor,
            collator,
            model=make_model(plora={"lora_dropout": 0.0}, distillation=options),
            per_device_train_batch_size=NUM_ROWS // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        trained = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
        results.append((trained, {name: log[name] for name in ("loss", "response_kl", "end_of_turn_kl")}))
    (expected, expected_log), (actual, log) = results
    assert log == pytest.approx(expected_log, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [REVERSE, {**JSD, **INSIDE}])
def test_batches_of_two_processes_add_up_to_one(options, collator, rows):
    model = make_model(distillation=options)
    ends = [model.generation_config.eos_token_id]
    counts = count_items([collator(rows)], "cpu", ends)
    whole = model(**collator(rows)).loss
    parts = [model(**collator(rows[part]), num_items_in_batch=counts).loss for part in (slice(1), slice(1, None))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(counts, sum(count_items([collator([row])], "cpu", ends) for row in rows))


def test_a_step_counts_the_ends_of_turns(collator, rows):
    batch = collator(rows)
    counts = ItemCounts(*count_items([batch, batch], "cpu", [2]).tolist())
    assert counts.ends_of_turn == 2 * len(rows)
    assert ItemCounts(*count_items([batch], "cpu").tolist()).ends_of_turn == 0
    model = make_model(distillation={"end_of_turn_kl": 1.0})
    with pytest.raises(ValueError, match=r"needs num_items_in_batch with 4 counts, .* but got 3\."):
        model(**batch, num_items_in_batch=torch.tensor([5, 5, 5]))
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="has no eos_token_id"):
        model(**batch)


def test_an_end_of_turn_that_never_counts_is_refused(processor):
    model = make_model(distillation={"end_of_turn_kl": 1.0})
    warn_of_endless_answers(model, processor)
    model.generation_config.eos_token_id = [7]
    with pytest.raises(ValueError, match=r"at which generation stops, \[7\], but answers end with 2"):
        warn_of_endless_answers(model, processor)


def test_a_measurement_is_the_papers_whatever_was_trained(collator, rows):
    options = {**JSD, **INSIDE, "early_tokens": 2, "early_weight": 3.0}
    model, plain, batch = make_model(distillation=options), make_model(), collator(rows)
    before = model.config.distillation
    with paper_losses(model.config):
        parts = model(**batch).loss_parts
    expected = plain(**batch).loss_parts
    assert model.config.distillation == before and set(parts) == {*expected, "end_of_turn_kl"}
    for name, part in expected.items():
        assert torch.equal(parts[name], part), name


def test_layers_are_compared_under_activation_checkpointing(collator, rows):
    model = make_model(distillation=INSIDE).train()
    batch = collator(rows)
    plain = torch.autograd.grad(model(**batch).loss, model.adapter.output_proj.weight)[0]
    model.activation_checkpointing_enable()
    torch.testing.assert_close(torch.autograd.grad(model(**batch).loss, model.adapter.output_proj.weight)[0], plain)
