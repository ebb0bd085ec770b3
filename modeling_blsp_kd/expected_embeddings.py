"""Speech tokens as expected embeddings: the LLM's token embeddings, averaged by how probable each token is.

An option of the CFormer, after LegoSLM (arXiv 2505.11352), which does so with CTC posteriors. The probabilities are the
softmax of what `transcript_ce` trains, so what a recognition warm-up learned is at once in the range of the LLM's
own embeddings. The lower the temperature of the softmax, the nearer the average is to the embedding of the most
probable token. Leaves out: the output of the CFormer itself (`adapters.py`).

Shapes: U speech tokens, V vocabulary, D LLM width.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .llm_outputs import gathered_weight

OUTPUTS = ("projection", "expected_embedding")
MOST_LOGITS = 2**24  # at once; 64 MiB in float32


def llm_vectors(model: Any, token_states: torch.Tensor) -> torch.Tensor:
    """Return the vectors that the LLM of a [`BlspKdForCausalLM`] reads for an adapter's output of shape (..., D)."""
    if model.adapter.output == "projection":
        return token_states
    return expected_embeddings(token_states, model.get_input_embeddings(), model.adapter.output_temperature)


def expected_embeddings(token_states: torch.Tensor, embeddings: nn.Module, temperature: float = 1.0) -> torch.Tensor:
    """Average embeddings, as their module returns them, with weights softmax(token_states @ weight.T / temperature).

    At most `MOST_LOGITS` logits are in memory at once; the backward pass computes them again.

    Args:
        token_states (`torch.FloatTensor` of shape (..., D)).
        embeddings (`nn.Module`): the LLM's, with a `weight` of shape (V, D). It gets no gradient.
        temperature (`float`): above 0.

    Returns:
        `torch.FloatTensor` of shape (..., D): in the dtype of `token_states`.
    """
    weight = gathered_weight(embeddings).detach()
    # Gemma's embeddings multiply what they look up.
    scale = torch.as_tensor(getattr(embeddings, "embed_scale", 1.0), device=weight.device).to(weight.dtype)
    rows = token_states.reshape(-1, token_states.shape[-1])
    averaged = [
        checkpoint(_average, part, weight, temperature, use_reentrant=False)
        if part.requires_grad
        else _average(part, weight, temperature)
        for part in rows.split(max(1, MOST_LOGITS // len(weight)))
    ]
    return (torch.cat(averaged) * scale).to(token_states.dtype).view_as(token_states)


def _average(rows: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    probabilities = ((rows / temperature).to(weight.dtype) @ weight.T).softmax(-1, dtype=torch.float32)
    return probabilities.to(weight.dtype) @ weight
