"""The scores that `examples/train.py` reports when training has ended.

`scoring.py` scores more, with intervals, for `examples/evaluate.py`.
"""

from typing import Any

from .answering import accuracy

# What an evaluation of the Trainer measures and a training reports.
REPORTED = ("token_count_accuracy", "token_count_error", "response_kl", "input_kl")
VOICE_GROUPS = ("seen_voices", "held_out_voices", "unnamed_voices")


def score_by_voices(rows: list[dict], spoken: list[str], seen_voices: set) -> dict:
    """Score the answers to rows that say which is right.

    Returns:
        `dict`: `num_scored`, and the accuracy of the LLM on the gold transcript and of the model on speech, for seen,
        for held-out and for unnamed voices; empty if there is no row.
    """
    if not rows:
        return {}
    results: dict[str, Any] = {"num_scored": len(rows)}
    for name, given in (("text_accuracy", [row["response"] for row in rows]), ("speech_accuracy", spoken)):
        by_voices: dict[str, list[tuple[dict, str]]] = {voices: [] for voices in VOICE_GROUPS}
        for row, text in zip(rows, given):
            voice = row.get("voice")
            voices = "seen_voices" if voice in seen_voices else "held_out_voices"
            by_voices["unnamed_voices" if voice is None else voices].append((row, text))
        results[name] = {voices: accuracy(*zip(*pairs))["all"] for voices, pairs in by_voices.items() if pairs}
        results[name]["by_kind"] = accuracy(rows, given)["by_kind"]
    return results


def results_table(results: dict) -> str:
    """Return the table of a training's results, to print."""
    text, speech = (results.get(name, {"by_kind": {}}) for name in ("text_accuracy", "speech_accuracy"))
    if "num_scored" in results:
        table = [f"\n{'answers correct (exact match)':32} {'text':>8} {'speech':>8} {'ratio':>8}"]
    else:
        table = ["\nNo row of the evaluation has an 'answer', so no answers are scored."]
    lines = {name.replace("_", " "): (text[name], speech[name]) for name in text if name != "by_kind"}
    lines |= {f"  {kind}": (text["by_kind"][kind], speech["by_kind"][kind]) for kind in text["by_kind"]}
    for name, (upper, reached) in lines.items():
        table.append(f"{name:32} {upper:8.3f} {reached:8.3f} {reached / upper if upper else float('nan'):8.3f}")
    for name in REPORTED:
        if name in results:
            table.append(f"{name.replace('_', ' '):32} {results[name]:8.4f}")
    table.append(f"{'training took':32} {results['train_seconds']:8.0f} s, everything {results['total_seconds']:.0f} s")
    return "\n".join(table)
