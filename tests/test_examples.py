"""The scripts of examples/, in short forms."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, HfArgumentParser, pipeline

from examples import infer, train
from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.training.building import build_model, build_processor, make_trainer, warn_of_endless_answers
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing import BlspKdProcessor
from processing.manifests import read_manifest
from processing.publishing.verify import ELSEWHERE
from processing.spoken_inputs import user_turn
from processing.training_rows import responses
from processing.training_rows.options import DataOptions
from tests.helpers.prompts import CHAT_TEMPLATE, clip, make_tokenizer
from tests.helpers.shipping import run_python

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*arguments, cwd=ROOT):
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the default run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("default_run")
    output = run(
        EXAMPLES / "train.py",
        *("--output_dir", folder / "model", "--cache_dir", folder / "clips", "--max_steps", "3", "--save_steps", "2"),
        *("--num_utterances", "24", "--num_eval_utterances", "17", "--logging_steps", "1", "--plora", "true"),
        *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--disable_tqdm", "true"),
    )
    return folder, output


@pytest.mark.long
def test_default_run_leaves_results_a_table_and_three_answers(trained):
    folder, output = trained
    results = json.loads((folder / "model" / "results.json").read_text())
    for side in ("text_accuracy", "speech_accuracy"):
        assert set(results[side]) == {"seen_voices", "held_out_voices", "by_kind"}
        assert len(results[side]["by_kind"]) >= 8
    assert {"token_count_accuracy", "response_kl", "input_kl", "train_seconds"} <= set(results)
    assert results["text_accuracy"]["seen_voices"] > 0.8, "the embedded LLM answers text"
    assert "answers correct (exact match)" in output
    assert output.count("  answers ") == 3
    assert (folder / "model" / "checkpoint-2" / "processor_config.json").exists()


@pytest.mark.long
def test_default_run_tells_what_a_model_card_needs(trained):
    folder, _ = trained
    contents = (folder / "model" / "results.json").read_text()
    results, training = json.loads(contents), json.loads(contents)["training"]
    assert training["text_model"] == "examples/tiny_world/llm"
    assert training["data"] == {"source": "tiny world", "rows": 24, "voices": 12}
    assert training["evaluation"]["rows"] == 34
    assert (training["steps"], training["batch_size"], training["learning_rate"]) == (3, 8, 1e-3)
    assert training["encoder_learning_rate"] == 4e-4
    assert len(results["samples"]) == 3
    for sample in results["samples"]:
        assert soundfile.info(folder / "model" / sample["audio"]).duration > 0.5
        assert sample["text"] and sample["instruction"] and sample["answer"]
    assert str(folder) not in contents and str(ROOT) not in contents


@pytest.mark.long
def test_infer_answers_a_file(trained):
    folder, _ = trained
    audio = next((folder / "clips").glob("*.flac"))
    output = run(EXAMPLES / "infer.py", "--model", folder / "model", "--audio", audio, "--instruction", "Say it again.")
    processor = BlspKdProcessor.from_pretrained(folder / "model")
    model = BlspKdForCausalLM.from_pretrained(folder / "model")
    turn = user_turn("Say it again.", {"type": "audio", "path": str(audio)})
    inputs = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    new_tokens = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(new_tokens, skip_special_tokens=True)
    assert output.strip() == expected.strip() != ""


def test_infer_names_a_missing_file_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", "no/model", "--audio", str(tmp_path / "question.wav")])
    with pytest.raises(SystemExit):
        infer.main()
    assert f"--audio {tmp_path / 'question.wav'} is no file." in capsys.readouterr().err


@pytest.mark.parametrize("model", ["/no/model", "./model", "outputs/no/model", "../model", "~/model"])
def test_infer_names_a_missing_folder_before_it_asks_the_hub(model, tmp_path, monkeypatch, capsys):
    """Without a network it took half a minute of retries to find that a folder was misspelt."""
    monkeypatch.setattr(infer.AutoProcessor, "from_pretrained", lambda *_, **__: pytest.fail("it loads the model"))
    (tmp_path / "question.wav").touch()
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", model, "--audio", str(tmp_path / "question.wav")])
    with pytest.raises(SystemExit):
        infer.main()
    assert f"--model {model} is no folder, and no Hub id either." in capsys.readouterr().err


# Runs in a process of its own, that cannot import this package.
ASK = f"""
import runpy
import sys

