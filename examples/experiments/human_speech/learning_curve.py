"""Plot scores against the amount of training speech, from evaluations of models trained on sets of several sizes.

    python -m examples.experiments.human_speech.learning_curve --output outputs/learning_curve \\
        --evaluations outputs/sentences_5_evaluation outputs/sentences_10_evaluation

The evaluations (of several seeds, too) are of `evaluate.py --train_manifest`, over the same rows, with the systems text
and speech and the tasks transcripts and alignment. The training manifests hold a `duration` of each row. Leaves in the
output folder `learning_curve.json`, `.md` and `.png`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from processing.evaluation.report import COLUMNS, shown
from processing.manifests import read_objects, seconds

TASKS = ("transcripts", "alignment")
SCORES = [column for column in COLUMNS if column[1] in TASKS]
PLOTTED = ("wer", "response_kl", "input_kl", "token_count_error")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="output folders of evaluate.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the curve")
    options = parser.parse_args()
    points = sorted(map(read_point, options.evaluations), key=lambda point: point["minutes"])
    if len({point["data"] for point in points}) > 1:
        raise ValueError(f"The evaluations are not of the same rows: {sorted({point['data'] for point in points})}.")
    options.output.mkdir(parents=True, exist_ok=True)
    curve = {"points": points, "per_doubling": {name: slope(points, name) for _, _, name, _, _ in SCORES}}
    (options.output / "learning_curve.json").write_text(json.dumps(curve, indent=2) + "\n")
    (options.output / "learning_curve.md").write_text(as_markdown(curve))
    plot(points, options.output / "learning_curve.png")
    print(as_markdown(curve))


def read_point(folder: Path) -> dict:
    """Return minutes of training speech and all scores of one evaluation.

    Raises:
        ValueError: it does not name the training manifest, or lacks a system or a score.
    """
    results = json.loads((folder / "results.json").read_text())
    settings, systems = results["settings"], results["systems"]
    if missing := sorted({"text", "speech"} - systems.keys()):
        raise ValueError(f"{folder} lacks the systems {missing}. Evaluate with --systems text,speech.")
    scores = systems["speech"]
    if not settings["train_manifest"]:
        raise ValueError(f"{folder} does not say on what the model was trained. Evaluate with --train_manifest.")
    if missing := sorted(set(TASKS) - scores.keys()):
        raise ValueError(f"{folder} lacks scores of {missing}. Evaluate with --tasks transcripts,alignment.")
    rows = [row for _, row in read_objects(settings["train_manifest"])]
    return {
        "minutes": round(sum(seconds("duration", row["duration"]) for row in rows) / 60, 1),
        "sentences": len(rows),
        "data": Path(settings["data"]).name,
        "text_wer": systems["text"]["transcripts"]["wer"],
        **{name: scores[task][name] for _, task, name, _, _ in SCORES},
    }


def slope(points: list[dict], name: str) -> float | None:
    """Return the change of a score per doubling of the data, by least squares, or None for fewer than two sizes."""
    sizes = np.log2([point["minutes"] for point in points])
    if np.ptp(sizes) == 0:
        return None
    return float(np.polyfit(sizes, [point[name]["value"] for point in points], 1)[0])


def as_markdown(curve: dict) -> str:
    lines = [
        "| minutes | sentences | " + " | ".join(heading for heading, *_ in SCORES) + " |",
        "|---|---|" + "---|" * len(SCORES),
    ]
    for point in curve["points"]:
        cells = [shown(point[name], factor, decimals) for _, _, name, factor, decimals in SCORES]
        lines.append(f"| {point['minutes']:g} | {point['sentences']} | " + " | ".join(cells) + " |")
    changes = (curve["per_doubling"][name] for _, _, name, _, _ in SCORES)
    cells = [
        "" if change is None else f"{factor * change:+.{decimals}f}"
        for change, (*_, factor, decimals) in zip(changes, SCORES)
    ]
    lines.append("| with each doubling | | " + " | ".join(cells) + " |")
    text_wer = 100 * curve["points"][-1]["text_wer"]["value"]
    lines += ["", f"From the text itself the LLM's WER is {text_wer:.1f} %. 95 % intervals over rows."]
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path):
    chosen = [score for score in SCORES if score[2] in PLOTTED]
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (heading, _, name, factor, _) in zip(figure.subplots(1, len(chosen)), chosen):
        values, lows, highs = (
            np.array([factor * point[name][key] for point in points]) for key in ("value", "low", "high")
        )
        minutes = [point["minutes"] for point in points]
        axes.errorbar(minutes, values, yerr=[values - lows, highs - values], fmt="o-", capsize=3)
        axes.set(xscale="log", xlabel="minutes of training speech", ylabel=heading, ylim=(0, None))
        axes.set_xticks(minutes, [f"{size:g}" for size in minutes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
