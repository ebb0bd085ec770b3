"""Remake the trained checkpoint in `examples/tiny_world/model` from the result of the default run.

    accelerate launch examples/train.py
    python -m examples.tiny_world.build_model outputs/default

Leaves out: the model's code, which a checkpoint usually carries. This one stands beside it, in the installed package.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor

FOLDER = Path(__file__).parent / "model"
# What names the code that is left out.
CODE = ("auto_map", "custom_pipelines")


def main(trained: str):
    shutil.rmtree(FOLDER, ignore_errors=True)
    # Half the size, and as many right answers (README).
    BlspKdForCausalLM.from_pretrained(trained).to(torch.bfloat16).save_pretrained(FOLDER)
    BlspKdProcessor.from_pretrained(trained).save_pretrained(FOLDER)
    shutil.copyfile(Path(trained, "results.json"), FOLDER / "results.json")
    for path in FOLDER.glob("*.py"):
        path.unlink()
    for path in FOLDER.glob("*config.json"):
        options = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in options.items() if k not in CODE}, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
