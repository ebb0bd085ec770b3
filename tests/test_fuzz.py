"""The short form of the fuzzer, and whether it sees what it must: errors of other libraries, crashes, hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability import fuzz
from tests.reliability.fuzz_kinds import Kind, WrongResultError

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.long
def test_no_case_is_lost(tmp_path):
    # A process of its own, since the fuzzer forks and torch's threads do not survive that.
    subprocess.run(
        [sys.executable, "-m", "tests.reliability.fuzz", "--short", "--output", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
        timeout=600,
    )
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["failures"] == []
    cases = {row["kind"]: row["cases"] for row in found["kinds"]}
    assert cases == {
        **{f"audio: {name}": 40 for name in ("wav", "flac", "ogg", "mp3", "phone")},
        **{"manifests": 20, "chats": 30, "configs": 30, "checkpoints": 20},
    }


def answer(_):
    return "well"


def refuse(_):
    raise ValueError("Expected a clip, got none.")


def forget_a_check(case):
    return {}[case]


def unpack_too_much(_):
    int("x")  # a ValueError, but none that somebody wrote


def parse(_):
    json.loads("{")


def let_through(_):
    raise WrongResultError("came through")


def take_too_much(_):
    return b"x" * (fuzz.MAX_MEMORY_BYTES + 2**25)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(_):
    time.sleep(60)


@pytest.mark.long
@pytest.mark.parametrize(
    "use, outcome",
    [
        (answer, "result"),
        (refuse, "clear error"),
        (forget_a_check, "raw error"),
        (unpack_too_much, "raw error"),
        (parse, "raw error"),
        (let_through, "wrong result"),
        (take_too_much, "memory"),
        (die, "crash"),
        (sleep, "hang"),
    ],
)
def test_how_a_case_ended_is_told(use, outcome, tmp_path, monkeypatch):
    if outcome == "hang":
        monkeypatch.setattr(fuzz, "MAX_SECONDS", 1.0)
    kind = Kind("made up", 1, make=lambda rng: rng.integers(10), use=use)
    outcomes = fuzz.run(kind, seed=0, num_cases=2, scratch=tmp_path / "scratch")
    assert [(each.case, each.outcome) for each in outcomes] == [(0, outcome), (1, outcome)]
    [row] = fuzz.summary(outcomes)
    assert row["cases"] == row[outcome] == 2
    listed = fuzz.write(tmp_path, 0, outcomes)
    assert ("made up, case 1" in listed) == (outcome in fuzz.FAILURES)
