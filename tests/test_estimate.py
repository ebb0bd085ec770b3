"""Estimated against measured memory, counted against written-out operations, and recipes that scripts can read."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import HfArgumentParser

from examples.estimate import CONFIGS
from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.training import estimate, step_cost
from modeling_blsp_kd.training.command_line import unfold_recipe
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from modeling_blsp_kd.training.step_operations import count_operations
from processing.training_rows.options import DataOptions
from tests.benchmarks.memory_estimate import ASSUME, compare, make_config

EXAMPLES = Path(__file__).parents[1] / "examples"

TINY_WORLD = EXAMPLES / "tiny_world"
RECIPES = sorted(path for path in (EXAMPLES / "recipes").glob("*.yaml") if "fsdp" not in path.name)
# As the Hub shows them: parameters of the LLM, and of Whisper's encoder.
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


@pytest.mark.long
@pytest.mark.parametrize(("size", "case"), [("tiny", "adapter"), ("flat", "all, checkpointing")])
def test_memory_is_what_a_step_takes(size, case):
    estimated, measured = compare(size, case, torch.device("cpu"))
    assert abs(estimated / measured - 1) < 0.05


def test_operations_of_the_llm_are_those_of_its_products():
    """Teacher: forward. Student: the same, and as much again for gradients of the inputs, none for frozen weights."""
    config = make_config("tiny", {"freeze_speech_encoder": True})
    model = step_cost.without_contents(lambda: estimate.build_model(config, torch.float32, checkpoints=False))
    batch = estimate.make_batch(config, 3, 2.0, ASSUME)
    operations = count_operations(model, batch, bf16=False)
    text, (num_rows, length) = config.text_config, batch["teacher_input_ids"].shape
    weights = sum(
        weight.numel() for name, weight in model.language_model.model.named_parameters() if "proj.weight" in name
    )
    products = 2 * num_rows * length * weights
    attention = 2 * 2 * num_rows * length**2 * text.hidden_size
    assert operations["LLM as teacher"] == text.num_hidden_layers * attention + products
    # Attention's backward makes its scores again: five products where forward has two.
    assert operations["LLM as student"] == text.num_hidden_layers * attention * 3.5 + 2 * products
    compared = batch["teacher_is_content"].sum() + batch["teacher_is_response"].sum()
    # Student, teacher, and the gradient.
    assert operations["vocabulary"] == 3 * 2 * compared * text.hidden_size * text.vocab_size


def test_shards_hold_their_part_and_what_is_gathered():
    memory = step_cost.Memory(weights=800, gradients=80, optimizer=160, activations=50)
    alone = estimate.memory_of_gpu(memory, 300, estimate.Assumptions(overhead_gb=0))
    assert sum(alone.values()) == memory.peak
    two = estimate.memory_of_gpu(memory, 300, estimate.Assumptions(num_gpus=2, overhead_gb=0))
    assert sum(two.values()) == memory.peak + 80, "DDP copies gradients to its buckets"
    sharded = estimate.memory_of_gpu(memory, 300, estimate.Assumptions(num_gpus=8, num_shards=8, overhead_gb=0))
    assert sum(sharded.values()) == (800 + 80 + 160) / 8 + 50 + 300


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_by_both_scripts(path):
    parser = HfArgumentParser((ModelOptions, DataOptions, Arguments))
    given = unfold_recipe([str(path), "--bf16", "false", "--use_cpu", "true", "--seed", "7"])
    model_options, data_options, args = parser.parse_args_into_dataclasses(given)
    recipe, assumed = estimate.read_recipe(path)
    assert (args.learning_rate, args.max_steps, args.seed) == (recipe["learning_rate"], recipe["max_steps"], 7)
    assert (model_options.plora, model_options.dtype) == (True, "bfloat16") and data_options.train_manifest
    with torch.device("meta"):
        model = estimate.build_model(estimate.model_config(recipe, CONFIGS), torch.bfloat16, checkpoints=True)
    parameters = estimate.count_parameters(model)
    assert parameters["LLM"] == (0, PUBLISHED[recipe["text_model"]])
    assert sum(map(sum, parameters.values())) == sum(each.numel() for each in model.parameters())
    assume = estimate.Assumptions(**assumed)
    assert assume.num_gpus % assume.num_shards == 0


def test_an_unknown_option_in_a_recipe_is_refused(tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"learning_speed": 1e-3, "estimate": {"num_gpus": 2}}))
    parser = HfArgumentParser((ModelOptions, DataOptions, Arguments))
    with pytest.raises(ValueError, match="learning_speed"):
        parser.parse_args_into_dataclasses(unfold_recipe([str(tmp_path / "wrong.yaml")]))


def test_options_of_a_recipe_may_be_mappings(tmp_path):
    (tmp_path / "short.yaml").write_text("adapter_options: {num_pre_layers: 2}\nplora: true\nlearning_rate: 1e-4\n")
    assert unfold_recipe([str(tmp_path / "short.yaml"), "--seed", "2"]) == [
        *("--adapter_options", '{"num_pre_layers": 2}', "--plora", "true", "--learning_rate", "1e-4", "--seed", "2")
    ]
    assert unfold_recipe(["--seed", "2"]) == ["--seed", "2"] and unfold_recipe([]) == []


def test_a_model_that_is_trained_further_costs_what_its_parts_cost(tmp_path):
    parts = {"speech_model": str(TINY_WORLD / "speech_encoder"), "text_model": str(TINY_WORLD / "llm"), "plora": True}
    stage = {"freeze_speech_encoder": True, "speech_padding": "max_length"}
    config = estimate.model_config(parts)
    config.save_pretrained(tmp_path)
    further = estimate.model_config({"start_from": str(tmp_path), **stage})
    expected = estimate.model_config({**parts, **stage})
    assert further.to_diff_dict() == expected.to_diff_dict() != config.to_diff_dict()
    assert estimate.backbones({"start_from": "me/model"}) == "me/model"


def test_encoders_of_other_types_are_refused():
    config = BlspKdConfig(**{**make_config("tiny", {}).to_dict(), "speech_config": {"model_type": "hubert"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate.BlspKdConfig, "from_pretrained", lambda *_, **__: config)
        with pytest.raises(ValueError, match="estimated for Whisper encoders, but me/model has 'hubert'"):
            estimate.model_config({"start_from": "me/model"})


def test_the_launch_file_is_one_of_accelerate():
    config = load_config_from_file(str(EXAMPLES / "accelerate" / "fsdp2_four_nodes.yaml"))
    assert (config.num_processes, config.fsdp_config["fsdp_version"]) == (32, 2)
