"""Faults while training: broken checkpoints, full disks, losses that are not finite, SIGTERM, exact resuming."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from modeling_blsp_kd.training.atomic_checkpoints import ASIDE, SEAL, choose_checkpoint, defect
from tests.helpers.models import make_model
from tests.helpers.trainers import make_trainer

SAVING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
}
# Random in every way that training is: PLoRA's dropout, masked features.
RANDOM = {
    "plora": {"lora_dropout": 0.2},
    "speech": {"apply_spec_augment": True, "mask_time_prob": 0.2, "mask_time_length": 3, "mask_feature_prob": 0.1},
}
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


def trainer_of(folder, processor, collator, seed=0, model=None, **options):
    model = make_model(seed=seed, **RANDOM) if model is None else model
    return make_trainer(folder, processor, collator, model=model, **{**SAVING, **options})


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def means(trainer):
    """All that was logged, but times."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]


def assert_same_run(actual, expected):
    for name, value in weights(expected).items():
        assert torch.equal(actual.model.state_dict()[name], value), name
    assert means(actual) == means(expected)


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor, collator):
    """A run of six steps and its folder, which is not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder, processor, collator)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run_folder(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


@pytest.mark.parametrize("workers", [{}, pytest.param(WORKERS, marks=pytest.mark.long)])
@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_resumed_run_is_the_uninterrupted_one(logging_steps, workers, tmp_path, processor, collator):
    """Means that were logged after a resume left out the steps between the last log and the checkpoint."""
    options = {"logging_steps": logging_steps, "eval_strategy": "steps", "eval_steps": 3, "num_train_epochs": 2}
    options |= workers
    whole = trainer_of(tmp_path, processor, collator, **options)
    whole.train()
    assert len(means(whole)) == 6 // logging_steps + 2
    for step in (2, 4):  # in the first of two epochs, and at its end
        resumed = trainer_of(tmp_path, processor, collator, seed=9, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


def test_each_evaluation_reads_the_rows_that_it_is_given_in_their_order(tmp_path, processor, collator):
    """The Trainer keeps a loader whose workers persist: all evaluations were over the first one's rows."""
    rows = make_trainer(tmp_path, processor, collator).eval_dataset
    rows = rows.add_column("length", list(range(len(rows))))
    seen = {}
    for name, workers in (("alone", {}), ("workers", WORKERS)):
        trainer = trainer_of(tmp_path, processor, collator, train_sampling_strategy="group_by_length", **workers)
        seen[name] = [
            [batch["input_ids"].tolist() for batch in trainer.get_eval_dataloader(dataset)]
            for dataset in (rows, rows.select([0]), rows)
        ]
    assert seen["workers"] == seen["alone"]
    assert len(seen["alone"][0]) > 1 == len(seen["alone"][1]), "batches"


def damage(checkpoint: Path, how: str):
    file = checkpoint / "optimizer.pt"
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "altered":
        contents = bytearray(file.read_bytes())
        contents[len(contents) // 2] ^= 1
        file.write_bytes(contents)
    elif how == "missing":
        file.unlink()
    elif how == "half a seal":
        os.truncate(checkpoint / SEAL, 40)
    else:  # written in place by another Trainer, and killed
        (checkpoint / SEAL).unlink()
        (checkpoint / "trainer_state.json").unlink()


DAMAGES = {
    "truncated": r"optimizer\.pt has \d+ bytes instead of \d+",
    "altered": r"optimizer\.pt was altered",
    "missing": r"optimizer\.pt is missing",
    "half a seal": rf"{SEAL} cannot be read",
    "half-written": r"trainer_state\.json cannot be read",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_used(how, run_folder, caplog):
    damage(run_folder / "checkpoint-6", how)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(True, str(run_folder)) == str(run_folder / "checkpoint-4")
    warning = caplog.messages[-1]
    assert f"Resuming from {run_folder / 'checkpoint-4'}" in warning and f"{run_folder / 'checkpoint-6'}: " in warning
    with pytest.raises(ValueError, match=rf"Cannot resume from .*checkpoint-6: {DAMAGES[how]}"):
        choose_checkpoint(str(run_folder / "checkpoint-6"), str(run_folder))


@pytest.mark.long
def test_training_from_the_checkpoint_before_a_broken_one_is_the_uninterrupted_run(
    saved, run_folder, processor, collator
):
    damage(run_folder / "checkpoint-6", "truncated")
    resumed = trainer_of(run_folder, processor, collator, seed=9)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, saved[1])
    assert defect(run_folder / "checkpoint-6") is None, "written anew over the broken one"
    assert not (run_folder / ASIDE).exists()


def test_no_good_checkpoint_is_an_error(run_folder, tmp_path, processor, collator):
    with pytest.raises(ValueError, match="there is none"):
        trainer_of(tmp_path / "empty", processor, collator).train(resume_from_checkpoint=True)
    for step in (2, 4, 6):
        damage(run_folder / f"checkpoint-{step}", "missing")
    with pytest.raises(ValueError, match=r"all are broken: .*checkpoint-6: optimizer.*checkpoint-2: optimizer"):
        choose_checkpoint(True, str(run_folder))
    with pytest.raises(ValueError, match="it is no folder"):
        choose_checkpoint(str(tmp_path / "nowhere"), str(run_folder))


def test_checkpoints_of_other_trainers_are_taken_unverified(run_folder, caplog):
    (run_folder / "checkpoint-6" / SEAL).unlink()
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(True, str(run_folder)) == str(run_folder / "checkpoint-6")
    assert "cannot be verified" in caplog.text


def test_a_seal_lists_every_file(saved):
    checkpoint = saved[0] / "checkpoint-6"
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(json.loads((checkpoint / SEAL).read_text())["files"]) == present - {SEAL}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "loss_sums_0.json", "trainer_state.json"} < present


