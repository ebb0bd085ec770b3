"""Run the numerical tests as other CPUs would: with other instruction sets, numbers of threads, and rounding.

    python -m tests.portability                          # all that this CPU can imitate, a few minutes each
    python -m tests.portability --short                  # what differs most from this CPU, two minutes
    python -m tests.portability -- tests/test_plora.py   # whatever pytest selects with this, of the numerical tests

Numerical tests are those with the marker `numerical`. Each setting runs in a process of its own. What a setting changes
is looked up first (`cpu_kernels.py`): one that changes nothing on this CPU, or needs another one, is skipped and says
so. `BLSP_KD_TEST_ROUNDING` stands for all other CPUs: it rounds products differently for each shape
(`other_rounding.py`). The table and pytest's output go to `outputs/portability`. The status is 1 if anything failed.
Leaves out: instructions that this CPU lacks. MKL heeds `MKL_ENABLE_INSTRUCTIONS` on CPUs by Intel only.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .cpu_kernels import look

TESTS = Path(__file__).parents[1]
MARK = "pytest.mark.numerical"
OLDEST_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
}
OTHER_ROUNDING = {"BLSP_KD_TEST_ROUNDING": "other"}
SETTINGS = [
    {},
    *({"ATEN_CPU_CAPABILITY": value} for value in ("default", "avx2", "avx512")),
    *({"ONEDNN_MAX_CPU_ISA": value} for value in ("SSE41", "AVX2", "AVX512_CORE")),
    *({"MKL_ENABLE_INSTRUCTIONS": value} for value in ("SSE4_2", "AVX2", "AVX512")),
    {"MKL_CBWR": "COMPATIBLE"},
    OLDEST_CPU,
    OTHER_ROUNDING,
]
CASES = [(setting, num_threads) for num_threads in (1, 2) for setting in SETTINGS]
SHORT = [(OLDEST_CPU, 2)]


def run(cases, output: Path, pytest_arguments=()) -> list[dict]:
    """Run the numerical tests under each setting that changes something on this CPU.

    Args:
        cases (`list[tuple]`): environment variables, and a number of threads.
        output (`Path`): folder for pytest's output.
        pytest_arguments (`list[str]`): choose among the numerical tests.

    Returns:
        `list[dict]`: for each case its `name`, and either `skipped`, the reason, or what `run_tests` returns.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Of the CPU as it is, whether or not that is one of the cases.
    seen = {name_of({}, number): look(variables({}, number)) for number in sorted({number for _, number in cases})}
    results = []
    for setting, num_threads in cases:
        name = name_of(setting, num_threads)
        try:
            facts = look(variables(setting, num_threads))
        except RuntimeError as error:
            result = {"skipped": f"cannot run here. {error}"}
        else:
            twin = next((other for other in seen if seen[other] == facts and other != name), None)
            seen[name] = facts
            if twin:
                result = {"skipped": f"computes here what '{twin}' does"}
            else:
                result = run_tests(variables(setting, num_threads), output / f"{len(results):02}.txt", pytest_arguments)
        results.append({"name": name, **result})
        print(row(results[-1]), flush=True)
    return results


def name_of(setting: dict[str, str], num_threads: int) -> str:
    settings = " ".join(f"{name}={value}" for name, value in setting.items()) or "as it is"
    return f"{settings}, {num_threads} thread{'s' * (num_threads > 1)}"


def variables(setting: dict[str, str], num_threads: int) -> dict[str, str]:
    # `conftest.py` gives torch one thread, whatever OpenMP says, unless it is told otherwise. Threads that wait sleep:
    # small operations on a busy machine take ten times as long if they do not.
    threads = {"OMP_NUM_THREADS": num_threads, "BLSP_KD_TEST_THREADS": num_threads, "OMP_WAIT_POLICY": "PASSIVE"}
    return setting | {name: str(value) for name, value in threads.items()}


def run_tests(environment: dict[str, str], log: Path, pytest_arguments) -> dict:
    """Run the numerical tests once, in a process with these environment variables.

    Returns:
        `dict`: how many `passed`, the names of those that `failed`, and `seconds`.
    """
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    # Other files take time to import, and more packages.
    chosen = pytest_arguments or sorted(str(path) for path in TESTS.rglob("test_*.py") if MARK in path.read_text())
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "numerical", f"--junitxml={report}", *chosen]
    started = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=TESTS.parent, env=os.environ | environment, stdout=file, stderr=file
        ).returncode
    tests = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = [{child.tag for child in test} for test in tests]
    failed = [
        f"{test.get('classname')}::{test.get('name')}"
        for test, outcome in zip(tests, outcomes)
        if outcome & {"failure", "error"}
    ]
    if status and not failed:
        failed = [f"pytest ended with status {status}, see {log}"]
    passed = sum(not outcome & {"failure", "error", "skipped"} for outcome in outcomes)
    return {"passed": passed, "failed": failed, "seconds": round(time.monotonic() - started)}


def row(result: dict) -> str:
    if "skipped" in result:
        return f"| {result['name']} | | | | {result['skipped']} |"
    failed = ", ".join(result["failed"])
    return f"| {result['name']} | {result['passed']} | {len(result['failed'])} | {result['seconds']} | {failed} |"


def table(results: list[dict]) -> str:
    head = "| setting | passed | failed | seconds | |\n|---|---|---|---|---|\n"
    return head + "".join(row(result) + "\n" for result in results)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.portability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one setting: an old CPU's instructions")
    parser.add_argument("--output", type=Path, default=Path("outputs/portability"), help="folder for the results")
    parser.add_argument("pytest_arguments", nargs="*", help="after --: what to select among the numerical tests")
    options = parser.parse_args()
    results = run(SHORT if options.short else CASES, options.output, options.pytest_arguments)
    (options.output / "portability.md").write_text(table(results))
    print("\n" + table(results))
    sys.exit(any(result.get("failed") for result in results))


if __name__ == "__main__":
    main()
