"""Partial LoRA (PLoRA): LoRA on the LLM's linear layers, added at speech positions only.

Follows arXiv 2405.19041 (partial LoRA after arXiv 2401.16420) on stock PEFT layers, so that quantised layers, PEFT's
own file format and a user's own LoRA beside it keep working. Leaves out: merging (the update depends on the position),
DoRA and LoRA biases (both would reach text positions), and expert layers of mixtures, which see regrouped tokens.
"""

import copy
import math
import os
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .plora_layers import ADAPTER_NAME, Call, SpeechRows, current_call, with_partial_lora

logger = logging.get_logger(__name__)


def leave_out_of_peft_model(model: PreTrainedModel, state_dict: dict, prefix: str, local_metadata: dict):
    """Drop partial LoRA from the state dict of a `PeftModel`, as a hook: PEFT would save it with its user's adapter."""
    if prefix.endswith("base_model.model."):
        for name in [name for name in state_dict if f".{ADAPTER_NAME}." in name]:
            del state_dict[name]


def _shapes(weights: dict[str, torch.Tensor]) -> set[tuple]:
    return {(name, tuple(tensor.shape)) for name, tensor in weights.items()}


def check_parallelism(config: PreTrainedConfig):
    """Raise a ValueError if the layers of a model are split among processes, by its config."""
    if getattr(getattr(config, "distributed_config", None), "tp_plan", None) is not None:
        raise ValueError(
            "Tensor parallelism does not know the layers that partial LoRA wraps. Use a device_map, FSDP or data "
            "parallelism, or a model with plora off."
        )


