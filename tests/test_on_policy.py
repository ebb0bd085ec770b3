"""The on-policy stage: what the student answers, who scores it, and that a resumed training gives the same answers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.training.command_line import unfold_recipe
from modeling_blsp_kd.training.on_policy import OnPolicyOptions, with_own_answers
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing.training_rows.options import DataOptions
from tests.helpers.literal_losses import literal_sums
from tests.helpers.models import make_model
from tests.helpers.trainers import NUM_ROWS, make_trainer

pytestmark = pytest.mark.numerical

REVERSE = {"divergence": "reverse", "end_of_turn_kl": 0.5}
GREEDY = OnPolicyOptions(share=1.0, temperature=0.0, max_new_tokens=6)
SAMPLED = OnPolicyOptions(share=0.5, temperature=1.0, max_new_tokens=6)


def answered(model, batch, options=GREEDY, seed=0, step=0, place=0, in_step=False):
    return with_own_answers(model, batch, options, seed, step, place, in_step)


def response(batch, row):
    labels = batch["labels"][row]
    return labels[labels != -100].tolist()


def test_the_student_answers_and_the_teacher_reads_the_transcript_with_these_answers(collator, rows):
    model = make_model(plora={"lora_dropout": 0.5}, distillation=REVERSE).train()
    rows = [rows[0], {**rows[1], "audio": None}, rows[2]]
    given, random_state = collator(rows), torch.get_rng_state()
    batch, (num_tokens, num_rows) = answered(model, given)
    assert torch.equal(torch.get_rng_state(), random_state) and model.training, "training goes on as without answers"
    assert num_rows == 2 and response(batch, 1) == response(given, 1), "a row of text only keeps its response"
    assert num_tokens == len(response(batch, 0)) + len(response(batch, 2))
    for row, clip in ((0, 0), (2, 1)):
        alone = collator([rows[row]])
        start = int((alone["labels"][0] != -100).long().argmax())
        features = {name: alone[name] for name in ("input_features", "input_features_mask", "num_speech_tokens")}
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = (
            model.eval().generate(input_ids=alone["input_ids"][:, :start], **features, **options)[0, start:].tolist()
        )
        assert response(batch, row) == expected
        for ids, mask in (("input_ids", "attention_mask"), ("teacher_input_ids", "teacher_attention_mask")):
            length, answer = int(batch[mask][row].sum()), len(expected)
            before = given[ids][row][: length - answer].tolist()
            assert batch[ids][row, :length].tolist() == before + expected
        in_teacher = batch["teacher_is_response"][row]
        assert batch["teacher_input_ids"][row][in_teacher].tolist() == expected
        content = [each["teacher_input_ids"][row][each["teacher_is_content"][row]] for each in (batch, given)]
        assert torch.equal(*content) and len(content[0]) == given["num_speech_tokens"][clip]


def test_own_answers_are_scored_as_literally(collator, rows):
    model = make_model(plora=True, distillation=REVERSE)
    batch, _ = answered(model, collator(rows))
    parts, expected = model(**batch).loss_parts, literal_sums(model, batch)
    for name in ("response_kl", "input_kl", "end_of_turn_kl"):
        assert parts[name][0].item() == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-4), name
    num_ends = sum(2 in response(batch, row) for row in range(len(rows)))
    assert parts["end_of_turn_kl"][1] == num_ends, "an answer that was cut has no end of turn"


def test_answers_follow_from_seed_step_and_rows(collator, rows):
    model, batch = make_model(), collator(rows)
    first, _ = answered(model, batch, SAMPLED)
    assert torch.equal(answered(model, batch, SAMPLED)[0]["labels"], first["labels"])
    draws = {tuple(map(tuple, answered(model, batch, SAMPLED, step=step)[0]["labels"].tolist())) for step in range(8)}
    assert len(draws) > 4
    none = OnPolicyOptions(share=1e-9)
    assert answered(model, batch, none)[0] is batch and answered(model, batch, none, in_step=True)[0] is batch


def test_accumulation_does_not_change_what_greedy_answers_teach(tmp_path, processor, collator):
    results = []
    for accumulation in (1, 4):
        trainer = make_trainer(
            tmp_path,
            processor,
            collator,
            model=make_model(distillation=REVERSE),
            on_policy=OnPolicyOptions(share=0.6, temperature=0.0, max_new_tokens=6),
            per_device_train_batch_size=NUM_ROWS // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        results.append({name: log[name] for name in ("loss", "response_kl", "on_policy_answer_tokens")})
    assert results[0] == pytest.approx(results[1], rel=1e-4) and results[0]["on_policy_answer_tokens"] > 0


def test_resuming_gives_the_uninterrupted_run(tmp_path, processor, collator):
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"optim": "adamw_torch", "on_policy": SAMPLED}
    whole = make_trainer(tmp_path, processor, collator, model=make_model(plora=True), **options)
    whole.train()
    resumed = make_trainer(tmp_path, processor, collator, model=make_model(seed=9, plora=True), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_what_makes_no_sense_is_refused(collator, rows):
    for options, message in (
        ({"share": 0.0}, r"must lie in \(0, 1\], got 0"),
        ({"share": 0.5, "temperature": -1.0}, r"must be at least 0, got -1"),
        ({"share": 0.5, "max_new_tokens": 0}, r"must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OnPolicyOptions(**options)
    batch = {**collator(rows), "teacher_top_ids": torch.zeros(3, 9, 2)}
    with pytest.raises(ValueError, match="On-policy rows need the teacher itself"):
        answered(make_model(), batch)


def test_the_recipe_is_one_that_the_script_reads():
    path = Path(__file__).parent.parent / "examples" / "recipes" / "stages" / "on_policy.yaml"
    words = [*unfold_recipe([str(path)]), "--use_cpu", "true", "--bf16", "false"]
    model, _, args = HfArgumentParser((ModelOptions, DataOptions, Arguments)).parse_args_into_dataclasses(words)
    assert args.on_policy_share == 0.75 and model.start_from
    assert BlspKdConfig(distillation=json.loads(model.distillation)).distillation["divergence"] == "reverse"
