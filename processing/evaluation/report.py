"""The results as a Markdown table and as plots.

Leaves out: scores of single kinds of transcripts and translations; `results.json` has what there is.
"""

from pathlib import Path

from transformers.utils.import_utils import is_matplotlib_available

# Heading, task, score, factor, decimals.
COLUMNS = (
    ("exact match", "answers", "exact_match", 1, 3),
    ("contained", "answers", "contained", 1, 3),
    ("share of text", "answers", "share_of_text", 1, 3),
    ("contained, share of text", "answers", "contained_share_of_text", 1, 3),
    ("WER %", "transcripts", "wer", 100, 1),
    ("CER %", "transcripts", "cer", 100, 1),
    ("BLEU", "translation", "bleu", 1, 1),
    ("chrF", "translation", "chrf", 1, 1),
    ("response KL", "alignment", "response_kl", 1, 4),
    ("response tokens agree", "alignment", "response_agreement", 1, 3),
    ("input KL", "alignment", "input_kl", 1, 4),
    ("token count error", "alignment", "token_count_error", 1, 3),
    ("token count right", "alignment", "token_count_accuracy", 1, 3),
    ("token count within 1", "alignment", "token_count_within_one", 1, 3),
)
WORD_TIMES = (("word times, median ms", "median_ms", 1, 0), ("90 % within ms", "percentile_90_ms", 1, 0))


def as_markdown(results: dict) -> str:
    """Tables of all systems: scores with their 95 % intervals, and exact matches by kind and by group of voices."""
    systems, settings = results["systems"], results["settings"]
    lines = [f"{settings['model']} on {settings['data']}: {settings['num_rows']} rows, 95 % intervals over rows", ""]
    body = _overall(systems, settings["num_rows"]) + _costs([results.get("cost", {}).get(name) for name in systems])
    lines += table(["", *systems], body)
    for field, heading in (("by_voice_group", "exact match by voices"), ("by_kind", "exact match by kind")):
        groups = {name: scores["answers"].get(field, {}) for name, scores in systems.items() if "answers" in scores}
        names = dict.fromkeys(name for group in groups.values() for name in group)
        if names:
            body = [
                _line(name, [of_system[name]["exact_match"] for of_system in groups.values()], settings["num_rows"])
                for name in names
            ]
            lines += ["", *table([heading, *groups], body)]
    return "\n".join(lines) + "\n"


def _overall(systems: dict, num_rows: int) -> list[list[str]]:
    rows = []
    for heading, task, name, factor, decimals in COLUMNS:
        scores = [of.get(task, {}).get(name) for of in systems.values()]
        rows.append(_line(heading, scores, num_rows, factor, decimals))
    for heading, name, factor, decimals in WORD_TIMES:
        scores = [of.get("alignment", {}).get("word_times", {}).get(name) for of in systems.values()]
        rows.append(_line(heading, scores, num_rows, factor, decimals))
    return [row for row in rows if any(row[1:])]


def _costs(costs: list[dict | None]) -> list[list[str]]:
    """Return the lines of the parameters that run and of the time to the first token, if they were measured."""
    measured = [cost for cost in costs if cost]
    if not measured:
        return []
    num_timed = measured[0]["first_token_ms"]["n"]
    return [
        ["parameters run, M", *(f"{cost['num_parameters'] / 1e6:.1f}" if cost else "" for cost in costs)],
        [
            f"first token, ms ({num_timed} rows)",
            *(shown(cost["first_token_ms"], 1, 0) if cost else "" for cost in costs),
        ],
    ]


def _line(heading: str, scores: list[dict | None], num_rows: int, factor: float = 1, decimals: int = 3) -> list[str]:
    """Return one score of all systems, and the number of rows behind it, if not all."""
    counts = {score["n"] for score in scores if score is not None}
    if counts and counts != {num_rows}:
        heading += f" ({max(counts)} rows)"
    return [heading, *(shown(score, factor, decimals) for score in scores)]


def shown(score: dict | None, factor: float, decimals: int) -> str:
    """Return a score with its interval, or nothing if there is none."""
    if score is None:
        return ""
    value, low, high = (f"{factor * score[name]:.{decimals}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in [head, *body]]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def plot(results: dict, folder: Path) -> list[Path]:
    """Pictures of the scores with their intervals, and of exact matches by kind; none without matplotlib."""
    if not is_matplotlib_available():
        return []
    from matplotlib.figure import Figure

    systems, written = results["systems"], []
    colours = {system: f"C{number}" for number, system in enumerate(systems)}
    shown = [column for column in COLUMNS if any(column[2] in of.get(column[1], {}) for of in systems.values())]
    if shown:
        num_columns = min(4, len(shown))
        num_lines = -(-len(shown) // num_columns)
        figure = Figure(figsize=(3 * num_columns, 2.4 * num_lines), layout="constrained")
        for number, (heading, task, name, factor, _) in enumerate(shown, start=1):
            axes = figure.add_subplot(num_lines, num_columns, number)
            scores = {system: of[task][name] for system, of in systems.items() if name in of.get(task, {})}
            for place, (system, score) in enumerate(scores.items()):
                value, low, high = (factor * score[bound] for bound in ("value", "low", "high"))
                spread = [[max(0, value - low)], [max(0, high - value)]]
                axes.errorbar(place, value, yerr=spread, fmt="o", capsize=4, color=colours[system], clip_on=False)
            axes.set_xticks(range(len(scores)), scores)
            axes.set_xlim(-0.5, len(scores) - 0.5)
            axes.set_ylim(bottom=0)
            axes.set_title(heading)
        written.append(folder / "scores.png")
        figure.savefig(written[-1], dpi=120)
    by_kind = {
        name: scores["answers"]["by_kind"] for name, scores in systems.items() if "by_kind" in scores.get("answers", {})
    }
    if by_kind:
        kinds = list(next(iter(by_kind.values())))
        figure = Figure(figsize=(2 + 0.6 * len(kinds), 3.5), layout="constrained")
        axes, width = figure.add_subplot(), 0.8 / len(by_kind)
        for place, (system, of_kind) in enumerate(by_kind.items()):
            matches = [of_kind[kind]["exact_match"] for kind in kinds]
            values = [score["value"] for score in matches]
            spread = [
                [max(0, score["value"] - score["low"]) for score in matches],
                [max(0, score["high"] - score["value"]) for score in matches],
            ]
            places = [index + (place - (len(by_kind) - 1) / 2) * width for index in range(len(kinds))]
            axes.bar(
                places, values, width, yerr=spread, label=system, color=colours[system], error_kw={"linewidth": 0.8}
            )
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        axes.set_ylabel("exact match")
        figure.legend(loc="outside upper center", ncols=len(by_kind))
        written.append(folder / "by_kind.png")
        figure.savefig(written[-1], dpi=120)
    return written
