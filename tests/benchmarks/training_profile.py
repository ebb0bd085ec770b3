"""The time of the default training run, part by part.

    python -m tests.benchmarks.training_profile

Runs steps of `examples/train.py` as they are, on a part of the default data. Marks stand where one part hands over
to the next, forward and backward, and the time between two marks belongs to the part that just ended. Counts the epochs
after the first, which finds the features of all clips kept; of the first it tells how long it waits for them. Leaves
out: what a step costs beside its floor (`training_step.py`).
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from examples.train import with_tiny_world
from modeling_blsp_kd.devices import usable_cores
from modeling_blsp_kd.training.building import make_trainer
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing.training_rows.options import DataOptions

from .report import machine

NUM_WARMUP_STEPS = 5
WAITING = "waiting for the next batch"


class Marks(TrainerCallback):
    """Seconds of each part, for each step.

    Args:
        trainer: what trains; its model gets hooks that stay.
    """

    def __init__(self, trainer):
        self.steps, self.last = [], None
        model = trainer.model
        model.audio_tower.register_forward_hook(
            lambda module, inputs, output: self._ended("speech encoder", "adapter", output.last_hidden_state, "forward")
        )
        model.adapter.register_forward_hook(
            lambda module, inputs, output: self._ended("adapter", "LLM as student", output.speech_tokens, "forward")
        )
        model.language_model.base_model.register_forward_hook(self._llm_ended)
        model.register_forward_hook(lambda *_: self.mark("losses, forward (the KL's gradient included)"))
        trainer.add_callback(self)

    def mark(self, part: str):
        now = time.perf_counter()
        if self.steps:
            self.steps[-1][part] += now - self.last
        self.last = now

    def _ended(self, part: str, next_part: str, output, direction: str):
        """`part` has made `output`; when the gradient of that arrives, `next_part` has finished its backward."""
        self.mark(f"{part}, {direction}")
        if output.requires_grad:
            output.register_hook(lambda gradient: self.mark(f"{next_part}, backward"))

    def _llm_ended(self, module, inputs, output):
        if torch.is_grad_enabled():
            self._ended("LLM as student", "losses", output.last_hidden_state, "forward")
        else:
            self.mark("LLM as teacher")

    def on_step_begin(self, args, state, control, **kwargs):
        self.mark(WAITING)
        self.steps.append(defaultdict(float))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.mark("speech encoder, backward (and clipping)")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimiser")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.training_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--num_utterances", type=int, default=960, help="of the tiny world")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=Arguments.dataloader_num_workers,
        help="processes that read ahead",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    args = Arguments(
        output_dir=str(options.output / "profiled_run"),
        max_steps=options.steps,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=options.dataloader_num_workers,
    )
    set_seed(args.seed)
    data = DataOptions(num_utterances=options.num_utterances, num_eval_utterances=1)
    epoch = -(-options.num_utterances // args.per_device_train_batch_size)
    if not NUM_WARMUP_STEPS < epoch < options.steps:
        parser.error(
            f"--num_utterances {options.num_utterances} make an epoch of {epoch} steps, which is to be longer than "
            f"{NUM_WARMUP_STEPS} and shorter than the {options.steps} --steps."
        )
    trainer, _, _ = make_trainer(ModelOptions(), with_tiny_world(data, args), args)
    marks = Marks(trainer)
    where = machine(args.device, torch.float32, "wall")
    trainer.train()

    first, steps = marks.steps[NUM_WARMUP_STEPS:epoch], marks.steps[epoch:]
    total = statistics.median(sum(step.values()) for step in steps)
    parts = {part: statistics.median(step[part] for step in steps) for part in steps[-2]}
    rows = sorted(parts.items(), key=lambda item: -item[1])
    lines = [f"| median of {len(steps)} steps | ms | share |", "|---|---|---|"]
    lines += [f"| {part} | {1000 * seconds:.1f} | {seconds / total:.0%} |" for part, seconds in rows]
    waiting, whole = (
        statistics.median(times) for times in zip(*((step[WAITING], sum(step.values())) for step in first))
    )
    lines += [
        f"| whole step | {1000 * total:.1f} | |",
        "",
        f"In the first epoch, {WAITING} took {1000 * waiting:.1f} of {1000 * whole:.1f} ms ({waiting / whole:.0%}).",
    ]
    text = "\n".join(lines) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training_profile.md").write_text(text)
    data = {"machine": where, "steps": [dict(step) for step in marks.steps]}
    (options.output / "training_profile.json").write_text(json.dumps(data, indent=1))
    workers = f"{options.dataloader_num_workers} data loader worker(s)"
    print(f"{where['date']}, {where['processor']}, {where['threads']} thread(s), {workers}\n\n{text}")


if __name__ == "__main__":
    main()
