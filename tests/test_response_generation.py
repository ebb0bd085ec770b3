"""Responses made by the LLM: what becomes of good and bad rows, of embedded audio, of paths and of options."""

import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM

from examples.make_training_data import main
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.evaluation.answering import answer_rows
from processing.manifests import DEFAULT_INSTRUCTION, read_manifest
from processing.response_generation.engines import Answer, TransformersEngine
from tests.helpers.asr_data import TEXTS, make, options_for, read_lines, write_lines
from tests.helpers.audio_files import encode_by_ffmpeg
from tests.helpers.prompts import CHAT_TEMPLATE, clip, make_tokenizer

THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}",
)


# What comes out


def test_rows_are_what_training_reads_and_answers_are_those_that_training_would_make(asr, backbones, processor, capfd):
    rows, rejects = make(asr / "asr.jsonl", asr / "train.jsonl", backbones[1], templates=["continue", "repeat"])
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


def test_an_answer_that_was_cut_is_marked(backbones, processor, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(backbones[1])
    ends = set(range(2, 300, 12))
    llm.generation_config.eos_token_id = sorted(ends)
    llm.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), processor, "cpu", "float32", 4, 12, 0, 1)
    prompts = [[1, 5 + index] for index in range(12)]
    answers = engine.answer(prompts, list(range(12)))
    for prompt, answer in zip(prompts, answers):
        tokens = llm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 2:]
        assert answer.is_finished == (int(tokens[-1]) in ends)
    assert {answer.is_finished for answer in answers} == {True, False}, "the test sees both"


def test_bad_rows_are_rejected_with_their_line_and_reason(asr, backbones):
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
    rows, rejects = make(asr / "bad.jsonl", asr / "out.jsonl", backbones[1], max_duration_s=1, max_prompt_tokens=60)
    good_lines = [index for index, (_, reason) in enumerate(lines) if reason is None]
    assert [row["id"] for row in rows] == [f"{index}-continue" for index in good_lines]
    expected = {number: reason for number, (_, reason) in enumerate(lines, start=1) if reason}
    assert [reject["line"] for reject in rejects] == [*expected]
    for reject in rejects:
        assert re.search(expected[reject["line"]], reject["reason"], re.DOTALL), reject


def test_prompts_are_those_of_training_and_inference_for_the_same_options(asr, backbones, monkeypatch, tmp_path):
    """With a thinking LLM the answers of one prompt would be trained after another."""
    llm = make_tokenizer()
    llm.chat_template = THINKING_TEMPLATE
    shutil.copytree(backbones[1], tmp_path / "llm")
    llm.save_pretrained(tmp_path / "llm")
    answer, asked = Answer, []

    def answer_yes(self, prompts, seeds):
        asked.extend(prompts)
        return [answer("yes", True) for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "answer", answer_yes)
    texts = {}
    for given in (None, '{"enable_thinking": false}', '{"enable_thinking": true}'):
        asked.clear()
        output = asr / f"out{len(texts)}.jsonl"
        rows, _ = make(asr / "asr.jsonl", output, tmp_path / "llm", chat_template_kwargs=given, max_new_tokens=1)
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
def test_an_answer_that_cannot_be_trained_on_is_a_reject(asr, backbones, monkeypatch, text, fault):
    answer = Answer

    def answer_one_badly(self, prompts, seeds):
        return [answer(text if index == 1 else "yes", True) for index in range(len(prompts))]

    monkeypatch.setattr(TransformersEngine, "answer", answer_one_badly)
    rows, rejects = make(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], limit=2)
    assert [row["id"] for row in rows] == ["84-0-continue"]
    assert rejects[0]["line"] == 2
    assert rejects[0]["reason"] == f"answer: that of the LLM to template 'continue' {fault}"


# Embedded audio


def test_embedded_audio_of_a_streamed_data_set_becomes_files(asr, parquet, backbones):
    common = {"text_column": "sentence", "manifest": None}
    rows, rejects = make(parquet, asr / "hub.jsonl", backbones[1], **common, parquet=None, dataset=parquet)
    expected, _ = make(asr / "asr.jsonl", asr / "plain.jsonl", backbones[1])
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


