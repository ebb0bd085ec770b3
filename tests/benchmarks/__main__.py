"""Runs the benchmarks and writes JSON, a Markdown table and plots.

    python -m tests.benchmarks                          # everything, in full
    python -m tests.benchmarks --small                  # everything, in seconds: does it run?
    python -m tests.benchmarks --only cif --clock cpu   # one part, on a machine that has other work too
    THP_MEM_ALLOC_ENABLE=1 python -m tests.benchmarks   # torch asks Linux for huge pages: fewer faults in large tensors

Peers are optional: `pip install -c constraints.txt -e ".[benchmarks]"`. A GPU is used if there is one, in bfloat16.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import importlib
import os
from pathlib import Path

import torch

from . import report
from .measure import measure

BENCHMARKS = ("cif", "linear_kl", "plora", "encoder", "training_step", "training_input", "loading", "requests")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes that run in seconds and mean nothing")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas between")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder for the results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is timed on a CPU")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"--only takes {', '.join(BENCHMARKS)}, not {', '.join(sorted(unknown))}")

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
    where = report.machine(device, dtype, options.clock)
    results = []
    for name in names:
        for case in importlib.import_module(f".{name}", __package__).cases(options.small, device, dtype):
            print(f"{name}: {case.name}", flush=True)
            results.append(
                {
                    "benchmark": name,
                    "case": case.name,
                    "sweep": case.sweep,
                    "memory_unit": case.memory_unit,
                    "missing": case.missing,
                    "candidates": measure(case, device, options.clock, 0.0 if options.small else 0.05),
                }
            )
            # After each case, so that a run that is stopped keeps the others.
            where["load_average_after"] = os.getloadavg()[0]
            text = report.write(options.output, where, results)
    print(text)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
