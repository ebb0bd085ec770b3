"""The comparison of two environments, here of one with itself: it runs, and it finds a difference."""

import sys

import pytest
import torch

from tests.reliability.other_version import compare, differences

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    assert compare([sys.executable], folder) == []
    return torch.load(folder / "home_0_0" / "results.pt")


def test_saved_models_answer_the_same_in_another_environment(answers):
    """`.ci/run` compares the oldest with the newest admitted versions."""
    assert set(answers) == {"full", "partial LoRA", "sliding windows", "thin"}
    for name, of_model in answers.items():
        assert torch.equal(of_model["tokens after a cache"], of_model["tokens of a conversation"]), name
        assert torch.equal(of_model["tokens of a prompt in chunks"][:, -6:], of_model["tokens of an answer"]), name


def test_a_difference_is_found(answers):
    other = {name: dict(of_model) for name, of_model in answers.items()}
    other["thin"]["logits"] = other["thin"]["logits"] + 1e-3
    other["full"]["tokens"] = other["full"]["tokens"].roll(1, 1)
    other["partial LoRA"]["times"] = other["partial LoRA"]["times"][:, 1:]
    del other["sliding windows"]
    found = differences(other, answers)
    assert [line.split(": ")[:2] for line in found] == [
        ["sliding windows", "only one has it"],
        ["full", "tokens"],
        ["partial LoRA", "times"],
        ["thin", "logits"],
    ]
    assert differences(answers, answers) == []
