"""Write a model card from what a Trainer knows: the model, how to load it, its training, and its evaluation.

`push_to_hub` uses it instead of the Trainer's draft, which does not support models with two backbones. Leaves out:
answers, samples and licences, which `examples/publish.py` adds.
"""

import os
import textwrap
from dataclasses import asdict

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from ..distillation_options import DistillationOptions
from ..distillation_step import LOSS_PARTS

TASK = "audio-text-to-text"
TAGS = ["custom_code", "speech", "knowledge-distillation", "blsp-kd", "arxiv:2405.19041"]


def card_of_training(trainer: Trainer) -> ModelCard:
    """Return the card of the model of a [`BlspKdTrainer`], in its current state of training."""
    args, state, config = trainer.args, trainer.state, trainer.model.config
    model_id = trainer.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    base_models = _base_models(config)
    data = card_metadata(base_models)
    batch_size = state.train_batch_size or args.per_device_train_batch_size
    batch_size *= args.gradient_accumulation_steps * args.world_size
    evaluations = [
        entry for entry in state.log_history if any(name.endswith("response_kl") for name in _measured(entry))
    ]
    measured = [f"- {name}: {value:.4g}" for name, value in _measured(evaluations[-1]).items()] if evaluations else []
    made_from = f" It was made from {' and '.join(base_models)}." if base_models else ""
    text = textwrap.dedent(
        """\
        # {model_id}

        A text LLM with ears ([BLSP-KD](https://arxiv.org/abs/2405.19041)): speech becomes as many vectors as its
        transcript has tokens, after which the LLM predicts what it would after the transcript.{made_from}

        ```python
        from transformers import pipeline

        pipe = pipeline("audio-text-to-text", model="{model_id}", trust_remote_code=True)
        ```

        ## Training

        {steps:,} steps of {batch_size} rows, learning rate {learning_rate:g}, losses {losses}.

        ## Evaluation

        {evaluation}
        """
    ).format(
        model_id=model_id,
        made_from=made_from,
        steps=state.global_step,
        batch_size=batch_size,
        learning_rate=args.learning_rate,
        losses=name_losses(config.distillation),
        evaluation="\n".join(measured) or "Not measured.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def card_metadata(base_models: list[str], **facts) -> ModelCardData:
    """Return what the card of any BLSP-KD model tells the Hub: its base models (Hub ids), and other facts by name."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        tags=TAGS,
        base_model=base_models or None,
        # Without this, the Hub would take several base models for a merge.
        base_model_relation="finetune" if base_models else None,
        **facts,
    )


def _measured(entry: dict) -> dict[str, float]:
    """Return the losses and counts of an evaluation in the log."""
    speed = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: value for name, value in entry.items() if name.startswith("eval_") and not name.endswith(speed)}


def _base_models(config) -> list[str]:
    """Return the Hub ids of the backbones, without local folders."""
    backbones = config.backbones or {}
    names = [
        backbones.get(part, {}).get("name_or_path") or part_config.name_or_path
        for part, part_config in (("audio_tower", config.speech_config), ("language_model", config.text_config))
    ]
    return [name for name in names if name and "/" in name and not os.path.exists(name) and not os.path.isabs(name)]


def name_losses(options: dict) -> str:
    """Name the losses that have a weight, the temperature, and whatever else differs from its default."""
    defaults = asdict(DistillationOptions())
    shown = {
        name: value
        for name, value in options.items()
        if value and (name in LOSS_PARTS or name == "temperature" or value != defaults.get(name))
    }
    numbers = {name: f"{value:g}" for name, value in shown.items() if isinstance(value, float)}
    return ", ".join(f"{name} {numbers.get(name, value)}" for name, value in shown.items())