class PartialLora:
    """Injects LoRA layers into a language model and switches them on for the speech positions of one call.

    Outside [`~PartialLora.at`] the layers are off, and the model is the original LLM bit for bit. Other LoRA adapters
    on the same layers go on as PEFT switches them.

    Args:
        language_model (`nn.Module`): changed in place, its linear layers become `peft` LoRA layers.
        r (`int`): rank.
        lora_alpha (`int`): the update is scaled by `lora_alpha / r`.
        lora_dropout (`float`): dropout on the input of the update, in training.
        target_modules (`str` or `list[str]`): names of the linear layers as in `peft.LoraConfig`; `"all-linear"`
            takes all attention and MLP projections, but not the output head.

    Raises:
        ValueError: PEFT finds no such layer.
    """

    def __init__(
        self, language_model: nn.Module, r: int, lora_alpha: int, lora_dropout: float, target_modules: str | list[str]
    ):
        # PEFT takes a second to import, and a model without partial LoRA does not need it.
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        lora_config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules, bias="none"
        )
        inject_adapter_in_model(lora_config, language_model, adapter_name=ADAPTER_NAME)
        self.lora_config = language_model.peft_config[ADAPTER_NAME]  # with the names that "all-linear" stands for
        named_layers = [item for item in language_model.named_modules() if isinstance(item[1], LoraLayer)]
        self.layer_names = [name for name, _ in named_layers]
        self.layers = [layer for _, layer in named_layers]
        for layer in self.layers:
            peft_class: type = type(layer)
            layer.__class__ = with_partial_lora(peft_class)
            layer.partial_lora = self
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            layer.set_adapter([])  # off except at speech positions; PEFT freezes adapters that it deactivates
            for parameter in trained:
                parameter.requires_grad_(True)

        self._move_beside_offloaded()

    def _move_beside_offloaded(self):
        """Put the matrices of offloaded layers where these run.

        PEFT puts them where the weight is, but an offloaded layer has no weight between calls.
        """
        offloaded = [layer for layer in self.layers if layer.base_layer.weight.is_meta]
        if not offloaded:
            return
        from accelerate.utils import align_module_device

        # accelerate runs all of them on one device, so fetching the first one's weight tells.
        with align_module_device(offloaded[0].base_layer):
            device = offloaded[0].base_layer.weight.device
        if device.type == "meta":  # not offloaded, but built without weights, to be loaded
            return
        for layer in offloaded:
            layer.lora_A.to_empty(device=device)
            layer.lora_B.to_empty(device=device)

    def take_off(self, language_model: nn.Module):
        """Put the LLM's own layers back where this was injected."""
        for name, layer in zip(self.layer_names, self.layers):
            language_model.set_submodule(name, layer.base_layer)
        del language_model.peft_config

    def initialize(self):
        """Initialise as PEFT does: random A, zero B, so that the untrained update is nothing.

        Weights that came from a checkpoint stay as they are.
        """
        for layer in self.layers:
            init.kaiming_uniform_(layer.lora_A[ADAPTER_NAME].weight, a=math.sqrt(5))
            init.zeros_(layer.lora_B[ADAPTER_NAME].weight)

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable matrices A and B of every layer, by their names in a PEFT adapter file."""
        return {
            f"base_model.model.{name}.{kind}.weight": getattr(layer, kind)[ADAPTER_NAME].weight
            for name, layer in zip(self.layer_names, self.layers)
            for kind in ("lora_A", "lora_B")
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters.values())

    def save_pretrained(self, folder: str | os.PathLike, base_model_name_or_path: str | None = None):
        """Write a standard PEFT adapter folder.

        [`~PartialLora.load_pretrained`] reads it back. PEFT itself loads it onto the bare LLM too, as an ordinary
        LoRA, which adds the update at every position.

        Args:
            folder (`str` or `os.PathLike`): made if missing.
            base_model_name_or_path (`str`, *optional*): the LLM that the adapter belongs to, for its config.
        """
        from peft.utils import SAFETENSORS_WEIGHTS_NAME

        lora_config = copy.copy(self.lora_config)
        lora_config.base_model_name_or_path, lora_config.task_type = base_model_name_or_path, "CAUSAL_LM"
        lora_config.inference_mode = True
        lora_config.save_pretrained(folder)
        weights = {name: parameter.detach().contiguous() for name, parameter in self.named_parameters.items()}
        save_file(weights, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})

    @torch.no_grad()
    def load_pretrained(self, folder: str | os.PathLike):
        """Take over the weights of a PEFT adapter folder, or of a Hub repository of one.

        Raises:
            ValueError: it is not a LoRA of the same rank, scale and layers.
        """
        from peft import LoraConfig
        from peft.utils import load_peft_weights

        lora_config = LoraConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device="cpu")
        parameters = self.named_parameters
        for name, expected, got in [
            ("rank", self.lora_config.r, lora_config.r),
            ("lora_alpha", self.lora_config.lora_alpha, lora_config.lora_alpha),
            ("weights", _shapes(parameters), _shapes(weights)),
        ]:
            if got != expected:
                if name == "weights":
                    expected, got = sorted(expected - got)[:3], sorted(got - expected)[:3]
                raise ValueError(
                    f"{folder} does not fit this model's partial LoRA: its {name} should be {expected}, but is {got}. "
                    "Build the model with the same `plora` options."
                )
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    @property
    def current_call(self) -> Call | None:
        """Return the innermost call of this model that the current thread is inside of."""
        return current_call(self)

    @property
    def is_speech(self) -> torch.BoolTensor | None:
        """Return the speech positions of that call."""
        return None if self.current_call is None else self.current_call.is_speech

    def at(self, is_speech: torch.BoolTensor | None) -> Call:
        """Add the update at the positions `is_speech` (B, L), inside this block only. None: nowhere.

        A block holds in the thread that enters it. Blocks may nest, also those of several models.
        """
        if is_speech is not None and torch.is_grad_enabled():
            self._warn_of_others()
        # Once for all layers: the host waits for the device here.
        return self._switched_to(is_speech, SpeechRows.of(is_speech))

    def keep_mask_in_recomputation(self, checkpoint_func: Callable) -> Callable:
        """Wrap a function for gradient checkpointing so that the recomputation sees the mask of the pass it repeats.

        The recomputation runs inside backward, perhaps in a thread of autograd's, after the block of `at` has ended.
        """

        def recompute_with_mask(function, *args, **kwargs):
            call = self.current_call
            is_speech, rows = (None, None) if call is None else (call.is_speech, call.rows)

            def run(*args, **kwargs):
                with self._switched_to(is_speech, rows):
                    return function(*args, **kwargs)

            return checkpoint_func(run, *args, **kwargs)

        return recompute_with_mask

    def _switched_to(self, is_speech, rows: SpeechRows | None) -> Call:
        return Call(self, is_speech, rows)

    def _warn_of_others(self):
        for layer in self.layers:
            others = [] if layer.disable_adapters else layer.active_adapters
            if others and layer.lora_A[ADAPTER_NAME].weight.requires_grad:
                logger.warning_once(
                    f"LoRA {others} is trained, and the model's own partial LoRA with it, which PEFT does not save in "
                    "that adapter. Call model.requires_grad_(False) before get_peft_model to train yours alone."
                )
                return
