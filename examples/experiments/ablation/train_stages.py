"""Train in stages, each from the model of the one before, with a learning rate schedule of its own.

Takes the options of `examples/train.py`, which all stages share, and `--stages`: a JSON list with an entry for each
stage, of its share of `--max_steps` and its own options (`{"share": 0.3, "learning_rate": 1e-4}`). The output folder
receives what the last stage leaves; `train_seconds` in `results.json` is that of all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=json.loads, required=True)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--eval_manifest", help="not used: evaluate.py follows")
    options, shared = parser.parse_known_args()
    seconds = 0.0
    for command, folder in stage_commands(options.stages, options.max_steps, options.output_dir, shared):
        subprocess.run([sys.executable, *command], check=True)
        results = json.loads((folder / "results.json").read_text())
        seconds += results["train_seconds"]
    results["train_seconds"] = round(seconds, 1)
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def stage_commands(
    stages: list[dict], max_steps: int, output_dir: Path, shared: list[str]
) -> list[tuple[list[str], Path]]:
    """Return the arguments for Python of each stage, and the folder that it writes. All but the last lie beside it."""
    commands: list[tuple[list[str], Path]] = []
    for number, stage in enumerate(stages):
        is_last = number == len(stages) - 1
        folder = output_dir if is_last else output_dir.with_name(f"{output_dir.name}-stage{number + 1}")
        own = {name: value for name, value in stage.items() if name != "share"}
        own |= {"max_steps": max(1, round(stage["share"] * max_steps)), "output_dir": folder, "num_eval_utterances": 0}
        if commands:
            own["start_from"] = commands[-1][1]
        words = [
            word
            for name, value in own.items()
            for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
        ]
        commands.append(([str(TRAIN), *shared, *words], folder))  # of an option that comes twice the last counts
    return commands


if __name__ == "__main__":
    main()
