"""One table, one figure and one JSON file of an analysis.

Leaves out: what the numbers mean, see `analysis.py`.
"""

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
SPEECH_COLOUR, OTHER_COLOUR = "#1f6fb4", "#8a8a8a"
MARKERS = "osD^v<>pPX*hd"


def write(analysis: dict, settings: dict, folder: Path):
    """Write `summary.json`, `summary.md` and `summary.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"settings": settings, **analysis}, indent=1) + "\n")
    (folder / "summary.md").write_text(markdown(analysis, settings))
    if analysis["systems"]:
        draw(analysis).savefig(folder / "summary.png", dpi=120)


def label(row: dict) -> str:
    own = {"speech": "", "cascade": ""}.get(row["system"], f" ({row['system']})")
    return row["title"] + own


def markdown(analysis: dict, settings: dict) -> str:
    text = next((row["exact_match"] for row in analysis["systems"] if row["system"] == "text"), None)
    lines = [
        f"{settings['steps']} steps on {settings['data']}, evaluated on {settings['rows']}. "
        "Intervals are 95 %: over seeds by Student's t, over rows by bootstrap.",
        "",
        "| system | exact match | over seeds | over rows | of text | held-out voices | response KL | input KL "
        "| token count | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in analysis["systems"]:
        of_text = row["exact_match"] / text if text else None
        cells = [
            label(row),
            _number(row["exact_match"]),
            _interval(row["over_seeds"]),
            _interval(row["over_rows"]),
            _number(of_text),
            _number(row.get("by_voice_group", {}).get("held out voices")),
            _number(row["response_kl"]),
            _number(row["input_kl"]),
            _number(row["token_count_accuracy"]),
            _number(row["minutes"], 1),
            str(len(row["by_seed"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in analysis["systems"]:
        if row["exact_transcripts"] is not None:
            lines += ["", f"{label(row)}: {row['exact_transcripts']:.3f} of its transcripts are right."]
    lines += ["", "| claim | difference | interval | seeds | verdict |", "|---|---|---|---|---|"]
    for claim in analysis["claims"]:
        cells = [_number(claim["effect"], sign="+"), _interval(claim["interval"], sign="+"), str(claim["num_seeds"])]
        lines.append(f"| {claim['claim']} | {' | '.join(cells)} | {claim['verdict']} |")
    correlation = analysis["kl_and_accuracy"]
    lines += [
        "",
        f"KL measures alignment: Spearman's rank correlation of response KL and exact match over "
        f"{correlation['num_runs']} runs is {_number(correlation['spearman'])} "
        f"{_interval(correlation['interval'])}: {correlation['verdict']}.",
        "",
        "Machines: "
        + "; ".join(", ".join(f"{k} {v}" for k, v in machine.items()) for machine in analysis["machines"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _number(value, digits=3, sign="") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def _interval(interval, sign="") -> str:
    return "" if interval is None else f"[{_number(interval[0], sign=sign)}, {_number(interval[1], sign=sign)}]"


def draw(analysis: dict) -> Figure:
    """Draw exact match of every system (a dot per seed), and beside it response KL against exact match of every run."""
    rows = analysis["systems"]
    figure = Figure(figsize=(13, 1.6 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        colour = SPEECH_COLOUR if row["system"] == "speech" else OTHER_COLOUR
        left.barh(place, row["exact_match"], color=colour, alpha=0.35)
        left.plot(row["over_rows"], [place, place], color=colour, linewidth=2)
        left.plot(list(row["by_seed"].values()), [place] * len(row["by_seed"]), "o", color=colour, markersize=4)
        left.annotate(
            f"{row['exact_match']:.3f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    for row in rows:
        if row["system"] in ("text", "blind") and row["name"] == "untrained":
            left.axvline(row["exact_match"], color="black", linestyle=":", linewidth=1)
    left.set_yticks(range(len(rows)), [label(row) for row in rows])
    left.invert_yaxis()
    left.set(xlabel="exact match (dots: seeds, lines: 95 % over rows)", xlim=(0, 1))

    correlation = analysis["kl_and_accuracy"]
    titles = {row["name"]: row["title"] for row in rows}
    for marker, name in zip(MARKERS, dict.fromkeys(name for name, _, _ in correlation["runs"])):
        of_name = [(kl, accuracy) for other, kl, accuracy in correlation["runs"] if other == name]
        right.plot(*zip(*of_name), marker, label=titles[name], markersize=5)
    right.set(xlabel="response KL", ylabel="exact match", ylim=(0, 1))
    if correlation["runs"]:
        right.set_xscale("log")
        right.legend(fontsize=7)
    if correlation["spearman"] is not None:
        right.set_title(f"Spearman {correlation['spearman']:.2f} over {correlation['num_runs']} runs", fontsize=10)
    return figure
