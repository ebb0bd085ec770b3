"""`examples/make_training_data.py`: what it makes of good and bad rows, and that nothing is lost when it is killed."""

import contextlib
import hashlib
import importlib.machinery
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from processing import BlspKdDataCollator, BlspKdProcessor
from tests.helpers.audio_files import encode_by_ffmpeg
from tests.helpers.prompts import CHAT_TEMPLATE, clip, make_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}",
)
TEXTS = [
    "THE RED CAT RAN TO THE RIVER",
    "I'M SURE I CAN",
    "AND I",
    "HE HOPED THERE WOULD BE STEW",
    "RUN",
    "THE CAT AND THE RIVER AND THE CAT",
    "REPEAT THE WORDS",
    "STUFF IT INTO YOU HIS BELLY COUNSELLED HIM",
]


@pytest.fixture(scope="module")
def script():
    """The script as a module, with `examples` on the path as when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    import make_training_data

    yield make_training_data
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def asr(tmp_path):
    """A folder with a manifest of eight good rows."""
    folder = tmp_path / "asr"
    (folder / "clips").mkdir(parents=True)
    rows = []
    for index, text in enumerate(TEXTS):
        soundfile.write(folder / f"clips/{index}.flac", clip(0.3 + 0.05 * index, seed=index), 16_000)
        rows.append({"audio": f"clips/{index}.flac", "text": text, "id": f"84-{index}", "voice": "ann"})
    write_lines(folder / "asr.jsonl", rows)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def options_for(source, result, llm, **changes):
    options = {
        **({"manifest": source} if Path(source).suffix == ".jsonl" else {"parquet": source}),
        "text_model": llm,
        "output": result,
        "normaliser": "librispeech",
        "batch_size": 2,
        "max_new_tokens": 6,
        "dtype": "float32",
        **changes,
    }
    arguments = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def make(script, source, output, llm, **changes):
    """Run it here; returns the rows and the rejects."""
    script.main(options_for(source, output, llm, **changes))
    return read_lines(output), read_lines(output.with_name(f"{output.stem}.rejects.jsonl"))


# What comes out


def test_rows_are_what_training_reads_and_answers_are_those_that_training_would_make(
    script, asr, backbones, processor, capfd
):
    rows, rejects = make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1], templates=["continue", "repeat"])
    from processing.evaluation.answering import answer_rows
    from processing.manifests import DEFAULT_INSTRUCTION, read_manifest

    assert rejects == [] and len(rows) == 2 * len(TEXTS)
    assert [row["id"] for row in rows[:3]] == ["84-0-continue", "84-0-repeat", "84-1-continue"]
    assert rows[0]["instruction"] == DEFAULT_INSTRUCTION
    assert rows[1]["instruction"] == processor.transcription_instruction
    first = rows[0]
    assert (first["text"], first["source_text"]) == ("The red cat ran to the river", TEXTS[0])
    assert (first["audio"], first["voice"], first["engine"]) == ("clips/0.flac", "ann", "transformers")
    assert first["duration"] == pytest.approx(0.3) and len({row["seed"] for row in rows}) == len(rows)
    read = read_manifest(str(asr / "train.jsonl"))
    llm = AutoModelForCausalLM.from_pretrained(backbones[1])
    assert [row["response"] for row in read] == answer_rows(llm, processor, read, "text", max_new_tokens=6)
    batch = BlspKdDataCollator(processor)(read)
    assert batch["labels"].shape[0] == len(rows)
    assert "rows/s" in capfd.readouterr().err


def test_an_answer_that_was_cut_is_marked(script, backbones, processor, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(backbones[1])
    ends = set(range(2, 300, 12))
    llm.generation_config.eos_token_id = sorted(ends)
    llm.save_pretrained(tmp_path)
    engine = script.TransformersEngine(str(tmp_path), processor, "cpu", "float32", 4, 12, 0, 1)
    prompts = [[1, 5 + index] for index in range(12)]
    answers = engine.answer(prompts, list(range(12)))
    for prompt, answer in zip(prompts, answers):
        tokens = llm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 2:]
        assert answer.is_finished == (int(tokens[-1]) in ends)
    assert {answer.is_finished for answer in answers} == {True, False}, "the test sees both"


def test_bad_rows_are_rejected_with_their_line_and_reason(script, asr, backbones):
    soundfile.write(asr / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(asr / "silent.wav", np.zeros(8000), 16_000)
    soundfile.write(asr / "click.wav", clip(0.01), 16_000)
    soundfile.write(asr / "long.wav", clip(1.2), 16_000)
    (asr / "phone.m4a").write_bytes(encode_by_ffmpeg(clip(0.5), "ipod", "aac"))
    (asr / "browser.webm").write_bytes(encode_by_ffmpeg(clip(0.5), "webm", "libopus", coded_rate=48_000))
    (asr / "damaged.flac").write_bytes((asr / "clips/3.flac").read_bytes()[:30])
    good = {"audio": "clips/1.flac", "text": "RUN"}
    lines = [
        (good, None),
        ({**good, "audio": "phone.m4a"}, None),
        ({**good, "audio": "browser.webm"}, None),
        ({**good, "audio": "missing.flac"}, r"audio: Audio file not found"),
        ({**good, "audio": "empty.wav"}, r"audio: .*empty\.wav is empty"),
        ({**good, "audio": "silent.wav"}, r"audio: .*silent"),
        ({**good, "audio": "click.wav"}, r"audio: too short, 0\.0100 s"),
        ({**good, "audio": "long.wav"}, r"audio: .*lasts 1\.20 s, but a clip may last at most 1 s"),
        ({**good, "audio": "damaged.flac"}, r"audio: .*cannot be decoded"),
        ({**good, "audio": "a\0b"}, r"expected the path of an audio file, got 'a\\x00b'"),
        ({**good, "audio": 7}, r"expected the path of an audio file, got 7"),
        ({"text": "RUN"}, r"expected the path of an audio file, got None"),
        ({**good, "text": "  "}, r"text: expected some in 'text', got '  '"),
        ({"audio": "clips/1.flac"}, r"text: expected some in 'text', got None"),
        ({**good, "text": "THE CAT " * 40}, r"text: too long, the prompt has \d+ tokens, at most 60"),
        ({**good, "text": "A <|audio|> B"}, r"text: holds the audio placeholder"),
        ({**good, "text": "A \ud800 B"}, r"cannot be written as JSON"),
        ({**good, "voice": float("nan")}, r"cannot be written as JSON"),
        ([good], r"expected a JSON object, got"),
        ('{"audio": "clips/1.fl', r"not a line of JSON"),
        ("", r"not a line of JSON"),
        ("[" * 100_000, r"not a line of JSON"),
        (b"\xff\xfe\xfd", r"not a line of JSON"),
        (good, None),
    ]
    encoded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row, _ in lines
    ]
    (asr / "bad.jsonl").write_bytes(b"\n".join(encoded))
    rows, rejects = make(
        script, asr / "bad.jsonl", asr / "out.jsonl", backbones[1], max_duration_s=1, max_prompt_tokens=60
    )
    good_lines = [index for index, (_, reason) in enumerate(lines) if reason is None]
    assert [row["id"] for row in rows] == [f"{index}-continue" for index in good_lines]
    expected = {number: reason for number, (_, reason) in enumerate(lines, start=1) if reason}
    assert [reject["line"] for reject in rejects] == [*expected]
    for reject in rejects:
        assert re.search(expected[reject["line"]], reject["reason"], re.DOTALL), reject


def test_prompts_are_those_of_training_and_inference_for_the_same_options(
    script, asr, backbones, monkeypatch, tmp_path
):
    """With a thinking LLM the answers of one prompt would be trained after another."""
    llm = make_tokenizer()
    llm.chat_template = THINKING_TEMPLATE
    shutil.copytree(backbones[1], tmp_path / "llm")
    llm.save_pretrained(tmp_path / "llm")
    answer, asked = sys.modules["training_data.engines"].Answer, []

    def answer_yes(self, prompts, seeds):
        asked.extend(prompts)
        return [answer("yes", True) for _ in prompts]

    monkeypatch.setattr(script.TransformersEngine, "answer", answer_yes)
    texts = {}
    for given in (None, '{"enable_thinking": false}', '{"enable_thinking": true}'):
        asked.clear()
        output = asr / f"out{len(texts)}.jsonl"
        rows, _ = make(
            script, asr / "asr.jsonl", output, tmp_path / "llm", chat_template_kwargs=given, max_new_tokens=1
        )
        options = None if given is None else json.loads(given)
        processor = BlspKdProcessor.from_backbones(backbones[0], tmp_path / "llm", chat_template_kwargs=options)
        read = [{**row, "audio": str(asr / row["audio"])} for row in rows]
        batch = BlspKdDataCollator(processor)(read)
        for prompt, teacher, answers in zip(asked, batch["teacher_input_ids"], batch["teacher_is_response"]):
            assert teacher[: int(answers.long().argmax())].tolist() == prompt
        texts[given] = processor.decode(asked[0])
    assert len(set(texts.values())) == 2 and texts[None] == texts['{"enable_thinking": true}']
    assert texts['{"enable_thinking": false}'].endswith("</think>\n\n")


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "is empty"),
        ("I hear <|audio|>", "holds the audio placeholder"),
        (
            "<think>\nThe user",
            "ends within a thought. Raise --max_new_tokens, or have the LLM not think, for example with "
            "--chat_template_kwargs '{\"enable_thinking\": false}'",
        ),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_a_reject(script, asr, backbones, monkeypatch, text, fault):
    answer = sys.modules["training_data.engines"].Answer

    def answer_one_badly(self, prompts, seeds):
        return [answer(text if index == 1 else "yes", True) for index in range(len(prompts))]

    monkeypatch.setattr(script.TransformersEngine, "answer", answer_one_badly)
    rows, rejects = make(script, asr / "asr.jsonl", asr / "out.jsonl", backbones[1], limit=2)
    assert [row["id"] for row in rows] == ["84-0-continue"]
    assert rejects[0]["line"] == 2
    assert rejects[0]["reason"] == f"answer: that of the LLM to template 'continue' {fault}"


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
def test_transcripts_become_text_as_llms_write_it(script, name, source, expected):
    assert script.NORMALISERS[name](source) == expected


@pytest.mark.parametrize("text", ["<MUSIC>", "<SIL>", "<NOISE>", "<OTHER>", "HELLO <NOISE> THERE"])
def test_gigaspeech_rows_without_speech_are_refused(script, text):
    with pytest.raises(script.BadRow, match="no speech: the transcript holds <"):
        script.NORMALISERS["gigaspeech"](text)


def test_gigaspeech_tags_of_another_kind_are_refused(script):
    with pytest.raises(script.BadRow, match="unknown tag <UNK>"):
        script.NORMALISERS["gigaspeech"]("A <UNK> B")


# Templates


def test_templates_come_from_names_files_and_texts(script, asr, backbones, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"colour": "Name the colour.", "to": "Say it in $language."}))
    (tmp_path / "more.txt").write_text("Shout it.\n\n  Count the words. \n")
    rows = [{**row, "language": "Dutch"} for row in read_lines(asr / "asr.jsonl")]
    del rows[1]["language"]
    rows[2]["language"] = "$text {0.__class__}"
    write_lines(asr / "asr.jsonl", rows)
    made, rejects = make(
        script,
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


def test_own_instructions_are_asked_as_they_are(script, asr, backbones):
    rows = [
        {**row, "instruction": f"Do {index}.", "answer": "x"} for index, row in enumerate(read_lines(asr / "asr.jsonl"))
    ]
    write_lines(asr / "asr.jsonl", rows)
    made, _ = make(script, asr / "asr.jsonl", asr / "out.jsonl", backbones[1], templates="own", keep="answer")
    assert [row["instruction"] for row in made] == [f"Do {index}." for index in range(len(TEXTS))]
    assert {row["answer"] for row in made} == {"x"} and "voice" not in made[0]


def test_a_row_draws_the_same_templates_each_time_and_rows_draw_different_ones(script):
    from training_data.templates import Instruction, choose

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
def test_useless_templates_are_named(script, tmp_path, names, instructions, message):
    from training_data.templates import read_templates

    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "number.json").write_text("7")
    names = [str(tmp_path / name) if name.endswith(".json") else name for name in names]
    with pytest.raises(ValueError, match=message):
        read_templates(names, instructions)


# Sampling and engines


def test_row_sampler_draws_from_the_distribution(script):
    from training_data.engines import RowSampler

    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    scores = probabilities.log().expand(4000, -1)
    chosen = RowSampler(list(range(4000)))(None, scores).argmax(-1)
    counts = chosen.bincount(minlength=6) / 4000
    assert counts[1] == counts[5] == 0
    assert (counts - probabilities).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_a_sampled_answer_depends_on_its_own_seed_alone(script, asr, backbones):
    sampled = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    rows = {
        name: make(script, asr / "asr.jsonl", asr / f"{name}.jsonl", backbones[1], **{**sampled, **changes})[0]
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
    greedy, _ = make(script, asr / "asr.jsonl", asr / "greedy.jsonl", backbones[1], max_new_tokens=12)
    assert answers["cold"] == [row["response"] for row in greedy], "top_p that leaves one token is greedy"
    assert answers["two"] != answers["cold"]


def test_vllm_gets_the_same_prompts_and_seeds_and_gives_the_same_rows(script, asr, backbones, monkeypatch):
    asked = {}

    class LLM:
        def __init__(self, model, dtype, tensor_parallel_size, max_model_len):
            asked["model"] = (model, dtype, tensor_parallel_size, max_model_len)

        def generate(self, prompts, sampling_params, use_tqdm):
            for prompt, sampling in zip(prompts, sampling_params):
                asked[sampling["seed"]] = (prompt["prompt_token_ids"], sampling)
            finished = types.SimpleNamespace(text=" yes ", finish_reason="stop")
            cut = types.SimpleNamespace(text="no", finish_reason="length")
            return [types.SimpleNamespace(outputs=[(finished, cut)[index % 2]]) for index in range(len(prompts))]

    prompts = {}
    answer = script.TransformersEngine.answer

    def noting(self, given, seeds):
        prompts.update(zip(seeds, given))
        return answer(self, given, seeds)

    monkeypatch.setattr(script.TransformersEngine, "answer", noting)
    expected, _ = make(script, asr / "asr.jsonl", asr / "here.jsonl", backbones[1], temperature=0.7)
    vllm = types.ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    rows, _ = make(script, asr / "asr.jsonl", asr / "vllm.jsonl", backbones[1], temperature=0.7, engine="vllm")
    assert asked.pop("model") == (str(backbones[1]), "float32", 1, 256)
    assert {seed: prompt for seed, (prompt, _) in asked.items()} == prompts
    assert all((one["max_tokens"], one["temperature"], one["top_p"]) == (6, 0.7, 1.0) for _, one in asked.values())
    assert [(row["response"], row["finished"]) for row in rows[:2]] == [("yes", True), ("no", False)]
    answer_fields = ("response", "finished", "engine")
    assert [{key: row[key] for key in row if key not in answer_fields} for row in rows] == [
        {key: row[key] for key in row if key not in answer_fields} for row in expected
    ]
    assert [*rows[0]] == [*expected[0]] and {row["engine"] for row in rows} == {"vllm"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named(script, asr, backbones):
    with pytest.raises(ImportError, match="--engine vllm needs vLLM, which is not installed"):
        make(script, asr / "asr.jsonl", asr / "out.jsonl", backbones[1], engine="vllm")


# Embedded audio


@pytest.fixture
def parquet(asr, tmp_path):
    """The eight rows and two bad ones, with embedded audio: two parquet files in a folder, as on the Hub."""
    rows = read_lines(asr / "asr.jsonl")
    audio = [{"bytes": (asr / row["audio"]).read_bytes(), "path": row["audio"]} for row in rows]
    wav = io.BytesIO()
    soundfile.write(wav, clip(0.5, seed=9), 8_000, format="WAV")
    audio[5] = {"bytes": wav.getvalue(), "path": None}
    audio += [{"bytes": b"damaged", "path": "x.mp3"}, {"bytes": None, "path": "clips/0.flac"}]
    texts = [*TEXTS, "DAMAGED", "IN PLACE"]
    (tmp_path / "hub").mkdir()
    info = {"info": {"features": {"audio": {"_type": "Audio"}, "sentence": {"dtype": "string", "_type": "Value"}}}}
    for number, part in enumerate((slice(0, 4), slice(4, None))):
        table = pyarrow.table({"audio": audio[part], "sentence": texts[part]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pyarrow.parquet.write_table(table, tmp_path / f"hub/train-0000{number}-of-00002.parquet")
    return tmp_path / "hub"


def test_embedded_audio_of_a_streamed_data_set_becomes_files(script, asr, parquet, backbones):
    common = {"text_column": "sentence", "manifest": None}
    rows, rejects = make(script, parquet, asr / "hub.jsonl", backbones[1], **common, parquet=None, dataset=parquet)
    expected, _ = make(script, asr / "asr.jsonl", asr / "plain.jsonl", backbones[1])
    assert [row["response"] for row in rows] == [row["response"] for row in expected]
    assert rows[0]["audio"] == "hub.audio/000000/000000000.flac" and rows[5]["audio"].endswith("/000000005.wav")
    for index, row in enumerate(rows):
        if index != 5:
            assert (asr / row["audio"]).read_bytes() == (asr / f"clips/{index}.flac").read_bytes()
    assert len([path for path in (asr / "hub.audio").rglob("*") if path.is_file()]) == 8
    assert [reject["index"] for reject in rejects] == [8, 9]
    settings = json.loads((asr / "hub.settings.json").read_text())
    assert settings["source"]["split"] == "train" and len(settings["source"]["files"]) == 2
    assert "cannot be decoded" in rejects[0]["reason"]
    assert "column 'audio' holds no audio: expected embedded bytes" in rejects[1]["reason"]


def test_parquet_files_give_the_same_rows_and_may_name_audio_beside_them(script, asr, parquet, backbones):
    shutil.copytree(asr / "clips", parquet / "clips")
    files = sorted(parquet.glob("*.parquet"))
    rows, rejects = make(
        script, "x.parquet", parquet / "train.jsonl", backbones[1], parquet=files, text_column="sentence", limit=10
    )
    assert [row["audio"] for row in rows[-2:]] == ["train.audio/000000/000000007.flac", "clips/0.flac"]
    assert len(rows) == 9 and [reject["index"] for reject in rejects] == [8]
    settings = json.loads((parquet / "train.settings.json").read_text())
    assert [file["name"] for file in settings["source"]["parquet"]] == [file.name for file in files]


def test_a_column_that_does_not_exist_is_named(script, parquet, backbones):
    with pytest.raises(ValueError, match=r"no column 'speech', only \['audio', 'sentence'\]: see --audio_column"):
        make(
            script,
            *("x.parquet", parquet / "out.jsonl", backbones[1]),
            parquet=sorted(parquet.glob("*.parquet")),
            audio_column="speech",
        )


# Paths


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
def test_audio_outside_the_folder_of_the_data_needs_permission(script, asr, backbones, tmp_path, how):
    shutil.copy(asr / "clips/0.flac", tmp_path / "outside.flac")
    (asr / "link").symlink_to(tmp_path)
    audio = {"parent": "../outside.flac", "absolute": str(tmp_path / "outside.flac"), "link": "link/outside.flac"}[how]
    write_lines(asr / "asr.jsonl", [*read_lines(asr / "asr.jsonl"), {"audio": audio, "text": "RUN"}])
    with pytest.raises(ValueError, match=r"asr\.jsonl, line 9: the audio path '.*' leaves the folder of the data"):
        make(script, asr / "asr.jsonl", asr / "out.jsonl", backbones[1])
    assert not (asr / "out.settings.json").exists(), "it is refused before anything is made"
    rows, _ = make(script, asr / "asr.jsonl", asr / "out.jsonl", backbones[1], allow_outside_paths=True)
    assert (asr / rows[-1]["audio"]).samefile(tmp_path / "outside.flac")


def test_audio_is_found_from_an_output_folder_that_is_a_symbolic_link(script, asr, backbones, tmp_path):
    """Paths were relative by name: "../asr/clips" from a linked folder led to the parent of the link's target."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    rows, _ = make(script, asr / "asr.jsonl", tmp_path / "near/train.jsonl", backbones[1], limit=1)
    assert (tmp_path / "near" / rows[0]["audio"]).samefile(asr / "clips/0.flac")


