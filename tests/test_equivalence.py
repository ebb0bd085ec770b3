"""The short form of the command that compares two processes with one, and what its comparison must notice.

Leaves out: FSDP2 with other ways of sharding (`test_sharding.py`).
"""

import pytest
import torch
from reliability.equivalence import MAX_DIFFERENCE, SHORT, log_difference, run, table, weight_difference
from reliability.equivalence_worker import make_start
from safetensors.torch import load_file, save_file


def test_two_processes_train_what_one_trains(tmp_path):
    results = run(tmp_path, SHORT)
    assert [result for result in results if not result["passed"]] == []
    assert len(results) == sum(len(cases) for cases in SHORT.values())
    assert table(results).count("| passed |") == len(results)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


def altered(start, folder, alter):
    """A copy of the full checkpoint with other weights."""
    weights = load_file(start / "full" / "model.safetensors")
    alter(weights)
    folder.mkdir()
    (folder / "config.json").write_text((start / "full" / "config.json").read_text())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_weight_that_moved_otherwise_is_noticed(start, tmp_path):
    name = "adapter.cif_weight.bias"

    def moved(by):
        def alter(weights):
            trained = [name for name in weights if name.startswith("adapter.")]
            for name in trained:
                weights[name] += 0.01
            weights[trained[0]].flatten()[0] += by

        return alter

    expected = altered(start, tmp_path / "expected", moved(0.0))
    assert weight_difference(expected, expected, start / "full") == 0
    actual = altered(start, tmp_path / "actual", moved(1e-4))
    assert weight_difference(actual, expected, start / "full") == pytest.approx(1e-2, rel=1e-2)
    assert weight_difference(expected, start / "full", start / "full") == float("inf"), "frozen, but moved"
    fewer = altered(start, tmp_path / "fewer", lambda weights: weights.pop(name))
