"""The trainings that `equivalence.py` compares, in the one process or in each of several.

    python equivalence_worker.py FOLDER CASE [CASE ...]          # also started by `accelerate launch`
    python equivalence_worker.py train.py OPTIONS                # examples/train.py, on any engine without GPUs

Nothing here depends on the number of processes but the size of their batches. Leaves out: comparing.
"""

import json
import os
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import PrinterCallback, TrainingArguments

from modeling_blsp_kd import BlspKdForCausalLM, BlspKdTrainer
from modeling_blsp_kd.training.on_policy import OnPolicyOptions
from processing import BlspKdDataCollator
from tests.helpers.models import make_model
from tests.helpers.prompts import make_processor, spoken_prompts
from tests.helpers.trainers import many_rows

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 4  # rows of one forward, over all processes


@dataclass
class Case:
    """One training.

    Args:
        num_rows (`int`), num_eval_rows (`int`).
        start (`str`): checkpoint of `make_start`.
        text_only (`frozenset[int]`): rows without audio.
        resume_at (`int`, *optional*): train anew from this step's checkpoint, and keep that run.
        own_answers (`OnPolicyOptions`, *optional*): the student answers a share of the rows. Many of its tokens end an
            answer, so that the processes are done at different times.
        options (`dict`): for TrainingArguments.
    """

    num_rows: int
    num_eval_rows: int = 0
    start: str = "full"
    text_only: frozenset[int] = frozenset()
    resume_at: int | None = None
    own_answers: OnPolicyOptions | None = None
    options: dict = field(default_factory=dict)


# In order, rows 0 and 1 are the first process's, 2 and 3 the second's, and so on.
CASES = {
    "training": Case(num_rows=16, options={"gradient_accumulation_steps": 2}),
    "tied head, frozen encoder": Case(num_rows=12, start="tied", options={"activation_checkpointing": False}),
    "thin save, resumed": Case(num_rows=16, start="thin", resume_at=2),
    "own answers": Case(num_rows=12, own_answers=OnPolicyOptions(share=0.6, temperature=0.0, max_new_tokens=6)),
    "no audio on one process": Case(num_rows=12, text_only=frozenset({2, 3, 6, 7, 10, 11})),
    # The second process has one row in the last batch of training, and none in that of evaluation.
    "uneven last batches": Case(num_rows=7, num_eval_rows=5, options={"eval_strategy": "epoch", "num_train_epochs": 2}),
    "fewer rows than processes": Case(num_rows=1, num_eval_rows=1, start="thin", options={"eval_strategy": "epoch"}),
}


def make_start(folder: Path):
    """The checkpoints that trainings start from. That of "thin" needs the folder's other two."""
    plora, distillation = {"lora_dropout": 0.0}, {"response_ce": 0.5, "transcript_ce": 0.5}
    full = make_model(plora=plora, distillation=distillation)
    full.save_pretrained(folder / "full")
    make_model(plora=plora, freeze_speech_encoder=True, text={"tie_word_embeddings": True}).save_pretrained(
        folder / "tied"
    )
    bare = make_model()
    bare.audio_tower.save_pretrained(folder / "speech")
    bare.language_model.save_pretrained(folder / "text")
    BlspKdForCausalLM.from_backbones(
        folder / "speech",
        folder / "text",
        audio_token_id=full.config.audio_token_id,
        thin=True,
        adapter=full.config.adapter,
        plora=plora,
        distillation=distillation,
    ).save_pretrained(folder / "thin")


def folder_of(name: str, folder: Path) -> Path:
    return folder / name.replace(" ", "_").replace(",", "")


def run(name: str, folder: Path):
    """Train a case and leave in its folder the log, the saved model and greedy answers of the trained model."""
    case, folder = CASES[name], folder_of(name, folder)
    rows = [{**row, "audio": None} if index in case.text_only else row for index, row in enumerate(many_rows())]
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    processor = make_processor()

    def train(resume_from=None):
        args = TrainingArguments(
            output_dir=str(folder),
            use_cpu="ACCELERATE_TORCH_DEVICE" not in os.environ,
            **{
                "per_device_train_batch_size": GLOBAL_BATCH // num_processes,
                "per_device_eval_batch_size": GLOBAL_BATCH // num_processes,
                "num_train_epochs": 1,
                "learning_rate": 0.05,
                # Larger than the gradients, so that steps are proportional to them and not to their signs.
                "adam_epsilon": 0.1,
                "lr_scheduler_type": "constant",
                "train_sampling_strategy": "sequential",
                "activation_checkpointing": True,
                "logging_steps": 1,
                "save_strategy": "no" if case.resume_at is None else "steps",
                "save_steps": case.resume_at or 1,
                "report_to": "none",
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
                "disable_tqdm": True,
                **case.options,
            },
        )
        model = BlspKdForCausalLM.from_pretrained(folder.parents[1] / "start" / case.start)
        if case.own_answers is not None:
            model.generation_config.eos_token_id = list(range(0, model.config.get_text_config().vocab_size, 3))
        trainer = BlspKdTrainer(
            model=model,
            args=args,
            train_dataset=rows[: case.num_rows],
            eval_dataset=rows[: case.num_eval_rows],
            data_collator=BlspKdDataCollator(processor),
            processing_class=processor,
            on_policy=case.own_answers,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    trainer = train()
    if case.resume_at is not None:
        trainer = train(str(folder / f"checkpoint-{case.resume_at}"))
    trainer.save_model(str(folder / "model"))
    model = trainer.model.eval()
    model.activation_checkpointing_disable()
    with torch.no_grad():
        answers = model.generate(**spoken_prompts(processor), max_new_tokens=8, do_sample=False).tolist()
    results = {
        "num_processes": trainer.args.world_size,
        "engine": [type(trainer.model_wrapped).__name__, type(trainer.model).__name__],
        "log": [entry for entry in trainer.state.log_history if "train_loss" not in entry],
        "answers": answers,
    }
    (folder / f"results_{trainer.args.process_index}.json").write_text(json.dumps(results) + "\n")
    trainer.accelerator.wait_for_everyone()


def claim_accelerators():
    """Let accelerate use FSDP and DeepSpeed, which it passes over in silence where it finds CPUs only.

    Its one function that looks for devices gets another answer. All that it does then is its own, with gloo.
    """
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ.update({"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"})


def main():
    if "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        claim_accelerators()
    torch.set_num_threads(1)
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "train.py":
        runpy.run_path(str(ROOT / "examples" / "train.py"), run_name="__main__")
        return
    folder, *names = sys.argv
    for name in names:
        run(name, Path(folder))


if __name__ == "__main__":
    main()