def test_a_row_of_a_parquet_file_cannot_leave_its_folder_either(script, asr, backbones):
    table = pyarrow.table({"audio": [{"bytes": None, "path": "../../etc/passwd"}], "text": ["RUN"]})
    pyarrow.parquet.write_table(table, asr / "evil.parquet")
    with pytest.raises(ValueError, match=r"'\.\./\.\./etc/passwd' leaves the folder of the data"):
        make(script, asr / "evil.parquet", asr / "out.jsonl", backbones[1])


# Killed, and begun again


def killed(script, arguments, hook):
    """Run it in a forked process that `hook` may kill. True if it was killed, False if it came to its end."""

    def child():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            hook()
            script.main(arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()  # else the test run would wait for it at its own end
        pytest.fail("the forked process hangs")
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_now():
    os.kill(os.getpid(), signal.SIGKILL)


def at_sync(count, torn=None):
    """Kill at the `count`-th time that something is to be on the disk; `torn`: of an appended line only so much is."""

    def hook():
        calls, sync = 0, os.fsync

        def fsync(descriptor):
            nonlocal calls
            calls += 1
            if calls == count:
                if torn is not None:
                    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                    if path.name.startswith("part-"):
                        content = path.read_bytes()
                        last = content.rstrip(b"\n").rfind(b"\n") + 1
                        os.truncate(path, last + int(torn * (len(content) - last)))
                kill_now()
            sync(descriptor)

        os.fsync = fsync

    return hook


@pytest.fixture
def answers_tell_their_batch(script, monkeypatch):
    """A stand-in for the LLM, quick, and more touchy: its answers depend on all that was asked with them."""

    class Engine:
        def answer(self, prompts, seeds):
            asked = hashlib.sha256(json.dumps([prompts, seeds]).encode()).hexdigest()
            return [sys.modules["training_data.engines"].Answer(f"{seed} of {asked}", True) for seed in seeds]

    monkeypatch.setattr(script, "make_engine", lambda *arguments: Engine())


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.usefixtures("answers_tell_their_batch")
def test_killed_at_any_point_it_goes_on_and_ends_with_the_same_files(script, asr, parquet, backbones):
    """Every place where something must be on the disk: settings, part, audio, blocks, rejects, output."""
    files = {"parquet": sorted(parquet.glob("*.parquet")), "text_column": "sentence"}
    changes = {**files, "batch_size": 4}
    make(script, "x.parquet", asr / "whole/train.jsonl", backbones[1], **changes)
    expected = everything_in(asr / "whole")
    assert {path.name for path in expected} >= {"train.jsonl", "train.rejects.jsonl", "train.settings.json"}
    count = 0
    while True:
        count += 1
        folder = asr / f"killed{count}"
        arguments = options_for("x.parquet", folder / "train.jsonl", backbones[1], **changes)
        if not killed(script, arguments, at_sync(count)):
            break
        make(script, "x.parquet", folder / "train.jsonl", backbones[1], **changes)
        assert everything_in(folder) == expected, f"killed at sync {count}"
    assert count > 20, "the kill came at many places"
    assert everything_in(folder) == expected


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("answers_tell_their_batch")
def test_killed_again_and_again_in_the_middle_of_lines_nothing_is_lost_or_doubled(script, asr, backbones, seed):
    changes = {"templates": ["continue", "repeat"], "batch_size": 1}
    make(script, asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1], **changes)
    arguments = options_for(asr / "asr.jsonl", asr / "killed/train.jsonl", backbones[1], **changes)
    generator, kills = random.Random(seed), 0
    while killed(script, arguments, at_sync(generator.randint(1, 6), torn=generator.random())):
        kills += 1
        assert kills < 60
    assert kills >= 2
    assert everything_in(asr / "killed") == everything_in(asr / "whole")


