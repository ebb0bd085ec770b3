"""Trains in two processes what one process trains, on every engine that `examples/accelerate` has a file for.

    python -m tests.reliability.equivalence            # all engines and cases, some ten minutes on one core
    python -m tests.reliability.equivalence --short    # DDP and FSDP2, few cases, a minute

Small random models with partial LoRA and gradient checkpointing, float32, AdamW, gradients clipped; then `train.py` as
a user starts it. Started by `accelerate launch` with the project's own files, but for two processes and without bf16;
for FSDP and DeepSpeed, accelerate is told that the CPUs are accelerators. ZeRO runs where DeepSpeed is installed.
Equal are, at every step: the loss, each of its parts and the gradient's norm (of the gradients before clipping); at the
end: evaluation, the saved weights as one process loads them, and greedy answers of the sharded model.
Leaves out: GPUs, several nodes, half precision.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open

from . import equivalence_worker as worker

ROOT = Path(__file__).parents[2]
MAX_DIFFERENCE = {"log": 1e-4, "weights": 1e-3, "answers": 0}
TIMEOUT_S = 1800
OF_TIME = ("runtime", "per_second")


@dataclass
class Engine:
    """
    Args:
        file (`str`): of `examples/accelerate`.
        wraps (`str`): what it makes of the model. Anything else means that it has not run.
        options (`tuple`): of `accelerate launch`, over what the file says.
    """

    file: str
    wraps: str
    options: tuple[str, ...] = ()


ENGINES = {
    "DDP": Engine("ddp.yaml", "DistributedDataParallel"),
    "FSDP2": Engine("fsdp2.yaml", "FSDPBlspKdForCausalLM"),
    # The file for four nodes lets one process load the weights and send them to the others.
    "FSDP2, loaded by one process": Engine(
        "fsdp2_four_nodes.yaml",
        "FSDPBlspKdForCausalLM",
        ("--parallelism_config_dp_replicate_size", "1", "--parallelism_config_dp_shard_size", "2"),
    ),
    "ZeRO-2": Engine("zero2.yaml", "DeepSpeedEngine"),
    "ZeRO-3": Engine("zero3.yaml", "DeepSpeedEngine"),
}
SHORT = {
    "DDP": ["uneven last batches"],
    "FSDP2": ["training", "tied head, frozen encoder", "no audio on one process", "own answers"],
}
EXAMPLE = "train.py"
EXAMPLE_STEPS = 3
EXAMPLE_OPTIONS = {
    "num_utterances": 20,  # and batches of 8, so that the last one is too small for two processes
    "num_eval_utterances": 3,
    "max_steps": EXAMPLE_STEPS,
    "save_steps": 1,
    "save_total_limit": EXAMPLE_STEPS,
    "logging_steps": 1,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 0.1,
    "learning_rate": 0.2,  # steps far above the rounding of a weight
    "train_sampling_strategy": "random",
    "spec_augment": "false",  # drawn by each process for itself
    "max_response_tokens": 8,
}
EXAMPLE_BATCH = 8


def launch(engine: Engine, script: list[str], log: Path) -> str | None:
    """Run a script in two processes. Returns what went wrong, or None."""
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate" / engine.file)]
    return run_python([*command, *options, *engine.options, *script], log)


def run_python(arguments: list[str], log: Path) -> str | None:
    tools = Path(sys.executable).parent  # DeepSpeed compiles with ninja, which may be installed beside Python
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file, stderr=file)
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"hung for {TIMEOUT_S} s, see {log.name}"
        finally:
            process.terminate()  # not killed: a launcher ends its processes itself
            process.wait()
    return None if status == 0 else f"exit status {status}, see {log.name}"


def log_difference(actual: list[dict], expected: list[dict]) -> float:
    """Largest difference of a logged number, relative to it where it is above 0.1."""
    if len(actual) != len(expected) or any(a.keys() != e.keys() for a, e in zip(actual, expected)):
        return float("inf")
    return largest(
        abs(a[name] - e[name]) / max(abs(e[name]), 0.1)
        for a, e in zip(actual, expected)
        for name in e
        if not name.endswith(OF_TIME)
    )


def largest(differences) -> float:
    """NaN if there is one, unlike Python's `max`."""
    return torch.tensor(list(differences)).max().item()


def weight_difference(actual: Path, expected: Path, start: Path) -> float:
    """Largest difference of a weight, relative to how far training moved the weights of its tensor.

    Of tensors that it hardly moved: relative to 1 % of the farthest.
    """
    models = [worker.BlspKdForCausalLM.from_pretrained(folder) for folder in (actual, expected, start)]
    tied = set(models[0].all_tied_weights_keys)  # FSDP2 saves them twice
    if names_of_saved(actual) - tied != names_of_saved(expected) - tied:
        return float("inf")
    actual, expected, start = (model.state_dict() for model in models)
    moved = {name: (expected[name] - start[name]).abs().max().item() for name in expected}
    least = max(moved.values()) / 100
    return largest((actual[name] - expected[name]).abs().max().item() / max(moved[name], least) for name in expected)


