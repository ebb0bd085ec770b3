"""Write the contents of a published folder except its card: the model with code and licence, and sample clips.

Leaves out: the card (`card.py`), and making the folder appear when it is complete (`publication.py`).
"""

import shutil
from importlib.metadata import files
from pathlib import Path

from transformers import PreTrainedModel

from processing import BlspKdPipeline

MAX_NEW_TOKENS = 128  # of an answer on the card


def write_model(pipeline: BlspKdPipeline, folder: Path, full: bool):
    """Write weights, configs, processor, and the code that loads and serves them; the licence goes with the code.

    Args:
        full: write a thin model's backbones too.
    """
    pipeline.model.config.auto_map["AutoProcessor"] = "processing_blsp_kd.BlspKdProcessor"
    drop_ctc_head(pipeline.model)
    pipeline.save_pretrained(folder, full=full)
    # The licence lies where the installation put it: in the checkout, or beside the metadata of the wheel.
    [licence] = (path.locate() for path in files("blsp-kd") or [] if path.name == "LICENSE")
    for file in (Path(__file__).with_name("handler.py"), Path(__file__).with_name("requirements.txt"), licence):
        shutil.copy(file, folder)


def drop_ctc_head(model: PreTrainedModel):
    """Remove the auxiliary head that only training uses (distillation option `ctc`), in place."""
    if model.config.distillation_options.ctc:
        model.adapter.ctc_head = None
        model.config.distillation = {**model.config.distillation, "ctc": 0.0}


def write_samples(pipeline: BlspKdPipeline, rows: list[dict], folder: Path) -> list[dict]:
    """Copy the rows' clips, and let the model answer them as it is; return rows for the card."""
    samples = []
    for number, row in enumerate(rows, start=1):
        (folder / "samples").mkdir(exist_ok=True)
        name = f"samples/{number}{Path(row['audio']).suffix}"
        shutil.copyfile(row["audio"], folder / name)
        options = {"instruction": row.get("instruction") or None, "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        output = pipeline(str(folder / name), **options)["generated_text"].strip()
        known = {key: row.get(key) for key in ("text", "instruction", "answer")}
        samples.append({"audio": name, **known, "output": output})
    return samples
