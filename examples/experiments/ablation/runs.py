"""Runs: one configuration with one seed, trained and evaluated in a folder of its own, and the small file it leaves.

Leaves out: what runs share and what their files are called (`plan.py`), and what follows from results (`analysis.py`).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from processing.evaluation.text_scores import match_answers

from .matrix import TRAIN, Configuration
from .plan import Plan, read_rows
from .speeds import equal_steps

EXAMPLES = Path(__file__).parents[2]
EXPERIMENTS = "examples.experiments"
ALIGNMENT = ("response_kl", "input_kl", "token_count_error", "token_count_accuracy")
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def run(configuration: Configuration, seed: int, plan: Plan) -> dict:
    """Train and evaluate, and keep the result.

    Raises:
        RuntimeError: a script failed; the message has its last lines.
    """
    folder = plan.output_dir / f"{configuration.name}-seed{seed}"
    # An interrupted run may have left files of other weights.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, log, start = folder / "model", folder / "log.txt", time.time()
    steps = equal_steps(configuration, plan, _seconds_of_training)
    _call(train_command(configuration, seed, replace(plan, steps=steps), model), log, plan.threads)
    own = json.loads((model / "results.json").read_text())

    is_cascade = configuration.systems == ("cascade",)
    _call(
        evaluate_command(
            model,
            # A cascade is the LLM on the transcripts of a recogniser.
            model / "heard.jsonl" if is_cascade else plan.rows_manifest,
            ("text",) if is_cascade else configuration.systems,
            ("answers", "alignment") if configuration.keeps_llm else ("answers",),
            folder / "evaluation",
        ),
        log,
        plan.threads,
    )
    rows = read_rows(plan.rows_manifest)
    evaluated = json.loads((folder / "evaluation" / "results.json").read_text())["systems"]
    systems = {}
    for system in configuration.systems:
        evaluated_as = "text" if is_cascade else system
        systems[system] = {
            **score(rows, folder / "evaluation" / "predictions" / f"{evaluated_as}.jsonl"),
            **_groups(evaluated[evaluated_as]["answers"]),
        }
    alignment = evaluated.get("speech", {}).get("alignment") or own
    result = {
        "name": configuration.name,
        "seed": seed,
        "settings": plan.settings(configuration),
        "machine": machine(plan.threads),
        "steps": steps,
        "seconds": {"training": own["train_seconds"], "all": round(time.time() - start, 1)},
        "systems": systems,
        "alignment": {name: _value(alignment[name]) for name in ALIGNMENT if alignment.get(name) is not None},
    }
    if "exact_transcripts" in own:
        result["exact_transcripts"] = own["exact_transcripts"]
    path = plan.result_path(configuration, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, path)
    return result


def _seconds_of_training(configuration: Configuration, plan: Plan, folder: Path) -> float:
    """Return the processor's seconds, without waiting for other load; with an accelerator, those that passed."""
    before = os.times()
    _call(train_command(configuration, 1, plan, folder / "model"), folder / "log.txt", plan.threads)
    after = os.times()
    if torch.accelerator.is_available():
        return json.loads((folder / "model" / "results.json").read_text())["train_seconds"]
    return after.children_user + after.children_system - before.children_user - before.children_system


def _groups(answers: dict) -> dict[str, dict[str, float]]:
    """Return exact match by kind of question and by kind of voice, if rows have them."""
    return {
        grouping: {group: scores["exact_match"]["value"] for group, scores in answers[grouping].items()}
        for grouping in ("by_kind", "by_voice_group")
        if grouping in answers
    }


def _value(measured):
    """Return a value without its interval, which `evaluate.py` writes and `train.py` does not."""
    return measured["value"] if isinstance(measured, dict) else measured


