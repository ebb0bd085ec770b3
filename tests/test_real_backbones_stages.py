"""The rows that real backbones are trained on in stages: what the LLM answers, what is repeated, and their mixtures."""

import json
from pathlib import Path

import soundfile
from transformers import HfArgumentParser

from examples.experiments.real_backbones import make_stages
from examples.experiments.real_backbones.make_stages import REPEAT, main, parse, split
from modeling_blsp_kd.distillation_options import DistillationOptions
from modeling_blsp_kd.training.command_line import unfold_recipe
from modeling_blsp_kd.training.options import TINY_TEXT_MODEL, Arguments, ModelOptions
from processing.manifests import DEFAULT_INSTRUCTION
from processing.training_rows.mixtures import read_mixture, read_sources
from processing.training_rows.options import DataOptions
from tests.helpers.prompts import SAMPLING_RATE, clip

KINDS = ("capital", "opposite")


def row(number: int, kind: str = "repeat", duration: float = 1.0) -> dict:
    labels = {"kind": kind, "answer": "yes", "instruction": "Repeat the words." if kind == "repeat" else ""}
    return {"audio": f"clips/{number}.flac", "text": f"text {number}", "voice": "a", "duration": duration, **labels}


def write(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    for each in rows:
        (path.parent / "clips").mkdir(exist_ok=True)
        soundfile.write(path.parent / each["audio"], clip(each["duration"]), SAMPLING_RATE)


def test_a_sentence_is_either_continued_or_repeated_and_only_kept_kinds_are_asked():
    options = parse(["--data", "d", "--text_model", "m", "--num_continued", "3", "--num_questions", "4"])
    synthetic = [row(number, "repeat", 9.0 if number == 7 else 1.0) for number in range(8)]
    synthetic += [row(100 + number, kind) for number, kind in enumerate(("capital", "opposite", "odd") * 3)]
    people = [row(200)]
    asked, repeated = split(synthetic, people, KINDS, options)
    by_kind = {kind: [each["audio"] for each in asked if each["kind"] == kind] for kind in ("continue", *KINDS, "odd")}
    assert len(by_kind["continue"]) == 4 and people[0]["audio"] in by_kind["continue"]
    assert len(by_kind["capital"]) + len(by_kind["opposite"]) == 4 and not by_kind["odd"]
    assert {each["instruction"] for each in asked if each["kind"] == "continue"} == {DEFAULT_INSTRUCTION}
    audio = [each["audio"] for each in repeated]
    assert len(audio) == 4 and not {*audio} & {*by_kind["continue"]}
    assert "clips/7.flac" not in {*audio, *by_kind["continue"]}, "it is longer than what is answered"
    assert split(synthetic, people, KINDS, options) == (asked, repeated)


def test_the_mixtures_can_be_trained_on(tmp_path):
    question = {**row(5, "capital"), "text": "name the person"}  # the tiny world's LLM has an answer to this
    write(tmp_path / "train_people.jsonl", [row(1), row(2)])
    write(tmp_path / "train_synthetic.jsonl", [row(3), row(4), question, row(6, duration=13.0)])
    command = [
        "--data",
        str(tmp_path),
        "--text_model",
        TINY_TEXT_MODEL,
        "--max_new_tokens",
        "4",
        "--num_continued",
        "1",
    ]
    main(command)
    recognition = read_sources(read_mixture(str(tmp_path / "recognition.yaml")), seed=0, allow_outside_paths=False)
    assert sorted({Path(each["audio"]).stem for each in recognition}) == list("12345"), "one is too long"
    distillation = read_sources(read_mixture(str(tmp_path / "distillation.yaml")), seed=0, allow_outside_paths=False)
    repeated = {each["text"] for each in distillation if each["kind"] == "repeat"}
    assert {"text 1", "text 2"} < repeated and all(each["response"] for each in distillation)
    assert all(each["response"] == each["text"] for each in distillation if each["kind"] == "repeat")
    assert {each["text"] for each in distillation if each["kind"] == "capital"} == {question["text"]}
    before = (tmp_path / "answers.jsonl").read_bytes()
    main(command)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_each_stage_is_read_by_train_and_begins_where_the_one_before_ended():
    parser, before = HfArgumentParser((ModelOptions, DataOptions, Arguments)), None
    for stage, mixture in (
        ("recognition", "recognition"),
        ("distillation", "distillation"),
        ("partial_lora", "distillation"),
    ):
        path = Path(make_stages.__file__).parent / "stages" / f"{stage}.yaml"
        given = unfold_recipe([str(path), "--bf16", "false", "--use_cpu", "true"])
        model_options, data_options, args = parser.parse_args_into_dataclasses(given)
        losses = DistillationOptions.read(json.loads(model_options.distillation)).for_adapter(one_to_one=True)
        assert (model_options.start_from, data_options.train_mixture) == (before, f"data/{mixture}.yaml")
        assert (losses.response_kl > 0) == (stage != "recognition") and model_options.freeze_speech_encoder
        assert model_options.transcription_instruction == (REPEAT if before is None else None)
        assert bool(model_options.plora) == (stage == "partial_lora")
        before = args.output_dir
