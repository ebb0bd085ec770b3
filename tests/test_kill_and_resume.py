"""The short form of the command that kills trainings and resumes them, and the user's way to resume."""

import logging

import pytest

from modeling_blsp_kd.training.options import Arguments, where_to_resume
from tests.reliability.kill_and_resume import KINDS, SHORT, run, table


@pytest.mark.long
def test_killed_trainings_end_as_the_one_that_nobody_killed(tmp_path):
    results = run(tmp_path, tmp_path / "clips", kills=3, sizes=SHORT)
    assert all(killed["survived"] for killed in results["runs"]), results["runs"]
    assert sum(results["by_kind"][kind]["tried"] for kind in KINDS) == 3
    assert results["logged"] == 4, "two means of training, two evaluations"
    assert "| all | 3 | 3 | 0 |" in table(results)


@pytest.mark.parametrize(
    "given, at_first, later",
    [(None, False, False), ("false", False, False), ("True", False, True), ("a/folder", "a/folder", "a/folder")],
)
def test_resuming_may_stand_in_a_command_from_its_first_start_on(given, at_first, later, tmp_path, caplog):
    """`--resume_from_checkpoint true` was taken for a folder of that name."""
    args = Arguments(output_dir=str(tmp_path), resume_from_checkpoint=given, use_cpu=True)
    with caplog.at_level(logging.INFO):
        assert where_to_resume(args) == at_first
    assert ("training starts anew" in caplog.text) == (given == "True")
    (tmp_path / "checkpoint-7").mkdir()
    assert where_to_resume(args) == later