@pytest.mark.long
def test_a_leftover_of_a_killed_writer_is_no_checkpoint(saved, run_folder, processor, collator):
    shutil.copytree(run_folder / "checkpoint-6", run_folder / ASIDE / "checkpoint-8")
    (run_folder / ASIDE / "checkpoint-8" / "optimizer.pt").unlink()
    assert choose_checkpoint(True, str(run_folder)) == str(run_folder / "checkpoint-6")
    shutil.rmtree(run_folder / "checkpoint-6")
    trainer = trainer_of(run_folder, processor, collator)
    trainer.train(resume_from_checkpoint=True)
    assert not (run_folder / ASIDE).exists()
    assert_same_run(trainer, saved[1])


@pytest.mark.long
def test_an_old_checkpoint_goes_only_when_the_new_one_is_there(tmp_path, processor, collator, monkeypatch):
    """The Trainer's own rotation may run while the new checkpoint is not yet safe."""
    seen = []

    def move_into_place(written, final):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        real_move(written, final)

    from modeling_blsp_kd.training import saving as module

    real_move = module.move_into_place
    monkeypatch.setattr(module, "move_into_place", move_into_place)
    trainer_of(tmp_path, processor, collator, save_total_limit=1).train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.long
def test_the_best_checkpoint_stays_and_is_known_by_its_final_name(tmp_path, processor, collator):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 0.05}
    trainer = trainer_of(tmp_path, processor, collator, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert defect(best) is None
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


@pytest.mark.long
def test_thin_checkpoints_are_sealed_and_resumed(tmp_path, backbones, processor, collator):
    from modeling_blsp_kd import BlspKdForCausalLM

    def make():
        adapter = {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1}
        torch.manual_seed(0)
        return BlspKdForCausalLM.from_backbones(
            *backbones, audio_token_id=processor.audio_token_id, thin=True, adapter=adapter
        )

    whole = trainer_of(tmp_path, processor, collator, model=make())
    whole.train()
    damage(tmp_path / "checkpoint-6", "altered")
    resumed = trainer_of(tmp_path, processor, collator, model=make())
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


@pytest.mark.long
@pytest.mark.parametrize("limit", [1_000, 200_000])
def test_a_full_disk_is_an_error_that_leaves_the_older_checkpoints(limit, saved, tmp_path, processor, collator):
    """Real writes that fail, by a limit on the size of files: of JSON, of weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = trainer_of(tmp_path, processor, collator, save_total_limit=1)
    trainer.add_callback(At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*MiB are free.*Earlier checkpoints"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    resumed = trainer_of(tmp_path, processor, collator, seed=9)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, saved[1])


def poison(trainer, steps, what):
    """Make the loss of given steps NaN or infinite, or only its gradient."""
    forward = trainer.model.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        if trainer.model.training and trainer.state.global_step + 1 in steps:
            if what == "gradient":
                output["loss"].register_hook(lambda gradient: gradient * float("inf"))
            else:
                output["loss"] = output["loss"] + what  # its gradient stays finite
                output["loss_parts"]["response_kl"] = output["loss_parts"]["response_kl"] + torch.tensor([what, 0.0])
        return output

    trainer.model.forward = poisoned


@pytest.mark.parametrize("what", [float("nan"), float("inf"), "gradient"])
def test_a_loss_that_is_not_finite_stops(what, saved, tmp_path, processor, collator):
    """The Trainer logged the mean of earlier losses in its place and trained on."""
    trainer = trainer_of(tmp_path, processor, collator)
    poison(trainer, {5}, what)
    shown = {"gradient": r"response_kl \d"}.get(what, rf"response_kl {what}")
    with pytest.raises(FloatingPointError, match=rf"Step 5: the gradient's norm is (nan|inf)\..*{shown}.*'skip'"):
        trainer.train()
    before = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt")["state"][0]["exp_avg"]
    assert torch.isfinite(before).all()
    loaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights(trainer).items())


def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path, processor, collator, caplog):
    trainer = trainer_of(tmp_path, processor, collator, logging_steps=3)
    trainer.non_finite_loss = "skip"
    poison(trainer, {2, 3}, float("nan"))
    seen = {}
    trainer.add_callback(At(2, lambda: seen.update(before=weights(trainer))))
    trainer.add_callback(At(4, lambda: seen.update(after=weights(trainer))))
    trainer.train()
    assert all(torch.equal(seen["after"][name], value) for name, value in seen["before"].items())
    first, second = means(trainer)
    assert first["non_finite_steps"] == second["non_finite_steps"] == 2
    for entry in (first, second):  # the first is that of step 1 alone
        parts = entry["response_kl"] + entry["input_kl"] + entry["quantity"]
        assert entry["loss"] == pytest.approx(parts, rel=0.2) and "grad_norm" not in first
    assert "Step 2: the gradient's norm is nan" in caplog.text and "Skipped (2 so far)" in caplog.text


def test_skipping_without_end_stops(tmp_path, processor, collator):
    trainer = trainer_of(tmp_path, processor, collator, max_steps=20, save_strategy="no")
    trainer.non_finite_loss = "skip"
    poison(trainer, range(3, 21), float("inf"))
    with pytest.raises(FloatingPointError, match="Step 12: .* number 10 in a row"):
        trainer.train()


@pytest.mark.long
@pytest.mark.parametrize("workers", [{}, WORKERS])
def test_sigterm_saves_and_exits_and_the_resumed_run_is_the_uninterrupted_one(workers, tmp_path, processor, collator):
    """Sent to all processes, as clusters do: workers that read ahead died of it, and training with them."""

    def terminate():
        pids = [str(process.pid) for process in [*multiprocessing.active_children(), multiprocessing.current_process()]]
        subprocess.run(["kill", "-TERM", *pids], check=True)  # a worker takes it otherwise if its parent sends it
        assert len(pids) > workers.get("dataloader_num_workers", 0)
        time.sleep(0.5)

    whole = trainer_of(tmp_path, processor, collator, save_strategy="no", **workers)
    whole.train()
    trainer = trainer_of(tmp_path, processor, collator, save_strategy="no", **workers)
    trainer.add_callback(At(3, terminate))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        trainer.train()
    assert exit_.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    resumed = trainer_of(tmp_path, processor, collator, seed=9, **workers)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)
    for worker in multiprocessing.active_children():  # as Python does with those that are left when it exits
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.long
def test_two_processes_agree(tmp_path):
    """One of two processes gets SIGTERM, then one has a loss that is not finite: neither may be left waiting."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["exit"] == second["exit"] == 143
    assert first["saved"] in (["checkpoint-3"], ["checkpoint-4"])
    assert "checkpoint-1: optimizer.pt is missing" in first["error"] and first["error"] == second["error"], (
        "the altered checkpoint is an error in both"
    )
    assert first["non_finite"].startswith("Step 6: the gradient's norm is nan")
    assert first["non_finite"] == second["non_finite"]
    files = json.loads((tmp_path / "run" / first["saved"][0] / SEAL).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "loss_sums_0.json", "loss_sums_1.json"} < set(files)


def test_wrong_options_are_named(tmp_path, processor, collator):
    from modeling_blsp_kd import BlspKdTrainer

    trainer = trainer_of(tmp_path, processor, collator)
    with pytest.raises(ValueError, match="must be 'stop' or 'skip', got 'ignore'"):
        BlspKdTrainer(trainer.model, trainer.args, non_finite_loss="ignore")
    with pytest.raises(ValueError, match="Leave enable_jit_checkpoint out"):
        trainer_of(tmp_path, processor, collator, enable_jit_checkpoint=True)


def main(folder):
    """One of two processes; only the second has faults."""
    from processing import BlspKdDataCollator
    from tests.helpers.prompts import make_processor

    processor = make_processor()
    collator, run = BlspKdDataCollator(processor), folder / "run"
    trainer = trainer_of(run, processor, collator, save_strategy="no")
    is_second = trainer.args.process_index == 1
    if is_second:
        trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    told = {}
    try:
        trainer.train()
    except SystemExit as exit_:
        told["exit"] = exit_.code
    told["saved"] = sorted(path.name for path in run.glob("checkpoint-*"))

    trainer = trainer_of(run, processor, collator, max_steps=8, save_strategy="no")
    if is_second:
        poison(trainer, {6}, float("nan"))
    try:
        trainer.train(resume_from_checkpoint=True)
    except FloatingPointError as error:
        told["non_finite"] = str(error)

    trainer.accelerator.wait_for_everyone()
    broken = run / "checkpoint-1"
    if not is_second:
        shutil.copytree(run / told["saved"][0], broken)
        damage(broken, "missing")
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(broken))
    except ValueError as error:
        told["error"] = str(error)
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
