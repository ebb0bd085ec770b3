"""The metadata of a model card: base models, licence, languages, data, samples for the widget, and measured results.

Follows the Hub's card metadata (huggingface_hub's `ModelCardData`).
"""

from huggingface_hub import EvalResult, ModelCardData

from modeling_blsp_kd.training.card import TASK, card_metadata

VOICES = {
    "seen_voices": "voices heard in training",
    "held_out_voices": "voices not heard in training",
    "unnamed_voices": "voices that the data does not name",
}


def metadata_of(facts: dict) -> ModelCardData:
    """Return the metadata of a card from the facts of [`make_card`]."""
    base_models = [part["base_model"] for part in facts["parts"] if is_hub_id(part["base_model"])]
    eval_results = _eval_results(facts["results"])
    return card_metadata(
        base_models,
        license=facts["licence"],
        language=facts["languages"] or None,
        datasets=facts["datasets"] or None,
        metrics=sorted({result.metric_type for result in eval_results}) or None,
        widget=[
            {"src": sample["audio"], "example_title": _title(sample), "output": {"text": sample["output"]}}
            for sample in facts["samples"]
        ]
        or None,
        model_name=facts["name"],
        eval_results=eval_results or None,
    )


def is_hub_id(name: str | None) -> bool:
    """Return whether a model's name is an id of the Hub rather than a path or nothing."""
    return name is not None and name != "" and name.count("/") < 2


def _title(sample: dict) -> str:
    return sample["instruction"] or sample["audio"]


def _eval_results(results: dict) -> list[EvalResult]:
    evaluation = (results.get("training") or {}).get("evaluation")
    if evaluation is None:
        return []  # an entry must name its data
    source = evaluation["source"]
    common = {"task_type": TASK, "dataset_type": source.replace(" ", "-"), "dataset_name": source}
    speech = results.get("speech_accuracy", {})
    measured = [
        EvalResult(
            **common,
            dataset_config=voices,
            metric_type="exact_match",
            metric_name=f"exact match of answers, {described}",
            metric_value=round(speech[voices], 4),
        )
        for voices, described in VOICES.items()
        if voices in speech
    ]
    if "token_count_accuracy" in results:
        value = round(results["token_count_accuracy"], 4)
        measured.append(
            EvalResult(**common, metric_type="accuracy", metric_name="number of speech tokens", metric_value=value)
        )
    return measured
