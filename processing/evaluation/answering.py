"""Answers from text and from speech, and how many of them are right.

Both sides get the same instruction; the text side reads the gold transcript, which is the upper bound for the speech
side. Leaves out: other metrics than exact match (see `text_scores.py`).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from tqdm import tqdm

from modeling_blsp_kd import BlspKdForCausalLM
from processing.processing_blsp_kd import BlspKdProcessor
from processing.spoken_inputs import user_turn


@torch.inference_mode()
def answer(
    model: BlspKdForCausalLM,
    processor: BlspKdProcessor,
    conversations: list[list[dict]],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    description: str | None = None,
) -> list[str]:
    """Return the greedy answers to conversations (lists of chat messages), in order; a description shows progress."""
    model.eval()
    answers = []
    starts = range(0, len(conversations), batch_size)
    for start in tqdm(starts, desc=description, mininterval=1, disable=description is None):
        inputs = processor.apply_chat_template(
            conversations[start : start + batch_size], add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def answer_rows(
    model: BlspKdForCausalLM, processor: BlspKdProcessor, rows: list[dict], source: str, **options
) -> list[str]:
    """Answer rows, from their `"text"` or from their `"audio"`."""
    content = {
        "text": lambda row: {"type": "text", "text": row["text"].strip()},
        "audio": lambda row: {"type": "audio", "audio": row["audio"]},
    }[source]
    conversations = [user_turn(row.get("instruction"), content(row)) for row in rows]
    return answer(model, processor, conversations, **{"description": f"answering from {source}", **options})


def accuracy(rows: Sequence[dict], answers: Sequence[str]) -> dict:
    """Return the share of exact matches with `row["answer"]`, over all rows and by `row["kind"]`."""
    right = defaultdict(list)
    for row, given in zip(rows, answers):
        right[row.get("kind") or "all"].append(given == row["answer"])
    matches = [match for kind in right.values() for match in kind]
    return {
        "all": sum(matches) / len(matches),
        "by_kind": {kind: sum(values) / len(values) for kind, values in sorted(right.items())},
    }
