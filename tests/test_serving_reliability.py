"""The command that tries a front at its bounds and kills it under load, and whether it would see what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")

from tests.reliability.serving import ANSWERED, ERROR, HUNG, REFUSED, WRONG, Outcome, finding, markdown, never

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_a_crowd_and_a_killed_front_are_survived(tmp_path):
    """`test_serving_http.py` has the small forms of the other two trials."""
    command = [sys.executable, "-m", "tests.reliability.serving", "--engine", "stand-in", "--questions", "10"]
    command += ["--trials", "crowd,front_killed", "--output", tmp_path]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert told.returncode == 0, told.stdout + told.stderr[-3000:]
    crowd, killed = json.loads((tmp_path / "serving.json").read_text())
    assert crowd["requests"] == 200 == crowd["counts"][ANSWERED] + crowd["counts"][REFUSED]
    assert killed["counts"][ERROR] >= 8 and killed["counts"][ANSWERED] >= 24


def outcome(kind):
    return Outcome(kind, begin=1.0, end=3.5, detail=f"this is {kind}")


def test_what_goes_wrong_is_told():
    outcomes = [outcome(kind) for kind in (ANSWERED, REFUSED, ERROR, WRONG, HUNG)]
    assert never(outcomes, WRONG, HUNG) == ["wrong: this is wrong", "hung: this is hung"]
    good, bad = finding("crowd", outcomes[:2], []), finding("engine_killed", outcomes, never(outcomes, HUNG))
    assert good["counts"][ANSWERED] == good["counts"][REFUSED] == 1 and bad["longest_s"] == 2.5
    text = markdown([good, bad])
    assert "| crowd | 2 | 1 | 1 | 0 | 0 | 0 | 2.5 | survived |" in text
    assert "| engine killed | 5 | 1 | 1 | 1 | 1 | 1 | 2.5 | 1 faults |" in text
    assert "- engine_killed: hung: this is hung" in text
