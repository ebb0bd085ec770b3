"""Responses made by the LLM: how transcripts are written, what is asked about them, and how engines answer."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch

from processing.manifests import BadRow
from processing.response_generation.engines import RowSampler, TransformersEngine
from processing.response_generation.normalisers import NORMALISERS
from processing.response_generation.templates import Instruction, choose, read_templates
from tests.helpers.asr_data import TEXTS, make, read_lines, write_lines

# Transcripts


@pytest.mark.parametrize(
    "name, source, expected",
    [
        ("none", "  As  it\tis ", "As it is"),
        ("librispeech", "MISTER QUILTER IS THE APOSTLE", "Mister quilter is the apostle"),
        ("librispeech", "I SAID I'LL GO IF I'M ILL", "I said I'll go if I'm ill"),
        ("librispeech", "SHE'S IN IT'S OWN I", "She's in it's own I"),
        ("librispeech", "Chapter One by I. Smith", "Chapter One by I. Smith"),
        (
            "gigaspeech",
            "AS THEY'RE LEAVING <COMMA> CAN KASH PULL ZAHRA ASIDE REALLY QUICKLY <QUESTIONMARK>",
            "As they're leaving, can kash pull zahra aside really quickly?",
        ),
        (
            "gigaspeech",
            "STOP <EXCLAMATIONPOINT> I KNOW <COMMA> I DO <PERIOD> YES <PERIOD>",
            "Stop! I know, I do. Yes.",
        ),
        ("gigaspeech", "<COMMA> WELL", ", Well"),
        ("common_voice", '"Who is it?"', "Who is it?"),
        ("common_voice", "Where is it going", "Where is it going."),
        ("common_voice", '"I see"', "I see."),
        ("common_voice", '"Yes" and "no"', '"Yes" and "no"'),
        ("common_voice", '"""Hello"" he said"', '""Hello" he said"'),
        ("common_voice", "Das „Auto“ fährt!", "Das „Auto“ fährt!"),
        ("common_voice", "„Das Auto fährt“", "Das Auto fährt."),
        ("common_voice", "¿Qué hora es?", "¿Qué hora es?"),
        ("common_voice", "今日は天気がいい", "今日は天気がいい"),
        ("common_voice", '"', '"'),
    ],
)
def test_transcripts_become_text_as_llms_write_it(name, source, expected):
    assert NORMALISERS[name](source) == expected


@pytest.mark.parametrize("text", ["<MUSIC>", "<SIL>", "<NOISE>", "<OTHER>", "HELLO <NOISE> THERE"])
def test_gigaspeech_rows_without_speech_are_refused(text):
    with pytest.raises(BadRow, match="no speech: the transcript holds <"):
        NORMALISERS["gigaspeech"](text)


def test_gigaspeech_tags_of_another_kind_are_refused():
    with pytest.raises(BadRow, match="unknown tag <UNK>"):
        NORMALISERS["gigaspeech"]("A <UNK> B")


# Templates


def test_templates_come_from_names_files_and_texts(asr, backbones, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"colour": "Name the colour.", "to": "Say it in $language."}))
    (tmp_path / "more.txt").write_text("Shout it.\n\n  Count the words. \n")
    rows = [{**row, "language": "Dutch"} for row in read_lines(asr / "asr.jsonl")]
    del rows[1]["language"]
    rows[2]["language"] = "$text {0.__class__}"
    write_lines(asr / "asr.jsonl", rows)
    made, rejects = make(
        *(asr / "asr.jsonl", asr / "out.jsonl", backbones[1]),
        templates=[tmp_path / "mine.json", tmp_path / "more.txt", "answer"],
        instructions=["Why?"],
        limit=3,
    )
    asked = {row["template"]: row["instruction"] for row in made if row["id"].startswith("84-0")}
    assert asked == {
        "colour": "Name the colour.",
        "to": "Say it in Dutch.",
        "more1": "Shout it.",
        "more2": "Count the words.",
        "answer": "Answer the following request.",
        "instruction1": "Why?",
    }
    assert [(reject["line"], "'language', got None" in reject["reason"]) for reject in rejects] == [(2, True)]
    literal = [row["instruction"] for row in made if row["id"] == "84-2-to"]
    assert literal == ["Say it in $text {0.__class__}."], "what a row holds is never filled in again"


def test_own_instructions_are_asked_as_they_are(asr, backbones):
    rows = [
        {**row, "instruction": f"Do {index}.", "answer": "x"} for index, row in enumerate(read_lines(asr / "asr.jsonl"))
    ]
    rows[1]["instruction"] = ""
    del rows[2]["instruction"]
    write_lines(asr / "asr.jsonl", rows)
    made, rejects = make(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], templates="own", keep="answer")
    expected = ["Do 0.", "", *(f"Do {index}." for index in range(3, len(TEXTS)))]
    assert [row["instruction"] for row in made] == expected, "with an empty one the speech itself is the request"
    assert [(reject["line"], "'instruction', got None" in reject["reason"]) for reject in rejects] == [(3, True)]
    assert {row["answer"] for row in made} == {"x"} and "voice" not in made[0]


