"""The benchmark command runs and writes what it says. What it measures is not judged here."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import __main__ as benchmark_command
from tests.benchmarks import report, serving
from tests.benchmarks.__main__ import BENCHMARKS

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


@pytest.mark.long
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
        ("cif", "B"), ("cif", "T"), ("encoder", "seconds"), ("linear_kl", "tokens"), ("linear_kl", "vocabulary")
    }  # fmt: skip


@pytest.mark.parametrize("value, is_on", [("1", True), ("0", False), (None, False)])
def test_huge_pages_are_told_of(value, is_on, tmp_path, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", value)
    where = report.machine(torch.device("cpu"), torch.float32, "wall")
    text = report.write(tmp_path, {**where, "load_average_after": 0.0}, [])
    assert where["huge_pages"] == ("huge pages" in text) == is_on


def test_a_run_that_is_stopped_keeps_what_it_has_measured(tmp_path, monkeypatch):
    measured = []

    def measure(case, *arguments):
        if case.sweep and any(earlier.sweep for earlier in measured):
            raise KeyboardInterrupt
        measured.append(case)
        return {name: {"times_s": [1], "median_s": 1, "ratios": [1], "peak_bytes": 0} for name in case.candidates}

    monkeypatch.setattr(benchmark_command, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)  # other tests follow in this process
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--small", "--only", "cif", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        benchmark_command.main()
    results = json.loads((tmp_path / "benchmarks.json").read_text())["results"]
    assert [result["case"] for result in results] == [case.name for case in measured] and measured[-1].sweep


@pytest.mark.long
def test_markdown_has_a_row_for_every_case_and_names_every_candidate(folder):
    data = json.loads((folder / "benchmarks.json").read_text())
    text = (folder / "benchmarks.md").read_text()
    tables = text.split("### ")[1:]
    for result in data["results"]:
        if result["sweep"]:
            continue
        (table,) = [table for table in tables if table.startswith(result["benchmark"] + " (")]
        rows = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]
        names, (row,) = rows[0][1:], [row for row in rows if row[0] == result["case"]]
        cells = dict(zip(names, row[1:], strict=True))
        for name, measured in result["candidates"].items():
            shown = 1000 * measured["median_s"] if name == "BLSP-KD" else statistics.median(measured["ratios"])
            assert float(cells[name].split(" [")[0]) == pytest.approx(shown, rel=0.01)
        for name in result["missing"]:
            assert f"Not run: {name} (" in table


@pytest.mark.long
def test_memory_is_what_tensors_hold_at_one_time(folder):
    """Of the largest CIF case: the gradients, as large as the input, and less than that again."""
    results = json.loads((folder / "benchmarks.json").read_text())["results"]
    (result,) = [result for result in results if result["case"] == "forward + backward (2, 60, 16)"]
    input_bytes = result["memory_unit"][1]
    assert input_bytes == 4 * 2 * 60 * 16
    assert input_bytes < result["candidates"]["read and write floor"]["peak_bytes"] < 1.2 * input_bytes


@pytest.mark.long
def test_an_unknown_benchmark_is_named():
    finished = run("--only", "cif,speed")
    assert finished.returncode == 2 and f"--only takes {', '.join(BENCHMARKS)}, not speed" in finished.stderr


def test_the_summary_shows_figures_that_were_measured():
    figures = re.findall(r"[\d.]+ \[[\d.]+-[\d.]+\]", (REPOSITORY / "docs" / "speed.md").read_text())
    assert len(figures) > 40
    measured = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert [figure for figure in figures if figure not in measured] == []


def test_the_figures_of_serving():
    """Of made-up rounds: the ratio is that within a repeat, and what failed is told and no time."""

    def rounds(seconds, *errors):
        answers = [{"first_s": 0.5, "all_s": 1.0, "text": "yes", "error": None}] * (4 - len(errors))
        answers += [{"first_s": 0.0, "all_s": 0.0, "text": "", "error": error} for error in errors]
        return [{"seconds": each, "cpu_seconds": each / 2, "answers": answers} for each in seconds]

    servers = {serving.FRONT: rounds([1.0, 2.0, 1.0]), serving.PEER: rounds([2.0, 8.0, 3.0], "status 500: no")}
    where = report.machine(torch.device("cpu"), torch.float32, "wall")
    where |= {"usable_cores": 1, "engine": "vllm", "load_average_after": 0.0}
    text = serving.markdown(where, [{"llm": "tiny", "clients": 8, "servers": servers}])
    assert "| tiny | 8 | requests/s | 4 [2-4] | 1.33 [0.5-2] | 3 [2-4] |" in text
    assert "| tiny | 8 | requests/s of CPU | 8 [4-8] | 2.67 [1-4] | 3 [2-4] |" in text
    assert "| tiny | 8 | first token, s | 0.5, 0.5 | 0.5, 0.5 | |" in text
    assert "| tiny | 8 | answered | 12 of 12 | 9 of 12 | 9 equal |" in text and "Failed: status 500: no" in text
