"""Partial LoRA (PLoRA): LoRA on the LLM's linear layers, added at speech positions only.

Follows arXiv 2405.19041 (partial LoRA after arXiv 2401.16420) on stock PEFT layers, so that quantised layers and PEFT's
own file format keep working. Leaves out: merging (the update depends on the position), DoRA and LoRA biases (both
would reach text positions), and expert layers of mixtures, which see regrouped tokens.
"""

import math
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import initialization as init

ADAPTER_NAME = "default"


def _refuse_merge(*args, **kwargs):
    raise NotImplementedError(
        "Partial LoRA cannot be merged into the LLM: it applies at speech positions only, and merged weights would "
        "change the LLM at text positions too. Keep it unmerged; text and decoding steps skip it at no cost."
    )


class PartialLora:
    """Injects LoRA layers into a language model and switches them on for the speech positions of one call.

    Outside [`~PartialLora.at`] the layers are off, and the model is the original LLM bit for bit.

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

    def __init__(self, language_model: nn.Module, r: int, lora_alpha: int, lora_dropout: float, target_modules):
        lora_config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=target_modules, bias="none"
        )
        inject_adapter_in_model(lora_config, language_model, adapter_name=ADAPTER_NAME)
        self.layers = [module for module in language_model.modules() if isinstance(module, LoraLayer)]
        self.is_speech: torch.BoolTensor | None = None
        for layer in self.layers:
            # A bound method, not a closure: copy.deepcopy then rebinds it to the copy of this object.
            layer.lora_A[ADAPTER_NAME].register_forward_hook(self._drop_text_positions)
            layer.merge = _refuse_merge
            layer._disable_adapters = True

    def initialize(self):
        """Initialise as PEFT does: random A, zero B, so that the untrained update is nothing.

        Weights that came from a checkpoint stay as they are.
        """
        for layer in self.layers:
            init.kaiming_uniform_(layer.lora_A[ADAPTER_NAME].weight, a=math.sqrt(5))
            init.zeros_(layer.lora_B[ADAPTER_NAME].weight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable matrices A and B of every layer."""
        return [
            matrix.weight
            for layer in self.layers
            for matrix in (layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME])
        ]

    @contextmanager
    def at(self, is_speech: torch.BoolTensor | None):
        """Add the update at the positions `is_speech` (B, L), inside this block only. None: nowhere."""
        outer = self.is_speech
        self._switch(is_speech)
        try:
            yield
        finally:
            self._switch(outer)

    def checkpoint(self, checkpoint_func):
        """Wrap a checkpointing function so that the recomputation sees the mask of the forward pass it repeats.

        The recomputation runs inside backward, when the block of `at` has long been left.
        """

        def checkpoint_with_mask(function, *args, **kwargs):
            is_speech = self.is_speech

            def run(*args, **kwargs):
                with self.at(is_speech):
                    return function(*args, **kwargs)

            return checkpoint_func(run, *args, **kwargs)

        return checkpoint_with_mask

    def _switch(self, is_speech):
        self.is_speech = is_speech
        for layer in self.layers:
            # Not `enable_adapters`, which also changes requires_grad.
            layer._disable_adapters = is_speech is None

    def _drop_text_positions(self, lora_a: nn.Module, inputs, low_rank: torch.Tensor) -> torch.Tensor:
        if low_rank.shape[:2] != self.is_speech.shape:
            raise ValueError(
                f"Partial LoRA was given the speech mask of a {tuple(self.is_speech.shape)} batch, but a layer saw "
                f"hidden states of shape {tuple(low_rank.shape)}. Layers that regroup tokens (experts of a mixture) "
                "cannot take it: name the other layers in `plora['target_modules']`."
            )
        # Filled, not multiplied: 0 times inf at a text position would be NaN.
        return low_rank.masked_fill(~self.is_speech[..., None], 0.0)
