"""Report which digits are misheard and how answers suffer, from the predictions of `examples/evaluate.py`.

    python -m examples.experiments.human_speech.error_analysis --evaluations outputs/digits_*_evaluation \\
        --output outputs/errors

The evaluations (of several seeds and held-out speakers) hold the systems text and speech and the tasks answers and
transcripts. jiwer aligns the answer to "Repeat the words." with the transcript. Intervals come from a bootstrap over
clips, each with all its seeds.
"""

import argparse
import json
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import jiwer
import numpy as np

from ..ablation.analysis import bootstrap_over_rows

ALL_VOICES = "all voices"
OUTCOMES = ("right", "heard right, answered wrong", "count right, digits misheard", "count wrong")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="output folders of evaluate.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for errors.json and errors.md")
    options = parser.parse_args()
    runs = {folder.resolve().name: read_rows(folder) for folder in options.evaluations}
    if len(runs) < len(options.evaluations):
        parser.error(f"--evaluations are told apart by the last part of their names, but these are {sorted(runs)}.")
    groups = {}
    for name in sorted({row["voice_group"] for rows in runs.values() for row in rows}):
        groups[name] = describe(
            {run: [row for row in rows if row["voice_group"] == name] for run, rows in runs.items()}
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "errors.json").write_text(json.dumps(groups, indent=2) + "\n")
    (options.output / "errors.md").write_text(as_markdown(groups))
    print(as_markdown(groups))


def read_rows(folder: Path) -> list[dict]:
    """Read transcript, question, recognised words and answer of each row of one evaluation.

    Raises:
        ValueError: the evaluation lacks a system or a task.
    """
    predicted = {}
    for system in ("text", "speech"):
        path = folder / "predictions" / f"{system}.jsonl"
        if not path.exists():
            raise ValueError(f"{path} is missing. Run evaluate.py with --systems text,speech.")
        predicted[system] = [json.loads(line) for line in path.read_text().splitlines()]
    rows = []
    for text, speech in zip(predicted["text"], predicted["speech"], strict=True):
        if missing := {"answers", "transcripts"} - speech["predicted"].keys():
            raise ValueError(f"{folder}, row {speech['id']} lacks {sorted(missing)}: predict answers and transcripts.")
        rows.append(
            {
                "id": speech["id"],
                "said": speech["text"],
                "heard": speech["predicted"]["transcripts"],
                "kind": speech["kind"],
                "voice": speech["voice"],
                "voice_group": speech.get("voice_group", "all voices"),
                "is_right": speech["predicted"]["answers"] == speech["answer"],
                "text_is_right": text["predicted"]["answers"] == text["answer"],
            }
        )
    return rows


def outcomes(rows: list[dict]) -> dict:
    """Return the shares of `OUTCOMES`."""
    counts = Counter(map(outcome, rows))
    return {name: counts[name] / len(rows) for name in OUTCOMES}


def outcome(row: dict) -> str:
    """Return one of `OUTCOMES`."""
    if row["is_right"]:
        return "right"
    if row["heard"] == row["said"]:
        return "heard right, answered wrong"
    is_count_right = len(row["heard"].split()) == len(row["said"].split())
    return "count right, digits misheard" if is_count_right else "count wrong"


def shares(rows: list[dict], key) -> dict:
    """Return right answers from text and from speech, grouped by the value of `key` for a row."""
    table = {}
    for name in sorted({key(row) for row in rows}):
        chosen = [row for row in rows if key(row) == name]
        right = sum(row["is_right"] for row in chosen)
        text_right = sum(row["text_is_right"] for row in chosen)
        table[str(name)] = {
            "rows": len(chosen),
            "text": text_right / len(chosen),
            "speech": right / len(chosen),
            "speech_interval": interval(chosen),
            "share_of_text": right / text_right if text_right else None,
        }
    return table


def interval(rows: list[dict]) -> list[float] | None:
    """Return the interval of the share of right answers from speech, or None for a single clip."""
    by_clip = defaultdict(list)
    for row in rows:
        by_clip[row["id"], row["voice"], row["said"]].append(row["is_right"])
    if len(by_clip) == 1:
        return None
    found = bootstrap_over_rows(np.array([np.mean(seeds) for seeds in by_clip.values()])).confidence_interval
    return [float(found.low), float(found.high)]


