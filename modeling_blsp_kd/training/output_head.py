"""Check before training that the losses read an LLM's output head as the LLM itself does.

The losses take hidden states and the head's weight, not the logits that the LLM returns. So they have to know all that
it does to its logits afterwards. Leaves out: the losses (`distillation.py`).
"""

import torch
from torch import nn

from ..distillation import postprocess_logits
from ..distillation_step import OutputHead
from ..frozen import frozen


@torch.no_grad()
def check_output_head(language_model: nn.Module):
    """Make sure that the losses see the same logits as the LLM's own forward returns.

    The losses read the output head directly, which is only right while they know all that the LLM does to its
    logits afterwards. The trainer calls this once.

    Raises:
        ValueError: this LLM does something else.
    """
    from peft.utils.integrations import gather_params_ctx  # the import takes a second, so only training does it

    input_ids = torch.arange(4, device=language_model.device)[None]
    head = OutputHead.of(language_model)
    parameters = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    with frozen(language_model):
        options = {"input_ids": input_ids, "use_cache": False, "return_dict": True}
        own = language_model(**options).logits.float()
        states = language_model.base_model(**options).last_hidden_state
        with gather_params_ctx(parameters, modifier_rank=None):  # under ZeRO-3
            logits = nn.functional.linear(states, head.weight, head.bias)
    difference = (postprocess_logits(logits, head.scale, head.softcap) - own).abs().max()
    tolerance = 1e-3 if own.dtype == torch.float32 else 1e-1
    if not difference <= tolerance * max(1.0, float(own.abs().max())):
        raise ValueError(
            f"{type(language_model).__name__} treats its logits in a way that the distillation losses do not know "
            f"(largest difference {float(difference):.3g}); distilling it would be wrong. Known are a scale "
            "(logit_scale, logits_scaling) and soft-capping (final_logit_softcapping)."
        )
