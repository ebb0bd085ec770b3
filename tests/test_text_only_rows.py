"""Rows without audio: batches that mix them with spoken rows, and batches of nothing else.

Leaves out: what the collator makes of spoken rows (`test_data_collator.py`).
"""

import pytest
import torch

from tests.helpers.models import make_model

pytestmark = pytest.mark.numerical

OPTIONS = {
    "plora": {"plora": {"lora_dropout": 0.0}, "distillation": {"response_ce": 0.5, "transcript_ce": 0.5}},
    "adapter": {"freeze_speech_encoder": True},
    "subsampler": {
        "adapter": {"type": "subsampler"},
        "distillation": {"response_ce": 1.0, "response_kl": 1.0, "input_kl": 0.0, "quantity": 0.0},
    },
}
COUNTS = torch.tensor([11, 7, 3])  # of an imagined optimiser step


def text_only(row):
    return {**row, "audio": None}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=COUNTS).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_mixed_batch_is_the_sum_of_its_rows(options, collator, rows):
    model = make_model(**options).train()
    mixed = [rows[0], text_only(rows[1]), rows[2]]
    loss, together = gradients(model, collator(mixed))
    alone = [gradients(model, collator([row])) for row in mixed]
    torch.testing.assert_close(loss, sum(row_loss for row_loss, _ in alone))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(row[name] for _, row in alone), rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_audio_has_gradients_of_zero(options, checkpointing, collator, rows):
    """A parameter without a gradient makes the other processes wait for ever."""
    model = make_model(**options).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, all_zero = gradients(model, collator([text_only(rows[0]), {**rows[1], "audio": None}]))
    assert all(not gradient.any() for gradient in all_zero.values())


def test_the_kl_of_a_text_only_row_is_zero(collator, rows):
    model = make_model(plora={})
    parts = model(**collator([text_only(row) for row in rows])).loss_parts
    assert parts["response_kl"][0].abs() < 1e-5
    assert parts["response_kl"][1] > 0
    assert parts["input_kl"].tolist() == [0, 0]
    assert parts["quantity"].tolist() == [0, 0]


def test_counts_of_mixed_rows(collator, rows):
    batch = collator([text_only(rows[0]), rows[1]])
    assert len(batch["input_features"]) == len(batch["num_speech_tokens"]) == 1
    assert batch["teacher_is_content"].sum(1).tolist() == [0, int(batch["num_speech_tokens"])]
    assert len(collator([text_only(rows[0])])["input_features"]) == 0
