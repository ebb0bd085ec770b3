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

from hub.card import TINY_WORLD, make_card
from hub.facts import OWN_BACKBONES, OWN_LICENCE, describe_parts
from hub.publication import complete_or_nothing
from hub.space import write_space
from hub.upload import UploadError, upload
from hub.verify import measure_memory, verify
from huggingface_hub.utils import validate_repo_id

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdPipeline, BlspKdProcessor
from processing.audio_decoding import audio_info
from processing.evaluation.answering import answer_rows
from processing.manifests import read_manifest

HUB_FILES = Path(__file__).parent / "hub"
LICENCE_FILE = Path(__file__).parents[1] / "LICENSE"
MAX_NEW_TOKENS = 128  # of an answer on the card


def main():
    options = parse_options()
    checkpoint, name = Path(options.checkpoint), options.push or Path(options.folder).absolute().name
    repo_id = options.push or "someone/model"  # as which it is tried out
    validate_repo_id(repo_id)
    check_backbones(checkpoint, options.full)
    results_file = checkpoint / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    kept = [{**row, "audio": checkpoint / row["audio"]} for row in results.pop("samples", [])]
    rows = read_manifest(options.samples, options.allow_outside_paths) if options.samples else kept
    if options.verify and not rows:
        raise SystemExit("--verify needs a clip, and this checkpoint kept none. Give some with --samples.")

    with complete_or_nothing(options.folder) as (folder, record):
        model = BlspKdForCausalLM.from_pretrained(checkpoint)
        processor = BlspKdProcessor.from_pretrained(checkpoint)
        is_thin = model.config.backbones is not None and not options.full
        write_model(model, processor, folder, options.full)
        samples = write_samples(model, processor, rows, folder)
        record["facts"] = {
            "name": name,
            "thin": is_thin,
            "losses": model.config.distillation,
            "results": results,
            "samples": samples,
            **describe_checkpoint(model, results.get("training"), options),
            "memory": measure(folder, repo_id, model.config.backbones if is_thin else None, samples),
        }
        make_card(record["facts"]).save(folder / "README.md")
    print(f"{options.folder} is complete: {name}")

    if options.verify:
        report(verify(options.folder, repo_id, model, processor, rows[0]["audio"]))
    if options.space:
        write_space(options.space, repo_id)
    if options.push:
        try:
            print(f"uploaded: {upload(options.folder, options.push, private=options.private or None).commit_url}")
        except UploadError as error:
            raise SystemExit(str(error)) from error


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder that train.py left")
    parser.add_argument("folder", help="where to write the repository's files")
    parser.add_argument("--full", action="store_true", help="with its backbones, though the checkpoint is thin")
    parser.add_argument(
        "--samples",
        metavar="MANIFEST",
        help="JSONL rows (audio, text, instruction, answer) to show; those that train.py kept if omitted",
    )
    parser.add_argument("--allow_outside_paths", action="store_true", help="let audio of --samples leave its folder")
    for part in ("text_model", "speech_model"):
        parser.add_argument(f"--{part}", metavar="ID[=LICENCE]", help="Hub id and licence of this base model")
    parser.add_argument("--licence", metavar="ID", help="Hub's id of the licence that you give the weights")
    parser.add_argument("--language", action="append", default=[], help="code such as en; may be repeated")
    parser.add_argument("--dataset", action="append", default=[], help="Hub id of training data; may be repeated")
    parser.add_argument("--verify", action="store_true", help="check that the folder answers elsewhere as it does here")
    parser.add_argument("--push", metavar="REPO_ID", help="upload to this repository of the Hub, in one commit")
    parser.add_argument("--space", metavar="FOLDER", help="also write the demo page of REPO_ID as a Space's folder")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    return parser.parse_args()


def check_backbones(checkpoint: Path, full: bool):
    """Refuse to publish a checkpoint that needs folders of this machine."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"{checkpoint} is no checkpoint: it has no config.json. Give the folder that train.py left.")
    backbones = json.loads((checkpoint / "config.json").read_text()).get("backbones") or {}
    local = [part for part, backbone in backbones.items() if backbone["revision"].startswith("sha256:")]
    if local and not full:
        raise SystemExit(
            f"This checkpoint is thin, and its {' and '.join(local)} came from a folder of this machine, which others "
            "do not have. Publish it with --full, or train it from base models of the Hub."
        )


def write_model(model, processor, folder: Path, full: bool):
    """Weights, configs, processor, and the code that loads them; LICENSE goes with the code."""
    model.config.auto_map["AutoProcessor"] = "processing_blsp_kd.BlspKdProcessor"
    BlspKdPipeline(model=model, processor=processor).save_pretrained(folder, full=full)
    for file in (HUB_FILES / "handler.py", HUB_FILES / "requirements.txt", LICENCE_FILE):
        shutil.copy(file, folder)


def write_samples(model, processor, rows: list[dict], folder: Path) -> list[dict]:
    """Copy the rows' clips, and let the model answer them as it is; returns rows for the card."""
    samples = []
    for number, row in enumerate(rows, start=1):
        (folder / "samples").mkdir(exist_ok=True)
        name = f"samples/{number}{Path(row['audio']).suffix}"
        shutil.copyfile(row["audio"], folder / name)
        samples.append({"audio": name, **{key: row.get(key) for key in ("text", "instruction", "answer")}})
    heard = [{**sample, "audio": str(folder / sample["audio"])} for sample in samples]
    outputs = answer_rows(model, processor, heard, "audio", batch_size=1, max_new_tokens=MAX_NEW_TOKENS)
    for sample, output in zip(samples, outputs):
        sample["output"] = output
    return samples


def describe_checkpoint(model, training: dict | None, options) -> dict:
    """Parts, licence, languages and data sets; see [`make_card`]."""
    given = {}
    for part in ("text_model", "speech_model"):
        if getattr(options, part):
            name, _, licence = getattr(options, part).partition("=")
            given[part] = (name, licence or None)
    parts = describe_parts(model, training, given)
    base_models = [part["base_model"] or "" for part in parts if part["name"] in ("speech encoder", "LLM")]
    stages = None if training is None else training.get("before", [])
    is_tiny_world = stages is not None and all(stage["data"]["source"] == TINY_WORLD for stage in [*stages, training])
    # Then all of it is ours, and English.
    is_ours = is_tiny_world and all(name.startswith(OWN_BACKBONES) for name in base_models)
    return {
        "parts": parts,
        "licence": options.licence or (OWN_LICENCE if is_ours else None),
        "languages": options.language or (["en"] if is_ours else []),
        "datasets": options.dataset,
    }


def measure(folder: Path, repo_id: str, backbones: dict | None, samples: list[dict]) -> dict | None:
    """Memory of answering the first sample; see [`make_card`]."""
    if not samples:
        return None
    clip = folder / samples[0]["audio"]
    memory = measure_memory(folder, repo_id, backbones, clip, samples[0]["instruction"])
    return memory and {**memory, "clip_s": audio_info(clip).duration_s}


def report(checks: list[tuple[str, bool, str]]):
    """Print a table of checks, and end with exit code 1 if one failed."""
    for check, is_right, came in checks:
        print(f"{'ok' if is_right else 'FAILED':8}{check:44} {came}")
    if not all(is_right for _, is_right, _ in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
