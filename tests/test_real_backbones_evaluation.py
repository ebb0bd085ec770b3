"""The evaluation of real backbones: kinds that are kept, all parts by one command, curves, and the paper's claims."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser

from examples.experiments.real_backbones import claims, evaluate_all, plot_curves
from examples.experiments.real_backbones.claims import CLAIMS, VARIANTS, train_command
from examples.experiments.real_backbones.keep_kinds import choose, read_kept
from examples.experiments.real_backbones.questions import KINDS, make_questions
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing.evaluation.options import add_options
from processing.training_rows.options import DataOptions
from tests.helpers.models import base_llm, make_model
from tests.test_evaluate import flac, write_manifest

SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}


def test_enough_kinds_are_kept_with_enough_test_questions():
    kept = read_kept()
    assert set(kept) <= set(KINDS) and len(kept) >= 12
    asked = [dict(question.labels)["kind"] for question in make_questions(True, 1000, 0)]
    assert sum(kind in kept for kind in asked) >= 300


def test_a_kind_is_kept_if_more_than_half_is_right():
    lines = [
        {
            "id": f"{kind}{number}",
            "kind": kind,
            "answer": "5",
            "predicted": {"answers": "It is five." if right else "No"},
        }
        for kind, results in {"sum": (1, 1, 0), "half": (1, 0), "none": (0, 0)}.items()
        for number, right in enumerate(results)
    ]
    chosen = choose(lines, least=0.5)
    assert {kind for kind, of in chosen.items() if of["is_kept"]} == {"sum"}
    assert chosen["sum"] == {"contained": 0.667, "n": 3, "is_kept": True}


def results_file(path, steps, hours):
    systems = {"systems": {"speech": {"transcripts": {"wer": SCORE}}}}
    results = {"model": {"steps": steps}, "hours": hours, "repeat_people": systems}
    path.write_text(json.dumps(results))
    return path


def test_curves_are_ordered_and_drawn(tmp_path):
    files = [results_file(tmp_path / f"{steps}.json", steps, {"people": 1.0, "flite": 2.0}) for steps in (200, 100)]
    points = plot_curves.read_points(files, "steps")
    assert [place for place, _ in points] == [100, 200]
    assert [place for place, _ in plot_curves.read_points(files, "hours")] == [3, 3]
    lines = plot_curves.PICTURES["WER % of repeated words"]
    assert plot_curves.curves_of(points, lines, "speech") == {"people": [(100, SCORE), (200, SCORE)]}
    assert not plot_curves.curves_of(points, lines, "cascade")
    plot_curves.main(["--over", "steps", "--output", str(tmp_path / "steps.png"), *map(str, files)])
    assert (tmp_path / "steps.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="does not tell the hours"):
        plot_curves.read_points([results_file(tmp_path / "x.json", 1, {})], "hours")


def test_trainings_of_a_claim_differ_in_one_thing(tmp_path):
    common = ["--text_model", "llm", "--adapter_options", "{}", "--train_mixture", "mix.yaml", "--plora", "false"]
    options = SimpleNamespace(warm_up="warm", steps=7)
    commands = {
        name: dict(zip(command[1::2], command[2::2]))
        for name, variant in VARIANTS.items()
        for command in [train_command(variant, tmp_path, 3, options, common)]
    }
    for variant in VARIANTS.values():
        command = train_command(variant, tmp_path, 3, options, [*common, "--use_cpu", "true"])
        model, _, args = HfArgumentParser((ModelOptions, DataOptions, Arguments)).parse_args_into_dataclasses(
            command[1:]
        )
        assert args.max_steps == 7 and bool(model.start_from) == variant.from_warm_up
    assert all(of["--max_steps"] == "7" and of["--seed"] == "3" for of in commands.values())
    for name, variant in VARIANTS.items():
        assert ("--start_from" in commands[name]) == variant.from_warm_up != ("--text_model" in commands[name])
    assert "--adapter_options" in commands["cif"] and "--adapter_options" not in commands["fixed_rate"]
    for names in CLAIMS.values():
        first, second = (set(commands[name].items()) for name in names)
        assert {name for name, _ in first ^ second} <= {
            "--distillation", "--plora", "--adapter", "--adapter_options", "--calibrate_adapter"
        }  # fmt: skip


def test_claims_need_a_warm_up_and_pairs(tmp_path, capsys):
    given = ["--output", str(tmp_path), "--data", str(tmp_path), "--steps", "1"]
    for wrong, message in (
        (["--claims", "loss"], "start from a --warm_up"),
        (["--claims", "adapter", "--", "--bf16"], "pairs of --name and value"),
    ):
        with pytest.raises(SystemExit):
            claims.parse([*given, *wrong])
        assert message in capsys.readouterr().err


def test_a_table_of_claims_has_a_cell_for_each_score_of_each_run(tmp_path):
    options = SimpleNamespace(output=tmp_path, steps=7, claims=["loss"], seeds=[1, 2])
    scores = {f"{part} {name}": SCORE for part, _, name, _ in claims.SHOWN}
    claims.write(
        {f"{name}-{seed}": {"train_seconds": 5, "scores": scores} for name in CLAIMS["loss"] for seed in (1, 2)},
        options,
    )
    lines = [line for line in (tmp_path / "claims.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and {line.count("|") for line in lines} == {len(claims.SHOWN) + 3}
    assert {part for part, *_ in claims.SHOWN} == set(claims.PARTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--parts", "telepathy"], "no parts telepathy"), (["--parts", "text_only"], "compares with --text_model")],
)
def test_unknown_parts_are_named(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate_all.parse(["--model", "m", "--data", str(tmp_path), "--output", str(tmp_path), *given])
    assert message in capsys.readouterr().err


@pytest.fixture
def tests_data(tmp_path, processor):
    """A model, its LLM, and a folder of test data: two sentences, and a question of each kept kind."""
    made = make_model(plora={"lora_dropout": 0.0})
    made.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    base_llm(made).save_pretrained(tmp_path / "llm")
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.flac").write_bytes(flac())
    row = {"audio": "0.flac", "text": "the red cat", "answer": "cat"}
    words = [{"text": word, "start": 0.1, "end": 0.2} for word in row["text"].split()]
    repeat, asked = {**row, "kind": "repeat"}, [{**row, "kind": kind} for kind in read_kept()]
    write_manifest(data / "choices_people.jsonl", [repeat, repeat])
    write_manifest(data / "test_synthesizer.jsonl", [repeat, *asked])
    write_manifest(data / "test_word_times.jsonl", [{**repeat, "words": words}])
    given = ["--model", tmp_path / "model", "--data", data, "--output", tmp_path / "output"]
    given += ["--text_model", tmp_path / "llm", "--asr_model", tmp_path / "model", "--num_timed", 1]
    return [str(each) for each in [*given, "--max_new_tokens", 3, "--hours", "people=1.5"]]


def test_parts_are_evaluated_and_merged(tests_data, tmp_path, monkeypatch):
    asked = {}

    def evaluate(command, check):
        parser = argparse.ArgumentParser()
        add_options(parser)
        options = parser.parse_args(command[2:])
        asked[Path(options.output).name] = options
        systems = {name: {"transcripts": {"wer": SCORE}} for name in options.systems}
        results = {"settings": {"model": "m", "data": "d", "num_rows": 9}, "systems": systems}
        Path(options.output).mkdir(parents=True)
        Path(options.output, "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(evaluate_all.subprocess, "run", evaluate)
    evaluate_all.main(tests_data)
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert set(results) == {"model", "hours", "text_only", *asked} and len(asked) == 6
    texts = 2 + 1 + len(read_kept())
    assert results["text_only"]["same_logits"] == results["text_only"]["num_prompts"] == texts
    assert asked["questions"].kinds == read_kept() and asked["repeat_people"].kinds == ["repeat"]
    assert asked["continue_people"].systems == ("speech",) and asked["continue_people"].asr_model is None
    assert asked["repeat_people"].systems == ("text", "speech", "blind", "cascade")
    told = (tmp_path / "output" / "results.md").read_text()
    assert "| repeat, people: WER %" in told and "50.0 [40.0, 60.0]" in told and "## text_only" in told


@pytest.mark.long
def test_one_command_evaluates_parts_and_goes_on(tests_data, tmp_path):
    evaluate_all.main([*tests_data, "--parts", "repeat_people", "continue_people", "questions"])
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert set(results["repeat_people"]["systems"]) == {"text", "speech", "blind", "cascade"}
    assert "wer" in results["repeat_people"]["systems"]["cascade"]["transcripts"]
    assert results["repeat_people"]["cost"]["cascade"]["num_parameters"] > 0
    assert "response_agreement" in results["continue_people"]["systems"]["speech"]["alignment"]
    evaluate_all.main([*tests_data, "--parts", "questions"])
    again = json.loads((tmp_path / "output" / "results.json").read_text())["questions"]
    # Answers are kept; what they cost is measured in each run.
    assert {**again, "cost": None} == {**results["questions"], "cost": None}
