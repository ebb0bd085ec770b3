"""Every field of transformers' TrainingArguments: docs/training_arguments.md says what becomes of it, this shows it.

Leaves out: what takes several processes or a GPU (`test_equivalence.py`, `test_accelerate_configs.py`).
"""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_blsp_kd import BlspKdTrainer
from tests.helpers.models import make_model
from tests.helpers.trainers import NUM_ROWS, make_trainer, many_rows

ROOT = Path(__file__).parent.parent
TABLE = re.findall(
    r"^\| (`.*?`) \| (works|no effect|refused)(.*?) \| (.*?) \|$",
    (ROOT / "docs" / "training_arguments.md").read_text(),
    re.MULTILINE,
)
OUTCOMES = {name: outcome for names, outcome, _, _ in TABLE for name in re.findall(r"`(\w+)`", names)}

REFUSED = {
    "label_smoothing_factor": (0.1, "soft already"),
    "use_liger_kernel": (True, "Liger's kernels"),
    "torch_compile": (True, "falls into dozens of pieces"),
    "torch_compile_backend": ("eager", "Compile the LLM's layers instead"),
    "torch_compile_mode": ("default", "Compile the LLM's layers instead"),
    "liger_kernel_config": ({"rope": True}, "Liger's kernels"),
    "label_names": (["answers"], "an evaluation would have no loss"),
    "enable_jit_checkpoint": (True, "saves on SIGTERM by itself"),
    "parallelism_config": (ParallelismConfig(tp_size=2), "placed by position"),
}
# Values of one kind of argument that is otherwise supported.
REFUSED_VALUES = [
    ("train_sampling_strategy", "batch_rebalance", "'group_by_length' also keeps padding low"),
    ("accelerator_config", {"split_batches": True}, "cut a batch into rows"),
    ("debug", "underflow_overflow", "boolean masks"),
    ("accelerator_config", {"dispatch_batches": True}, "cut a batch into rows"),
]
NO_EFFECT = {
    "remove_unused_columns": True,
    "logging_nan_inf_filter": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "batch_eval_metrics": True,
    "include_for_metrics": ["inputs", "loss"],
    "use_cache": True,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "resume_from_checkpoint": "nowhere",
}


class Recorder(TrainerCallback):
    """Counts what the Trainer does."""

    def __init__(self):
        self.logs, self.evaluated_at, self.saved_at, self.columns = [], [], [], None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated_at.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.saved_at.append(state.global_step)


def run(folder, processor, collator, callbacks=(), model=None, resume=None, **options):
    trainer = make_trainer(folder, processor, collator, model=model, **options)
    recorder = Recorder()
    for callback in (recorder, *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_same(actual, expected):
    for name, value in trained(expected).items():
        assert torch.equal(trained(actual)[name], value), name


FOUR_STEPS = {"per_device_train_batch_size": 4, "max_steps": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, processor, collator):
    """Four steps with none of the arguments in question."""
    return run(tmp_path_factory.mktemp("plain"), processor, collator, **FOUR_STEPS)[0]


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_every_field_once():
    """A new version of transformers brings new fields, of which nobody would have thought."""
    listed = [name for names, _, _, _ in TABLE for name in re.findall(r"`(\w+)`", names)]
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert sorted(listed) == sorted(fields)


def test_each_line_of_the_table_names_a_test_that_exists():
    defined = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for names, _, _, tests in TABLE:
        assert re.findall(r"`(\w+)`", tests), names
        for test in re.findall(r"`(\w+)`", tests):
            assert f"def {test}(" in defined, f"{names}: {test}"


def test_the_table_says_what_is_refused_and_what_has_no_effect():
    assert {name for name, outcome in OUTCOMES.items() if outcome == "refused"} == set(REFUSED)
    assert {name for name, outcome in OUTCOMES.items() if outcome == "no effect"} == set(NO_EFFECT)


# -- refused, or without effect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "reason"), [*((name, *given) for name, given in REFUSED.items()), *REFUSED_VALUES]
)
def test_what_cannot_do_what_it_says_is_refused_with_the_reason(name, value, reason, tmp_path, processor, collator):
    """Label smoothing trained without labels, no kernel of Liger was there, label_names gave an eval_loss of 0."""
    with pytest.raises(ValueError, match=rf"(?s)BLSP-KD refuses:.*{name}=.*{reason}"):
        make_trainer(tmp_path, processor, collator, **{name: value})