@pytest.mark.long
def test_killed_while_removing_the_parts_it_only_removes_the_rest(script, asr, backbones):
    make(script, asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1])
    arguments = options_for(asr / "asr.jsonl", asr / "killed/train.jsonl", backbones[1])

    def hook():
        def half(folder):
            next(folder.glob("part-*.jsonl")).unlink()
            kill_now()

        shutil.rmtree = half

    assert killed(script, arguments, hook)
    assert (asr / "killed/train.parts").exists()
    script.main(arguments)
    assert everything_in(asr / "killed") == everything_in(asr / "whole")


@pytest.mark.long
def test_two_processes_go_on_where_one_was_killed_and_end_with_the_same_files(script, asr, backbones):
    changes = {"temperature": 1.0, "batch_size": 1}
    make(script, asr / "asr.jsonl", asr / "whole/train.jsonl", backbones[1], **changes)
    arguments = options_for(asr / "asr.jsonl", asr / "two/train.jsonl", backbones[1], **changes)
    assert killed(script, arguments, at_sync(6))
    done = (asr / "two/train.parts/part-00000.jsonl").read_bytes().count(b"\n")
    assert 0 < done < 5
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(EXAMPLES / "make_training_data.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "8 rows, made by 2 process(es)" in launched.stdout
    assert "process 1 of 2" in launched.stderr
    assert everything_in(asr / "two") == everything_in(asr / "whole")


# Begun otherwise


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, r"seed: 0, now 1"),
        ({"normaliser": "none"}, r"normaliser: 'librispeech', now 'none'"),
        ({"templates": "repeat"}, r"templates: .*'continue'.*, now .*'repeat'.*"),
        ({"batch_size": 3}, r"batch_size: 2, now 3"),
    ],
)
@pytest.mark.parametrize("state", ["complete", "killed"])
def test_other_settings_are_refused_and_leave_all_as_it_was(script, asr, backbones, changes, message, state):
    output = asr / "train.jsonl"
    if state == "complete":
        make(script, asr / "asr.jsonl", output, backbones[1], limit=4)
    else:
        assert killed(script, options_for(asr / "asr.jsonl", output, backbones[1], limit=4), at_sync(5))
    before = everything_in(asr)
    with pytest.raises(ValueError, match=rf"train\.jsonl was begun with other settings \({message}\)"):
        make(script, asr / "asr.jsonl", output, backbones[1], limit=4, **changes)
    assert everything_in(asr) == before


