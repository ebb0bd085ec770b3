"""The pytest plugin behind `pytest -m hf_common`: fetches transformers' tests, then counts and reports the outcomes.

`tests/conftest.py` registers it for that marker expression only. Leaves out: choosing tests; all of a mixin run.
"""

import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import soundfile

from tests.helpers.prompts import SAMPLING_RATE, clip

from . import sdist

MARKER = "hf_common"
REPORT = sdist.PROJECT / "docs" / "common_tests.md"
OURS = "BLSP-KD: "  # begins the reasons of the skips that this project adds
# Markers of transformers' tests.
THEIR_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "slow",
    "torch_compile_test",
)
AUDIO_FILES = ("glass-breaking-151256.wav", "f2641_0_throatclearing.wav")
RANK = ("passed", "skipped", "failed")  # the worst outcome of a test's phases and subtests counts


def skip(reason: str):
    """A test in place of one of transformers' that contradicts a trait of this model."""

    def skipped(self, *args, **kwargs):
        self.skipTest(OURS + reason)

    return skipped


class CommonTests:
    """Counts of one run. Under pytest-xdist the workers import the tests, and the controller fetches and counts."""

    def __init__(self):
        self.outcomes = {}
        self.reasons = {}
        self.broken_files = []

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.reasons.setdefault(report.nodeid, _skip_reason(report))
        before = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(before, report.outcome, key=RANK.index)

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken_files.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        # A run of nothing, or of nothing but skips, is no success. Listing the tests is not meant to run any.
        if "passed" not in self.outcomes.values() and not session.config.option.collectonly:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter, config):
        if not self.outcomes:
            return
        terminalreporter.section("transformers' common tests")
        for line in self.table():
            terminalreporter.write_line(line)
        # A run of some tests must not overwrite the account of all.
        names_some = any("::" in argument or argument.endswith(".py") for argument in config.args)
        if not (names_some or config.option.keyword or self.broken_files):
            REPORT.parent.mkdir(exist_ok=True)
            REPORT.write_text(self.markdown(), encoding="utf-8")
            terminalreporter.write_line(f"written to {REPORT.relative_to(sdist.PROJECT)}")

    def table(self) -> list[str]:
        by_class = defaultdict(Counter)
        for nodeid, outcome in self.outcomes.items():
            by_class[nodeid.split("::")[1]][outcome] += 1
        lines = ["| test class | passed | skipped | failed |", "|---|---:|---:|---:|"]
        for name, counts in [*sorted(by_class.items()), ("all", Counter(self.outcomes.values()))]:
            lines.append(f"| {name} | {counts['passed']} | {counts['skipped']} | {counts['failed']} |")
        return lines

    def markdown(self) -> str:
        lines = [
            "# transformers' common tests",
            "",
            f"`pytest -m {MARKER}` ran the common tests of transformers {sdist.VERSION} on small BLSP-KD models, and "
            "wrote this file.",
            "",
            *self.table(),
        ]
        failed = sorted(_test_name(nodeid) for nodeid, outcome in self.outcomes.items() if outcome == "failed")
        if failed:
            lines += ["", "## Failed", "", *(f"- {name} ({count})" for name, count in Counter(failed).items())]
        for title, ours in (("Skipped by this project", True), ("Skipped by transformers' tests", False)):
            by_reason = defaultdict(Counter)
            for nodeid, reason in self.reasons.items():
                if self.outcomes[nodeid] == "skipped" and reason.startswith(OURS) == ours:
                    by_reason[reason.removeprefix(OURS)][_test_name(nodeid)] += 1
            lines += ["", f"## {title}", ""]
            for reason, tests in sorted(by_reason.items(), key=lambda item: (-item[1].total(), item[0])):
                names = ", ".join(f"`{name}`" for name in sorted(tests))
                lines.append(f"- {tests.total()} x {reason}: {names}")
            if not by_reason:
                lines.append("None.")
        return "\n".join(lines) + "\n"


def _test_name(nodeid: str) -> str:
    return nodeid.split("::")[2]


def _skip_reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"\s+", " ", reason).removeprefix("Skipped: ")


def pytest_configure(config):
    for marker in THEIR_MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' tests")
    if not hasattr(config, "workerinput"):
        sdist.fetch()
        config.pluginmanager.register(CommonTests(), "hf_common_report")
    media = tempfile.TemporaryDirectory()
    config.add_cleanup(media.cleanup)
    for seed, name in enumerate(AUDIO_FILES):
        soundfile.write(Path(media.name, name), clip(seed=seed), SAMPLING_RATE)
    sdist.make_importable(Path(media.name))