@pytest.mark.parametrize("has_plora", [True, False])
def test_fsdp_may_not_checkpoint_activations_of_partial_lora(has_plora, tmp_path, processor, collator, monkeypatch):
    """FSDP's own checkpointing lost the speech positions: a CheckpointError, or, reentrant, no gradients at all."""
    plugin = FullyShardedDataParallelPlugin(activation_checkpointing=True, fsdp_version=2)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)  # as if FSDP had started this process
    model = make_model(plora=has_plora)
    with pytest.raises(ValueError, match="pass activation_checkpointing=True") if has_plora else nullcontext():
        trainer = make_trainer(tmp_path, processor, collator, model=model)
        assert trainer.is_fsdp_enabled


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(name, tmp_path, processor, collator):
    """compute_metrics was taken and never called, since a distillation step returns no logits."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"takes no {name}"):
        BlspKdTrainer(make_model(), args, collator, **{name: lambda *_: None})


def test_arguments_without_effect_change_nothing(plain, tmp_path, processor, collator):
    """`TrainingArguments("out")` was refused, because its remove_unused_columns is True."""
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, **NO_EFFECT)
    assert_same(trainer, plain)
    assert losses(trainer) == losses(plain)
    expected, actual = plain.evaluate(), trainer.evaluate()
    timed = ("runtime", "per_second", "preparation_time")
    assert {n: v for n, v in actual.items() if not n.endswith(timed)} == {
        n: v for n, v in expected.items() if not n.endswith(timed)
    }


# -- optimisation -----------------------------------------------------------------------------------------------------


def test_optimiser_and_schedule_are_those_of_the_arguments(tmp_path, processor, collator):
    trainer = make_trainer(
        tmp_path,
        processor,
        collator,
        max_steps=10,
        optim="adamw_torch",
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
        warmup_steps=2,
    )
    trainer.train()
    group, without_decay = trainer.optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
    assert (group["initial_lr"], group["weight_decay"], without_decay["weight_decay"]) == (3e-4, 0.1, 0.0)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] < rates[1] and rates[2] == max(rates) == 3e-4 and rates[-1] >= 1e-5


def test_arguments_of_an_optimiser_reach_it(tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, optim="sgd", optim_args="momentum=0.5,nesterov=true")
    assert all((group["momentum"], group["nesterov"]) == (0.5, True) for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd", "adamw_bnb_8bit"])
def test_optimisers_train(optim, tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, optim=optim, learning_rate=1e-3)
    assert all(loss == loss for loss in losses(trainer)) and len(losses(trainer)) == 4
    before = make_model(plora={"lora_dropout": 0.0}, distillation={"response_ce": 0.5}).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained(trainer).items())


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, max_grad_norm=1e-6)
    before = make_model(plora={"lora_dropout": 0.0}, distillation={"response_ce": 0.5}).state_dict()
    moved = sum((value - before[name]).square().sum() for name, value in trained(trainer).items()).sqrt()
    assert 0 < moved <= 1.01e-2 * 1e-6 + 1e-6 * 0.05  # learning rate times norm, and float32's rounding


def test_counts_of_one_process_are_those_of_all(plain, tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, average_tokens_across_devices=False)
    assert_same(trainer, plain)


def test_noise_on_embeddings_reaches_the_students_text_alone(tmp_path, processor, collator):
    plain, noisy = (
        run(tmp_path, processor, collator, neftune_noise_alpha=alpha)[0].state.log_history[0] for alpha in (None, 5.0)
    )
    assert noisy["response_kl"] > plain["response_kl"], "the teacher reads clean text"
    assert noisy["quantity"] == plain["quantity"], "speech is heard as before"


@pytest.mark.parametrize("new_name", [False, True])
def test_checkpointing_of_activations_changes_nothing(new_name, plain, tmp_path, processor, collator):
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, **options)
    assert_same(trainer, plain)


@pytest.mark.long
def test_layers_of_the_llm_may_be_compiled(tmp_path, processor, collator):
    def trained_with(compiled):
        model = make_model(plora={"lora_dropout": 0.0})
        for layer in model.language_model.model.layers if compiled else ():
            layer.compile(dynamic=True, backend="eager")
        return losses(run(tmp_path, processor, collator, model=model, per_device_train_batch_size=4, max_steps=2)[0])

    assert trained_with(True) == pytest.approx(trained_with(False), rel=1e-4)


# -- precision and device ---------------------------------------------------------------------------------------------


def test_bfloat16_computes_in_half_and_keeps_float32_weights(plain, tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, bf16=True, bf16_full_eval=True)
    assert all(value.dtype == torch.float32 for value in trained(trainer).values())
    assert losses(trainer) != losses(plain)
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.1)
    expected = plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.1)


def test_float16_scales_losses_on_a_cpu_too(tmp_path, processor, collator):
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, fp16=True, fp16_full_eval=True)
    assert all(loss == loss for loss in losses(trainer))
    assert trainer.evaluate()["eval_loss"] > 0


def test_tf32_is_refused_by_transformers_where_there_is_none(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--tf32 requires Ampere"):
            TrainingArguments(str(tmp_path), tf32=True, use_cpu=True)


def test_settings_of_the_device_change_nothing(plain, tmp_path, processor, collator):
    options = {"torch_empty_cache_steps": 1, "skip_memory_metrics": False}
    options |= {"save_on_each_node": True, "log_on_each_node": False, "local_rank": -1}
    trainer, recorder = run(tmp_path, processor, collator, **FOUR_STEPS, **options)
    assert_same(trainer, plain)
    assert any("train_mem_cpu_alloc_delta" in logs for logs in recorder.logs)
    assert trainer.args.device.type == "cpu"


def test_settings_of_ddp_reach_accelerate(tmp_path, processor, collator):
    options = {
        "ddp_find_unused_parameters": False,
        "ddp_bucket_cap_mb": 7,
        "ddp_broadcast_buffers": False,
        "ddp_static_graph": True,
    }
    handler = make_trainer(tmp_path, processor, collator, **options).accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb) == (False, 7)
    assert (handler.broadcast_buffers, handler.static_graph) == (False, True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, ddp_timeout=60)
    assert args.ddp_timeout_delta.total_seconds() == 60


def test_full_determinism_trains(tmp_path, processor, collator):
    try:
        first, second = (
            run(tmp_path, processor, collator, **FOUR_STEPS, full_determinism=True, seed=3)[0] for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(first, second)


# -- rows and batches -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_smaller_batch_is_found_when_memory_runs_out(tmp_path, processor, collator):
    """Logged means counted the rows of the attempt that failed, too."""

    def collate(rows):
        if len(rows) > 4 and collate.calls > 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        collate.calls += 1
        return collator(rows)

    collate.calls = 0
    options = {"max_steps": 4, "logging_steps": 4, "per_device_train_batch_size": 8, "auto_find_batch_size": True}
    trainer, _ = run(tmp_path, processor, collate, **options)
    expected, _ = run(tmp_path, processor, collator, **{**options, "per_device_train_batch_size": 4})
    assert trainer.state.train_batch_size == 4 and trainer.state.global_step == 4
    # Weights moved in the failed attempt's step, but each mean is over four steps of four rows.
    assert set(trainer.state.log_history[0]) == set(expected.state.log_history[0])
    assert trainer.sums.parts == {}


@pytest.mark.parametrize("strategy", ["sequential", "random", "group_by_length"])
def test_rows_come_in_the_order_that_is_asked_for(strategy, tmp_path, processor, collator):
    seen = []

    def collate(rows):
        seen.append([row["text"] + row["response"] for row in rows])
        return collator(rows)

    args = make_trainer(tmp_path, processor, collator, **FOUR_STEPS, length_column_name="seconds").args
    args.train_sampling_strategy = strategy
    seconds = [len(row["audio"]["array"]) / 16_000 for row in many_rows()]
    dataset = Dataset.from_list(many_rows()).add_column("seconds", seconds)
    trainer = BlspKdTrainer(make_model(), args, collate, dataset, dataset.select(range(4)), processor)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    seen = seen[:4]
    rows = [row["text"] + row["response"] for row in many_rows()]
    assert sorted(row for batch in seen for row in batch) == sorted(rows), "each row once"
    assert (seen == [rows[start : start + 4] for start in range(0, NUM_ROWS, 4)]) == (strategy == "sequential")


def test_missing_lengths_are_named_before_training(tmp_path, processor, collator):
    """An evaluation without lengths failed after the training."""
    with pytest.raises(ValueError, match="needs the column 'length' in train_dataset, .* but it has .*'audio'"):
        make_trainer(tmp_path, processor, collator, train_sampling_strategy="group_by_length").train()


def test_seeds_decide_order_and_dropout(tmp_path, processor, collator):
    def logged(**options):
        return losses(run(tmp_path, processor, collator, **{**FOUR_STEPS, "max_steps": 1}, **options)[0])

    one = logged(seed=1)
    assert logged(seed=1, data_seed=1) == one != logged(seed=1, data_seed=2)
    assert logged(seed=2) != one


def test_workers_and_prefetching_change_nothing(plain, tmp_path, processor, collator):
    options = {
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, **options)
    expected, _ = run(tmp_path, processor, collator, **FOUR_STEPS, train_sampling_strategy="sequential")
    assert_same(trainer, expected)
    loader = trainer.get_train_dataloader().base_dataloader
    assert (loader.num_workers, loader.prefetch_factor, loader.pin_memory) == (2, 3, False)


@pytest.mark.long
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_is_dropped_where_it_is_asked_for(drop_last, tmp_path, processor, collator):
    trainer, _ = run(
        tmp_path,
        processor,
        collator,
        per_device_train_batch_size=6,
        max_steps=-1,
        num_train_epochs=2,
        dataloader_drop_last=drop_last,
    )
    assert trainer.state.global_step == (4 if drop_last else 6) and trainer.state.epoch == 2


def test_tokens_that_were_seen_are_counted(tmp_path, processor, collator):
    """A clip counts as its one placeholder, since tokens are those of `input_ids`."""
    batch = collator(many_rows())
    for how, expected in (("all", batch["input_ids"].numel()), ("non_padding", batch["attention_mask"].sum().item())):
        trainer, _ = run(tmp_path, processor, collator, include_num_input_tokens_seen=how)
        assert trainer.state.num_input_tokens_seen == expected


# -- logging, evaluation, checkpoints ---------------------------------------------------------------------------------


def test_logs_come_when_they_are_asked_for_with_all_parts(tmp_path, processor, collator):
    _, every = run(tmp_path, processor, collator, **FOUR_STEPS, logging_steps=3, logging_first_step=True)
    with_loss = [logs for logs in every.logs if "loss" in logs]
    assert len(with_loss) == 2 and all("response_kl" in logs for logs in with_loss)
    _, by_epoch = run(tmp_path, processor, collator, **FOUR_STEPS, logging_strategy="epoch")
    assert len([logs for logs in by_epoch.logs if "loss" in logs]) == 1


def test_reports_get_all_parts_and_their_settings(tmp_path, processor, collator):
    """Reporters are callbacks; they read these arguments themselves."""
    options = {"run_name": "mine", "project": "p", "trackio_space_id": "me/s", "trackio_bucket_id": "me/b"}
    options |= {"trackio_static_space_id": "me/t", "log_level": "error", "log_level_replica": "error"}
    trainer, recorder = run(tmp_path, processor, collator, **options, report_to="none")
    assert all(getattr(trainer.args, name) == value for name, value in options.items())
    assert {"loss", "response_kl", "input_kl", "quantity", "grad_norm"} <= set(recorder.logs[0])


def test_evaluations_come_when_they_are_asked_for(tmp_path, processor, collator):
    options = {**FOUR_STEPS, "eval_strategy": "steps", "per_device_eval_batch_size": 5}
    _, recorder = run(tmp_path, processor, collator, **options, eval_steps=2, eval_on_start=True)
    assert recorder.evaluated_at == [0, 2, 4]
    _, recorder = run(tmp_path, processor, collator, **options, eval_steps=1, eval_delay=3)
    assert recorder.evaluated_at == [3, 4]
    _, recorder = run(tmp_path, processor, collator, **{**options, "eval_strategy": "epoch"})
    assert recorder.evaluated_at == [4]


@pytest.mark.long
@pytest.mark.parametrize("metric", ["response_kl", "eval_input_kl", "eval_quantity", "loss"])
def test_the_best_model_is_that_of_the_lowest_kl_or_loss(metric, tmp_path, processor, collator):
    """TrainingArguments take every metric for one that should grow, unless its name ends in "loss": the model of the
    worst KL was kept."""
    options = {**FOUR_STEPS, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    options |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 0.1}
    trainer, _ = run(tmp_path, processor, collator, **options)
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert trainer.state.best_metric == min(values) < max(values)
    assert trainer.state.best_global_step == values.index(min(values)) + 1
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for parameter, value in best.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[parameter], value), parameter


def test_the_best_model_of_several_sets_and_of_a_count(tmp_path, processor, collator):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    trainer = make_trainer(tmp_path, processor, collator, **options, metric_for_best_model="token_count_accuracy")
    assert trainer.args.greater_is_better is True
    args = TrainingArguments(str(tmp_path), use_cpu=True, **options, metric_for_best_model="eval_hard_response_kl")
    sets = {name: Dataset.from_list(many_rows()[:2]) for name in ("easy", "hard")}
    trainer = BlspKdTrainer(make_model(), args, collator, train_dataset=sets["easy"], eval_dataset=sets)
    assert trainer.args.greater_is_better is False
    assert {"eval_easy_loss", "eval_hard_response_kl"} <= set(trainer.evaluate())
    args.metric_for_best_model = "eval_response_kl"
    with pytest.raises(ValueError, match="none of the metrics .* eval_easy_input_kl, .*eval_hard_loss"):
        BlspKdTrainer(make_model(), args, collator, train_dataset=sets["easy"], eval_dataset=sets)


def test_a_metric_that_is_never_reported_is_refused_before_training(tmp_path, processor, collator):
    """It was a KeyError after the first evaluation."""
    options = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    with pytest.raises(ValueError, match="eval_bleu.* none of the metrics .*: eval_input_kl, eval_loss, "):
        make_trainer(
            tmp_path, processor, collator, **options, load_best_model_at_end=True, metric_for_best_model="eval_bleu"
        )


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4]),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, [1, 2, 3, 4]),
        ({"save_strategy": "epoch"}, [4]),
    ],
)
def test_checkpoints_come_when_they_are_asked_for(options, saved, tmp_path, processor, collator):
    _, recorder = run(tmp_path, processor, collator, **FOUR_STEPS, **options)
    assert recorder.saved_at == saved
    kept = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert kept == saved[-options.get("save_total_limit", 4) :]


def test_only_better_models_are_saved(tmp_path, processor, collator):
    options = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 1}
    trainer, recorder = run(tmp_path, processor, collator, **FOUR_STEPS, **options, learning_rate=0.1)
    values = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    better = [step for step, value in enumerate(values, start=1) if value < min(values[: step - 1], default=9e9)]
    assert recorder.saved_at == better and len(better) > 0


def test_a_checkpoint_of_the_model_alone_has_no_optimiser_and_loads(tmp_path, processor, collator):
    options = {**FOUR_STEPS, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    run(tmp_path, processor, collator, **options)
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / "model.safetensors").exists() and not (checkpoint / "optimizer.pt").exists()
    AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer, _ = run(tmp_path, processor, collator, **{**options, "max_steps": 6}, resume=str(checkpoint))
    assert trainer.state.global_step == 6


def test_a_resumed_run_may_read_rows_anew_and_takes_callbacks_along(tmp_path, processor, collator):
    options = {**FOUR_STEPS, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    patience = EarlyStoppingCallback(early_stopping_patience=7)
    run(tmp_path, processor, collator, callbacks=[patience], **options)
    seen = []

    def collate(rows):
        seen.append(len(rows))
        return collator(rows)

    fresh = EarlyStoppingCallback(early_stopping_patience=1)
    trainer, _ = run(
        tmp_path,
        processor,
        collate,
        callbacks=[fresh],
        **{**options, "max_steps": 5},
        ignore_data_skip=True,
        restore_callback_states_from_checkpoint=True,
        resume=get_last_checkpoint(str(tmp_path)),
    )
    assert trainer.state.global_step == 5 and len(seen) >= 1
    restored = [each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
    assert restored[-1].early_stopping_patience == 7


def test_settings_of_the_scheduler_for_a_plateau_follow_the_evaluation(tmp_path, processor, collator):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trainer, _ = run(tmp_path, processor, collator, **FOUR_STEPS, **options, metric_for_best_model="eval_response_kl")
    assert trainer.lr_scheduler.best == min(
        entry["eval_response_kl"] for entry in trainer.state.log_history if "eval_response_kl" in entry
    )


def test_results_are_json(tmp_path, processor, collator):
    """Everything that is logged can be written, as trainer_state.json shows."""
    run(tmp_path, processor, collator, **FOUR_STEPS, save_strategy="steps", save_steps=4)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