def edits(rows: list[dict]) -> dict:
    """Count substitutions, deletions and insertions of each digit."""
    said: Counter = Counter()
    misheard: Counter = Counter()
    missed: Counter = Counter()
    made_up: Counter = Counter()
    output = jiwer.process_words([row["said"] for row in rows], [row["heard"] for row in rows])
    for words, heard, chunks in zip(output.references, output.hypotheses, output.alignments):
        said.update(words)
        for chunk in chunks:
            of_said = words[chunk.ref_start_idx : chunk.ref_end_idx]
            of_heard = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "substitute":
                misheard.update(zip(of_said, of_heard))
            elif chunk.type == "delete":
                missed.update(of_said)
            elif chunk.type == "insert":
                made_up.update(of_heard)
    by_digit = {
        digit: {
            "said": said[digit],
            "misheard": {heard: times for (of, heard), times in misheard.most_common() if of == digit},
            "missed": missed[digit],
            "made_up": made_up[digit],
        }
        for digit in sorted(said | made_up)
    }
    total = said.total()
    rates = {"misheard": misheard.total(), "missed": missed.total(), "made_up": made_up.total()}
    return {
        "digits_said": total,
        **{name: num / total for name, num in rates.items()},
        "strings_heard_right": sum(row["heard"] == row["said"] for row in rows) / len(rows),
        "by_digit": by_digit,
    }


def describe(runs: dict[str, list[dict]]) -> dict:
    """Return all figures of several runs, and of their rows pooled."""
    rows = [row for of_run in runs.values() for row in of_run]
    voices = {ALL_VOICES: rows}
    voices |= {
        voice: [row for row in rows if row["voice"] == voice] for voice in sorted({row["voice"] for row in rows})
    }
    return {
        "by_run": {name: shares(of_run, lambda row: "all")["all"] for name, of_run in runs.items()},
        "pooled": shares(rows, lambda row: "all")["all"],
        "answers": {voice: outcomes(of_voice) for voice, of_voice in voices.items()},
        "digits": {voice: edits(of_voice) for voice, of_voice in voices.items()},
        "by_voice": shares(rows, lambda row: row["voice"]),
        "by_kind": shares(rows, lambda row: row["kind"]),
        "by_length": shares(rows, lambda row: len(row["said"].split())),
    }


def as_markdown(groups: dict) -> str:
    lines = ["# Digit strings: what goes wrong"]
    for name, group in groups.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| exact match | rows | text | speech | speech over text |",
            "|---|---|---|---|---|",
        ]
        of_lengths = {f"{length} digits": share for length, share in group["by_length"].items()}
        tables = (group["by_run"], {"all runs": group["pooled"]}, group["by_voice"], group["by_kind"], of_lengths)
        for label, share in chain.from_iterable(table.items() for table in tables):
            ratio = "" if share["share_of_text"] is None else f"{share['share_of_text']:.3f}"
            speech = f"{share['speech']:.3f}"
            if share["speech_interval"]:
                low, high = share["speech_interval"]
                speech += f" [{low:.3f}, {high:.3f}]"
            lines.append(f"| {label} | {share['rows']} | {share['text']:.3f} | {speech} | {ratio} |")
        lines += ["", f"| what became of questions | {' | '.join(OUTCOMES)} |", "|---|---|---|---|---|"]
        for voice, of_voice in group["answers"].items():
            lines.append(f"| {voice} | {' | '.join(f'{share:.3f}' for share in of_voice.values())} |")
        lines += [
            "",
            "| digits | said | misheard | missed | made up | strings heard right |",
            "|---|---|---|---|---|---|",
        ]
        for voice, digits in group["digits"].items():
            rates = (digits[name] for name in ("misheard", "missed", "made_up", "strings_heard_right"))
            lines.append(f"| {voice} | {digits['digits_said']} | {' | '.join(f'{rate:.1%}' for rate in rates)} |")
        lines += ["", "| digit | said | misheard as | missed | made up |", "|---|---|---|---|---|"]
        digits = group["digits"][ALL_VOICES]
        for digit, row in digits["by_digit"].items():
            misheard = ", ".join(f"{heard} {times}" for heard, times in row["misheard"].items())
            lines.append(f"| {digit} | {row['said']} | {misheard} | {row['missed']} | {row['made_up']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
