"""The LLM's own responses, which it learns to give after speech as it does after text.

Rows that have a response keep it. `examples/make_training_data.py` makes responses ahead of training.
"""

from accelerate.utils import broadcast_object_list

from modeling_blsp_kd import BlspKdForCausalLM
from processing.chat_templates import is_in_thought
from processing.evaluation.answering import answer_rows
from processing.processing_blsp_kd import BlspKdProcessor
from processing.spoken_inputs import user_turn


def add_responses(
    rows: list[dict], model: BlspKdForCausalLM, processor: BlspKdProcessor, max_new_tokens: int = 32
) -> None:
    """Give each row without a `response` the LLM's greedy answer to its instruction and text, in place.

    Several processes call this together, and all get the answers of the first.

    Args:
        rows: each with `text`, and optionally `instruction`; the same row may occur several times.
        max_new_tokens: longest answer.

    Raises:
        ValueError: the LLM answers nothing, or does not finish its thought.
    """
    # A mixture repeats rows, as the same objects.
    unanswered = list({id(row): row for row in rows if not row.get("response")}.values())
    answers: list = [None] * len(unanswered)
    if model.device.type != "meta":  # FSDP's cpu_ram_efficient_loading gives the others their weights later
        answers = answer_rows(model, processor, unanswered, "text", max_new_tokens=max_new_tokens)
    if answers:  # torch cannot send an empty list
        broadcast_object_list(answers)
    for row, answer in zip(unanswered, answers):
        row["response"] = answer
    if empty := [row for row in unanswered if not row["response"]]:
        raise ValueError(
            f"The LLM answers {len(empty)} of {len(unanswered)} prompts with nothing, so there is nothing to learn "
            f"from, first {empty[0].get('origin', empty[0])}. Look at what it answers to text (its chat template? "
            "its tokenizer?), give these rows a 'response', or leave them out, as make_training_data.py does."
        )
    opened = processor.apply_chat_template(user_turn(None), add_generation_prompt=True)
    if thinking := [row for row in unanswered if is_in_thought(opened + row["response"])]:
        raise ValueError(
            f"{len(thinking)} of {len(unanswered)} answers of the LLM end within a thought, so nothing after it "
            f"would be learnt, first {thinking[0].get('origin', thinking[0])}. Have the LLM not think, for example "
            "with --chat_template_kwargs '{\"enable_thinking\": false}', or raise --max_response_tokens."
        )