def test_a_row_draws_the_same_templates_each_time_and_rows_draw_different_ones():
    templates = [Instruction(name, name) for name in "abcdef"]
    drawn = [tuple(one.name for one in choose(templates, 2, 0, index)) for index in range(200)]
    assert drawn == [tuple(one.name for one in choose(templates, 2, 0, index)) for index in range(200)]
    assert all(len(set(pair)) == 2 and sorted(pair) == list(pair) for pair in drawn)
    assert len(set(drawn)) == 15, "all pairs come"
    assert drawn != [tuple(one.name for one in choose(templates, 2, 1, index)) for index in range(200)]


@pytest.mark.parametrize(
    "names, instructions, message",
    [
        (["shout"], [], r"Unknown template 'shout': expected one of \['continue', 'answer', 'repeat', 'own'\]"),
        (["repeat", "repeat"], [], r"these come twice: \['repeat'\]"),
        ([], [" "], r"Template 'instruction1' must be a text that is not empty"),
        ([], ["It costs $5"], r"Write \$column for a column, \$\$ for \$"),
        ([], [], r"No templates: name some"),
        (["bad.json"], [], r"bad\.json is not JSON"),
        (["number.json"], [], r"expected an object of name to instruction or a list of instructions, got 7"),
    ],
)
def test_useless_templates_are_named(tmp_path, names, instructions, message):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "number.json").write_text("7")
    names = [str(tmp_path / name) if name.endswith(".json") else name for name in names]
    with pytest.raises(ValueError, match=message):
        read_templates(names, instructions)


# Sampling and engines


def test_row_sampler_draws_from_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    scores = probabilities.log().expand(4000, -1)
    chosen = RowSampler(list(range(4000)))(None, scores).argmax(-1)
    counts = chosen.bincount(minlength=6) / 4000
    assert counts[1] == counts[5] == 0
    assert (counts - probabilities).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_a_sampled_answer_depends_on_its_own_seed_alone(asr, backbones):
    sampled = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    rows = {
        name: make(asr / "asr.jsonl", asr / f"{name}.jsonl", backbones[1], **{**sampled, **changes})[0]
        for name, changes in {
            "two": {},
            "seven": {"batch_size": 7},
            "other": {"seed": 1},
            "cold": {"top_p": 1e-6},
        }.items()
    }
    answers = {name: [row["response"] for row in made] for name, made in rows.items()}
    assert rows["two"] == rows["seven"], "whatever the batch"
    assert sum(one != other for one, other in zip(answers["two"], answers["other"])) >= 6
    greedy, _ = make(asr / "asr.jsonl", asr / "greedy.jsonl", backbones[1], max_new_tokens=12)
    assert answers["cold"] == [row["response"] for row in greedy], "top_p that leaves one token is greedy"
    assert answers["two"] != answers["cold"]


def test_vllm_gets_the_same_prompts_and_seeds_and_gives_the_same_rows(asr, backbones, monkeypatch):
    asked = {}

    class LLM:
        def __init__(self, model, dtype, tensor_parallel_size, max_model_len, seed):
            asked["model"] = (model, dtype, tensor_parallel_size, max_model_len, seed)

        def generate(self, prompts, sampling_params, use_tqdm):
            for prompt, sampling in zip(prompts, sampling_params):
                asked[sampling["seed"]] = (prompt["prompt_token_ids"], sampling)
            finished = types.SimpleNamespace(text=" yes ", finish_reason="stop")
            cut = types.SimpleNamespace(text="no", finish_reason="length")
            return [types.SimpleNamespace(outputs=[(finished, cut)[index % 2]]) for index in range(len(prompts))]

    prompts = {}
    answer = TransformersEngine.answer

    def noting(self, given, seeds):
        prompts.update(zip(seeds, given))
        return answer(self, given, seeds)

    monkeypatch.setattr(TransformersEngine, "answer", noting)
    expected, _ = make(asr / "asr.jsonl", asr / "here.jsonl", backbones[1], temperature=0.7)
    vllm = types.ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    rows, _ = make(
        asr / "asr.jsonl", asr / "vllm.jsonl", backbones[1], temperature=0.7, engine="vllm", vllm_options='{"seed": 7}'
    )
    assert asked.pop("model") == (str(backbones[1]), "float32", 1, 256, 7)
    assert {seed: prompt for seed, (prompt, _) in asked.items()} == prompts
    assert all((one["max_tokens"], one["temperature"], one["top_p"]) == (6, 0.7, 1.0) for _, one in asked.values())
    assert [(row["response"], row["finished"]) for row in rows[:2]] == [("yes", True), ("no", False)]
    answer_fields = ("response", "finished", "engine")
    assert [{key: row[key] for key in row if key not in answer_fields} for row in rows] == [
        {key: row[key] for key in row if key not in answer_fields} for row in expected
    ]
    assert [*rows[0]] == [*expected[0]] and {row["engine"] for row in rows} == {"vllm"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named(asr, backbones):
    with pytest.raises(ImportError, match="--engine vllm needs vLLM, which is not installed"):
        make(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], engine="vllm")
