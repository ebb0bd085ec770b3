"""The ablation: that the matrix compares what it says, that no run is lost or repeated, and what verdicts mean."""

import hashlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, HfArgumentParser
from transformers.utils import ModelOutput

from examples.experiments.ablation import __main__ as ablate
from examples.experiments.ablation import analysis, beyond, report, runs, train_stages
from examples.experiments.ablation.matrix import BY_NAME, CLAIMS, CONFIGURATIONS, RECOGNIZER, TRAIN
from examples.experiments.ablation.plan import Plan, read_rows
from examples.experiments.ablation.speeds import equal_steps
from examples.experiments.ablation.train_global_lora import GlobalLoraForCausalLM, merge_lora
from examples.experiments.ablation.train_recognizer import CtcRecognizer, RecognizerOptions
from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.distillation_step import NEED_STUDENT, wanted_losses
from modeling_blsp_kd.training.options import TINY_SPEECH_MODEL, Arguments, ModelOptions
from processing.evaluation.recognition import read_off
from processing.training_rows.options import DataOptions
from tests.helpers.models import make_config, make_model, text_config
from tests.helpers.prompts import spoken_prompts


@pytest.fixture
def plan(tmp_path):
    rows = [{"id": str(number), "audio": f"{number}.flac", "text": "red cat", "answer": "red"} for number in range(4)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Plan(
        steps=3,
        num_utterances=24,
        rows_manifest=manifest,
        output_dir=tmp_path / "out",
        results_dir=tmp_path / "results",
        cache_dir=tmp_path / "clips",
    )


# -- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ablate.MATRICES)
def test_names_and_titles_are_unique_and_claims_name_what_is_there(name):
    configurations, claims = ablate.MATRICES[name].CONFIGURATIONS, ablate.MATRICES[name].CLAIMS
    known = ablate.by_name(name)
    assert len(known) == len({configuration.title for configuration in configurations}) == len(configurations)
    for claim in claims:
        for configuration, system in (claim.better, claim.worse):
            assert system in known[configuration].systems
    assert len({claim.text for claim in claims}) == len(claims)


@pytest.mark.parametrize("configuration", beyond.OPTIONS, ids=lambda configuration: configuration.name)
def test_scripts_take_the_options_beyond_the_paper(configuration, plan, tmp_path):
    """And the stages share the steps, and begin where the one before ended."""
    _, *arguments = runs.train_command(configuration, 1, replace(plan, steps=10), tmp_path / "model")
    commands = [arguments]
    if configuration.script == beyond.STAGES:
        stages = json.loads(arguments.pop(arguments.index("--stages") + 1))
        shared = [word for word in arguments[1:] if word != "--stages"]
        staged = train_stages.stage_commands(stages, 10, tmp_path / "model", shared)
        assert [folder.name for _, folder in staged] == ["model-stage1", "model"]
        commands = [command[1:] for command, _ in staged]
    num_steps, before = 0, None
    for words in commands:
        parser = HfArgumentParser((ModelOptions, DataOptions, Arguments))
        model_options, _, args = parser.parse_args_into_dataclasses(words)
        num_steps += args.max_steps
        assert model_options.start_from == before
        before = args.output_dir
        config = make_config(text={"num_hidden_layers": 4}, distillation=json.loads(model_options.distillation))
        assert not args.on_policy_share or wanted_losses(config.distillation, True, True) & NEED_STUDENT
    assert num_steps == 10 and before == str(tmp_path / "model")


def test_equal_time_is_measured_once_and_gives_slower_configurations_fewer_steps(plan):
    plan, asked = replace(plan, steps=100, baseline=beyond.BASELINE), []
    seconds_per_step = {beyond.BASELINE.name: 0.5, "on_policy": 1.0, "hardest": 0.4}

    def train(configuration, plan, folder):
        asked.append((configuration.name, plan.steps))
        return 20.0 + plan.steps * seconds_per_step[configuration.name]

    for _ in range(2):
        by_name = ablate.by_name("beyond")
        steps = {name: equal_steps(by_name[name], plan, train) for name in seconds_per_step}
        assert steps == {beyond.BASELINE.name: 100, "on_policy": 50, "hardest": 125}
    assert len(asked) == 7, "the first run of all makes the clips, and does not count"
    assert equal_steps(by_name["untrained"], plan, None) == 100
    assert plan.fingerprint(beyond.BASELINE) != replace(plan, baseline=None).fingerprint(beyond.BASELINE)


@pytest.mark.parametrize("name", BY_NAME)
def test_scripts_take_the_options_and_a_config_can_be_built(name, plan, tmp_path):
    script, *arguments = runs.train_command(BY_NAME[name], 1, plan, tmp_path / "model")
    if script == "-m":
        module, *arguments = arguments
        assert importlib.util.find_spec(module) is not None
    else:
        assert Path(script).exists()
    own = (RecognizerOptions,) if BY_NAME[name].script == RECOGNIZER else ()
    parser = HfArgumentParser((*own, ModelOptions, DataOptions, Arguments))
    *_, model_options, data_options, args = parser.parse_args_into_dataclasses(arguments)
    assert (args.max_steps, args.seed, data_options.num_utterances) == (3, 1, 24)
    config = BlspKdConfig(
        speech_config=AutoConfig.from_pretrained(TINY_SPEECH_MODEL),
        text_config=text_config(),
        adapter=model_options.adapter,
        plora=model_options.plora,
        distillation=json.loads(model_options.distillation),
        freeze_speech_encoder=model_options.freeze_speech_encoder,
    )
    if BY_NAME[name].script == TRAIN:
        assert any(config.distillation[loss] for loss in ("response_kl", "input_kl", "response_ce"))


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ("blsp", "subsampler_kl", {"distillation"}),
        ("cformer_both", "encoder", {"freeze_speech_encoder"}),
        ("cformer_both", "plora", {"plora"}),
        ("encoder", "encoder_plora", {"plora"}),
        ("plora", "encoder_plora", {"freeze_speech_encoder"}),
        ("encoder_plora", "global_lora", set()),
        ("cformer_response", "cformer_both", {"distillation"}),
    ],
)
def test_neighbours_differ_in_one_thing(one, other, differing):
    one, other = BY_NAME[one].options, BY_NAME[other].options
    assert {name for name in one | other if one.get(name) != other.get(name)} == differing


