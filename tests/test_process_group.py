"""No process group outlives a script that ends properly. `test_exact_order.py` has two processes of a trainer."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit
from pathlib import Path

import torch
from torch import distributed

from modeling_blsp_kd.training.process_group import end_with_interpreter


def threads():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def main():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    atexit.register(lambda: print("a group is left:", distributed.is_initialized(), threads() > 0))
    end_with_interpreter()
    end_with_interpreter()
    trainer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    trainer.itself = [trainer]
    END


main()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "code", "is_left"),
    [("raise SystemExit(143)", 143, False), ("raise ValueError", 1, True)],
)
def test_the_group_ends_before_the_interpreter_does(end, code, is_left):
    """A training that had saved its model was aborted at its exit: "terminate called without an active exception"."""
    script = SCRIPT.replace("END", end)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == code, run.stderr[-3000:]
    assert run.stdout == f"a group is left: {is_left} {is_left}\n"
