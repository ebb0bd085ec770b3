"""Kills trainings with SIGKILL at random moments, resumes them, and compares with the run that nobody killed.

    python -m tests.reliability.kill_and_resume            # 20 kills, some ten minutes on one core
    python -m tests.reliability.kill_and_resume --short    # 3 kills

The tiny world's default model with partial LoRA, dropout, SpecAugment and accumulation. Kills fall in a step, in an
evaluation and while a checkpoint is written, in turn. Survived: weights and all logged means equal to the last bit.
Leaves out: several processes, and a loss of power, which can only be had by losing it.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ("step", "evaluation", "writing")
NUM_FILES = 12  # of a checkpoint, at least
# Five steps an epoch, or three: checkpoints, logs and evaluations fall into the middle of an epoch and of each other.
FULL = {"steps": 20, "utterances": 40}
SHORT = {"steps": 6, "utterances": 24}
SAVE_STEPS, EVAL_STEPS, LOGGING_STEPS = 4, 3, 3
EVAL_UTTERANCES = 4  # of voices that are trained on, and as many of others
OF_TIME = ("runtime", "per_second")


def train(folder: Path, clips: Path, steps: int, utterances: int):
    """Do what a user's command does, in a process of its own."""
    multiprocessing.set_start_method("fork", force=True)  # of the data loader's worker, as in a user's process
    folder.mkdir(exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    from transformers import TrainerCallback, set_seed
    from transformers.trainer_utils import IntervalStrategy

    from examples.train import with_tiny_world
    from modeling_blsp_kd.training.building import make_trainer
    from modeling_blsp_kd.training.options import Arguments, ModelOptions, where_to_resume
    from processing.training_rows.loading import evaluation_data
    from processing.training_rows.options import DataOptions

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    args = Arguments(
        output_dir=str(folder),
        resume_from_checkpoint="true",
        max_steps=steps,
        warmup_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        save_steps=SAVE_STEPS,
        eval_steps=EVAL_STEPS,
        logging_steps=LOGGING_STEPS,
        use_cpu=True,
        disable_tqdm=True,
    )
    set_seed(args.seed)
    args.resume_from_checkpoint = where_to_resume(args)
    data = DataOptions(num_utterances=utterances, num_eval_utterances=EVAL_UTTERANCES, cache_dir=str(clips))
    trainer, _, eval_rows = make_trainer(ModelOptions(plora=True), with_tiny_world(data, args), args)
    trainer.eval_dataset = evaluation_data(eval_rows)
    args.eval_strategy = IntervalStrategy.STEPS
    progress = os.open(folder / "progress.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    class Progress(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            os.write(progress, b"step\n")

        def on_prediction_step(self, *args, **kwargs):
            os.write(progress, b"evaluation\n")

        def on_evaluate(self, *args, **kwargs):
            os.write(progress, b"evaluated\n")

    trainer.add_callback(Progress())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(str(folder / "model"))
    (folder / "curve.json").write_text(json.dumps(trainer.state.log_history))


def outcome(folder: Path) -> dict:
    """Checksum of the weights, and all that was logged but times."""
    curve = json.loads((folder / "curve.json").read_text())
    means = [
        {name: value for name, value in entry.items() if not name.endswith(OF_TIME)}
        for entry in curve
        if "train_loss" not in entry  # the Trainer's summary is of one call, not of the run
    ]
    return {
        "weights": hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "means": means,
    }


def marks(folder: Path) -> list[str]:
    file = folder / "progress.txt"
    return file.read_text().split() if file.exists() else []


def wait_and_kill(process, folder: Path, kind: str, steps: int, step_s: float, rng: random.Random) -> dict | None:
    """Kill a training at a random moment of a kind. None if it ended before."""
    if kind == "writing":
        nth, delay_s = rng.randint(1, -(-steps // SAVE_STEPS)), 0.0
        num_files = rng.randint(1, NUM_FILES)
    elif kind == "step":
        nth, delay_s = rng.randint(1, steps), rng.uniform(0, step_s)
    else:
        nth, delay_s = rng.randint(1, 2 * EVAL_UTTERANCES * (steps // EVAL_STEPS)), rng.uniform(0, step_s / 20)
    written = set()
    while process.is_alive():
        if kind == "writing":
            # `walk` takes it well that folders are renamed meanwhile.
            found = [(Path(top).name, names) for top, _, names in os.walk(folder / "_unfinished")]
            found = [(name, names) for name, names in found if name.startswith("checkpoint-")]
            written |= {name for name, _ in found}
            due = len(written) > nth or (len(written) == nth and any(len(names) >= num_files for _, names in found))
        else:
            due = marks(folder).count(kind) >= nth
        if due:
            time.sleep(delay_s)
            process.kill()
            process.join()
            was_writing = any((folder / "_unfinished").glob("checkpoint-*"))
            seen = marks(folder)
            return {
                "aimed_at": kind,
                "hit": "writing" if was_writing else ("evaluation" if seen[-1] == "evaluation" else "step"),
                "steps_begun": seen.count("step"),
                "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
            }
        time.sleep(0.0005)
    return None


def run(output: Path, clips: Path, kills: int, sizes: dict, seed: int = 0) -> dict:
    """Kill and resume that many trainings.

    Returns:
        `dict`: `runs`, each with its `hit` and whether it `survived`, and `tried`, `survived`, `lost` for each kind.
    """
    # A server that has imported everything forks each training: a second instead of ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_blsp_kd.trainer", "processing", "datasets", "peft"])
    rng = random.Random(seed)

    def start(folder: Path):
        process = context.Process(target=train, args=(folder, clips), kwargs=sizes)
        process.start()
        return process

    def finish(folder: Path) -> dict:
        process = start(folder)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"Training failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
        return outcome(folder)

    shutil.rmtree(output / "runs", ignore_errors=True)
    whole = output / "runs" / "whole"
    whole.mkdir(parents=True)
    expected = finish(whole)
    times = [
        entry["train_runtime"] for entry in json.loads((whole / "curve.json").read_text()) if "train_loss" in entry
    ]
    step_s = times[0] / sizes["steps"]
    runs = []
    while len(runs) < kills:
        folder = output / "runs" / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = KINDS[len(runs) % len(KINDS)]
        killed = wait_and_kill(start(folder), folder, kind, sizes["steps"], step_s, rng)
        if killed is None:
            continue  # too quick for us: another moment
        actual = finish(folder)
        same = {name: actual[name] == expected[name] for name in expected}
        runs.append({**killed, **same, "survived": all(same.values())})
        print(
            f"kill {len(runs)}: in {killed['hit']}, {killed['checkpoints'] or 'no checkpoint yet'}: {same}", flush=True
        )
    shutil.rmtree(output / "runs")
    by_kind = {}
    for kind in KINDS:
        survived = [run["survived"] for run in runs if run["hit"] == kind]
        by_kind[kind] = {"tried": len(survived), "survived": sum(survived), "lost": len(survived) - sum(survived)}
    return {"steps": sizes["steps"], "logged": len(expected["means"]), "by_kind": by_kind, "runs": runs}


def table(results: dict) -> str:
    names = {"step": "in a step", "evaluation": "in an evaluation", "writing": "while writing a checkpoint"}
    lines = ["| killed | tried | survived | lost |", "|---|---|---|---|"]
    for kind, counts in results["by_kind"].items():
        lines.append(f"| {names[kind]} | {counts['tried']} | {counts['survived']} | {counts['lost']} |")
    sums = [sum(counts[name] for counts in results["by_kind"].values()) for name in ("tried", "survived", "lost")]
    return "\n".join([*lines, "| all | {} | {} | {} |".format(*sums)]) + "\n"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.kill_and_resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, help="20, or 3 with --short")
    parser.add_argument("--short", action="store_true", help="6 steps instead of 20")
    parser.add_argument("--output", type=Path, default=Path("outputs/reliability"), help="folder for the results")
    options = parser.parse_args()
    kills = options.kills or (3 if options.short else 20)
    clips = options.output / "clips"
    results = run(options.output, clips, kills, SHORT if options.short else FULL)
    (options.output / "kill_and_resume.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "kill_and_resume.md").write_text(table(results))
    print(table(results))
    sys.exit(any(not run["survived"] for run in results["runs"]))


if __name__ == "__main__":
    main()
