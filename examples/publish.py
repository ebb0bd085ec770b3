"""Turn a trained checkpoint into a Hub repository that others use without this code.

    python examples/publish.py outputs/default outputs/publication --verify
    python examples/publish.py outputs/mine outputs/publication --text_model Qwen/Qwen2.5-0.5B-Instruct=apache-2.0 \\
        --speech_model openai/whisper-small=apache-2.0 --licence apache-2.0 --language en --push me/my-model --private

The folder holds the model with all code that loading it needs, the processor, the pipelines, `handler.py` for Inference
Endpoints, a model card with what was measured, and sample clips with what the model really answers to them. It appears
when it is complete; an earlier publication is replaced, other files never are.
"""

import argparse
import json
import shutil
from pathlib import Path

import soundfile
from answering import answer_rows
from hub.card import make_card
from hub.facts import OWN_BACKBONES, OWN_LICENCE, describe_parts
from hub.publication import complete_or_nothing
from hub.upload import UploadError, upload
from hub.verify import measure_memory, verify
from transformers.dynamic_module_utils import get_relative_import_files

import processing
from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor

HUB_FILES = Path(__file__).parent / "hub"
LICENCE_FILE = Path(__file__).parents[1] / "LICENSE"
PIPELINE_FILE = Path(processing.__file__).with_name("pipeline_blsp_kd.py")
CUSTOM_PIPELINES = {
    "audio-text-to-text": {"impl": "pipeline_blsp_kd.BlspKdPipeline", "pt": ["AutoModelForCausalLM"]},
    "automatic-speech-recognition": {
        "impl": "pipeline_blsp_kd.BlspKdSpeechRecognitionPipeline",
        "pt": ["AutoModelForCausalLM"],
    },
}


def main():
    options = parse_options()
    checkpoint, name = Path(options.checkpoint), options.push or Path(options.folder).absolute().name
    check_backbones(checkpoint, options.full)
    results_file = checkpoint / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    rows = read_samples(options.samples) if options.samples else rows_of(checkpoint, results)

    model = BlspKdForCausalLM.from_pretrained(checkpoint)
    processor = BlspKdProcessor.from_pretrained(checkpoint)
    is_thin = model.config.backbones is not None and not options.full
    if options.full:
        model = model.to(model.dtype)  # a full checkpoint has one dtype
    with complete_or_nothing(options.folder) as folder:
        write_model(model, processor, folder, options.full)
        results["samples"] = write_samples(model, processor, rows, folder)
        if results_file.exists():
            (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        facts = {
            "name": name,
            "thin": is_thin,
            "losses": model.config.distillation,
            "results": results,
            **describe_checkpoint(model, results.get("training"), options),
            **measure(folder, name, model.config.backbones if is_thin else None, results["samples"]),
        }
        make_card(facts).save(folder / "README.md")
    print(f"{options.folder} is complete: {name}")

    if options.verify:
        report_checks(options, name, model, processor, rows)
    if options.push:
        try:
            print(f"uploaded: {upload(options.folder, options.push, private=options.private or None).commit_url}")
        except UploadError as error:
            raise SystemExit(str(error)) from error