def train_command(configuration: Configuration, seed: int, plan: Plan, model: Path) -> list[str]:
    """Return the arguments for Python that train `configuration` and leave `model`."""
    options = {
        "max_steps": plan.steps,
        "num_utterances": plan.num_utterances,
        "cache_dir": plan.cache_dir,
        "seed": seed,
        "save_strategy": "no",
        **configuration.options,
        "output_dir": model,
    }
    if configuration.script == TRAIN:
        script = [str(EXAMPLES / TRAIN)]
        options["num_eval_utterances"] = 0  # `evaluate.py` does it
    else:
        script = ["-m", f"{EXPERIMENTS}.{configuration.script.removesuffix('.py').replace('/', '.')}"]
        options["eval_manifest"] = plan.rows_manifest
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*script, *given, *plan.train_options]


def evaluate_command(model: Path, manifest: Path, systems, tasks, output: Path) -> list[str]:
    return [
        str(EXAMPLES / "evaluate.py"),
        # A cascade's manifest lies with its model, and the clips elsewhere.
        *("--model", str(model), "--manifest", str(manifest), "--allow_outside_paths"),
        *("--systems", ",".join(systems), "--tasks", ",".join(tasks), "--output", str(output)),
    ]


def _call(command: list[str], log: Path, threads: int):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait take the cores from the other runs.
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
    }
    with log.open("a") as file:
        finished = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if finished.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} failed with exit status {finished.returncode}, see {log}:\n{tail}")


def score(rows: list[dict], predictions: Path) -> dict:
    """Return the share of exact matches, and in the manifest's order a 1 for each row that matched, else a 0."""
    lines = map(json.loads, predictions.read_text().splitlines())
    predicted = {line["id"]: line["predicted"]["answers"] for line in lines}
    missing = [row["id"] for row in rows if row["id"] not in predicted]
    if missing:
        raise ValueError(f"{predictions} lacks {len(missing)} of {len(rows)} rows, the first is {missing[0]!r}.")
    given = [predicted[row["id"]] for row in rows]
    matches = match_answers(given, [row["answer"] for row in rows], per_row=True)
    return {
        "exact_match": matches["exact_match"],
        "contained": matches["contained"],
        "matched_rows": "".join(map(str, matches["exact_match_rows"])),
    }


def machine(threads: int) -> dict:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def estimate_s(configuration: Configuration, known: list[dict]) -> float | None:
    """Estimate the time of a run: the longest of its configuration, else of any configuration, else None."""
    own = [result["seconds"]["all"] for result in known if result["name"] == configuration.name]
    return max(own or [result["seconds"]["all"] for result in known], default=None)


def run_all(
    wanted: list[tuple[Configuration, int]], plan: Plan, workers: int, time_budget_s: float | None, log=print
) -> list[str]:
    """Run each pair that has no result yet.

    A run that is expected to end after the time budget is not started. Without any result to estimate from, one run
    is started anyway, unless the budget is 0.

    Args:
        wanted: (configuration, seed) pairs, in order.
        workers: runs at a time.
        time_budget_s: for all of this. None: unlimited.

    Returns:
        list of str: the runs that the time budget did not allow.

    Raises:
        RuntimeError: runs failed; the others were completed first.
    """
    start, lock = time.time(), threading.Lock()
    known = [result for pair in wanted if (result := plan.load(*pair)) is not None]
    missing = [pair for pair in wanted if plan.load(*pair) is None]
    left, failed = [], []
    log(f"{len(known)} of {len(wanted)} runs have results, {len(missing)} are missing")

    def run_or_leave(pair):
        configuration, seed = pair
        name = f"{configuration.name}, seed {seed}"
        with lock:
            expected_s = estimate_s(configuration, known)
        if time_budget_s is not None and time.time() - start + (expected_s or 0) >= time_budget_s:
            left.append(name)
            return
        log(f"{name}: begins" + (f", some {expected_s / 60:.1f} minutes" if expected_s is not None else ""))
        try:
            result = run(configuration, seed, plan)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            failed.append(f"{name}: {error}")
            log(f"{name}: FAILED")
            return
        with lock:
            known.append(result)
        system, scores = next(iter(result["systems"].items()))
        log(f"{name}: {system} {scores['exact_match']:.3f}, {result['seconds']['all'] / 60:.1f} minutes")

    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(run_or_leave, missing))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C also cancels the runs that have not started
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed.\n" + "\n\n".join(failed))
    return left
