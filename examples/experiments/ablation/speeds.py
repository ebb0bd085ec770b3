"""Equal time instead of equal steps: how many steps a configuration takes in the time of the baseline.

Leaves out: evaluation, which is not counted.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from .matrix import UNTRAINED, Configuration
from .plan import Plan

# What comes before the first step cancels: the speed is that of the steps between the two.
FEWER_STEPS, MORE_STEPS = 40, 120


def equal_steps(configuration: Configuration, plan: Plan, train) -> int:
    """Return the steps that a configuration takes in the time that the plan's baseline takes for its own.

    Speeds are measured once for each configuration and machine, and kept in `speeds.json` of the output folder.

    Args:
        plan: with a baseline.
        train (callable): runs a configuration with a plan and a folder, and returns the seconds of its training.
    """
    if plan.baseline is None or configuration.script == UNTRAINED:
        return plan.steps
    own, others = (_seconds_per_step(each, plan, train) for each in (configuration, plan.baseline))
    return max(1, round(plan.steps * others / own))


def _seconds_per_step(configuration: Configuration, plan: Plan, train) -> float:
    path = plan.output_dir / "speeds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = f"{configuration.name}-{plan.fingerprint(configuration)}-{plan.threads}-threads"
    if key not in known:
        folder = plan.output_dir / f"{configuration.name}-speed"
        seconds = []
        # The first run of all also makes the clips, so it is not counted.
        for steps in (FEWER_STEPS, MORE_STEPS) if known else (FEWER_STEPS, FEWER_STEPS, MORE_STEPS):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            seconds.append(train(configuration, replace(plan, steps=steps), folder))
        shutil.rmtree(folder)
        known[key] = (seconds[-1] - seconds[-2]) / (MORE_STEPS - FEWER_STEPS)
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(json.dumps(known, indent=1) + "\n")
        os.replace(unfinished, path)
    return known[key]
