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
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.training.command_line import add_backbone_options, read_backbone_options
from processing import BlspKdPipeline, BlspKdProcessor
from processing.manifests import read_manifest
from processing.publishing.base_models import local_folders, other_revisions, public_backbones
from processing.publishing.card import make_card
from processing.publishing.contents import write_model, write_samples
from processing.publishing.facts import describe_checkpoint
from processing.publishing.publication import complete_or_nothing
from processing.publishing.space import write_space
from processing.publishing.upload import UploadError, upload
from processing.publishing.verify import measure_memory, verify

CLIPS = Path(__file__).parent / "tiny_world" / "clips"  # on the page of --space


def main():
    options = parse_options()
    checkpoint, name = Path(options.checkpoint), options.push or Path(options.folder).absolute().name
    repo_id = options.push or "someone/model"  # as which it is tried out
    validate_repo_id(repo_id)
    given, backbones = given_base_models(options), backbones_to_publish(checkpoint, options)
    results_file = checkpoint / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    kept = [{**row, "audio": checkpoint / row["audio"]} for row in results.pop("samples", [])]
    rows = read_manifest(options.samples, options.allow_outside_paths) if options.samples else kept
    if options.verify and not rows:
        raise SystemExit("--verify needs a clip, and this checkpoint kept none. Give some with --samples.")

    with complete_or_nothing(options.folder) as (folder, record):
        dtype = options.dtype or "auto"
        model = BlspKdForCausalLM.from_pretrained(checkpoint, dtype=dtype, **read_backbone_options(options))
        processor = BlspKdProcessor.from_pretrained(checkpoint)
        found, local = model.config.backbones or {}, {}
        if backbones is not None:
            model.config.backbones, local = backbones, local_folders(backbones, found)
        pipeline = BlspKdPipeline(model=model, processor=processor)
        write_model(pipeline, folder, options.full)
        samples = write_samples(pipeline, rows, folder)
        record["facts"] = {
            "name": name,
            "thin": backbones is not None,
            "other_revisions": other_revisions(found),
            "losses": model.config.distillation,
            "results": results,
            "samples": samples,
            **describe_checkpoint(
                model,
                results.get("training"),
                given,
                licence=options.licence,
                languages=options.language,
                datasets=options.dataset,
            ),
            "memory": measure_memory(folder, repo_id, samples[0], local) if samples else None,
        }
        make_card(record["facts"]).save(folder / "README.md")
    print(f"{options.folder} is complete: {name}")

    if options.verify:
        report(verify(options.folder, repo_id, model, processor, rows[0]["audio"], local))
    if options.space:
        write_space(options.space, repo_id, CLIPS)
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
    parser.add_argument("--dtype", help="of all weights, such as bfloat16; omitted, as the checkpoint has them")
    for part in ("text_model", "speech_model"):
        parser.add_argument(f"--{part}", metavar="ID[=LICENCE]", help="Hub id and licence of this base model")
    add_backbone_options(parser)
    parser.add_argument("--licence", metavar="ID", help="Hub's id of the licence that you give the weights")
    parser.add_argument("--language", action="append", default=[], help="code such as en; may be repeated")
    parser.add_argument("--dataset", action="append", default=[], help="Hub id of training data; may be repeated")
    parser.add_argument("--verify", action="store_true", help="check that the folder answers elsewhere as it does here")
    parser.add_argument("--push", metavar="REPO_ID", help="upload to this repository of the Hub, in one commit")
    parser.add_argument("--space", metavar="FOLDER", help="also write the demo page of REPO_ID as a Space's folder")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    return parser.parse_args()


def backbones_to_publish(checkpoint: Path, options: argparse.Namespace) -> dict | None:
    """Return the base models that a thin publication names, or None for a full one."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"{checkpoint} is no checkpoint: it has no config.json. Give the folder that train.py left.")
    stored = json.loads((checkpoint / "config.json").read_text()).get("backbones")
    if stored is None or options.full:
        return None
    try:
        return public_backbones(stored, given_base_models(options))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def given_base_models(options: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    """Return Hub id and licence of each base model that the user names; see [`describe_parts`]."""
    given = {}
    for part in ("text_model", "speech_model"):
        if getattr(options, part):
            name, _, licence = getattr(options, part).partition("=")
            given[part] = (name, licence or None)
    return given


def report(checks: list[tuple[str, bool, str]]):
    """Print a table of checks, and end with exit code 1 if one failed."""
    for check, is_right, came in checks:
        print(f"{'ok' if is_right else 'FAILED':8}{check:44} {came}")
    if not all(is_right for _, is_right, _ in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
