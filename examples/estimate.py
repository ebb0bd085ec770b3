"""What training will cost: parameters, memory of a GPU and time, before anything is downloaded.

    python examples/estimate.py examples/recipes/whisper_small_qwen2.5_1.5b.yaml
    python examples/estimate.py examples/recipes/whisper_large_v3_llama3.1_8b.yaml --num_gpus 16 --utilisation 0.3

Runs a step of the real model (forward, backward, AdamW) on tensors that have a shape but no contents, adds up what is
alive at each moment and counts the operations: torch's `FakeTensorMode` and `FlopCounterMode`. Sharding and time are
arithmetic on top. `python -m tests.benchmarks.memory_estimate` compares the memory with that of real steps. Leaves out:
speech encoders other than Whisper; time to load data, evaluate and save; what a GPU's kernels need inside.

A recipe is what `examples/train.py` takes. Its section `estimate` holds [`Assumptions`] about machines and data. The
configs of its models are looked up in `examples/recipes/configs` first, so that no download is needed.
"""

import argparse
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM, distillation
from modeling_blsp_kd.speech_encoder import encode_speech

CONFIGS = Path(__file__).parent / "recipes" / "configs"
GB = 1e9
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm)
# The counter knows the attention of GPUs only; the simulation runs that of CPUs, which saves the same tensors.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


@dataclass
class Assumptions:
    """Machines and data.

    Args:
        num_gpus (`int`): processes, one GPU each.
        num_shards (`int`): over how many of them FSDP2 splits weights, gradients and optimiser states; 1: DDP.
        gpu_memory_gb (`float`), peak_tflops (`float`): of one GPU, in 1e9 bytes and 1e12 dense operations per second.
        utilisation (`float`): share of the peak that a step reaches, in (0, 1].
        network_gb_per_s (`float`): what one GPU receives from the others that it shares shards with, in 1e9 bytes.
        overhead_gb (`float`): of CUDA, its libraries and fragmentation.
        clip_s (`float`), longest_clip_s (`float`): mean duration, which time is for, and longest, which memory is for.
        tokens_per_s (`float`): transcript tokens per second of speech.
        prompt_tokens (`int`), response_tokens (`int`): template with instruction, and the LLM's answer.
    """

    num_gpus: int = 1
    num_shards: int = 1
    gpu_memory_gb: float = 24.0
    peak_tflops: float = 165.0
    utilisation: float = 0.35
    network_gb_per_s: float = 50.0
    overhead_gb: float = 1.5
    clip_s: float = 10.0
    longest_clip_s: float = 30.0
    tokens_per_s: float = 3.3
    prompt_tokens: int = 40
    response_tokens: int = 40


# -- a step without contents ------------------------------------------------------------------------------------------


