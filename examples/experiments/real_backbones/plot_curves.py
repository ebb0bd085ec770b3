"""Learning curves, over steps or over hours of speech, from the results of `evaluate_all`.

    python -m examples.experiments.real_backbones.plot_curves --over steps --output steps.png RUNS/*/results.json
    python -m examples.experiments.real_backbones.plot_curves --over hours --output hours.png RUNS/*/results.json

Each file is a point: its steps are those of the model's training, its hours the sum of what `--hours` of `evaluate_all`
named. Of a recognition warm-up take `--system cascade`, whose transcripts are read off the speech vectors. Leaves out:
fits and forecasts.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

# Heading of a picture, and its lines: label, part, task, score.
PICTURES = {
    "WER % of repeated words": (
        ("people", "repeat_people", "transcripts", "wer"),
        ("held-out synthesizer", "repeat_synthesizer", "transcripts", "wer"),
    ),
    "questions, % of text": (("held-out synthesizer", "questions", "answers", "contained_share_of_text"),),
    "token count within one, %": (
        ("people", "repeat_people", "alignment", "token_count_within_one"),
        ("held-out synthesizer", "repeat_synthesizer", "alignment", "token_count_within_one"),
    ),
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of evaluate_all")
    parser.add_argument("--over", choices=["steps", "hours"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--system", default="speech", help="whose scores to draw")
    options = parser.parse_args(arguments)
    points = read_points(options.results, options.over)
    curves = {heading: curves_of(points, lines, options.system) for heading, lines in PICTURES.items()}
    draw({heading: of for heading, of in curves.items() if of}, options.over, options.output)


def read_points(paths: list[Path], over: str) -> list[tuple[float, dict]]:
    """Return the place on the axis and the results of each file, in order.

    Raises:
        ValueError: a file does not tell its place.
    """
    points = []
    for path in paths:
        results = json.loads(path.read_text())
        place = results["model"].get("steps") if over == "steps" else sum(results["hours"].values())
        if not place:
            raise ValueError(f"{path} does not tell the {over} of its model. Name them to evaluate_all: --hours.")
        points.append((place, results))
    return sorted(points, key=lambda point: point[0])


def curves_of(points: list[tuple[float, dict]], lines, system: str) -> dict[str, list[tuple[float, dict]]]:
    """Return for each label the places and the scores of the points that have one."""
    curves = {}
    for label, part, task, name in lines:
        scores = [
            (place, results.get(part, {}).get("systems", {}).get(system, {}).get(task, {}).get(name))
            for place, results in points
        ]
        if known := [(place, score) for place, score in scores if score]:
            curves[label] = known
    return curves


def draw(pictures: dict[str, dict[str, list[tuple[float, dict]]]], over: str, output: Path) -> None:
    """Draw the pictures side by side, with 95 % intervals.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not pictures:
        raise ValueError("No file has a score of this system to draw. Evaluate some parts first.")
    figure = Figure(figsize=(4 * len(pictures), 3.2), layout="constrained")
    for number, (heading, curves) in enumerate(pictures.items(), start=1):
        axes = figure.add_subplot(1, len(pictures), number)
        for label, points in curves.items():
            places = [place for place, _ in points]
            values, lows, highs = ([100 * score[name] for _, score in points] for name in ("value", "low", "high"))
            axes.plot(places, values, marker="o", label=label)
            axes.fill_between(places, lows, highs, alpha=0.2)
        axes.set_title(heading)
        axes.set_xlabel({"steps": "optimiser steps", "hours": "hours of speech"}[over])
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
