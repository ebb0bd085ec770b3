"""The short form of the command that compares two processes with one, and that its comparison can fail."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.reliability.equivalence import ENGINES, MAX_DIFFERENCE, SHORT, compare_case, run, table

pytestmark = pytest.mark.long

CASE = "training"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def results(output):
    return run(output, SHORT)


def test_two_processes_train_what_one_trains(results):
    assert [result for result in results if not result["passed"]] == []
    assert len(results) == sum(len(cases) for cases in SHORT.values())
    assert table(results).count("| passed |") == len(results)


def compare(output, engine="FSDP2", alter=lambda folder: None):
    """Return the differences between what two processes left."""
    runs = output / "equivalence"
    altered = output / "altered"
    shutil.rmtree(altered, ignore_errors=True)
    shutil.copytree(runs / "engine_1" / CASE, altered)
    alter(altered)
    return compare_case(ENGINES[engine], altered, runs / "one_process" / CASE, runs / "start" / "full")


def test_a_difference_is_found(results, output):
    def change_loss(folder):
        found = json.loads((folder / "results_0.json").read_text())
        found["log"][1]["input_kl"] *= 1.001
        (folder / "results_0.json").write_text(json.dumps(found))

    def change_answer(folder):
        found = json.loads((folder / "results_1.json").read_text())
        found["answers"][0][-1] += 1
        (folder / "results_1.json").write_text(json.dumps(found))

    def change_weight(folder):
        weights = load_file(folder / "model" / "model.safetensors")
        start = load_file(output / "equivalence" / "start" / "full" / "model.safetensors")
        name = "adapter.post_layers.0.fc1.weight"
        weights[name] += 0.01 * (weights[name] - start[name])  # one percent too far
        save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})

    assert all(difference <= MAX_DIFFERENCE[name] for name, difference in compare(output).items())
    for name, alter in (("log", change_loss), ("answers", change_answer), ("weights", change_weight)):
        found = compare(output, alter=alter)
        assert [key for key in MAX_DIFFERENCE if found[key] > MAX_DIFFERENCE[key]] == [name]


def test_an_engine_that_did_not_run_is_found(results, output):
    """accelerate falls back to DDP in silence where it finds no accelerator."""
    assert compare(output, engine="ZeRO-3")["problem"].startswith("ran as ['FSDPBlspKdForCausalLM'")