class FakeNumbers(TorchDispatchMode):
    """Fake numbers among real indices: where a sequence ends decides shapes, what a weight is does not.

    Integers and masks that come from no fake number are computed as ever. The questions that the model asks of its
    numbers (CIF: is an alpha sum 0, do the frames have much in common?) are answered with no.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than all else together
        if func in (aten.eq.Scalar, aten.gt.Tensor) and isinstance(args[0], FakeTensor):
            return torch.zeros(args[0].shape, dtype=torch.bool)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # What neither takes numbers nor makes them. Where neither a tensor nor a dtype is given, only `arange` may not.
        may_be_integer = tensors or func.overloadpacket is aten.arange
        dtype = kwargs.get("dtype") or (torch.int64 if may_be_integer else torch.get_default_dtype())
        if not dtype.is_floating_point and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            output = func(*args, **kwargs)
            if not any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in tree_leaves(output)):
                return output
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        with FAKE:
            return func(*args, **kwargs)

    @staticmethod
    def _places(index) -> tuple:
        """A mask as the indices that it selects, whose number is a shape."""
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        return index.nonzero(as_tuple=True) if is_mask else (index,)


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are alive while operations run inside it, and keeps the most.

    Args:
        on_gpu (`bool`): on a CPU, torch's half-precision products sum up in a float32 copy of what they make.
    """

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.on_gpu = on_gpu
        self.held = self.peak = 0
        self.sizes = {}

    def hold(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, storage: int):
        self.held -= self.sizes.pop(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
                if not self.on_gpu and func.overloadpacket in PRODUCTS and leaf.element_size() == 2:
                    self.peak = max(self.peak, self.held + 2 * leaf.nbytes)
        return output


def without_contents(build: Callable[[], BlspKdForCausalLM]) -> BlspKdForCausalLM:
    """The model that `build` makes, with weights that take no memory.

    It is made on the meta device. Its weights then pretend to lie on a CPU, since meta tensors attend in another way.
    """
    with torch.device("meta"):
        model = build()
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:  # tied weights stay tied
                    with FAKE:
                        made[tensor] = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
                tensors[name] = made[tensor]
    return model


def training_step(model, batch: dict, bf16: bool, accumulates: bool) -> torch.optim.Optimizer:
    """Forward, backward and AdamW as in any step but the first: its moments exist.

    Args:
        accumulates (`bool`): so do gradients, of the batches before.
    """
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@dataclass
class Memory:
    """Bytes of a training step on a GPU that holds everything.

    Args:
        weights, gradients, optimizer (`int`): of parameters with buffers, of all gradients, of AdamW's moments.
        activations (`int`): what the peak is beyond those: saved for backward, temporary, buffers of the losses. With
            a single batch per step, not all gradients exist at that moment, so it is a little more than this.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def peak_memory(model, batch: dict, bf16: bool, accumulates: bool, on_gpu: bool) -> Memory:
    """Memory of [`training_step`].

    Args:
        model: from [`without_contents`].
        batch (`dict`): what the collator makes; of `input_features` only the shape matters.
        on_gpu (`bool`): the KL makes probabilities of all rows of a chunk at once, as on a GPU, not of a few; and see
            [`LiveBytes`].
    """
    live = LiveBytes(on_gpu)
    for tensor in (*model.parameters(), *model.buffers()):
        live.hold(tensor)
    weights = live.held
    tile_size = sys.maxsize if on_gpu else distillation.TILE_SIZE
    with patch.object(distillation, "TILE_SIZE", tile_size), FakeNumbers(), live:
        optimizer = training_step(model, _with_fake_features(batch), bf16, accumulates)
    gradients = sum(parameter.nbytes for parameter in optimizer.param_groups[0]["params"])
    moments = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    return Memory(weights, gradients, moments, activations=live.peak - weights - gradients - moments)


def count_operations(model, batch: dict, bf16: bool) -> dict[str, int]:
    """Operations (2 per multiplication and addition) of forward and backward by part; arguments as `peak_memory`.

    Frozen weights get no gradient, but it flows through them; what checkpointing repeats is counted again. torch's
    counter mistakes which part some of backward belongs to, so the parts run alone, and the adapter is what is left.
    """
    batch, llm = _with_fake_features(batch), model.language_model.base_model
    llm_name = f"language_model.{model.language_model.base_model_prefix}"
    with FAKE:
        embeds = torch.zeros(*batch["teacher_input_ids"].shape, llm.config.hidden_size, requires_grad=True)

    def encoder():
        frames = encode_speech(model.audio_tower, batch["input_features"], batch["input_features_mask"])
        return frames.last_hidden_state.sum()

    def student():
        inputs = {"inputs_embeds": embeds, "attention_mask": batch["teacher_attention_mask"], "use_cache": False}
        return llm(**inputs).last_hidden_state.sum()

    total, in_forward = _count(lambda: model(**batch).loss, bf16)
    with model._partial_lora_at(batch["teacher_is_content"]):
        of_student, student_forward = _count(student, bf16)
    of_encoder, _ = _count(encoder, bf16)
    model.zero_grad()
    name = type(model).__name__
    # The KL takes all its products in forward, outside of these parts.
    vocabulary = in_forward[name] - sum(in_forward[f"{name}.{part}"] for part in ("audio_tower", "adapter", llm_name))
    teacher = in_forward[f"{name}.{llm_name}"] - student_forward["Global"]
    return {
        "speech encoder": of_encoder,
        "adapter": total - of_encoder - of_student - teacher - vocabulary,
        "LLM as student": of_student,
        "LLM as teacher": teacher,
        "vocabulary": vocabulary,
    }


def _count(function: Callable[[], torch.Tensor], bf16: bool) -> tuple[int, dict[str, int]]:
    """Operations of a function with the backward of what it returns, and those of forward alone by module."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with FakeNumbers(), counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = function()
        in_forward = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        if output.requires_grad:
            output.backward()
    return counter.get_total_flops(), in_forward


def _with_fake_features(batch: dict) -> dict:
    return {**batch, "input_features": FAKE.from_tensor(batch["input_features"])}


def count_parameters(model) -> dict[str, tuple[int, int]]:
    """Trained and frozen parameters by part."""
    partial_lora = [] if model.plora is None else model.plora.parameters
    is_partial_lora = {id(parameter) for parameter in partial_lora}
    parts = {
        "speech encoder": list(model.audio_tower.parameters()),
        "adapter": list(model.adapter.parameters()),
        "partial LoRA": partial_lora,
        "LLM": [each for each in model.language_model.parameters() if id(each) not in is_partial_lora],
    }
    return {
        part: tuple(sum(each.numel() for each in given if each.requires_grad == trained) for trained in (True, False))
        for part, given in parts.items()
    }


# -- from a recipe ----------------------------------------------------------------------------------------------------


def read_recipe(path: str | Path) -> tuple[dict, dict]:
    """The options of `examples/train.py`, and the section `estimate`."""
    recipe = yaml.safe_load(Path(path).read_text())
    return recipe, recipe.pop("estimate", {})


def read_config(name: str):
    return AutoConfig.from_pretrained(CONFIGS / name if (CONFIGS / name).is_dir() else name)


def model_config(recipe: dict) -> BlspKdConfig:
    stage = {
        "freeze_speech_encoder": recipe.get("freeze_speech_encoder", False),
        "speech_padding": recipe.get("speech_padding", "do_not_pad"),
    }
    if "start_from" in recipe:
        config = BlspKdConfig.from_pretrained(recipe["start_from"], **stage)
    else:
        text_config = read_config(recipe["text_model"])
        config = BlspKdConfig(
            speech_config=read_config(recipe["speech_model"]).to_dict(),
            text_config=text_config.to_dict(),
            adapter={"type": recipe.get("adapter", "cformer"), **recipe.get("adapter_options", {})},
            plora=recipe.get("plora", False),
            audio_token_id=text_config.vocab_size,
            **stage,
        )
    speech_type = config.speech_config.model_type
    if speech_type != "whisper":
        raise ValueError(f"Costs are estimated for Whisper encoders, but {backbones(recipe)} has {speech_type!r}.")
    return config


def backbones(recipe: dict) -> str:
    return recipe.get("start_from") or f"{recipe['speech_model']} + {recipe['text_model']}"


def build_model(config: BlspKdConfig, dtype: torch.dtype, checkpoints: bool) -> BlspKdForCausalLM:
    """A model in training mode, frozen weights in `dtype`, trained ones in float32, as `from_backbones` makes it."""
    model = BlspKdForCausalLM(config).train()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpoints:
        model.activation_checkpointing_enable()
    return model


def make_batch(config: BlspKdConfig, batch_size: int, clip_s: float, assume: Assumptions) -> dict:
    """A batch of equal clips and prompts, but for the end of the last, so that padding is masked as in a real one."""
    num_content = max(2, round(clip_s * assume.tokens_per_s))
    num_before, num_response = assume.prompt_tokens, assume.response_tokens
    length = num_before + num_content + num_response
    text = torch.zeros(batch_size, length, dtype=torch.long)
    place = torch.arange(length).expand(batch_size, -1)
    is_token = torch.ones_like(text)
    is_token[-1, -1] = 0
    is_response = (place >= length - num_response) & is_token.bool()

    def spoken(values, at_placeholder: int):
        column = torch.full((batch_size, 1), at_placeholder)
        return torch.cat([values[:, :num_before], column, values[:, num_before + num_content :]], dim=1)

    num_mel_frames = round(100 * clip_s)
    features_mask = torch.ones(batch_size, num_mel_frames, dtype=torch.long)
    features_mask[-1, -2:] = 0
    return {
        "input_ids": spoken(text, config.audio_token_id),
        "attention_mask": spoken(is_token, 1),
        "labels": spoken(text.masked_fill(~is_response, -100), -100),
        "input_features": torch.zeros(batch_size, config.speech_config.num_mel_bins, num_mel_frames),
        "input_features_mask": features_mask,
        "num_speech_tokens": torch.full((batch_size,), num_content),
        "teacher_input_ids": text,
        "teacher_attention_mask": is_token,
        "teacher_is_content": (place >= num_before) & (place < num_before + num_content),
        "teacher_is_response": is_response,
    }


# -- several GPUs, and time -------------------------------------------------------------------------------------------


def gathered_bytes(model, bf16: bool) -> int:
    """What FSDP2 has whole at one time: all that is in no layer, the layer that runs and the one that comes next."""
    layer_names = {*(model._no_split_modules or ()), *(model.language_model._no_split_modules or ())}

    def size(module) -> int:
        return sum(each.numel() * (2 if bf16 else each.element_size()) for each in module.parameters())

    layers = [size(module) for module in model.modules() if type(module).__name__ in layer_names]
    return size(model) - sum(layers) + 2 * max(layers)


def memory_of_gpu(memory: Memory, gathered: int, assume: Assumptions) -> dict[str, float]:
    """Bytes on one of the GPUs, by what they are for."""
    rows = {
        "weights": memory.weights / assume.num_shards,
        "gradients": memory.gradients / assume.num_shards,
        "optimiser states": memory.optimizer / assume.num_shards,
        "activations, temporary": memory.activations,
        "CUDA, fragmentation (assumed)": assume.overhead_gb * GB,
    }
    if assume.num_shards > 1:
        rows["gathered by FSDP2"] = gathered
    elif assume.num_gpus > 1:
        rows["buckets of DDP"] = memory.gradients
    return rows


def seconds_per_step(memory: Memory, operations: int, accumulation: int, assume: Assumptions) -> tuple[float, float]:
    """How long a step computes, and how long its traffic takes, which at best runs meanwhile.

    FSDP2 gathers the weights three times a batch (teacher, student, backward); gradients are exchanged once a step.
    """
    compute_s = accumulation * operations / (assume.peak_tflops * 1e12 * assume.utilisation)
    gathered = 3 * accumulation * memory.weights * (1 - 1 / assume.num_shards)
    exchanged = 2 * memory.gradients * (1 - 1 / assume.num_gpus)
    return compute_s, (gathered + exchanged) / (assume.network_gb_per_s * GB)


def estimate(recipe: dict, assume: Assumptions) -> dict:
    """All figures of a recipe: `parameters`, `memory` (bytes), `operations` of a batch, and the run as a whole."""
    config, bf16 = model_config(recipe), recipe.get("bf16", False)
    batch_size, accumulation = recipe["per_device_train_batch_size"], recipe.get("gradient_accumulation_steps", 1)
    dtype, checkpoints = getattr(torch, recipe.get("dtype", "float32")), recipe.get("activation_checkpointing", False)
    model = without_contents(lambda: build_model(config, dtype, checkpoints))
    longest, usual = (make_batch(config, batch_size, s, assume) for s in (assume.longest_clip_s, assume.clip_s))
    operations = count_operations(model, usual, bf16)
    accumulates = accumulation > 1 or assume.num_shards > 1
    memory = peak_memory(model, longest, bf16, accumulates, on_gpu=True)
    compute_s, network_s = seconds_per_step(memory, sum(operations.values()), accumulation, assume)
    clips_per_step = batch_size * accumulation * assume.num_gpus
    return {
        "parameters": count_parameters(model),
        "memory": memory_of_gpu(memory, gathered_bytes(model, bf16), assume),
        "operations": operations,
        "compute_s": compute_s,
        "network_s": network_s,
        "clips_per_step": clips_per_step,
        "clips_per_s": clips_per_step / max(compute_s, network_s),
        "hours": recipe["max_steps"] * max(compute_s, network_s) / 3600,
        "speech_hours": recipe["max_steps"] * clips_per_step * assume.clip_s / 3600,
    }


def print_estimate(figures: dict, recipe: dict, assume: Assumptions):
    print(f"{backbones(recipe)}\n\n{'parameters, millions':32} {'trained':>9} {'frozen':>9}")
    for part, (trained, frozen) in figures["parameters"].items():
        print(f"  {part:30} {trained / 1e6:9,.1f} {frozen / 1e6:9,.1f}")
    print(f"\n{f'memory of a GPU, clips of {assume.longest_clip_s:g} s':32} {'GB':>9}")
    for part, size in figures["memory"].items():
        print(f"  {part:30} {size / GB:9.2f}")
    total = sum(figures["memory"].values()) / GB
    verdict = "" if total <= assume.gpu_memory_gb else ": too much"
    print(f"  {'together':30} {total:9.2f} of {assume.gpu_memory_gb:g}{verdict}")
    print(f"\n{f'a batch, clips of {assume.clip_s:g} s':32} {'TFLOP':>9}")
    for part, operations in figures["operations"].items():
        print(f"  {part:30} {operations / 1e12:9.2f}")
    print(f"  {'together':30} {sum(figures['operations'].values()) / 1e12:9.2f}")
    print(
        f"\ntime, {assume.num_gpus} x {assume.peak_tflops:g} TFLOP/s at {assume.utilisation:.0%}"
        f"\n  {'a step of ' + format(figures['clips_per_step'], ',') + ' clips':30} {figures['compute_s']:9.1f} s"
        f" (network {figures['network_s']:.1f} s, beside it at best)"
        f"\n  {'clips per second':30} {figures['clips_per_s']:9.1f}"
        f"\n  {format(recipe['max_steps'], ',') + ' steps':30} {figures['hours']:9.1f} h"
        f" for {figures['speech_hours']:,.0f} h of speech"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file of options of examples/train.py")
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=field.type, help=f"instead of the recipe's, or of {field.default}")
    options = vars(parser.parse_args())
    recipe, assumed = read_recipe(options.pop("recipe"))
    assume = Assumptions(**{**assumed, **{name: value for name, value in options.items() if value is not None}})
    print_estimate(estimate(recipe, assume), recipe, assume)


if __name__ == "__main__":
    main()
