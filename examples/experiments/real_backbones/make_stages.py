"""Manifests and mixtures of the training stages, from the speech of `make_speech`.

    python -m examples.experiments.real_backbones.make_stages --data DATA --text_model LLM

Written in DATA, beside the manifests of `make_speech`, so that the paths of the clips stay as they are:

- recognition.yaml: people and synthetic speech with their transcripts, for the warm-up.
- distillation.yaml: questions and commands of the kept kinds and sentences to continue, with the LLM's own answers to
  the text (answers.jsonl); and sentences to repeat, whose response is the transcript (repeat_people.jsonl,
  repeat_synthetic.jsonl), since a small LLM does not repeat a text without faults.

A run that was stopped goes on with the same command. Leaves out: training, see `stages/`.
"""

import argparse
import random
from pathlib import Path

import yaml

from processing.manifests import DEFAULT_INSTRUCTION, read_objects
from processing.response_generation import AnswerOptions, RowOptions, SourceOptions, generate_responses

from .keep_kinds import KEPT_KINDS, read_kept
from .rows import write_manifest

REPEAT = "Repeat the following text word for word, and nothing else."


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    people, synthetic = (
        [row for _, row in read_objects(options.data / f"train_{name}.jsonl")] for name in ("people", "synthetic")
    )
    synthetic = [row for row in synthetic if row["duration"] <= options.longest_s]
    write_manifest(options.data / "recognition_synthetic.jsonl", synthetic)
    write_mixture(options.data / "recognition.yaml", train_people=4, recognition_synthetic=16)

    asked, repeated = split(synthetic, people, read_kept(options.kept_kinds), options)
    write_manifest(options.data / "asked.jsonl", asked)
    generate_responses(
        SourceOptions(manifest=str(options.data / "asked.jsonl")),
        RowOptions(str(options.data / "answers.jsonl"), templates=["own"], keep=["voice", "kind", "answer"]),
        AnswerOptions(
            options.text_model,
            dtype=options.dtype,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        ),
    )
    for name, rows in (("people", people), ("synthetic", repeated)):
        told = [{**row, "kind": "repeat", "instruction": REPEAT, "response": row["text"]} for row in rows]
        write_manifest(options.data / f"repeat_{name}.jsonl", told)
    write_mixture(options.data / "distillation.yaml", answers=8, repeat_synthetic=5, repeat_people=3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of make_speech")
    parser.add_argument("--text_model", required=True, help="the LLM, which answers")
    parser.add_argument("--kept_kinds", type=Path, default=KEPT_KINDS, help="file of keep_kinds")
    parser.add_argument("--longest_s", type=float, default=12.0, help="longest synthetic clip of the warm-up")
    parser.add_argument("--longest_answered_s", type=float, default=8.0, help="longest synthetic clip after it")
    parser.add_argument("--num_questions", type=int, default=4800, help="at most so many are answered")
    parser.add_argument("--num_continued", type=int, default=1200, help="synthetic sentences; and all of people")
    parser.add_argument("--num_repeated", type=int, default=8000, help="synthetic sentences; and all of people")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--dtype", help="of the LLM; omitted, as make_training_data.py decides")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def split(synthetic: list[dict], people: list[dict], kept: list[str], options) -> tuple[list[dict], list[dict]]:
    """Return the rows that the LLM answers (questions, and sentences to continue), and the rows to repeat."""
    rng = random.Random(f"stages {options.seed}")
    questions = [row for row in synthetic if row["kind"] in kept]
    short = [row for row in synthetic if row["kind"] == "repeat" and row["duration"] <= options.longest_answered_s]
    questions, short = (rng.sample(rows, len(rows)) for rows in (questions, short))
    continued = [*short[: options.num_continued], *people]
    asked = questions[: options.num_questions]
    asked += [{**row, "kind": "continue", "instruction": DEFAULT_INSTRUCTION} for row in continued]
    repeated = short[options.num_continued :][: options.num_repeated]
    return rng.sample(asked, len(asked)), repeated


def write_mixture(path: Path, **weights: int):
    """Write a mixture, for `train.py`, of the manifests beside it."""
    entries = [{"manifest": f"{name}.jsonl", "weight": weight} for name, weight in weights.items()]
    path.write_text(yaml.safe_dump(entries))


if __name__ == "__main__":
    main()
