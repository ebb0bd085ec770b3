"""Write what a later publication needs beside a trained model: a record of the training, clips, a card.

`examples/train.py` calls it, and `facts.py` reads the record.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard
from transformers import Trainer

from modeling_blsp_kd.training.options import TINY_SPEECH_MODEL, TINY_TEXT_MODEL, encoder_learning_rate

from .card import make_card
from .facts import describe_parts


def describe_training(
    trainer: Trainer, model_options: Any, data_options: Any, eval_rows: list[dict], stages_before: list[dict] | None
) -> dict:
    """Return settings and data of a run, for the model card, with Hub ids but without folders of this machine."""
    args, is_frozen = trainer.args, model_options.freeze_speech_encoder

    def public_name(name: str) -> str | None:
        own = {TINY_TEXT_MODEL: "examples/tiny_world/llm", TINY_SPEECH_MODEL: "examples/tiny_world/speech_encoder"}
        return own.get(name, None if os.path.isdir(name) else name)

    def describe(num_rows: int, voices: set, manifest: str | None) -> dict:
        return {
            "source": Path(manifest).name if manifest else "tiny world",
            "rows": num_rows,
            "voices": len(voices - {None, ""}) or None,
        }

    data, kept = trainer.train_dataset, trainer.train_dataset.teacher and trainer.train_dataset.teacher.index
    eval_voices = {row.get("voice") for row in eval_rows}
    made_from = {part: public_name(getattr(model_options, part)) for part in ("text_model", "speech_model")}
    if model_options.start_from is not None:
        made_from = {part: stages_before[-1][part] if stages_before else None for part in made_from}
    return {
        **made_from,
        "started_from": model_options.start_from and public_name(model_options.start_from),
        "before": stages_before,
        "data": describe(data.num_rows, data.voices, data_options.train_manifest or data_options.train_mixture),
        "evaluation": describe(len(eval_rows), eval_voices, data_options.eval_manifest) if eval_rows else None,
        "steps": trainer.state.global_step,
        "batch_size": trainer.state.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "encoder_learning_rate": None if is_frozen else encoder_learning_rate(model_options, args),
        "schedule": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
        "on_policy_share": args.on_policy_share or None,
        "kept_teacher": kept and {"name": public_name(kept["teacher"]), "k": kept["k"]},
        "seed": args.seed,
        "device": args.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def stages_of(model: str) -> list[dict] | None:
    """Return how a model was trained, each stage as [`describe_training`] does, first to last; None if not recorded."""
    results = Path(model, "results.json")
    last = json.loads(results.read_text()).get("training") if results.is_file() else None
    if last is None:
        return None
    before = last.pop("before", [])  # absent: an older record
    return None if before is None else [*before, last]


def keep_samples(rows: list[dict], folder: Path) -> list[dict]:
    """Copy clips beside the model, as examples to publish it with; their paths are relative to its folder."""
    (folder / "samples").mkdir(exist_ok=True)
    samples = []
    for number, row in enumerate(rows, start=1):
        name = f"samples/{number}{Path(row['audio']).suffix}"
        shutil.copyfile(row["audio"], folder / name)
        samples.append({"audio": name, **{key: row.get(key) for key in ("text", "instruction", "answer")}})
    return samples


def card_of_run(trainer: Trainer, results: dict) -> ModelCard:
    """Return the card that is pushed while training: that of `examples/publish.py`, without what only it measures."""
    model, samples = trainer.accelerator.unwrap_model(trainer.model), results.get("samples", [])
    return make_card(
        {
            "name": trainer.hub_model_id,
            "parts": describe_parts(model, results.get("training"), {}),
            "thin": model.config.backbones is not None,
            "memory": None,
            "losses": model.config.distillation,
            "results": results,
            "samples": samples,
            "licence": None,
            "languages": None,
            "datasets": None,
        }
    )