def test_parquet_files_give_the_same_rows_and_may_name_audio_beside_them(asr, parquet, backbones):
    shutil.copytree(asr / "clips", parquet / "clips")
    files = sorted(parquet.glob("*.parquet"))
    rows, rejects = make(
        "x.parquet", parquet / "train.jsonl", backbones[1], parquet=files, text_column="sentence", limit=10
    )
    assert [row["audio"] for row in rows[-2:]] == ["train.audio/000000/000000007.flac", "clips/0.flac"]
    assert len(rows) == 9 and [reject["index"] for reject in rejects] == [8]
    settings = json.loads((parquet / "train.settings.json").read_text())
    assert [file["name"] for file in settings["source"]["parquet"]] == [file.name for file in files]


def test_a_column_that_does_not_exist_is_named(parquet, backbones):
    with pytest.raises(ValueError, match=r"no column 'speech', only \['audio', 'sentence'\]: see --audio_column"):
        make(
            *("x.parquet", parquet / "out.jsonl", backbones[1]),
            parquet=sorted(parquet.glob("*.parquet")),
            audio_column="speech",
        )


# Paths


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
def test_audio_outside_the_folder_of_the_data_needs_permission(asr, backbones, tmp_path, how):
    shutil.copy(asr / "clips/0.flac", tmp_path / "outside.flac")
    (asr / "link").symlink_to(tmp_path)
    audio = {"parent": "../outside.flac", "absolute": str(tmp_path / "outside.flac"), "link": "link/outside.flac"}[how]
    write_lines(asr / "asr.jsonl", [*read_lines(asr / "asr.jsonl"), {"audio": audio, "text": "RUN"}])
    with pytest.raises(ValueError, match=r"asr\.jsonl, line 9: the audio path '.*' leaves the folder of the data"):
        make(asr / "asr.jsonl", asr / "out.jsonl", backbones[1])
    assert not (asr / "out.settings.json").exists(), "it is refused before anything is made"
    rows, _ = make(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], allow_outside_paths=True)
    assert (asr / rows[-1]["audio"]).samefile(tmp_path / "outside.flac")


def test_audio_is_found_from_an_output_folder_that_is_a_symbolic_link(asr, backbones, tmp_path):
    """Paths were relative by name: "../asr/clips" from a linked folder led to the parent of the link's target."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    rows, _ = make(asr / "asr.jsonl", tmp_path / "near/train.jsonl", backbones[1], limit=1)
    assert (tmp_path / "near" / rows[0]["audio"]).samefile(asr / "clips/0.flac")


def test_a_row_of_a_parquet_file_cannot_leave_its_folder_either(asr, backbones):
    table = pyarrow.table({"audio": [{"bytes": None, "path": "../../etc/passwd"}], "text": ["RUN"]})
    pyarrow.parquet.write_table(table, asr / "evil.parquet")
    with pytest.raises(ValueError, match=r"'\.\./\.\./etc/passwd' leaves the folder of the data"):
        make(asr / "evil.parquet", asr / "out.jsonl", backbones[1])


# Options


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
        ({"vllm_options": "{}"}, r"--vllm_options are of --engine vllm, which is not given"),
        ({"engine": "vllm", "vllm_options": "{a}"}, r"--vllm_options must be a JSON object, got '\{a\}'"),
        ({"engine": "vllm", "vllm_options": "[]"}, r"must be a JSON object of further arguments, but it is none"),
        ({"engine": "vllm", "vllm_options": '{"dtype": "auto"}'}, r"but other options set \['dtype'\]"),
        ({"temperature": -1}, r"--temperature must be 0 or more .* got -1\.0 and 1\.0"),
        ({"top_p": 0}, r"--top_p above 0 up to 1, got 0\.0 and 0\.0"),
        ({"batch_size": 0}, r"--batch_size must be at least 1, got 0"),
        ({"output": "train.csv"}, r"--output must be a \.jsonl file, got 'train\.csv'"),
        ({"max_new_tokens": 500}, r"The LLM has 256 positions, and --max_new_tokens 500 leaves none for prompts"),
    ],
)
def test_options_that_cannot_be_are_named(asr, backbones, changes, message):
    with pytest.raises(ValueError, match=message):
        main(options_for(asr / "asr.jsonl", asr / "out.jsonl", backbones[1], **changes))


def test_the_source_is_not_overwritten(asr, backbones):
    with pytest.raises(ValueError, match=r"is the source manifest itself"):
        make(asr / "asr.jsonl", asr / "clips/../asr.jsonl", backbones[1])