def test_changed_data_or_another_llm_are_other_settings(script, asr, backbones, tmp_path):
    make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    shutil.copytree(backbones[1], tmp_path / "text")
    make(script, asr / "asr.jsonl", asr / "train.jsonl", tmp_path / "text")  # a copy is the same
    weights = tmp_path / "text/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"other settings \(model: "):
        make(script, asr / "asr.jsonl", asr / "train.jsonl", tmp_path / "text")
    (asr / "asr.jsonl").write_text((asr / "asr.jsonl").read_text().replace("STEW", "SOUP"))
    with pytest.raises(ValueError, match=r"other settings \(source: "):
        make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1])


def test_a_complete_run_does_nothing_again(script, asr, backbones, capsys):
    make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    before = (asr / "train.jsonl").stat().st_mtime_ns
    make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert "train.jsonl is complete. Nothing to do." in capsys.readouterr().out
    assert (asr / "train.jsonl").stat().st_mtime_ns == before


def test_a_file_of_somebody_else_is_not_overwritten(script, asr, backbones):
    (asr / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"exists, but not .*train\.settings\.json, which tells how it was made"):
        make(script, asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert (asr / "train.jsonl").read_text() == "mine"


def test_two_runs_cannot_write_the_same_files(script, asr, backbones):
    arguments = options_for(asr / "asr.jsonl", asr / "train.jsonl", backbones[1])
    assert killed(script, arguments, at_sync(5))
    with FileLock(asr / "train.parts/part-00000.jsonl.lock"):
        with pytest.raises(RuntimeError, match=r"part-00000\.jsonl is being written by another run"):
            script.main(arguments)
    script.main(arguments)


def test_a_damaged_line_before_the_last_is_an_error_and_not_cut(script, asr, backbones):
    arguments = options_for(asr / "asr.jsonl", asr / "train.jsonl", backbones[1], batch_size=1)
    assert killed(script, arguments, at_sync(8))
    part = asr / "train.parts/part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0].replace(b"{", b"", 1) + b"".join(lines[1:]))
    before = part.read_bytes()
    with pytest.raises(RuntimeError, match=r"part-00000\.jsonl, line 1 is damaged"):
        script.main(arguments)
    assert part.read_bytes() == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "x"}, r"Give one source of rows"),
        ({"manifest": None}, r"Give one source of rows"),
        (
            {"normaliser": "mine"},
            r"--normaliser must be one of \['none', 'librispeech', 'gigaspeech', 'common_voice'\]",
        ),
        ({"engine": "mine"}, r"--engine must be transformers or vllm, got 'mine'"),
        ({"temperature": -1}, r"--temperature must be 0 or more .* got -1\.0 and 1\.0"),
        ({"top_p": 0}, r"--top_p above 0 up to 1, got 0\.0 and 0\.0"),
        ({"batch_size": 0}, r"--batch_size must be at least 1, got 0"),
        ({"output": "train.csv"}, r"--output must be a \.jsonl file, got 'train\.csv'"),
        ({"max_new_tokens": 500}, r"The LLM has 256 positions, and --max_new_tokens 500 leaves none for prompts"),
    ],
)
def test_options_that_cannot_be_are_named(script, asr, backbones, changes, message):
    with pytest.raises(ValueError, match=message):
        script.main(options_for(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], **changes))


def test_the_source_is_not_overwritten(script, asr, backbones):
    with pytest.raises(ValueError, match=r"is the source manifest itself"):
        make(script, asr / "asr.jsonl", asr / "clips/../asr.jsonl", backbones[1])
