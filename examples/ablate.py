"""Train and evaluate the configurations that the paper compares, with equal data, steps and seeds.

    python examples/ablate.py --time_budget_minutes 110
    python examples/ablate.py --short
    python examples/ablate.py --only cformer_both,encoder --seeds 1,2,3
    python examples/ablate.py --matrix beyond

This script runs the module `examples.experiments.ablation` from any working directory. `--help` has all options.
"""

import os
import sys
from pathlib import Path

MODULE = "examples.experiments.ablation"


def main():
    root = Path(__file__).resolve().parent.parent
    search_path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # The module replaces this process, so signals reach it directly.
    os.execve(sys.executable, [sys.executable, "-m", MODULE, *sys.argv[1:]], {**os.environ, "PYTHONPATH": search_path})


if __name__ == "__main__":
    main()
