"""Write the demo page (`processing/demo/page.py`) as a folder for a Hugging Face Space.

Follows the Hub's Space metadata (the front matter of README.md). The folder contains both packages, because a Space
installs only released packages. Leaves out: making the Space and choosing its hardware.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import yaml

import modeling_blsp_kd
import processing

CLIPS = "clips"
REQUIREMENTS = ("torch", "transformers", "accelerate", "peft", "safetensors", "soundfile", "soxr", "av", "matplotlib")
TITLE = "An LLM with ears"
APP = """import os

from processing.demo.page import serve

serve(os.environ.get("MODEL_ID", "{repo_id}"), "{clips}")
"""


def write_space(folder: str | Path, repo_id: str, clips: str | Path):
    """Write the Space of a published model.

    Args:
        folder (`str` or `os.PathLike`): must not exist, or be empty.
        repo_id (`str`): "owner/name" of the model, which the page loads.
        clips (`str` or `os.PathLike`): folder of example clips with a `metadata.jsonl`.

    Raises:
        FileExistsError: something is in the way.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Remove it, or name another folder for the Space.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "app.py").write_text(APP.format(repo_id=repo_id, clips=CLIPS))
    shutil.copytree(clips, folder / CLIPS)
    for package in (modeling_blsp_kd, processing):
        [source] = map(Path, package.__path__)
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("".join(f"{name}=={_released(name)}\n" for name in REQUIREMENTS))
    metadata = {
        "title": TITLE,
        "sdk": "gradio",
        "sdk_version": _released("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": [repo_id],
    }
    text = f"Talk to [{repo_id}](https://huggingface.co/{repo_id}), and see what it understood."
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {TITLE}\n\n{text}\n")


def _released(package: str) -> str:
    """Return the installed version without the mark of a local build (`+cpu`)."""
    return version(package).partition("+")[0]
