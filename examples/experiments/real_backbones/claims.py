"""The paper's claims on real backbones: trainings of equal steps and batches that differ in one thing.

    python -m examples.experiments.real_backbones.claims --output RUNS --warm_up WARM_UP --data DATA --steps 2000 \\
        --seeds 1 2 3 --claims loss adapter \\
        -- --text_model LLM --speech_model WHISPER_BASE --train_mixture mix.yaml --max_batch_length 100 \\
        --freeze_speech_encoder true --bf16 true --use_cpu true

- loss: both KLs, against cross-entropy on the responses, from the warm-up.
- plora: partial LoRA, against none, from the warm-up.
- adapter: one vector per token (CIF), against a fixed rate, each with the KLs that it allows. A warm-up fits only the
  first, so both begin untrained.
- cascade: end to end, against the warm-up that learns recognition for as many steps more and transcribes for the LLM.

What follows `--` goes to every training. A command that is repeated goes on where it was stopped: a run with
`results.json` is done, one with checkpoints is resumed. Leaves RUNS/VARIANT-SEED, each with `evaluation/`, and
`claims.json` and `claims.md` in RUNS. Leaves out: the choice of steps, and cascades with other recognisers, which
`evaluate_all` compares.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from modeling_blsp_kd.training.options import OF_A_MODEL

EXAMPLES = Path(__file__).parents[2]
EVALUATE_ALL = f"{__package__}.evaluate_all"
PARTS = ("repeat_people", "repeat_synthesizer", "questions", "continue_people")
# What the table shows: part, task, score, factor.
SHOWN = (
    ("repeat_people", "transcripts", "wer", 100),
    ("repeat_synthesizer", "transcripts", "wer", 100),
    ("questions", "answers", "contained", 1),
    ("questions", "answers", "contained_share_of_text", 1),
    # Of teacher and student on the same tokens: it tells trainings apart that are too short to answer.
    ("continue_people", "alignment", "response_kl", 1),
)


@dataclass(frozen=True)
class Variant:
    """One training: its options of `train.py`, whether it starts from the warm-up, and the system to score."""

    options: dict = field(default_factory=dict)
    from_warm_up: bool = True
    system: str = "speech"


RECOGNITION = {"transcript_ce": 1.0, "quantity": 1.0, "response_kl": 0.0, "input_kl": 0.0}
RESPONSE_CE = {"response_ce": 1.0, "quantity": 1.0, "response_kl": 0.0, "input_kl": 0.0}
VARIANTS = {
    "kl": Variant(),
    "response_ce": Variant({"distillation": json.dumps(RESPONSE_CE)}),
    "plora": Variant({"plora": "true"}),
    "cif": Variant({"calibrate_adapter": "true"}, from_warm_up=False),
    "fixed_rate": Variant({"adapter": "subsampler", "distillation": '{"response_kl": 1.0}'}, from_warm_up=False),
    "recognizer": Variant({"distillation": json.dumps(RECOGNITION)}, system="cascade"),
}
CLAIMS = {
    "loss": ("kl", "response_ce"),
    "plora": ("plora", "kl"),
    "adapter": ("cif", "fixed_rate"),
    "cascade": ("kl", "recognizer"),
}


def main(arguments: list[str] | None = None):
    options, for_training = parse(arguments)
    names = list(dict.fromkeys(name for claim in options.claims for name in CLAIMS[claim]))
    runs = {}
    for seed in options.seeds:
        for name in names:
            folder = options.output / f"{name}-{seed}"
            train(VARIANTS[name], folder, seed, options, for_training)
            evaluate(VARIANTS[name], folder, options)
            runs[f"{name}-{seed}"] = read_run(VARIANTS[name], folder)
            write(runs, options)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm_up", help="model of a recognition warm-up, which the variants start from")
    parser.add_argument("--data", type=Path, required=True, help="folder of make_speech")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--parts", nargs="+", default=PARTS, help="of evaluate_all")
    parser.add_argument("--limit", type=int, help="first rows of each part only")
    parser.add_argument("--dtype", help="of the models when they are evaluated")
    given = sys.argv[1:] if arguments is None else arguments
    place = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:place])
    names = [name for claim in options.claims for name in CLAIMS[claim]]
    if not options.warm_up and any(VARIANTS[name].from_warm_up for name in names):
        parser.error("These claims start from a --warm_up.")
    for_training = given[place + 1 :]
    if len(for_training) % 2 or not all(name.startswith("--") for name in for_training[::2]):
        parser.error(f"After -- come pairs of --name and value for train.py, got {' '.join(for_training)}.")
    return options, for_training


def train_command(variant: Variant, folder: Path, seed: int, options, for_training: list[str]) -> list[str]:
    """Return the arguments for Python that train a variant."""
    own = {**variant.options, "max_steps": options.steps, "seed": seed, "output_dir": folder}
    if variant.from_warm_up:
        own["start_from"] = options.warm_up
    given = [(name.removeprefix("--"), value) for name, value in zip(for_training[::2], for_training[1::2])]
    refused = OF_A_MODEL if variant.from_warm_up else ()
    kept = {name: value for name, value in given if name not in refused}
    if variant.options.get("adapter") == "subsampler":
        kept.pop("adapter_options", None)  # they are the CFormer's
    command = {**kept, **own, "resume_from_checkpoint": "true"}
    return [
        str(EXAMPLES / "train.py"),
        *(part for name, value in command.items() for part in (f"--{name}", str(value))),
    ]


def train(variant: Variant, folder: Path, seed: int, options, for_training: list[str]) -> None:
    if (folder / "results.json").is_file():
        return
    command = train_command(variant, folder, seed, options, for_training)
    subprocess.run([sys.executable, *command], check=True)


def evaluate(variant: Variant, folder: Path, options) -> None:
    command = ["-m", EVALUATE_ALL, "--model", folder, "--data", options.data, "--output", folder / "evaluation"]
    command += ["--parts", *options.parts]
    for name in ("limit", "dtype"):
        if value := getattr(options, name):
            command += [f"--{name}", value]
    command += ["--systems", f"text,{variant.system}"]  # of a cascade its own model is the recogniser
    subprocess.run([sys.executable, *map(str, command)], check=True)


def read_run(variant: Variant, folder: Path) -> dict:
    """Return what a training took and what it gave."""
    evaluated = json.loads((folder / "evaluation" / "results.json").read_text())
    scores = {
        f"{part} {name}": evaluated.get(part, {}).get("systems", {}).get(variant.system, {}).get(task, {}).get(name)
        for part, task, name, _ in SHOWN
    }
    seconds = json.loads((folder / "results.json").read_text())["train_seconds"]
    return {"train_seconds": seconds, "scores": {name: score for name, score in scores.items() if score}}


def write(runs: dict[str, dict], options) -> None:
    """Write `claims.json`, and `claims.md` with a table for each claim."""
    (options.output / "claims.json").write_text(json.dumps({"steps": options.steps, "runs": runs}, indent=1) + "\n")
    columns = {f"{part} {name}": factor for part, _, name, factor in SHOWN}
    lines = []
    for claim in options.claims:
        lines += [
            f"## {claim}",
            "",
            "| run | seconds since the last resume | " + " | ".join(columns) + " |",
            "|---|--:|" + "--:|" * len(columns),
        ]
        for run in (f"{name}-{seed}" for name in CLAIMS[claim] for seed in options.seeds):
            if run in runs:
                cells = [_cell(runs[run]["scores"].get(name), factor) for name, factor in columns.items()]
                lines.append(f"| {run} | {runs[run]['train_seconds']:.0f} | " + " | ".join(cells) + " |")
        lines.append("")
    (options.output / "claims.md").write_text("\n".join(lines))


def _cell(score: dict | None, factor: float) -> str:
    return f"{factor * score['value']:.3g} [{factor * score['low']:.3g}, {factor * score['high']:.3g}]" if score else ""


if __name__ == "__main__":
    main()
