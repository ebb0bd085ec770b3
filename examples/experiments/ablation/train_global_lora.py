"""Train with LoRA at all positions of the student instead of PLoRA, and merge it into the LLM.

The layers are those of PLoRA (stock PEFT), and the teacher is the LLM without them, so that positions are the only
difference. It changes the LLM's answers to text, which is what this experiment measures.

Takes the options of `examples/train.py`, `--plora true` among them. Leaves a model without LoRA, and in `results.json`
how well it is aligned with the original LLM, since the saved model has no original any more.
"""

import json
import logging
import time
from pathlib import Path
from typing import cast

import torch
from transformers import HfArgumentParser, set_seed

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.plora import ADAPTER_NAME, PartialLora
from modeling_blsp_kd.training.building import make_trainer
from modeling_blsp_kd.training.command_line import HelpFormatter
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing.evaluation.after_training import REPORTED
from processing.training_rows.loading import evaluation_data
from processing.training_rows.options import DataOptions

from ...train import with_tiny_world


class GlobalLoraForCausalLM(BlspKdForCausalLM):
    """[`BlspKdForCausalLM`] whose partial LoRA is not partial: it covers every position of a prompt with speech."""

    def _partial_lora_at(self, is_speech):
        return super()._partial_lora_at(None if is_speech is None else torch.ones_like(is_speech))


@torch.no_grad()
def merge_lora(model: BlspKdForCausalLM) -> BlspKdForCausalLM:
    """Return the same model with its LoRA added to the LLM's weights, so that it acts at all positions."""
    lora = cast(PartialLora, model.plora)
    updates = {
        f"language_model.{name}.weight": layer.get_delta_weight(ADAPTER_NAME)
        for name, layer in zip(lora.layer_names, lora.layers)
    }
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if f".{ADAPTER_NAME}." not in name
    }
    for name, update in updates.items():
        weights[name] = weights[name] + update.to(weights[name].dtype)
    config = model.config.__class__.from_dict({**model.config.to_dict(), "plora": False})
    merged = BlspKdForCausalLM(config).to(model.dtype)
    merged.load_state_dict(weights)
    merged.tie_weights()
    merged.generation_config = model.generation_config
    return merged.eval()


def main():
    parser = HfArgumentParser(
        (ModelOptions, DataOptions, Arguments), description=__doc__, formatter_class=HelpFormatter
    )
    model_options, data_options, args = parser.parse_args_into_dataclasses()
    if not model_options.plora:
        raise ValueError("LoRA at all positions takes the layers of PLoRA: pass --plora true.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_seed(args.seed)
    trainer, _, eval_rows = make_trainer(
        model_options, with_tiny_world(data_options, args), args, model_class=GlobalLoraForCausalLM
    )
    start = time.time()
    trainer.train()
    results = {"train_seconds": round(time.time() - start, 1)}
    processor = trainer.processing_class
    if eval_rows:
        alignment = trainer.evaluate(evaluation_data(eval_rows))
        results |= {name: alignment[f"eval_{name}"] for name in REPORTED if f"eval_{name}" in alignment}
    merge_lora(trainer.model).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