# -- LoRA at all positions --------------------------------------------------------------------------------------------


@pytest.mark.numerical
def test_global_lora_reaches_every_position_and_merging_keeps_it(processor):
    options = {"plora": {"r": 4, "lora_dropout": 0.0}}
    partial = make_model(**options)
    everywhere = GlobalLoraForCausalLM(make_config(**options)).eval()
    everywhere.load_state_dict(partial.state_dict())
    merged = merge_lora(everywhere)
    assert merged.plora is None and not any("lora" in name for name in merged.state_dict())
    inputs = spoken_prompts(processor)
    with torch.no_grad():
        expected, got, at_speech = (
            model(**inputs, num_speech_tokens=torch.tensor([3, 5])).logits for model in (everywhere, merged, partial)
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (expected - at_speech).abs().max() > 0.1


def test_the_teacher_of_global_lora_is_the_llm_without_it(processor, collator, rows):
    options = {"plora": {"r": 4, "lora_dropout": 0.0}}
    partial = make_model(**options)
    everywhere = GlobalLoraForCausalLM(make_config(**options)).eval()
    everywhere.load_state_dict(partial.state_dict())
    plain = make_model(**options, train_plora=False)
    text = {"input_ids": torch.arange(8, 20)[None]}
    with torch.no_grad():
        assert torch.equal(everywhere(**text).logits, plain(**text).logits)
        assert (merge_lora(everywhere)(**text).logits - plain(**text).logits).abs().max() > 0.1
    seen = []
    for model in (everywhere, plain):
        model.language_model.base_model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
    batch = collator(rows)
    with torch.no_grad():
        everywhere(**batch)
        plain(**batch)
    teacher, student, plain_teacher, plain_student = seen
    assert torch.equal(teacher, plain_teacher)
    # At the first position, which comes before any speech, so that partial LoRA would leave it as it is.
    assert (student[:, 0] - plain_student[:, 0]).abs().max() > 1e-3


# -- recognisers ------------------------------------------------------------------------------------------------------


@pytest.mark.numerical
def test_ctc_loss_is_that_of_each_clip_alone_and_paths_are_merged():
    model = make_model()
    torch.manual_seed(0)
    recognizer = CtcRecognizer(model.audio_tower, 5).eval()
    features = torch.randn(2, 80, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 40:] = 0
    features[1, :, 40:] = 0
    tokens, counts = torch.tensor([1, 2, 2, 4, 0]), torch.tensor([3, 2])
    with torch.no_grad():
        loss = recognizer(features, mask, tokens, counts)["loss"]
        alone = [
            recognizer(features[:1], mask[:1], tokens[:3], counts[:1])["loss"],
            recognizer(features[1:, :, :40], mask[1:, :40], tokens[3:], counts[1:])["loss"],
        ]
        torch.testing.assert_close(loss, torch.stack(alone).mean())
        # A head that says blank, then token 3 for two frames, blank, and token 3 again.
        recognizer.head = PathHead([5, 3, 3, 5, 3] + [5] * 25)
        assert recognizer.read_off(features, mask) == [[3, 3], [3, 3]]


class PathHead(torch.nn.Module):
    """Says one class per frame."""

    out_features = 6

    def __init__(self, path):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(path), 6).float()

    def forward(self, frames):
        return self.logits[: frames.shape[1]].expand(len(frames), -1, -1)