def names_of_saved(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def compare_case(engine: Engine, folder: Path, expected: Path, start: Path) -> dict:
    """Differences of a case in two processes from the case in one."""
    one = json.loads((expected / "results_0.json").read_text())
    both = [json.loads((folder / f"results_{index}.json").read_text()) for index in range(2)]
    for results in both:
        if results["num_processes"] != 2 or engine.wraps not in results["engine"]:
            return {"problem": f"ran as {results['engine']} in {results['num_processes']} processes"}
    answers = [(mine, its) for results in both for mine, its in zip(results["answers"], one["answers"], strict=True)]
    return {
        "log": log_difference(both[0]["log"], one["log"]),
        "weights": weight_difference(folder / "model", expected / "model", start),
        "answers": sum(mine != its for mine, its in answers),
    }


def run_example(engine: Engine | None, output: Path, clips: Path) -> str | None:
    """`examples/train.py` as a user starts it. Returns what went wrong."""
    options = {**EXAMPLE_OPTIONS, "output_dir": output, "cache_dir": clips}
    options["per_device_train_batch_size"] = EXAMPLE_BATCH // (1 if engine is None else 2)
    options = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = output.with_suffix(".txt")
    if engine is None:
        return run_python([str(ROOT / "examples/train.py"), *options, "--use_cpu", "true"], log)
    if engine.wraps == "DistributedDataParallel":
        return launch(engine, [str(ROOT / "examples/train.py"), *options, "--use_cpu", "true"], log)
    return launch(engine, [worker.__file__, EXAMPLE, *options], log)


def compare_example(folder: Path, expected: Path) -> dict:
    def logged(output):
        state = output / f"checkpoint-{EXAMPLE_STEPS}" / "trainer_state.json"
        return json.loads(state.read_text())["log_history"]

    results = [json.loads((output / "results.json").read_text()) for output in (folder, expected)]
    if results[0]["training"] != results[1]["training"]:  # which tells how many processes there were
        return {"problem": f"trained otherwise: {results[0]['training']}"}
    means = [{name: value for name, value in result.items() if isinstance(value, float)} for result in results]
    for mean in means:
        del mean["train_seconds"], mean["total_seconds"]
    answered = [[result["text_accuracy"], result["speech_accuracy"]] for result in results]
    return {
        "log": largest([log_difference(logged(folder), logged(expected)), log_difference(means[:1], means[1:])]),
        "weights": weight_difference(folder, expected, expected / "checkpoint-1"),
        "answers": int(answered[0] != answered[1]),
    }


def run(output: Path, cases_of: dict[str, list[str]]) -> list[dict]:
    """Run cases of engines, and each case in one process.

    Args:
        output (`Path`): folder for what they leave, emptied first but for the clips of `train.py`.
        cases_of (`dict`): names of cases by name of engine.

    Returns:
        `list[dict]`: for each engine and case its differences, `passed` (None: not run) and, if there is one, the
        `problem`.
    """
    runs, clips = output / "equivalence", output / "clips"
    shutil.rmtree(runs, ignore_errors=True)
    one = runs / "one_process"
    one.mkdir(parents=True)
    worker.make_start(runs / "start")
    for name in dict.fromkeys(name for cases in cases_of.values() for name in cases):
        if name != EXAMPLE:
            worker.run(name, one)
        elif problem := run_example(None, one / "train_py", clips):
            raise RuntimeError(f"train.py in one process: {problem}")
    results = []
    for number, (engine_name, cases) in enumerate(cases_of.items()):
        engine, folder = ENGINES[engine_name], runs / f"engine_{number}"
        folder.mkdir()
        if engine.wraps == "DeepSpeedEngine" and find_spec("deepspeed") is None:
            problem = "not run: DeepSpeed is not installed (pip install -e .[deepspeed])"
            results += [{"engine": engine_name, "case": case, "passed": None, "problem": problem} for case in cases]
            continue
        trained = [case for case in cases if case != EXAMPLE]
        failed = launch(engine, [worker.__file__, str(folder), *trained], folder / "log.txt") if trained else None
        for case in cases:
            if case == EXAMPLE:
                problem = run_example(engine, folder / "train_py", clips)
                found = {"problem": problem} if problem else compare_example(folder / "train_py", one / "train_py")
            elif failed and (case == trained[-1] or len(list(worker.folder_of(case, folder).glob("results_*"))) < 2):
                found = {"problem": failed}  # in this case or one before it
            else:
                start = runs / "start" / worker.CASES[case].start
                found = compare_case(engine, worker.folder_of(case, folder), worker.folder_of(case, one), start)
            passed = "problem" not in found and all(found[name] <= MAX_DIFFERENCE[name] for name in MAX_DIFFERENCE)
            results.append({"engine": engine_name, "case": case, **found, "passed": passed})
            print(results[-1], flush=True)
    return results


def table(results: list[dict]) -> str:
    lines = [
        "| engine, two processes | case | losses and norms | saved weights | other answers | |",
        "|---|---|---|---|---|---|",
        "| | largest difference allowed | {log:.0e} | {weights:.0e} | {answers} | |".format(**MAX_DIFFERENCE),
    ]
    for result in results:
        found = "{log:.1e} | {weights:.1e} | {answers}".format(**result) if "log" in result else "| | "
        verdict = {True: "passed", False: "FAILED", None: ""}[result["passed"]]
        note = " ".join(part for part in (verdict, result.get("problem", "")) if part)
        lines.append(f"| {result['engine']} | {result['case']} | {found} | {note} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.equivalence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="DDP and FSDP2 only, and few cases")
    parser.add_argument("--only", choices=ENGINES, help="one engine")
    parser.add_argument("--output", type=Path, default=Path("outputs/reliability"), help="folder for the results")
    options = parser.parse_args()
    cases_of = SHORT if options.short else {engine: [*worker.CASES, EXAMPLE] for engine in ENGINES}
    if options.only:
        cases_of = {options.only: cases_of.get(options.only) or parser.error(f"--short leaves {options.only} out")}
    results = run(options.output, cases_of)
    (options.output / "equivalence.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "equivalence.md").write_text(table(results))
    print(table(results))
    sys.exit(any(result["passed"] is False for result in results))


if __name__ == "__main__":
    main()
