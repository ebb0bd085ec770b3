"""What the losses take from the LLM: its hidden states after a prompt, and its output head.

The losses multiply with the head themselves, at the compared positions only. Leaves out: which positions these are
(`distillation_step.py`).

Shapes: B prompts, L length, D LLM width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class LlmStates:
    """Hidden states of the LLM after a batch of prompts.

    Args:
        last (B, L, D): those that its output head reads.
        layers (`list` of (B, L, D)): those of other layers that a loss compares.
    """

    last: torch.Tensor
    layers: list[torch.Tensor]

    @classmethod
    def after(cls, base_model: nn.Module, layers: Sequence[int], **prompts: Any) -> "LlmStates":
        """Run an LLM without its head on prompts, and keep its states of the layers, as it numbers them itself."""
        options = {"output_hidden_states": True} if layers else {}
        outputs = base_model(**prompts, use_cache=False, return_dict=True, **options)
        return cls(outputs.last_hidden_state, [outputs.hidden_states[layer] for layer in layers])


def gathered_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight of embeddings or head.

    accelerate makes each of them a unit of FSDP2, which gathers it in the module's own forward. The losses bypass that
    forward, so they gather it here; FSDP2 frees it again after the backward.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    return module.weight


@dataclass(frozen=True)
class OutputHead:
    """The LLM's output head as the losses take it, and what the LLM does to its logits afterwards.

    Args:
        weight (V, D), bias (V,) or None.
        scale (`float`): factor on the logits (Cohere's logit_scale, Granite's logits_scaling).
        softcap (`float` or None): tanh soft-capping of the logits (Gemma's final_logit_softcapping).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, language_model: nn.Module) -> "OutputHead":
        """Read the head of an LLM. Each forward calls this anew, because sharding swaps the weight."""
        head = language_model.get_output_embeddings()
        if head.weight.is_meta:
            raise ValueError("The LLM's output head is offloaded, so the losses cannot read it. Keep it on a device.")
        text_config = language_model.config.get_text_config()
        scale = getattr(text_config, "logit_scale", None) or 1.0
        scale /= getattr(text_config, "logits_scaling", None) or 1.0
        softcap = getattr(text_config, "final_logit_softcapping", None)
        return cls(gathered_weight(head), getattr(head, "bias", None), scale, softcap)

    @property
    def options(self) -> dict:
        """Return the keyword arguments of [`linear_kl`], [`linear_cross_entropy`] and [`keep_top`]."""
        return {"lm_head_bias": self.bias, "scale": self.scale, "softcap": self.softcap}
