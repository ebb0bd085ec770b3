"""Whether text-only behaviour is that of the original LLM, bit for bit.

Both read the same prompts in the same batches, in this process. Leaves out: speech, see `systems.py`.
"""

from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_blsp_kd import BlspKdForCausalLM
from processing.processing_blsp_kd import BlspKdProcessor
from processing.spoken_inputs import user_turn


@torch.inference_mode()
def compare_with_original(
    model: BlspKdForCausalLM,
    processor: BlspKdProcessor,
    original: PreTrainedModel,
    rows: list[dict],
    max_new_tokens: int = 16,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Compare what the model and the original LLM do with text.

    Args:
        original: the LLM as it was before, in the dtype of the model's own.
        rows: each with `text` and perhaps an `instruction`.

    Returns:
        `num_prompts`, and the numbers of those whose logits (`same_logits`) and greedy answers (`same_answers`) are
        equal in every bit; `largest_difference` of a logit.
    """
    model.eval(), original.eval()
    results: dict[str, Any] = {"num_prompts": len(rows), "same_logits": 0, "same_answers": 0, "largest_difference": 0.0}
    for start in tqdm(range(0, len(rows), batch_size), desc="comparing with the original LLM", mininterval=1):
        chats = [
            user_turn(row.get("instruction"), {"type": "text", "text": row["text"]})
            for row in rows[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
        inputs = {name: values.to(model.device) for name, values in inputs.items() if values is not None}
        difference = (model(**inputs).logits - original(**inputs).logits).float().abs()
        difference = difference.masked_fill(~inputs["attention_mask"].bool()[..., None], 0.0).amax((1, 2))
        results["same_logits"] += int((difference == 0).sum())
        results["largest_difference"] = max(results["largest_difference"], float(difference.max()))
        answers = [
            each.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            for each in (model, original)
        ]
        same_length = answers[0].shape == answers[1].shape
        results["same_answers"] += int((answers[0] == answers[1]).all(1).sum()) if same_length else 0
    return results
