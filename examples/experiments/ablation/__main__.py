"""Train and evaluate the configurations that the paper compares, with equal data, steps and seeds.

    python examples/ablate.py --time_budget_minutes 110
    python examples/ablate.py --short
    python examples/ablate.py --only cformer_both,encoder --seeds 1,2,3
    python examples/ablate.py --matrix beyond

Runs `examples/train.py` and `examples/evaluate.py` for each configuration and seed, on sentences of the tiny world that
no choice was made on. A run that has a result is not repeated, so the matrix can be worked through in slices; results
of several machines add up in one folder. Leaves there one small file per run, and `summary.md`, `summary.json` and
`summary.png` of all that there are; a time budget of 0 only writes these.

`--matrix beyond` adds what newer work adds to distillation (docs/losses.md) to one of these configurations. Each of its
configurations trains as long as that one, not for as many steps; its speed is measured first, so take one worker.

What is not an option here goes to `examples/train.py` in every run, for example `--text_model` and `--train_manifest`;
then give the rows to evaluate on with `--rows_manifest`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from modeling_blsp_kd.devices import usable_cores

from . import beyond, matrix
from .analysis import analyse
from .matrix import Configuration
from .plan import Plan, read_rows
from .report import write
from .runs import run_all, train_command

MATRICES = {"paper": matrix, "beyond": beyond}
RESULTS = Path(__file__).parent / "results"
FULL = {"steps": 1200, "num_utterances": 6000, "num_rows": 480, "seeds": "1,2,3"}
SHORT = {"steps": 300, "num_utterances": 2000, "num_rows": 96, "seeds": "1"}


def main():
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--matrix", choices=MATRICES, default="paper", help="which configurations")
    names_of = "; ".join(f"{name}: {','.join(by_name(name))}" for name in MATRICES)
    parser.add_argument("--only", help=f"names among those of the matrix ({names_of}); all if omitted")
    parser.add_argument("--seeds", help=f"comma-separated; {FULL['seeds']} if omitted")
    parser.add_argument("--short", action="store_true", help=f"a smaller matrix: {SHORT}, into the output folder")
    parser.add_argument("--steps", type=int, help=f"of each training; {FULL['steps']} if omitted")
    parser.add_argument("--num_utterances", type=int, help="training clips of the tiny world")
    parser.add_argument("--num_rows", type=int, help="tiny world: rows to evaluate on, per kind of voice")
    parser.add_argument("--rows_manifest", type=Path, help="JSONL manifest to evaluate on, with answers")
    parser.add_argument("--time_budget_minutes", type=float, help="start no run that is expected to end later")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"), help="of models and logs")
    parser.add_argument("--results_dir", type=Path, help="of results; examples/experiments/ablation/results if omitted")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/tiny_world_speech"), help="of the clips")
    options, train_options = parser.parse_known_args()
    defaults = SHORT if options.short else FULL
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    configurations, known = MATRICES[options.matrix].CONFIGURATIONS, list(by_name(options.matrix))
    names = options.only.split(",") if options.only else known
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"--only names no configuration {unknown}. There are {known}.")

    seeds = [int(seed) for seed in options.seeds.split(",")]
    if min(seeds) < 1:
        parser.error(f"--seeds are whole numbers from 1, got {options.seeds}. 0 stands for what needs no seed.")

    output_dir = options.output_dir / "short" if options.short else options.output_dir
    results_dir = output_dir / "results" if options.short else RESULTS
    if options.matrix != "paper":
        results_dir = results_dir / options.matrix
    plan = Plan(
        steps=options.steps,
        num_utterances=options.num_utterances,
        rows_manifest=options.rows_manifest or write_rows(options.num_rows, options.cache_dir),
        output_dir=output_dir,
        results_dir=options.results_dir or results_dir,
        cache_dir=options.cache_dir,
        train_options=train_options,
        threads=max(1, usable_cores() // options.workers),
        baseline=beyond.BASELINE if options.matrix == "beyond" else None,
    )
    own = {part for each in configurations for part in train_command(each, 1, replace(plan, train_options=[]), Path())}
    taken = sorted(own & {option.partition("=")[0] for option in train_options if option.startswith("--")})
    if taken:
        parser.error(f"{taken} differ between the runs, or have options of their own here, so they cannot be given.")
    # By seed first: what a slice leaves is comparable.
    wanted = [
        (configuration, seed)
        for seed in (0, *seeds)
        for configuration in configurations
        if configuration.name in names and configuration.has_seeds == (seed != 0)
    ]
    budget_s = None if options.time_budget_minutes is None else 60 * options.time_budget_minutes
    left = run_all(wanted, plan, options.workers, budget_s, log=tqdm.write)

    results = find_results(plan, configurations)
    settings = {
        "steps": plan.steps if plan.baseline is None else f"The time of {plan.steps}",
        "data": "a manifest" if "--train_manifest" in train_options else f"{plan.num_utterances} clips",
        "rows": f"{len(read_rows(plan.rows_manifest))} rows of "
        + (options.rows_manifest.name if options.rows_manifest else "the tiny world's final sentences"),
    }
    write(analyse(results, configurations, MATRICES[options.matrix].CLAIMS), settings, plan.results_dir)
    print((plan.results_dir / "summary.md").read_text())
    if left:
        print(f"Not run, because the time budget would not suffice: {'; '.join(left)}. Run this again.")


def by_name(name: str) -> dict[str, Configuration]:
    return {configuration.name: configuration for configuration in MATRICES[name].CONFIGURATIONS}


def find_results(plan: Plan, configurations: Sequence[Configuration] = matrix.CONFIGURATIONS) -> list[dict]:
    """Return all results of these settings, of any seed."""
    return [
        json.loads(path.read_text())
        for configuration in configurations
        for path in sorted(plan.results_dir.glob(f"{configuration.name}-seed*-{plan.fingerprint(configuration)}.json"))
    ]


def write_rows(num_rows: int, cache_dir: Path) -> Path:
    """Write the manifest that all are evaluated on: questions about the final sentences, by seen and held-out voices.

    It lies beside its clips, so that no path leaves its folder.
    """
    # Imported here: synthesis needs espeakng-loader, which a manifest does not.
    from ...tiny_world.dataset import make_rows
    from ...tiny_world.speech import HELD_OUT_VOICES, TRAIN_VOICES

    groups = {"seen voices": TRAIN_VOICES, "held out voices": HELD_OUT_VOICES}
    rows = [
        {**row, "voice_group": group}
        for seed, (group, voices) in enumerate(groups.items(), start=1)
        for row in make_rows("final", num_rows, voices, seed, cache_dir)
    ]
    manifest = cache_dir / f"final-{num_rows}.jsonl"
    with manifest.open("w") as file:
        for number, row in enumerate(rows, start=1):
            file.write(json.dumps({"id": str(number), **row, "audio": Path(row["audio"]).name}) + "\n")
    return manifest


if __name__ == "__main__":
    main()
