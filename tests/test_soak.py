"""The short form of the soak, and whether it would see a leak, a drift or a failed request."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.spoken_cases import make_repository
from tests.reliability import listening
from tests.reliability.soak import MAX_GROWTH_BYTES, Request, ask, memory_facts, verdict

REPOSITORY = Path(__file__).parent.parent
MIB = 2**20


@pytest.mark.long
def test_a_short_soak_is_survived(tmp_path, processor):
    model = make_repository(tmp_path / "model", processor)
    subprocess.run(
        [sys.executable, "-m", "tests.reliability.soak", "--short", "--model", model, "--output", tmp_path],
        cwd=REPOSITORY,
        check=True,
        timeout=600,
    )
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["wrong"] == [] and found["probes"] >= 2 and found["requests"] >= 20
    assert found["memory"]["end_bytes"] > found["memory"]["points"][-1][3] > 0, "allocated is a part of resident"


@pytest.mark.long
def test_a_short_session_is_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["listening", "--short", "--output", str(tmp_path)])
    listening.main()
    found = json.loads((tmp_path / "listening.json").read_text())
    assert found["drifts"] == found["unexpected"] == [] and found["probes"] >= 2 and found["speech_tokens"] > 10


def soaked(mib_per_request, settled=500, drifts=(), unexpected=()):
    """Return the findings of a run of 2,000 requests whose memory rose to `settled` requests and by a leak."""
    points = [
        (number / 10, number, round((600 + min(number, settled) * 0.4 + number * mib_per_request) * MIB), 0)
        for number in range(25, 2001, 25)
    ]
    return {"memory": memory_facts(points), "drifts": drifts, "unexpected": unexpected}


def test_what_fills_during_the_warm_up_is_no_growth():
    found = soaked(mib_per_request=0.0)
    assert found["memory"]["peak_bytes"] == 800 * MIB and found["memory"]["growth_bytes"] == pytest.approx(0, abs=1)
    assert verdict(found) == []


def test_a_leak_is_seen():
    found = soaked(mib_per_request=0.05)
    assert found["memory"]["growth_bytes"] == pytest.approx(1500 * 0.05 * MIB, rel=1e-6) and 75 * MIB > MAX_GROWTH_BYTES
    assert verdict(found) == ["memory grew by 75 MiB"]


def test_drifts_and_failures_are_seen():
    found = soaked(0.0, drifts=[{"request": 25}], unexpected=[{"request": 3}])
    assert verdict(found) == ["1 requests ended unexpectedly", "1 probes were answered differently"]


def fail():
    raise KeyError("text")


def refuse():
    raise ValueError("The clip is silent.")


@pytest.mark.parametrize(
    "call, options, outcome, is_wrong",
    [
        (dict, {}, "answered", False),
        (dict, {"refusal": "silent", "may_answer": False}, "answered", True),
        (refuse, {"refusal": "silent", "may_answer": False}, "refused", False),
        (refuse, {"refusal": "too long"}, "refused", True),
        (refuse, {}, "refused", True),
        (fail, {"refusal": "."}, "failed", True),
    ],
)
def test_how_a_request_ended_is_told(call, options, outcome, is_wrong):
    ended, _, wrong = ask(Request("made up", call, **options))
    assert (ended, wrong is not None) == (outcome, is_wrong)
