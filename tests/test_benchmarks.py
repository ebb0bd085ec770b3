"""The benchmark command runs and writes what it says. What it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = ("cif", "linear_kl", "plora", "encoder", "requests", "training_step", "loading")
REPOSITORY = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    finished = run("--small", "--output", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert (folder / "benchmarks.md").read_text() in finished.stdout
    return folder


def test_json_has_every_number(folder):
    data = json.loads((folder / "benchmarks.json").read_text())
    assert data["machine"]["threads"] == 1 and data["machine"]["versions"]["torch"]
    assert {result["benchmark"] for result in data["results"]} == set(BENCHMARKS)
    for result in data["results"]:
        ours = result["candidates"]["BLSP-KD"]
        assert ours["ratios"] == [1.0] * len(ours["times_s"])
        for measured in result["candidates"].values():
            assert len(measured["times_s"]) == len(ours["times_s"]) and min(measured["times_s"]) > 0
            assert measured["peak_bytes"] >= 0
    assert {(each["benchmark"], each["size"]) for each in data["slopes"]} == {
        ("cif", "B"), ("cif", "T"), ("linear_kl", "tokens"), ("linear_kl", "vocabulary"), ("encoder", "seconds")
    }  # fmt: skip


def test_markdown_has_a_row_for_every_candidate_and_missing_peer(folder):
    data = json.loads((folder / "benchmarks.json").read_text())
    text = (folder / "benchmarks.md").read_text()
    for result in data["results"]:
        for name in () if result["sweep"] else [*result["candidates"], *result["missing"]]:
            assert f"| {result['case']} | {name} |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (4, 6) for line in tables)


def test_memory_is_what_tensors_hold_at_one_time(folder):
    """Of the largest CIF case: the gradients, as large as the input, and less than that again."""
    results = json.loads((folder / "benchmarks.json").read_text())["results"]
    (result,) = [result for result in results if result["case"] == "forward + backward (2, 60, 16)"]
    input_bytes = result["memory_unit"][1]
    assert input_bytes == 4 * 2 * 60 * 16
    assert input_bytes < result["candidates"]["read and write floor"]["peak_bytes"] < 1.2 * input_bytes


def test_an_unknown_benchmark_is_named():
    finished = run("--only", "cif,speed")
    assert finished.returncode == 2 and f"--only takes {', '.join(BENCHMARKS)}, not speed" in finished.stderr
