"""Weights of the tokens of an answer in the response KL: early tokens, and those with the highest divergence.

Weights average 1 within each answer, so the loss stays a mean over response tokens, and its count is the same under
gradient accumulation and with several processes. docs/losses.md has the formulas and sources.
"""

from typing import Any

import torch


@torch.no_grad()
def answer_weights(
    values: torch.Tensor, num_tokens: torch.Tensor, early_tokens: int, early_weight: float, hardest_share: float
) -> torch.Tensor:
    """Return the weight of each response token. They average 1 within each answer.

    Args:
        values (`torch.FloatTensor` of shape (R,)): divergences of the tokens of all answers, one answer after another.
        num_tokens (`torch.LongTensor` of shape (B,)): tokens of each answer; they sum to R.
        early_tokens (`int`), early_weight (`float`): the first tokens of each answer weigh so many times as much.
        hardest_share (`float`): in (0, 1]: of an answer of n tokens the ceil(share * n) with the highest divergence
            count, the others weigh 0.

    Returns:
        `torch.FloatTensor` of shape (R,): float32.
    """
    num_rows, device = len(values), values.device
    answers = torch.arange(len(num_tokens), device=device).repeat_interleave(num_tokens, output_size=num_rows)
    places = torch.arange(num_rows, device=device) - (num_tokens.cumsum(0) - num_tokens)[answers]
    weights = torch.where(places < early_tokens, float(early_weight), 1.0)
    if hardest_share < 1:
        hardest_first = values.argsort(descending=True, stable=True)
        ranked = hardest_first[answers[hardest_first].argsort(stable=True)]  # answer by answer again
        # A share such as 0.1 is a little more than a tenth in binary.
        num_hardest = (hardest_share * num_tokens.double() - 1e-9).ceil()
        weights[ranked] *= places < num_hardest[answers]
    totals = torch.zeros(len(num_tokens), device=device).index_add(0, answers, weights)
    return weights * (num_tokens / totals)[answers]


def sum_of_answers(kl: torch.Tensor, num_tokens: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return the sum of the divergences of response tokens, weighed as the options of `distillation` say.

    Args:
        kl (R,), num_tokens (B,): see [`answer_weights`].
    """
    named = {name: options[name] for name in ("early_tokens", "early_weight", "hardest_share")}
    if named["early_weight"] == 1 and named["hardest_share"] == 1:
        return kl.sum()
    return (answer_weights(kl.detach(), num_tokens, **named) * kl).sum()


def end_of_turn_ids(eos_token_id: int | list[int] | None) -> list[int]:
    """Return the ids of the tokens that end an answer, from the `eos_token_id` of a generation config.

    Raises:
        ValueError: there is none.
    """
    if eos_token_id is None:
        raise ValueError(
            "end_of_turn_kl compares the tokens that end an answer, but the generation config of the LLM has no "
            "eos_token_id. Set model.generation_config.eos_token_id."
        )
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