def test_the_cformer_is_read_off_by_the_embeddings():
    model = make_model()
    embeddings = model.get_input_embeddings().weight
    embeddings.data = torch.nn.functional.normalize(embeddings.data, dim=1)
    heard = ModelOutput(
        token_states=embeddings[torch.tensor([[7, 9, 11], [20, 0, 0]])], num_speech_tokens=torch.tensor([3, 1])
    )
    model.get_audio_features = lambda *arguments: heard
    assert read_off(model, None, None) == [[7, 9, 11], [20]]


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_settings_but_not_places(plan, tmp_path):
    configuration = BY_NAME["encoder"]
    fingerprint = plan.fingerprint(configuration)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text(plan.rows_manifest.read_text().replace('"audio": "', '"audio": "../'))
    same = replace(plan, output_dir=tmp_path / "b", cache_dir=tmp_path / "c", rows_manifest=moved, threads=7)
    assert same.fingerprint(configuration) == fingerprint
    moved.write_text(plan.rows_manifest.read_text().replace('"red"', '"blue"', 1))
    others = [
        replace(plan, steps=4),
        replace(plan, num_utterances=25),
        replace(plan, rows_manifest=moved),
        replace(plan, train_options=["--learning_rate", "1e-4"]),
    ]
    assert fingerprint not in {other.fingerprint(configuration) for other in others}
    assert fingerprint != plan.fingerprint(BY_NAME["plora"])
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("a")
    of_manifest = replace(plan, train_options=["--train_manifest", str(manifest)])
    before = of_manifest.fingerprint(configuration)
    manifest.write_text("b")
    assert of_manifest.fingerprint(configuration) != before
    assert str(tmp_path) not in json.dumps(of_manifest.settings(configuration))


def pretend(plan, ran, seconds=60.0, failing=()):
    """A stand-in for `runs.run` that leaves a result."""

    def run(configuration, seed, plan):
        ran.append((configuration.name, seed))
        if configuration.name in failing:
            raise RuntimeError("no such microphone")
        result = made_result(configuration.name, seed, {configuration.systems[0]: [1, 0, 1, 1]}, seconds=seconds)
        plan.results_dir.mkdir(exist_ok=True)
        plan.result_path(configuration, seed).write_text(json.dumps(result))
        return result

    return run


def made_result(name, seed, systems, response_kl=None, seconds=60.0):
    return {
        "name": name,
        "seed": seed,
        "machine": {"cores": 2},
        "seconds": {"training": seconds, "all": seconds},
        "systems": {
            system: {"exact_match": float(np.mean(rows)), "matched_rows": "".join(map(str, rows))}
            for system, rows in systems.items()
        },
        "alignment": {} if response_kl is None else {"response_kl": response_kl},
    }


WANTED = [(BY_NAME[name], seed) for seed in (1, 2) for name in ("encoder", "plora")]


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_that_exist_are_not_repeated(plan, monkeypatch, workers):
    ran, told = [], []
    monkeypatch.setattr(runs, "run", pretend(plan, ran))
    assert runs.run_all(WANTED[:1], plan, workers, None, told.append) == []
    assert runs.run_all(WANTED, plan, workers, None, told.append) == []
    assert sorted(ran) == [("encoder", 1), ("encoder", 2), ("plora", 1), ("plora", 2)]
    runs.run_all(WANTED, replace(plan, steps=9), workers, None, told.append)
    assert len(ran) == 8, "other settings are other runs"
    assert len(list(plan.results_dir.iterdir())) == 8, "and they overwrite nothing"
    assert {result["seed"] for result in ablate.find_results(plan)} == {1, 2}


