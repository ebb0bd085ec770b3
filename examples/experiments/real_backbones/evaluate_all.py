"""Everything that is measured of a model on real backbones, by one command.

    python -m examples.experiments.real_backbones.evaluate_all --model MODEL --data DATA --output OUTPUT \\
        --text_model LLM --asr_model WHISPER_BASE WHISPER_TINY --people final

DATA is what `make_speech` made. The parts, each an `examples/evaluate.py` run of its own in OUTPUT/PART:

- repeat_people, repeat_synthesizer: the words again, by people and by the held-out synthesizer; WER, CER, token counts
  and input KL; parameters and time to the first token.
- questions: spoken questions and commands of the kinds in `kept_kinds.json`, whose answers can be checked.
- continue_people, continue_synthesizer: response KL, and tokens on which speech and text agree.
- word_times: by the synthesizer that tells them.
- text_only: logits and answers of --text_model itself and of the model, on the texts, bit for bit.

Leaves `results.json` and `results.md` in OUTPUT. A run that was stopped goes on with the same command. Leaves out:
training, see `claims`, and pictures, see `plot_curves`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdProcessor
from processing.evaluation.original_llm import compare_with_original
from processing.evaluation.report import as_markdown, shown, table
from processing.manifests import DEFAULT_INSTRUCTION, read_manifest

from .keep_kinds import KEPT_KINDS, read_kept

EVALUATE = Path(__file__).parents[2] / "evaluate.py"
ALL_SYSTEMS, HEARING = "text,speech,blind,cascade", "speech"
# The first table: heading, part, task, score, factor, decimals.
HEADLINES = (
    ("repeat, people: WER %", "repeat_people", "transcripts", "wer", 100, 1),
    ("repeat, people: CER %", "repeat_people", "transcripts", "cer", 100, 1),
    ("repeat, synthesizer: WER %", "repeat_synthesizer", "transcripts", "wer", 100, 1),
    ("repeat, synthesizer: CER %", "repeat_synthesizer", "transcripts", "cer", 100, 1),
    ("questions: exact match", "questions", "answers", "exact_match", 1, 3),
    ("questions: contained", "questions", "answers", "contained", 1, 3),
    ("questions: contained, share of text", "questions", "answers", "contained_share_of_text", 1, 3),
    ("continuation, people: response KL", "continue_people", "alignment", "response_kl", 1, 3),
    ("continuation, people: tokens agree", "continue_people", "alignment", "response_agreement", 1, 3),
    ("people: input KL", "repeat_people", "alignment", "input_kl", 1, 3),
    ("people: token count right", "repeat_people", "alignment", "token_count_accuracy", 1, 3),
    ("people: token count within 1", "repeat_people", "alignment", "token_count_within_one", 1, 3),
    ("synthesizer: token count within 1", "repeat_synthesizer", "alignment", "token_count_within_one", 1, 3),
)


def parts_of(options) -> dict[str, list]:
    """Return the arguments of `evaluate.py` for each of its parts."""
    people, synthesizer = f"{options.people}_people.jsonl", "test_synthesizer.jsonl"
    timed = ["--num_timed", options.num_timed]
    repeat = ["--kinds", "repeat", "--tasks", "transcripts,alignment", "--systems", ALL_SYSTEMS]
    goes_on = ["--kinds", "repeat", "--instruction", DEFAULT_INSTRUCTION, "--tasks", "alignment", "--systems", HEARING]
    asked = ["--kinds", *read_kept(options.kept_kinds), "--tasks", "answers", "--systems", ALL_SYSTEMS]
    return {
        "repeat_people": [people, *repeat, *timed],
        "repeat_synthesizer": [synthesizer, *repeat, *timed],
        "questions": [synthesizer, *asked, *timed],
        "continue_people": [people, *goes_on],
        "continue_synthesizer": [synthesizer, *goes_on],
        "word_times": ["test_word_times.jsonl", "--tasks", "alignment", "--systems", HEARING],
    }


def main(arguments: list[str] | None = None):
    options = parse(arguments)
    results, sections = {"model": training_of(Path(options.model)), "hours": dict(options.hours)}, []
    for part in options.parts:
        if part == "text_only":
            results[part] = compare_texts(options)
            sections.append(f"## {part}\n\n{json.dumps(results[part])}\n")
        else:
            evaluate(part, options)
            results[part] = json.loads((options.output / part / "results.json").read_text())
            sections.append(f"## {part}\n\n{as_markdown(results[part])}")
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        told = "\n".join([headlines(results), *sections])
        (options.output / "results.md").write_text(told)
    print(told)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of make_speech")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--people", choices=["choices", "final"], default="choices", help="which held-out speakers")
    parser.add_argument("--text_model", help="the original LLM, of the part text_only")
    parser.add_argument("--asr_model", nargs="*", default=[], help="recognisers; without, there is no cascade")
    parser.add_argument("--kept_kinds", type=Path, default=KEPT_KINDS, help="file of keep_kinds")
    parser.add_argument("--parts", nargs="+", help="some of the parts; omitted, all")
    parser.add_argument("--systems", help="of text,speech,blind,cascade, where a part compares them; omitted, all")
    parser.add_argument("--hours", nargs="*", default=[], metavar="NAME=HOURS", help="trained on, for plot_curves")
    parser.add_argument("--limit", type=int, help="first rows of each part only")
    parser.add_argument("--num_timed", type=int, default=30, help="rows whose first token is timed")
    parser.add_argument("--num_texts", type=int, default=500, help="of the part text_only")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", help="of the models; omitted, as evaluate.py decides")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--transcription_instruction", help="omitted, the one that the model was saved with")
    options = parser.parse_args(arguments)
    known = [*parts_of(options), "text_only"]
    options.parts = options.parts or [part for part in known if part != "text_only" or options.text_model]
    if unknown := set(options.parts) - set(known):
        parser.error(f"There are no parts {', '.join(sorted(unknown))}. There are: {', '.join(known)}.")
    if "text_only" in options.parts and not options.text_model:
        parser.error("The part text_only compares with --text_model.")
    options.hours = [(name, float(hours)) for name, _, hours in (pair.partition("=") for pair in options.hours)]
    return options


def evaluate(part: str, options) -> None:
    """Run `evaluate.py` for a part."""
    manifest, *given = parts_of(options)[part]
    if ALL_SYSTEMS in given:
        systems = options.systems or (ALL_SYSTEMS if options.asr_model else ALL_SYSTEMS.removesuffix(",cascade"))
        given[given.index(ALL_SYSTEMS)] = systems
        if options.asr_model and "cascade" in systems:
            given += ["--asr_model", *options.asr_model, "--asr_language", "en"]
    given += ["--model", options.model, "--manifest", options.data / manifest, "--output", options.output / part]
    given += ["--normalizer", "english", "--batch_size", options.batch_size]
    given += ["--max_new_tokens", options.max_new_tokens]
    for name in ("limit", "dtype", "transcription_instruction"):
        if value := getattr(options, name):
            given += [f"--{name}", value]
    subprocess.run([sys.executable, EVALUATE, *map(str, given)], check=True)


def headlines(results: dict) -> str:
    """Return the table of the scores that matter most, of all systems."""
    systems = list(dict.fromkeys(name for part in results.values() for name in part.get("systems", {})))
    body = []
    for heading, part, task, name, factor, decimals in HEADLINES:
        of_part = results.get(part, {}).get("systems", {})
        scores = [of_part.get(system, {}).get(task, {}).get(name) for system in systems]
        if any(scores):
            body.append([heading, *(shown(score, factor, decimals) for score in scores)])
    return "\n".join(table(["", *systems], body)) + "\n"


def compare_texts(options) -> dict:
    """Compare the model on text with the original LLM."""
    manifests = [f"{options.people}_people.jsonl", "test_synthesizer.jsonl"]
    rows = [row for manifest in manifests for row in read_manifest(str(options.data / manifest))]
    rows = [{"text": row["text"], "instruction": row.get("instruction")} for row in rows]
    step = max(1, len(rows) // min(options.num_texts, options.limit or options.num_texts))
    dtype = fast_dtype(options.dtype)
    return compare_with_original(
        BlspKdForCausalLM.from_pretrained(options.model, dtype=dtype),
        BlspKdProcessor.from_pretrained(options.model),
        AutoModelForCausalLM.from_pretrained(options.text_model, dtype=dtype),
        rows[::step][: options.limit or options.num_texts],
        batch_size=options.batch_size,
    )


def training_of(model: Path) -> dict:
    """Return what is known of a model's training: its steps, those of earlier stages included, and its records."""
    state, record = model / "trainer_state.json", model / "results.json"
    if state.is_file():  # a checkpoint
        return {"steps": json.loads(state.read_text())["global_step"]}
    training = json.loads(record.read_text()).get("training") if record.is_file() else None
    if training is None:
        return {}
    return {"steps": sum(stage["steps"] for stage in [*(training["before"] or []), training]), "training": training}


if __name__ == "__main__":
    main()