runpy.run_path({str(ELSEWHERE)!r})["leave_package_and_network"]()
from transformers import pipeline

for folder in sys.argv[2:]:
    for task in ("audio-text-to-text", "automatic-speech-recognition"):
        pipe = pipeline(task, model=folder, trust_remote_code=True)
        print(list(pipe(sys.argv[1], instruction="Say it again.", do_sample=False).values()))
"""


@pytest.mark.long
def test_what_training_saves_works_in_pipelines(trained, tmp_path):
    """On a trained model "audio-text-to-text" was an unknown task, and speech recognition a wall of tracebacks."""
    folder, _ = trained
    audio, saved = next((folder / "clips").glob("*.flac")), [folder / "model", folder / "model" / "checkpoint-2"]
    told = run_python(ASK, audio, *saved, folder=tmp_path, HF_HUB_OFFLINE="1").splitlines()
    expected = []
    for path in map(str, saved):
        ask = pipeline("audio-text-to-text", model=path)
        transcribe = pipeline("automatic-speech-recognition", model=path, trust_remote_code=True)
        for pipe in (ask, transcribe):
            expected.append(str(list(pipe(str(audio), instruction="Say it again.", do_sample=False).values())))
    assert told == expected and all(len(answer) > len("['']") for answer in told)


@pytest.mark.long
def test_training_from_a_manifest_makes_the_missing_responses(tmp_path):
    rows = [{"audio": f"{index}.wav", "text": "the red cat ran to the sea", "voice": "a"} for index in range(4)]
    for index, row in enumerate(rows):
        soundfile.write(tmp_path / row["audio"], clip(0.8, seed=index), 16_000)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{**row, "instruction": "Name the colour.", "answer": "red", "kind": "colour"} for row in rows]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    run(
        EXAMPLES / "train.py",
        *("--train_manifest", tmp_path / "train.jsonl", "--eval_manifest", tmp_path / "eval.jsonl"),
        *("--output_dir", tmp_path / "model", "--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--adapter", "subsampler", "--freeze_speech_encoder", "true"),
    )
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["text_accuracy"] == {"seen_voices": 1.0, "by_kind": {"colour": 1.0}}
    assert "input_kl" not in results
    assert results["training"]["data"] == {"source": "train.jsonl", "rows": 4, "voices": 1}
    assert results["training"]["encoder_learning_rate"] is None, "it is frozen"


@pytest.mark.long
def test_a_model_is_trained_further(trained, tmp_path):
    folder, _ = trained
    run(
        EXAMPLES / "train.py",
        *("--start_from", folder / "model", "--output_dir", tmp_path / "further", "--cache_dir", folder / "clips"),
        *("--max_steps", "1", "--learning_rate", "0", "--num_utterances", "8", "--num_eval_utterances", "3"),
        *("--use_cpu", "true", "--disable_tqdm", "true"),
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "further"))
    assert set(before) == set(after) and any("plora" in name for name in after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} starts where it was"
    first, last = (
        json.loads((path / "results.json").read_text())["training"] for path in (folder / "model", tmp_path / "further")
    )
    del first["before"]
    assert last["before"] == [first] and last["text_model"] == first["text_model"]
    assert last["steps"] == 1 and last["data"]["rows"] == 8


@pytest.mark.long
@pytest.mark.parametrize("inside", ["", "checkpoint-2"])
def test_further_training_does_not_write_over_where_it_started(trained, inside, monkeypatch):
    folder, _ = trained
    start, output = str(folder / "model" / inside), str(folder / "samples" / ".." / "model")
    monkeypatch.setattr(sys, "argv", ["train.py", "--start_from", start, "--output_dir", output, "--use_cpu", "true"])
    with pytest.raises(ValueError, match="holds the model of --start_from. Give a folder of its own"):
        train.main()


@pytest.mark.parametrize("thin", [False, True])
def test_a_further_stage_has_its_own_settings_and_the_models_weights(tmp_path, thin):
    options = ModelOptions(thin=thin, freeze_speech_encoder=True, speech_padding="max_length")
    processor = build_processor(options)
    first = build_model(options, processor)
    first.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")

    options = ModelOptions(start_from=str(tmp_path / "first"), distillation='{"input_kl": 0.5}')
    assert build_processor(options).audio_token_id == first.config.audio_token_id
    second = build_model(options, None)
    assert (second.config.backbones is not None) == thin
    assert second.config.speech_padding == "do_not_pad" and not second.audio_tower.pad_to_window
    assert second.config.distillation["input_kl"] == 0.5 and second.audio_tower.config.apply_spec_augment
    assert parts_trained(second) == {"adapter", "audio_tower"}
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name

    second.save_pretrained(tmp_path / "second")
    options = ModelOptions(
        start_from=str(tmp_path / "second"), freeze_speech_encoder=True, spec_augment=False, dtype="bfloat16"
    )
    if thin:
        with pytest.raises(ValueError, match=r"a thin checkpoint, was trained; .* full=True"):
            build_model(options, None)
        return
    third = build_model(options, None)
    assert parts_trained(third) == {"adapter"} and not third.audio_tower.config.apply_spec_augment
    for name, value in third.state_dict().items():
        assert value.dtype == (torch.float32 if name.startswith("adapter.") else torch.bfloat16)
        if name.startswith("adapter."):  # what is trained on is not rounded by the dtype of the rest
            assert torch.equal(value, second.state_dict()[name]), name
        assert torch.allclose(value.float(), first.state_dict()[name], rtol=2**-7, atol=0), name


def parts_trained(model):
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_of_a_model_that_is_trained_further_are_not_asked_for():
    with pytest.raises(ValueError, match="brings its own adapter, thin. Leave out --adapter, --thin, or"):
        ModelOptions(start_from="org/model", adapter="subsampler", thin=True)


def test_a_further_stage_may_add_partial_lora_and_keeps_one_that_is_there(tmp_path):
    """A recognition warm-up runs no LLM, so partial LoRA belongs to the stage after it, but was refused there."""
    first = ModelOptions(freeze_speech_encoder=True, transcription_instruction="Say it again, word for word.")
    processor = build_processor(first)
    build_model(first, processor).save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    further = ModelOptions(start_from=str(tmp_path / "first"), freeze_speech_encoder=True, plora=True)
    second = build_model(further, None)
    assert parts_trained(second) == {"adapter", "language_model"} and second.config.plora["r"] == 16
    assert all(parameter.requires_grad for parameter in second.plora.parameters)
    assert build_processor(further).transcription_instruction == "Say it again, word for word."
    second.save_pretrained(tmp_path / "second")
    third = build_model(replace(further, start_from=str(tmp_path / "second")), None)
    for name, value in second.state_dict().items():
        assert torch.equal(third.state_dict()[name], value), name


def test_partial_lora_is_switched_or_given_options():
    parser = HfArgumentParser((ModelOptions,))
    given = {"true": True, "1": True, "False": False, '{"r": 8}': {"r": 8}}
    for text, expected in given.items():
        assert parser.parse_args_into_dataclasses(["--plora", text])[0].plora == expected
    assert parser.parse_args_into_dataclasses(["--plora"])[0].plora is True
    assert parser.parse_args_into_dataclasses([])[0].plora is False
    for wrong in ("yes, please", "8", "null"):
        with pytest.raises(
            ValueError, match=f"--plora must be true, false, or a JSON object of options, got '{wrong}'"
        ):
            ModelOptions(plora=wrong)
    options = ModelOptions(plora='{"r": 8, "target_modules": ["q_proj"]}', freeze_speech_encoder=True)
    assert build_model(options, build_processor(options)).config.plora["r"] == 8


def test_a_manifest_row_without_text_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav", "text": "words"}\n{"audio": "b.wav", "text": ""}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, row 2: expected 'audio' and 'text'"):
        read_manifest(str(tmp_path / "bad.jsonl"))


def test_options_of_the_chat_template_come_from_the_command_line_or_the_model(tmp_path, backbones):
    llm = make_tokenizer()
    llm.chat_template = "{% if enable_thinking %}(thinks){% endif %}" + CHAT_TEMPLATE
    llm.save_pretrained(tmp_path / "llm")
    names = {"speech_model": str(backbones[0]), "text_model": str(tmp_path / "llm")}
    first = build_processor(ModelOptions(**names, chat_template_kwargs='{"enable_thinking": true}'))
    first.save_pretrained(tmp_path / "first")
    further = {"start_from": str(tmp_path / "first")}
    for options, thinks in [({}, True), ({"chat_template_kwargs": '{"enable_thinking": false}'}, False)]:
        processor = build_processor(ModelOptions(**further, **options))
        assert processor.chat_template_kwargs == {"enable_thinking": thinks}
        prompt = processor.apply_chat_template([{"role": "user", "content": "cat"}])
        assert prompt.startswith("(thinks)") == thinks
    with pytest.raises(ValueError, match="--chat_template_kwargs must be a JSON object"):
        build_processor(ModelOptions(**names, chat_template_kwargs="enable_thinking=true"))


def test_an_end_of_answers_that_generation_does_not_stop_at_is_warned_of(processor, caplog):
    for ends, num_warnings in ((2, 0), ([7, 2], 0), (7, 1), ([7], 1), (None, 1)):
        caplog.clear()
        config = SimpleNamespace(distillation={"end_of_turn_kl": 0.0})
        model = SimpleNamespace(config=config, generation_config=GenerationConfig(eos_token_id=ends))
        warn_of_endless_answers(model, processor)
        assert len(caplog.messages) == num_warnings
        assert all("trained to end with '<|end|>' (token 2)" in message for message in caplog.messages)
    model.config.distillation["end_of_turn_kl"] = 0.5  # which would never count a token
    with pytest.raises(ValueError, match="end_of_turn_kl"):
        warn_of_endless_answers(model, processor)


@pytest.mark.parametrize(
    "answer, message", [("", "with nothing"), ("<think>\nred", "answers of the LLM end within a thought")]
)
def test_an_llm_that_answers_nothing_stops_before_training(tmp_path, monkeypatch, answer, message):
    soundfile.write(tmp_path / "a.wav", clip(0.8), 16_000)
    rows = [{"audio": "a.wav", "text": "the red cat", "response": "red"}, {"audio": "a.wav", "text": "the sea"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(responses, "answer_rows", lambda model, processor, rows, *_, **__: [answer] * len(rows))
    data = DataOptions(train_manifest=str(tmp_path / "train.jsonl"))
    args = Arguments(output_dir=str(tmp_path / "model"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=rf"1 of 1 .*{message}.*train\.jsonl, row 2"):
        make_trainer(ModelOptions(), data, args)


@pytest.mark.long
def test_digit_manifest_joins_recordings_and_holds_one_speaker_out(tmp_path):
    words = "zero one two three four five six seven eight nine".split()
    rows = []
    for speaker in ("ann", "bob", "cas"):
        for digit, word in enumerate(words):
            for take in range(3):
                name = f"{speaker}_{digit}_{take}.flac"
                soundfile.write(tmp_path / name, clip(0.3, seed=digit, rate=8000), 8000)
                rows.append({"file_name": name, "text": word, "speaker": speaker})
    rows.append({"file_name": "other.flac", "text": "a sentence", "speaker": "dan"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "digits"
    printed = run(
        *("-m", "examples.experiments.make_digit_manifest"),
        *("--recordings", tmp_path / "metadata.jsonl", "--output", output, "--num_train", "12", "--num_test", "8"),
    )
    assert "1 recordings of other texts" in printed and "held out: cas" in printed
    train, test = ([json.loads(line) for line in (output / f"{name}.jsonl").open()] for name in ("train", "test"))
    assert {row["voice"] for row in train} == {"ann", "bob"} and {row["voice"] for row in test} == {"ann", "bob", "cas"}
    for row in train + test:
        samples, rate = soundfile.read(output / row["audio"])
        assert rate == 8000 and 2 <= len(row["text"].split()) <= 6
        assert len(samples) / rate > 0.3 * len(row["text"].split()) and np.abs(samples).max() > 0.4
        if row["kind"] == "reverse":
            assert row["answer"].split() == row["text"].split()[::-1]