def test_no_run_begins_that_would_end_too_late(plan, monkeypatch):
    ran = []
    monkeypatch.setattr(runs, "run", pretend(plan, ran, seconds=100.0))
    left = runs.run_all(WANTED, plan, 1, 90.0, lambda line: None)
    assert ran == [("encoder", 1)], "nothing was known of its time"
    assert left == ["plora, seed 1", "encoder, seed 2", "plora, seed 2"]
    assert runs.run_all(WANTED, plan, 1, 0.0, lambda line: None) == left
    assert runs.run_all(WANTED, plan, 1, 110.0, lambda line: None) == []


def test_a_failed_run_is_told_after_the_others_are_done(plan, monkeypatch):
    ran = []
    monkeypatch.setattr(runs, "run", pretend(plan, ran, failing=("encoder",)))
    with pytest.raises(RuntimeError, match="2 of 4 runs failed.\nencoder, seed 1: no such microphone"):
        runs.run_all(WANTED, plan, 1, None, lambda line: None)
    assert len(ran) == 4 and plan.load(BY_NAME["plora"], 2) is not None


def test_a_failing_script_is_told_with_its_last_lines(tmp_path):
    with pytest.raises(RuntimeError, match="failed with exit status 3, see .*log.txt:\nout of paper"):
        runs._call(["-c", "print('out of paper'); raise SystemExit(3)"], tmp_path / "log.txt", 1)


def test_threads_that_a_run_is_given_reach_its_script(tmp_path):
    runs._call(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path / "log.txt", 5)
    assert (tmp_path / "log.txt").read_text() == "5\n"


def test_scores_are_in_the_order_of_the_rows_and_need_them_all(plan, tmp_path):
    rows = read_rows(plan.rows_manifest)
    lines = [
        {"id": str(number), "predicted": {"answers": text}}
        for number, text in ((2, "Red."), (0, "blue"), (3, "it is red"), (1, "red"))
    ]
    predictions = tmp_path / "speech.jsonl"
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = runs.score(rows, predictions)
    assert scores == {"exact_match": 0.5, "contained": 0.75, "matched_rows": "0110"}
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    with pytest.raises(ValueError, match="speech.jsonl lacks 1 of 4 rows, the first is '1'"):
        runs.score(rows, predictions)


