"""That it learns: on three rows, a short training takes away nearly all of the distance between speech and text."""

import pytest
from transformers import TrainingArguments

from modeling_blsp_kd import BlspKdTrainer
from tests.helpers.models import make_model

pytestmark = pytest.mark.numerical


def test_a_short_training_makes_the_answers_to_speech_those_to_text(tmp_path, processor, collator, rows):
    model = make_model(
        speech={"d_model": 32}, text={"initializer_range": 0.1}, plora={"r": 16, "lora_alpha": 16}, train_plora=False
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        max_steps=80,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = BlspKdTrainer(model, args, data_collator=collator, train_dataset=rows, processing_class=processor)
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    for part in ("eval_response_kl", "eval_quantity"):
        assert after[part] < 0.1 * before[part], part
    # And it is the sound that they come from: with another row's clip they are not.
    others = [{**row, "audio": other["audio"]} for row, other in zip(rows, rows[1:] + rows[:1])]
    assert trainer.evaluate(others)["eval_response_kl"] > 5 * after["eval_response_kl"]
