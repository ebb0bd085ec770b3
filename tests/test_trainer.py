"""The Trainer glue: equal losses under accumulation, logging, checkpoints, resuming.

Leaves out: several processes (`test_equivalence.py`).
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_blsp_kd.training.batch_counts import first_rows
from tests.helpers.models import make_model
from tests.helpers.prompts import clip
from tests.helpers.trainers import NUM_ROWS, make_trainer

pytestmark = pytest.mark.numerical


def weights_and_log(trainer):
    trainer.train()
    weights = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return weights, trainer.state.log_history[0]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_accumulation_changes_neither_loss_nor_weights(accumulation, tmp_path, processor, collator):
    """A forward that ignores num_items_in_batch trained with a loss multiplied by the accumulation."""
    expected, expected_log = weights_and_log(make_trainer(tmp_path, processor, collator))
    trainer = make_trainer(
        tmp_path,
        processor,
        collator,
        per_device_train_batch_size=NUM_ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    actual, log = weights_and_log(trainer)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)
    assert set(log) == set(expected_log)
    for name in (
        "loss",
        "response_kl",
        "input_kl",
        "quantity",
        "response_ce",
        "token_count_error",
        "token_count_accuracy",
    ):
        assert log[name] == pytest.approx(expected_log[name], rel=1e-4), name


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3])
def test_first_rows_of_a_batch_are_the_batch_of_the_first_rows(num_rows, collator, rows):
    """The last batches of several processes hold rows of the first ones again, which counted twice."""
    model = make_model(plora={"lora_dropout": 0.0}, distillation={"response_ce": 0.5, "transcript_ce": 0.5}).train()
    rows = [rows[0], {**rows[1], "audio": None}, rows[2]]
    output = model(**first_rows(collator(rows), num_rows, model.config.audio_token_id))
    output.loss.backward()
    if num_rows == 0:
        assert output.loss == 0 and all(not part.any() for part in output.loss_parts.values())
        # Other processes wait for the gradients of this one.
        assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
        return
    expected = model(**collator(rows[:num_rows])).loss_parts
    for name, part in expected.items():
        torch.testing.assert_close(output.loss_parts[name], part, rtol=1e-4, atol=1e-5, msg=name)


def test_loss_is_the_weighted_sum_of_its_logged_parts(tmp_path, processor, collator):
    _, log = weights_and_log(make_trainer(tmp_path, processor, collator))
    parts = log["response_kl"] + log["input_kl"] + log["quantity"] + 0.5 * log["response_ce"]
    assert log["loss"] == pytest.approx(parts, rel=1e-5)


def test_evaluation_reports_the_same_quantities_as_training(tmp_path, processor, collator):
    trainer = make_trainer(tmp_path, processor, collator, per_device_eval_batch_size=5, learning_rate=0.0)
    metrics = trainer.evaluate()
    _, log = weights_and_log(trainer)
    for name in ("loss", "response_kl", "input_kl", "quantity", "token_count_accuracy", "token_count_error"):
        assert metrics[f"eval_{name}"] == pytest.approx(log[name], rel=1e-4), name


def test_evaluation_reports_the_kls_even_when_the_loss_does_not_weigh_them(tmp_path, processor, collator):
    model = make_model(distillation={"response_kl": 0.0, "input_kl": 0.0, "response_ce": 1.0})
    metrics = make_trainer(tmp_path, processor, collator, model=model).evaluate()
    assert metrics["eval_response_kl"] > 0 and metrics["eval_input_kl"] > 0
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_response_ce"] + metrics["eval_quantity"], rel=1e-5)


def test_checkpoints_hold_the_processor_and_load(tmp_path, processor, collator):
    trainer = make_trainer(tmp_path, processor, collator, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    prompt = {"text": "repeat<|audio|>", "audio": clip(), "sampling_rate": 16_000}
    expected, actual = processor(**prompt), AutoProcessor.from_pretrained(checkpoint)(**prompt)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_resuming_gives_the_uninterrupted_run(tmp_path, processor, collator):
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path, processor, collator, model=make_model(plora=True), **options)
    whole.train()
    resumed = make_trainer(tmp_path, processor, collator, model=make_model(seed=9, plora=True), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("has_processor", [True, False])
def test_a_trainer_without_the_processor_warns_of_what_its_checkpoints_lack(
    has_processor, tmp_path, processor, collator, caplog
):
    """Their config named pipelines, the code of which they did not have, and nothing said so."""
    trainer = make_trainer(tmp_path, processor if has_processor else None, collator)
    assert ("Pass processing_class=processor" in caplog.text) is not has_processor
    trainer.save_model(tmp_path / "saved")
    named = json.loads((tmp_path / "saved" / "config.json").read_text())["custom_pipelines"].values()
    files = {f"{code['impl'].split('.')[0]}.py" for code in named}
    assert {(tmp_path / "saved" / name).exists() for name in files} == {has_processor}
