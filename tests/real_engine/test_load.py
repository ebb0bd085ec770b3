"""The front and the real vLLM under load, with servers that are killed; and the command that measures them runs.

Opt-in, as `test_real_engine.py`. What is measured is not judged here.
"""

import json
import subprocess
import sys

import pytest

from tests.helpers.servers import ROOT

pytestmark = pytest.mark.vllm


def run(*arguments):
    told = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr[-3000:]


def test_a_crowd_and_killed_servers_are_survived(tmp_path):
    run("tests.reliability.serving", "--questions", 20, "--output", tmp_path)
    findings = json.loads((tmp_path / "serving.json").read_text())
    assert len(findings) == 4 and not any(each["wrong"] for each in findings)


def test_both_servers_are_measured_with_the_same_answers(tmp_path):
    run("tests.benchmarks.serving", "--small", "--output", tmp_path)
    for summary in json.loads((tmp_path / "serving.json").read_text())["summaries"]:
        ours, theirs = summary.values()
        assert ours["num_failed"] == theirs["num_failed"] == 0 and ours["texts"] == theirs["texts"]
