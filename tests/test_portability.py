"""The command that runs the numerical tests as other CPUs would: its settings arrive, and what they find is told."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.portability import __main__ as command
from tests.portability.cpu_kernels import look
from tests.portability.other_rounding import OtherRounding

TESTS = Path(__file__).parent


@pytest.mark.numerical
def test_settings_arrive_where_tests_run():
    """`conftest.py` sets the number of threads, so OMP_NUM_THREADS alone changed nothing."""
    assert torch.get_num_threads() == int(os.environ.get("BLSP_KD_TEST_THREADS", 1))
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert torch.backends.cpu.get_cpu_capability() == capability.upper()
    x, weight = torch.randn(8, 16), torch.randn(16, 4)
    is_other = not torch.equal((x @ weight)[:3], x[:3] @ weight)
    assert is_other or "BLSP_KD_TEST_ROUNDING" not in os.environ


@pytest.mark.long
def test_a_setting_is_seen_in_what_the_libraries_say():
    plain, other = look({"OMP_NUM_THREADS": "1"}), look({"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"})
    assert (plain["threads"], other["threads"], other["ATen"]) == ("1", "2", "DEFAULT")
    assert plain == look({"OMP_NUM_THREADS": "1", "NO_SUCH_SETTING": "1"})
    with pytest.raises(RuntimeError, match="ended with status 1.*PYTHONHASHSEED"):
        look({"PYTHONHASHSEED": "invalid"})


def test_other_rounding_is_the_same_for_equal_calls_and_within_the_bound_of_any_order():
    x, weight = torch.randn(7, 48, dtype=torch.float64), torch.randn(11, 48, dtype=torch.float64)
    plain = x @ weight.T
    with OtherRounding():
        rounded, again, of_fewer = x @ weight.T, x @ weight.T, x[:3] @ weight.T
    assert torch.equal(rounded, again) and not torch.equal(rounded, plain) and not torch.equal(rounded[:3], of_fewer)
    assert ((rounded - plain).abs() <= 2 * torch.finfo(torch.float64).eps * (x.abs() @ weight.abs().T)).all()
    with OtherRounding():  # -inf hides positions and stays what it is
        masked = torch.baddbmm(torch.full((1, 7, 11), -torch.inf, dtype=torch.float64), x[None], weight.T[None])
    assert (masked == -torch.inf).all()


@pytest.mark.long
def test_the_command_runs_what_is_selected_and_prints_its_table(tmp_path):
    arguments = [sys.executable, "-m", "tests.portability", "--short", "--output", str(tmp_path)]
    arguments += ["--", str(TESTS / "test_portability.py"), "-k", "arrive"]
    finished = subprocess.run(arguments, cwd=TESTS.parent, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    text = (tmp_path / "portability.md").read_text()
    assert text in finished.stdout
    # The second on CPUs that know no such instructions.
    assert re.search(r"2 threads \| (1 \| 0 \| \d+ \| +\||.*computes here what)", text), text


@pytest.mark.long
def test_what_fails_is_named_and_a_setting_without_effect_is_skipped(tmp_path, monkeypatch):
    failing = tmp_path / "test_two.py"
    failing.write_text(
        "import pytest\n\n@pytest.mark.numerical\n@pytest.mark.parametrize('x', [0, 1])\ndef test_x(x):\n    assert x\n"
    )
    monkeypatch.setattr(command, "look", lambda environment: {"ATen": environment.get("ATEN_CPU_CAPABILITY", "avx2")})
    settings = [{}, {"ATEN_CPU_CAPABILITY": "avx2"}]
    plain, other = command.run([(setting, 1) for setting in settings], tmp_path, [str(failing)])
    assert (plain["passed"], plain["failed"]) == (1, ["test_two::test_x[0]"])
    assert other["skipped"] == "computes here what 'as it is, 1 thread' does"
    nothing = command.run_tests({}, tmp_path / "nothing.txt", [str(failing), "-k", "no_such_test"])
    assert nothing["failed"] == [f"pytest ended with status 5, see {tmp_path / 'nothing.txt'}"]


def test_files_with_tolerances_have_numerical_tests():
    files = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    unmarked = [name for name, text in files.items() if "assert_close(" in text and command.MARK not in text]
    assert unmarked == [], "mark them, so that they meet the rounding of other CPUs, too"