def test_rows_get_their_number_as_id_and_need_answers(tmp_path):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"answer": "red"}\n{"answer": "blue", "id": 7}\n')
    assert [row["id"] for row in read_rows(manifest)] == ["1", "7"]
    manifest.write_text('{"answer": "red"}\n{"text": "blue"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl has 2 rows, of which 1 have no 'answer' \(the first: \['2'\]\)"):
        read_rows(manifest)


# -- what follows -----------------------------------------------------------------------------------------------------


def rows_right(share, seed, num_rows=400):
    return (np.random.default_rng(seed).random(num_rows) < share).astype(int)


@pytest.mark.parametrize(
    ("interval", "num_seeds", "expected"),
    [
        ([0.01, 0.2], 3, "confirmed"),
        ([-0.2, -0.01], 3, "refuted"),
        ([-0.1, 0.2], 3, "undecided"),
        ([0.0, 0.0], 3, "undecided"),
        ([0.1, 0.2], 1, "undecided (one seed)"),
        (None, 0, "not run"),
    ],
)
def test_verdicts(interval, num_seeds, expected):
    assert analysis.verdict(interval, num_seeds) == expected


def test_differences_are_paired_over_rows_and_seeds():
    worse = {seed: rows_right(0.6, seed) for seed in (1, 2, 3)}
    same = analysis.difference(worse, worse)
    assert same == {"effect": 0.0, "interval": [0.0, 0.0], "num_seeds": 3}
    # Twenty rows more are right, whatever the seed: the spread of rows that both get wrong does not blur it.
    better = {seed: rows.copy() for seed, rows in worse.items()}
    for rows in better.values():
        rows[np.flatnonzero(rows == 0)[:20]] = 1
    gain = analysis.difference(better, worse)
    assert gain["effect"] == pytest.approx(0.05)
    assert 0.02 < gain["interval"][0] < 0.05 < gain["interval"][1] < 0.08
    loss = analysis.difference(worse, better)
    assert loss["interval"][::-1] == pytest.approx([-bound for bound in gain["interval"]])
    assert analysis.difference({1: better[1]}, {2: worse[2]})["num_seeds"] == 0


def test_seeds_that_disagree_decide_nothing():
    worse = {seed: rows_right(0.5, 9) for seed in (1, 2, 3)}
    better = {seed: rows_right(share, 9) for seed, share in ((1, 0.95), (2, 0.5), (3, 0.6))}
    told = analysis.difference(better, worse)
    assert told["effect"] > 0.15 and told["interval"][0] < 0


def test_what_has_no_seeds_pairs_with_each():
    text, speech = {1: rows_right(0.9, 0)}, {seed: rows_right(0.6, seed) for seed in (1, 2, 3)}
    told = analysis.difference(text, speech, seedless={"better"})
    assert told["num_seeds"] == 3 and told["interval"][0] > 0
    assert analysis.difference(speech, text, {"worse"}, share=0.5)["interval"][0] > 0, "0.6 is more than half of 0.9"
    assert told["effect"] == pytest.approx(text[1].mean() - np.mean([rows.mean() for rows in speech.values()]))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(100):
        # Rows differ in how hard they are, seeds in how good they are; the true difference is 0.1.
        hard, sides = rng.uniform(-0.3, 0.3, 150), []
        for base in (0.6, 0.5):
            seeds = rng.normal(0, 0.03, 3)
            sides.append({s: (rng.random(150) < base + seeds[s] + hard).astype(int) for s in range(3)})
        low, high = analysis.difference(*sides)["interval"]
        inside += low <= 0.1 <= high
    assert inside >= 93


def test_rank_correlation_of_kl_and_accuracy():
    points = [("a", 0.1 * 2**rank, 0.9 - 0.1 * rank) for rank in range(8)]
    told = analysis.rank_correlation(points)
    assert told["spearman"] == pytest.approx(-1) and told["verdict"] == "confirmed" and told["num_runs"] == 8
    rising = [(name, kl, 1 - accuracy) for name, kl, accuracy in points]
    assert analysis.rank_correlation(rising)["verdict"] == "refuted"
    mixed = [("a", kl, accuracy) for kl, accuracy in zip((1, 2, 3, 4, 5, 6), (0.5, 0.1, 0.6, 0.2, 0.7, 0.3))]
    assert analysis.rank_correlation(mixed)["verdict"] == "undecided"
    assert analysis.rank_correlation(points[:3]) == {
        "spearman": None,
        "interval": None,
        "num_runs": 3,
        "verdict": "not run",
    }


def test_table_figure_and_json_tell_of_all_that_ran(tmp_path):
    results = [made_result("untrained", 0, {"text": rows_right(0.98, 0), "blind": rows_right(0.1, 0)})]
    for seed in (1, 2, 3):
        results.append(made_result("blsp", seed, {"speech": rows_right(0.3, seed)}, response_kl=1.0 + 0.1 * seed))
        better = {"speech": rows_right(0.7, seed)}
        results.append(made_result("subsampler_kl", seed, better, response_kl=0.2 + 0.1 * seed))
        changed = {"speech": rows_right(0.9, seed), "text": rows_right(0.5, seed)}
        results.append(made_result("global_lora", seed, changed, response_kl=0.05 + 0.01 * seed))
    report.write(
        analysis.analyse(results, CONFIGURATIONS), {"steps": 3, "data": "24 clips", "rows": "400 rows"}, tmp_path
    )
    table = (tmp_path / "summary.md").read_text()
    assert "| BLSP: subsampler, response CE | 0.3" in table
    assert "| BLSP-KD + encoder + LoRA everywhere (text) | 0.5" in table
    assert table.count("| confirmed |") == 2 and table.count("| not run |") == len(CLAIMS) - 2
    assert "is -0.9" in table or "is -1.0" in table
    told = json.loads((tmp_path / "summary.json").read_text())
    assert [row["system"] for row in told["systems"]] == ["text", "blind", "speech", "speech", "speech", "text"]
    assert told["claims"][0]["verdict"] == "confirmed" and told["claims"][0]["num_seeds"] == 3
    assert (tmp_path / "summary.png").stat().st_size > 10_000


def test_nothing_run_is_a_report_too(tmp_path):
    report.write(analysis.analyse([], CONFIGURATIONS), {"steps": 3, "data": "24 clips", "rows": "4 rows"}, tmp_path)
    assert (tmp_path / "summary.md").read_text().count("| not run |") == len(CLAIMS)


# -- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_end_to_end(tmp_path, monkeypatch, capsys):
    """Every script of the matrix for a few steps, in this process: starting Python ten times would take a minute."""
    scripts = []

    def call(command, log, threads):
        is_module = command[0] == "-m"
        name = command[is_module]
        scripts.append(name.rpartition(".")[2] if is_module else Path(name).stem)
        with monkeypatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", str(threads))
            patch.setattr(sys, "argv", command[is_module:])
            if is_module:
                importlib.import_module(name).main()
            else:
                runpy.run_path(name, run_name="__main__")

    monkeypatch.setattr(runs, "_call", call)
    names = "untrained,subsampler_kl,global_lora,cascade_cformer,cascade_ctc"
    arguments = [
        *("ablate.py", "--only", names, "--seeds", "1", "--steps", "2", "--num_utterances", "8", "--num_rows", "8"),
        *("--output_dir", tmp_path / "out", "--results_dir", tmp_path / "results", "--cache_dir", tmp_path / "clips"),
        *("--per_device_train_batch_size", "4", "--use_cpu", "true", "--disable_tqdm", "true"),
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    ablate.main()
    assert scripts.count("evaluate") == 5 and scripts.count("train_recognizer") == 2
    table = capsys.readouterr().out
    assert "evaluated on 16 rows of the tiny world's final sentences" in table
    told = json.loads((tmp_path / "results" / "summary.json").read_text())
    of_system = {(row["name"], row["system"]): row for row in told["systems"]}
    assert of_system["untrained", "text"]["exact_match"] > 0.8, "the embedded LLM answers text"
    assert set(of_system["cascade_ctc", "cascade"]["by_voice_group"]) == {"seen voices", "held out voices"}
    assert of_system["subsampler_kl", "speech"]["response_kl"] > 0
    assert of_system["global_lora", "speech"]["input_kl"] > 0
    assert of_system["cascade_ctc", "cascade"]["exact_transcripts"] is not None
    (result,) = (tmp_path / "results").glob("global_lora-seed1-*.json")
    result = json.loads(result.read_text())
    assert result["machine"]["torch"] == torch.__version__ and len(result["systems"]["text"]["matched_rows"]) == 16
    assert str(tmp_path) not in json.dumps(result)
    ablate.main()
    assert scripts.count("evaluate") == 5, "a second call runs nothing"


def test_figures_of_the_results_page_stand_in_the_tables_that_it_names():
    experiments = Path(ablate.__file__).parents[1]
    page = (experiments / "RESULTS.md").read_text().split("Settings were chosen")[0]
    tables = "".join((experiments / name).read_text() for name in re.findall(r"\]\(([^)]+\.md)\)", page))
    figures = re.findall(r"(?<![\d.])[-+]?\d\.\d{3}(?: \[[^]]+\])?|\d+\.\d %", page)
    assert len(figures) > 20
    spellings = (" %", "%", " [")  # the last is an interval's, in a column of per cent
    missing = [
        figure for figure in figures if not any(figure.replace(" %", spelling) in tables for spelling in spellings)
    ]
    # In the table of claims, differences and intervals have columns of their own.
    assert all(figure.replace(" [", " | [") in tables for figure in missing), missing
    for claim in CLAIMS:
        assert f"| {claim.text} |" in page


def test_published_results_are_those_of_the_matrix_as_it_stands():
    """A result is found by its fingerprint: a script or an option of another name would have all runs repeated."""
    paths = sorted(ablate.RESULTS.glob("*-seed*.json"))
    assert len(paths) > 30
    for path in paths:
        settings = json.loads(path.read_text())["settings"]
        configuration = BY_NAME[settings["name"]]
        assert (settings["script"], settings["options"]) == (configuration.script, configuration.options)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        assert path.stem.endswith(f"-{digest[:12]}")


@pytest.mark.long
def test_the_script_runs_from_any_folder(tmp_path):
    script = Path(ablate.__file__).parents[2] / "ablate.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, script, "--only", "decoder"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 2 and "ablate.py: error: --only names no configuration" in finished.stderr


def test_unknown_configurations_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--only", "encoder,decoder"])
    with pytest.raises(SystemExit):
        ablate.main()
    assert "--only names no configuration ['decoder']" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seed", "--plora=true", "--max_steps"])
def test_options_that_the_matrix_sets_cannot_be_given(option, monkeypatch, capsys, tmp_path):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"answer": "red"}\n')
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--rows_manifest", str(manifest), option, "7"])
    with pytest.raises(SystemExit):
        ablate.main()
    assert f"['{option.partition('=')[0]}'] differ between the runs" in capsys.readouterr().err
