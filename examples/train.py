"""Train an LLM to understand speech, from (audio, transcript) pairs.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --text_model Qwen/Qwen2.5-0.5B-Instruct --speech_model openai/whisper-small \\
        --train_manifest train.jsonl --eval_manifest eval.jsonl --output_dir outputs/mine
    accelerate launch examples/train.py examples/recipes/whisper_small_qwen2.5_1.5b.yaml --seed 2
    accelerate launch examples/train.py --resume_from_checkpoint true  # again and again, until it is done
    accelerate launch examples/train.py --start_from outputs/mine --train_manifest more.jsonl --output_dir outputs/more

Without arguments it uses the two tiny backbones of `examples/tiny_world` and speech that it synthesises on first use.
A manifest has one JSON object per line: `audio` (a path, relative to the manifest; null in a training row of text
alone), `text` (what is said) and optionally `instruction`, `response` (the LLM's answer; made here if absent),
`duration` (seconds; read from the file if absent), `answer` and `kind` (to score with) and `voice`. A mixture is a YAML
list of manifests and data sets, each with a `weight`. All other options are those of `transformers.TrainingArguments`
(docs/training_arguments.md explains each). A recipe is a YAML file of any of them; options after it override it.

The output folder receives the model with its processor, `results.json` (the measurements and the training data; it is
written after each part, so that a late failure loses nothing), the clips of three evaluation rows, and checkpoints.
"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

from modeling_blsp_kd import BlspKdTrainer
from modeling_blsp_kd.devices import usable_cores
from modeling_blsp_kd.training.building import check_options, make_trainer
from modeling_blsp_kd.training.command_line import HelpFormatter, unfold_recipe
from modeling_blsp_kd.training.options import Arguments, ModelOptions, where_to_resume
from processing.evaluation.after_training import REPORTED, results_table, score_by_voices
from processing.evaluation.answering import answer_rows
from processing.publishing.training_record import card_of_run, describe_training, keep_samples, stages_of
from processing.training_rows.kept_frames import KeptFrames
from processing.training_rows.loading import SKIPPED_FILE
from processing.training_rows.options import DataOptions

ROOT = Path(__file__).resolve().parent.parent
NUM_SAMPLES = 3


def main():
    parser = HfArgumentParser(
        (ModelOptions, DataOptions, Arguments), description=__doc__, formatter_class=HelpFormatter
    )
    model_options, data_options, args = parser.parse_args_into_dataclasses(unfold_recipe(sys.argv[1:]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_seed(args.seed)
    args.resume_from_checkpoint = where_to_resume(args)
    is_launched = args.world_size > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    if args.device.type == "cpu" and (is_launched or "OMP_NUM_THREADS" not in os.environ):
        # `accelerate launch` allows one thread per process, and would leave the other cores idle. What a user sets
        # for a single process stands.
        torch.set_num_threads(max(1, usable_cores() // args.world_size))
    check_options(model_options, data_options, args)
    start = time.time()
    stages_before = stages_of(model_options.start_from) if model_options.start_from else []
    trainer, _, eval_rows = make_trainer(model_options, with_tiny_world(data_options, args), args)
    model, processor = trainer.model, trainer.processing_class
    kept_frames = KeptFrames(model.audio_tower, model_options.kept_frames) if model_options.kept_frames else None
    results: dict[str, Any] = {}
    trainer.make_card = lambda: card_of_run(trainer, results)
    training_start = time.time()
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:  # a run that is stopped keeps them, too
        if kept_frames is not None and trainer.is_world_process_zero():
            kept_frames.save()
    results["train_seconds"] = round(time.time() - training_start, 1)
    results["training"] = describe_training(trainer, model_options, data_options, eval_rows, stages_before)
    trainer.accelerator.wait_for_everyone()  # they may still note skipped rows
    if data_options.skip_bad_audio and trainer.is_world_process_zero():
        results["skipped_rows"] = trainer.train_dataset.clip_features.skipped.finish()
        print(f"{results['skipped_rows']} training rows with bad audio were skipped: {args.output_dir}/{SKIPPED_FILE}")
    trainer.save_model(_internal_call=True)  # what is pushed has results and samples, too
    write_results(results, trainer)
    if eval_rows:
        alignment = trainer.evaluate()
        results |= {name: alignment[f"eval_{name}"] for name in REPORTED if f"eval_{name}" in alignment}
        write_results(results, trainer)
        samples, scored = eval_rows[:NUM_SAMPLES], [row for row in eval_rows if row.get("answer") is not None]
        # In all processes, of which each may hold only a share of the weights.
        asked = list({id(row): row for row in [*samples, *scored]}.values())
        spoken = answer_rows(model, processor, asked, "audio", max_new_tokens=data_options.max_response_tokens)
        answers = {id(row): answer for row, answer in zip(asked, spoken)}
        results |= score_by_voices(scored, [answers[id(row)] for row in scored], trainer.train_dataset.voices)
        results["total_seconds"] = round(time.time() - start, 1)
        write_results(results, trainer)
        if trainer.is_world_process_zero():
            print(results_table(results))
            for row in samples:
                print(f"\n{shown(row['audio'])}\n  says    {row['text']!r}")
                print(f"  asked   {row.get('instruction')!r}\n  answers {answers[id(row)]!r}")
            results["samples"] = keep_samples(samples, Path(args.output_dir))
            for row, sample in zip(samples, results["samples"]):
                sample["output"] = answers[id(row)]
        write_results(results, trainer)
    if args.push_to_hub:
        trainer.push_to_hub()


def with_tiny_world(options: DataOptions, args: Arguments) -> DataOptions:
    """Return options that name the manifests of the tiny world, which are made here, unless they name others."""
    if options.train_manifest or options.train_mixture:
        return options
    train, test = (
        Path(options.cache_dir, f"{split}-{number}.jsonl")
        for split, number in (("train", options.num_utterances), ("test", options.num_eval_utterances))
    )
    with args.main_process_first(desc="making the data"):
        if args.local_process_index == 0:
            # In a process of its own: a script imports no other one, and synthesis needs espeakng-loader.
            command = [sys.executable, "-m", "examples.tiny_world.make_manifests"]
            command += ["--train", str(train.absolute()), "--num_utterances", str(options.num_utterances)]
            if not options.eval_manifest:
                command += ["--test", str(test.absolute()), "--num_eval_utterances", str(options.num_eval_utterances)]
            subprocess.run(command, cwd=ROOT, check=True)
    # The clips fit in memory.
    return replace(
        options, train_manifest=str(train), eval_manifest=options.eval_manifest or str(test), keep_features=True
    )


def shown(path: str) -> str:
    """Return a path as short as can be."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def write_results(results: dict, trainer: BlspKdTrainer):
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
