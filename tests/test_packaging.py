"""`pip install` brings every folder and file of the packages, so that a wheel does what a checkout does."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_blsp_kd", "processing")
# What a user of the library writes: it trains, saves, and asks what it has saved.
SCRIPT = """
import sys
import modeling_blsp_kd
import numpy as np
from transformers import TrainingArguments, pipeline
from modeling_blsp_kd import BlspKdForCausalLM, BlspKdTrainer
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.training_rows.responses import add_responses
speech, text, output = sys.argv[1:]
processor = BlspKdProcessor.from_backbones(speech, text)
model = BlspKdForCausalLM.from_backbones(speech, text, audio_token_id=processor.audio_token_id)
tone = {"array": np.sin(np.arange(16_000, dtype=np.float32)), "sampling_rate": 16_000}
rows = [{"audio": tone, "text": "the red cat", "instruction": "repeat the words"} for _ in range(4)]
add_responses(rows, model, processor)
args = TrainingArguments(output, max_steps=3, logging_steps=1, use_cpu=True, report_to="none")
trainer = BlspKdTrainer(model, args, BlspKdDataCollator(processor), rows, processing_class=processor)
trainer.train()
trainer.save_model()
print(modeling_blsp_kd.__file__, len(trainer.state.log_history))
print(repr(pipeline("audio-text-to-text", model=output)(tone, instruction="repeat", max_new_tokens=4)))
"""


def test_every_file_of_the_packages_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    brought, elsewhere = set(), dict(re.findall(r"(\S+) = (\S+)", setup["options"]["package_dir"]))
    for package in setup["options"]["packages"].split():
        brought |= set((ROOT / elsewhere.get(package, package.replace(".", "/"))).glob("*.py"))
    for package, patterns in setup["options.package_data"].items():
        for pattern in patterns.split():
            found = set(ROOT.joinpath(*package.split(".")).glob(pattern))
            assert found, f"{pattern} of {package} matches no file"
            brought |= found
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in files if "__pycache__" not in path.parts} == brought


def test_no_file_edits_where_python_searches():
    """Scripts and tests found each other that way, and examples/evaluate.py hid the package `evaluate`."""
    edit = re.compile(r"\bsys\.path\b|syspath_prepend|addsitedir")
    files = [path for folder in (*PACKAGES, "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [path.name for path in files if edit.search(path.read_text()) and path != Path(__file__)] == []


@pytest.mark.long
def test_the_wheel_trains_and_answers_outside_the_checkout(backbones, tmp_path):
    source = shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "outputs", "build", "tests")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(built, check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True, timeout=300)
    assert len(SCRIPT.strip().splitlines()) <= 20
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py", *backbones, tmp_path / "model"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    where, answer = run.stdout.splitlines()[-2:]
    assert where == f"{tmp_path / 'installed' / 'modeling_blsp_kd' / '__init__.py'} 4", "three steps and a summary"
    assert "generated_text" in answer
