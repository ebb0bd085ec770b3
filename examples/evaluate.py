"""Compare a model on speech with its LLM on the text, with a cascade, and with not hearing at all.

    python examples/evaluate.py --model outputs/default --output outputs/default_evaluation
    python examples/evaluate.py --model outputs/mine --output outputs/mine_evaluation --manifest test.jsonl
    python examples/evaluate.py --model outputs/mine --output outputs/mine_german --limit 1000 \\
        --dataset fixie-ai/covost2 --config en_de --split test --streaming --systems text,speech,cascade \\
        --asr_model openai/whisper-small --tasks transcripts,translation \\
        --translation_instruction "Translate into German."

Without data it takes the tiny world's test sentences. A manifest has the fields of `examples/train.py`, and where known
`id`, `translation`, `words` and `voice_group`. Data sets of the Hub are known by their columns (CoVoST-2, MuST-C,
LibriSpeech, Common Voice, VoiceBench). `processing/evaluation/text_scores.py` says how texts are normalised.

With `--engine_url http://host:port/v1` a server of this model answers. The model is then loaded only for the task
`alignment`, and for a cascade without `--asr_model`.

Leaves in the output folder: `results.json`, `results.md`, plots (with matplotlib), and `predictions/`, one JSON line
per row. A rerun goes on there: after a stop, with a higher limit, with more systems.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.command_line import read_backbone_options
from processing import BlspKdProcessor
from processing.chat_templates import read_options
from processing.evaluation.cost import measure_cost
from processing.evaluation.options import add_options
from processing.evaluation.predictions import Predictions, predict_missing, settings_of
from processing.evaluation.recognition import load_recognizer, name_cascades
from processing.evaluation.report import as_markdown, plot
from processing.evaluation.rows import open_rows, voice_group
from processing.evaluation.scoring import Scorer
from processing.evaluation.served_answers import ServedAnswers
from processing.evaluation.systems import SYSTEMS, Systems
from processing.training_rows.kept_frames import KeptFrames

ROOT = Path(__file__).parent.parent
TINY_WORLD_TRANSLATION = "Give the key words in Spanish."


def main():
    options = parse_options()
    data, total, rows = open_rows(options, tiny_world)
    output = Path(options.output)
    asr_models = name_cascades(options.asr_model) if options.asr_model else {}
    names = [name for name in options.systems if name != "cascade"]
    names += (asr_models or ["cascade"]) if "cascade" in options.systems else []
    files = {
        name: Predictions(output / "predictions", name, settings_of(name, options, data, asr_models.get(name)))
        for name in names
    }
    systems = load_systems(options, asr_models)
    kept_frames = KeptFrames(systems.model.audio_tower, options.kept_frames) if options.kept_frames else None
    ids: list = []
    timed: list[dict] = []
    with tqdm(total=total, unit="row", desc="predicting", mininterval=1) as progress:
        while batch := list(islice(rows, options.batch_size)):
            timed += batch[: options.num_timed - len(timed)]
            predict_missing(systems, files, batch)
            ids += [row["id"] for row in batch]
            progress.update(len(batch))
    if not ids:
        raise ValueError(f"There is no row to evaluate on in {data}.")
    if kept_frames is not None:
        kept_frames.save()

    scorer = Scorer(
        options.tasks,
        options.num_resamples,
        bleu_tokenizer=options.bleu_tokenizer,
        normalizer=options.normalizer,
    )
    results = {
        "settings": {
            **vars(options),
            "data": data,
            "num_rows": len(ids),
            "versions": {name: version(name) for name in ("torch", "transformers", "jiwer", "sacrebleu")},
        },
        "systems": scorer({system: [file.by_id[row_id] for row_id in ids] for system, file in files.items()}),
    }
    if timed:
        results["cost"] = scorer.cost(measure_cost(systems, names, timed))
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.md").write_text(as_markdown(results))
    plot(results, output)
    print("\n" + as_markdown(results))


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    if options.systems is None:
        options.systems = SYSTEMS if options.asr_model else SYSTEMS[:3]
    if options.asr_model and "cascade" not in options.systems:
        parser.error("--asr_model is of the cascade, which is not among --systems.")
    if options.kept_frames and options.engine_url:
        parser.error("--kept_frames are of a model here, but with --engine_url the server listens.")
    if options.engine_url and options.num_timed:
        parser.error("--num_timed times this process, so leave out --engine_url.")
    if not (options.manifest or options.dataset or options.translation_instruction):
        options.translation_instruction = TINY_WORLD_TRANSLATION
    return options


def tiny_world(options: Namespace) -> tuple[str, list[dict]]:
    """Return the name and the rows of the data that is used if no other is given."""
    split = options.split or "test"
    command = [sys.executable, "-m", "examples.tiny_world.evaluation_rows", "--split", split]
    command += ["--num_utterances", str(options.num_utterances), "--cache_dir", Path(options.cache_dir).absolute()]
    command += ["--limit", str(options.limit)] if options.limit else []
    # In a process of its own, because synthesis needs espeakng-loader, which other data does not.
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    rows = [{**row, "voice_group": voice_group(row["is_seen_voice"])} for row in map(json.loads, lines)]
    return f"tiny world, {split}, {options.num_utterances} per kind of voice", rows


def load_systems(options: Namespace, asr_models: dict[str, str]) -> Systems:
    dtype, model, answers = fast_dtype(options.dtype), None, None
    processor = BlspKdProcessor.from_pretrained(options.model, **read_options(options.chat_template_kwargs))
    if options.transcription_instruction:
        processor.transcription_instruction = options.transcription_instruction
    if options.engine_url:
        rate = processor.feature_extractor.sampling_rate
        answers = ServedAnswers(options.engine_url, rate, processor.chat_template_kwargs)
    is_aligned = "alignment" in options.tasks and "speech" in options.systems
    if answers is None or is_aligned or ("cascade" in options.systems and not options.asr_model):
        given = {"device_map": "auto", "dtype": dtype, **read_backbone_options(options)}
        model = BlspKdForCausalLM.from_pretrained(options.model, **given).requires_grad_(False)
    recognizers = {name: load_recognizer(folder, dtype, options.asr_language) for name, folder in asr_models.items()}
    return Systems(
        model,
        processor,
        tasks=options.tasks,
        recognizer=recognizers or None,
        translation_instruction=options.translation_instruction,
        max_new_tokens=options.max_new_tokens,
        answers=answers,
    )


if __name__ == "__main__":
    main()
