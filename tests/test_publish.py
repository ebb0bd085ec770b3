"""Publishing: a folder that is complete or absent, and a card that tells what is so. `test_upload.py` uploads it.

The model card of the default run is what `publish.py` writes: after training it anew, publish it to a folder named
blsp-kd-tiny-world, and copy README.md to model_card.md and publication.json to tests/data/default_publication.json.
"""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.thin_checkpoints import trained_names
from processing import BlspKdPipeline, BlspKdProcessor, BlspKdSpeechRecognitionPipeline
from processing.publishing.card import TEMPLATE, make_card
from processing.publishing.facts import count_parameters
from processing.publishing.publication import complete_or_nothing
from processing.publishing.verify import compare, run_script
from processing.spoken_inputs import user_turn
from tests.helpers.models import make_model, make_thin_model, text_config
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.shipping import PACKAGE_FOLDERS, assert_tells_no_path, contents
from tests.helpers.stand_in_hub import REPO_ID, StandInHub, assert_holds

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "publish.py"
publish = importlib.util.module_from_spec(importlib.util.spec_from_file_location("publish_script", SCRIPT))
publish.__spec__.loader.exec_module(publish)

CODE_ROOTS = ("configuration_blsp_kd", "modeling_blsp_kd", "processing_blsp_kd", "pipeline_blsp_kd")
MEMORY = {"dtype": "float32", "peak_mb": 500.0, "before_mb": 450.0, "clip_s": 0.6}
PARTS = ("audio_tower", "language_model")
SAMPLES = [
    {"audio": f"samples/{number}.wav", "text": "the red | cat", "instruction": "repeat the words", "answer": "red"}
    for number in (1, 2)
]
RESULTS = {
    "train_seconds": 12.3,
    "training": {
        "text_model": "org/llm",
        "speech_model": "org/ears",
        "data": {"source": "train.jsonl", "rows": 1234, "voices": None},
        "evaluation": {"source": "eval.jsonl", "rows": 56, "voices": 2},
        "steps": 100,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "encoder_learning_rate": None,
        "schedule": "cosine",
        "warmup_steps": 10,
        "seed": 1,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
    },
    "token_count_accuracy": 0.875,
    "response_kl": 0.5,
    "input_kl": 0.25,
    "text_accuracy": {"seen_voices": 0.9, "held_out_voices": 0.8, "by_kind": {"colour": 0.7, "sum": 1.0}},
    "speech_accuracy": {"seen_voices": 0.6, "held_out_voices": 0.5, "by_kind": {"colour": 0.4, "sum": 0.65}},
    "samples": SAMPLES,
}


def save_checkpoint(folder, model, processor, results=RESULTS):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "samples").mkdir()
    for number in (1, 2):
        soundfile.write(folder / f"samples/{number}.wav", clip(0.6, seed=number), SAMPLING_RATE)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def run_publish(monkeypatch, *arguments, memory=MEMORY):
    """The command in this process; measuring memory takes another one."""
    monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
    monkeypatch.setattr(publish, "measure_memory", lambda *arguments: memory)
    publish.main()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    return save_checkpoint(folder, make_model(plora=True), processor)


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("publications") / "my-model"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_publish(monkeypatch, checkpoint, folder, "--licence", "mit", "--text_model", "org/llm=apache-2.0")
    return folder


# -- what the folder holds --------------------------------------------------------------------------------------------


def test_it_ships_the_code_that_loading_needs_and_no_other(published):
    sources = {path.stem: path.read_text() for folder in PACKAGE_FOLDERS for path in folder.glob("*.py")}
    needed, found = set(), set(CODE_ROOTS)
    while found:
        needed |= found
        imports = {name for stem in found for name in re.findall(r"^from \.(\w+) import", sources[stem], re.M)}
        found = imports - needed
    assert {path.stem for path in published.glob("*.py")} == needed | {"handler"}
    assert {"trainer", "data_collator"} & needed == set(), "what only training needs stays at home"
    for stem in needed:
        assert (published / f"{stem}.py").read_text() == sources[stem]
    for name in ("handler.py", "requirements.txt"):
        assert (published / name).read_bytes() == TEMPLATE.with_name(name).read_bytes()
    assert (published / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_its_config_names_every_auto_class_and_both_pipelines(published):
    config = json.loads((published / "config.json").read_text())
    auto_classes = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoProcessor"}
    assert set(config["auto_map"]) == auto_classes
    assert set(config["custom_pipelines"]) == {"audio-text-to-text", "automatic-speech-recognition"}
    named = [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]
    for module, name in (reference.split(".") for reference in named):
        assert f"class {name}(" in (published / f"{module}.py").read_text()


def test_it_holds_all_that_is_not_code(published):
    expected = {"README.md", "LICENSE", "requirements.txt", "publication.json", "samples/1.wav", "samples/2.wav"}
    expected |= {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    expected |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name for name in contents(published) if not name.endswith(".py")} == expected


def test_it_tells_no_path_of_this_machine(published, checkpoint, backbones):
    assert_tells_no_path(published, checkpoint.parent, published.parent, backbones[0].parent)


def test_samples_carry_what_the_model_answers(published, checkpoint):
    model, processor = BlspKdForCausalLM.from_pretrained(checkpoint), BlspKdProcessor.from_pretrained(checkpoint)
    answers = []
    for number in (1, 2):
        audio = {"type": "audio", "path": str(published / f"samples/{number}.wav")}
        chat = [{"role": "user", "content": [{"type": "text", "text": "repeat the words"}, audio]}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    widget = ModelCard.load(published / "README.md").data["widget"]
    assert [example["src"] for example in widget] == ["samples/1.wav", "samples/2.wav"]
    assert [example["output"]["text"] for example in widget] == answers and any(answers)
    for number in (1, 2):
        name = f"samples/{number}.wav"
        assert (published / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_manifest_of_samples_comes_before_those_of_training(checkpoint, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "other.flac", clip(0.7), SAMPLING_RATE)
    (tmp_path / "rows.jsonl").write_text('{"audio": "other.flac", "text": "cat", "instruction": "repeat the words"}\n')
    run_publish(monkeypatch, checkpoint, tmp_path / "made", "--samples", tmp_path / "rows.jsonl")
    assert [path.name for path in (tmp_path / "made" / "samples").iterdir()] == ["1.flac"]
    assert "| `samples/1.flac` | cat | repeat the words |" in (tmp_path / "made" / "README.md").read_text()


# -- thin checkpoints -------------------------------------------------------------------------------------------------


def test_a_thin_checkpoint_of_local_folders_is_refused_or_made_full(backbones, processor, tmp_path, monkeypatch):
    """It would ask everyone for folders of this machine."""
    model = make_thin_model(backbones)
    thin = save_checkpoint(tmp_path / "thin", model, processor, results=None)
    with pytest.raises(SystemExit, match="audio_tower and language_model came from a folder .* --full"):
        run_publish(monkeypatch, thin, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    run_publish(monkeypatch, thin, tmp_path / "made", "--full")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "made")
    assert loaded.config.backbones is None
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert_tells_no_path(tmp_path / "made", tmp_path, backbones[0].parent)


@pytest.mark.long
def test_a_thin_checkpoint_of_the_hub_is_published_thin_and_answers_elsewhere(
    hub_backbones, processor, tmp_path, monkeypatch
):
    thin = save_checkpoint(tmp_path / "thin", make_thin_model(hub_backbones), processor)
    # Once with the real measurement: a process that has the base models from the Hub's cache.
    monkeypatch.setattr(sys, "argv", ["publish.py", str(thin), str(tmp_path / "made")])
    publish.main()
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert card.data.base_model == ["org/ears", "org/llm"] and card.data["base_model_relation"] == "finetune"
    assert "loading fetches the base models" in card.text
    memory = json.loads((tmp_path / "made" / "publication.json").read_text())["facts"]["memory"]
    assert memory["peak_mb"] > memory["before_mb"] > 100 and memory["dtype"] == "float32"
    assert "org/llm" in (tmp_path / "made" / "config.json").read_text()
    assert_tells_no_path(tmp_path / "made", tmp_path)


def test_a_thin_checkpoint_of_local_folders_is_published_under_hub_ids(
    backbones, hub_backbones, processor, tmp_path, monkeypatch
):
    folders = {part: shutil.copytree(folder, tmp_path / part) for part, folder in zip(PARTS, backbones)}
    thin = save_checkpoint(tmp_path / "thin", make_thin_model(folders.values()), processor, {"samples": SAMPLES})
    trained = BlspKdConfig.from_pretrained(thin).backbones
    named = ("--speech_model", "org/ears=mit", "--text_model", "org/llm=apache-2.0")
    with pytest.raises(SystemExit, match=r"its audio_tower came from a folder .* that it is \(--speech_model ID\), or"):
        run_publish(monkeypatch, thin, tmp_path / "made", *named[2:])
    run_publish(monkeypatch, thin, tmp_path / "made", *named, "--dtype", "bfloat16")
    stored = BlspKdConfig.from_pretrained(tmp_path / "made").backbones
    assert stored == {
        "audio_tower": {"name_or_path": "org/ears", "trained_revision": trained["audio_tower"]["revision"]},
        "language_model": {"name_or_path": "org/llm", "trained_revision": trained["language_model"]["revision"]},
    }
    assert_tells_no_path(tmp_path / "made", tmp_path, backbones[0].parent)
    weights = load_file(tmp_path / "made" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert not any(name.startswith("audio_tower.") for name in weights)
    for source in (folders, None):  # with None: from the Hub, where org/ears is another revision
        loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "made", backbones=source)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert card.data.base_model == ["org/ears", "org/llm"]
    for part, name in zip(PARTS, hub_backbones):
        row = f"| [{name}](https://huggingface.co/{name}) | weights with the checksum {trained[part]['revision']} |"
        assert row in card.text
    assert "answered with another" not in card.text
    # What was published is published again by who has the base models in folders, even if one was changed.
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(folders["language_model"])
    elsewhere = ("--backbones", json.dumps({part: str(folder) for part, folder in folders.items()}))
    again = ("--samples", samples_of(thin, tmp_path), *elsewhere)
    with pytest.raises(ValueError, match="The language_model is another revision than in training"):
        run_publish(monkeypatch, tmp_path / "made", tmp_path / "again", *again, "--on_other_revision", "error")
    run_publish(monkeypatch, tmp_path / "made", tmp_path / "again", *again)
    assert BlspKdConfig.from_pretrained(tmp_path / "again").backbones == stored
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert "The examples here were answered with another language_model than in training, weights with" in card.text
    with pytest.raises(SystemExit, match="--text_model says org/other, but the checkpoint was made from org/llm"):
        run_publish(monkeypatch, tmp_path / "made", tmp_path / "no", *again, "--text_model", "org/other")


def samples_of(checkpoint, folder):
    shutil.copytree(checkpoint / "samples", folder / "samples")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)))
    return folder / "rows.jsonl"


@pytest.mark.long
def test_a_thin_publication_is_verified_with_local_base_models(backbones, processor, tmp_path, monkeypatch, capsys):
    """Where there is no network, they are put into the emulated cache under their Hub ids."""
    thin = save_checkpoint(tmp_path / "thin", make_thin_model(backbones), processor, {"samples": SAMPLES})
    named = ("--speech_model", "org/ears", "--text_model", "org/llm", "--dtype", "bfloat16", "--verify")
    monkeypatch.setattr(sys, "argv", ["publish.py", str(thin), str(tmp_path / "made"), *named])
    publish.main()
    checks = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAILED"))]
    assert len(checks) == 14 and all(check.startswith("ok") for check in checks)
    facts = json.loads((tmp_path / "made" / "publication.json").read_text())["facts"]
    assert facts["memory"]["dtype"] == "bfloat16"


# -- facts and card ---------------------------------------------------------------------------------------------------


def test_parameters_are_counted_by_part(backbones):
    for model in (
        make_model(plora=True),
        make_model(plora=False, freeze_speech_encoder=False),
        make_model(text={"tie_word_embeddings": True}),
        make_thin_model(backbones),
    ):
        counts = count_parameters(model)
        assert sum(part["parameters"] for part in counts.values()) == model.num_parameters()
        assert sum(part["trained"] for part in counts.values()) == model.num_parameters(only_trainable=True)
        adapter = sum(parameter.numel() for parameter in model.adapter.parameters())
        assert counts["adapter"] == {"parameters": adapter, "trained": adapter}
        assert counts["LLM"]["trained"] == 0
        assert (counts["partial LoRA"]["trained"] > 0) == (model.plora is not None)
    state = model.state_dict()
    assert sum(part["trained"] for part in counts.values()) == sum(state[name].numel() for name in trained_names(model))


def test_the_card_states_what_was_measured(published):
    card = ModelCard.load(published / "README.md")
    assert str(card) == (published / "README.md").read_text(), "the metadata survive a round trip"
    metadata = card.data.to_dict()
    assert metadata["license"] == "mit" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "audio-text-to-text" and metadata["base_model"] == ["org/ears", "org/llm"]
    assert {"custom_code", "speech", "knowledge-distillation"} <= set(metadata["tags"])
    assert "language" not in metadata, "nobody stated it"
    measured = {(result.dataset_config, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert measured == {
        ("seen_voices", "exact_match"): 0.6,
        ("held_out_voices", "exact_match"): 0.5,
        (None, "accuracy"): 0.875,
    }
    for line in (
        "# my-model",
        'MODEL = "my-model"',
        "| voices not heard in training | 0.800 | 0.500 |",
        "| weakest kind of question: colour | 0.700 | 0.400 |",
        "| base model of the LLM: [org/llm](https://huggingface.co/org/llm) | apache-2.0 |",
        "| base model of the speech encoder: [org/ears](https://huggingface.co/org/ears) | not stated |",
        "1,234 utterances of the manifest `train.jsonl`.",
        "| learning rate | 0.001, encoder frozen; cosine after 10 steps of warmup |",
        "peaks at 500 MB",
        "the red \\| cat",
    ):
        assert line in card.text, line
    assert "tiny world" not in card.text and "espeak" not in card.text


def test_the_card_tells_of_every_stage(checkpoint, tmp_path, monkeypatch):
    first = RESULTS["training"]
    second = {**first, "data": {"source": "more.jsonl", "rows": 55, "voices": None}, "steps": 7}
    for before, described in (
        ([first], ("Stage 1: 1,234 utterances", "Stage 2, the last:", "55 utterances of the manifest `more.jsonl`.")),
        (None, ("Trained further from [org/first](https://huggingface.co/org/first)", "is not recorded. After that:")),
    ):
        results = {**RESULTS, "training": {**second, "started_from": "org/first", "before": before}}
        (checkpoint / "results.json").write_text(json.dumps(results))
        run_publish(monkeypatch, checkpoint, tmp_path / f"made_{before is None}")
        text = " ".join((tmp_path / f"made_{before is None}" / "README.md").read_text().split())
        assert all(line in text for line in described)
    (checkpoint / "results.json").write_text(json.dumps(RESULTS))


def test_what_an_old_checkpoint_does_not_tell_is_not_invented(checkpoint, processor, tmp_path, monkeypatch):
    bare = save_checkpoint(tmp_path / "bare", make_model(), processor, results=None)
    run_publish(monkeypatch, bare, tmp_path / "made", memory=None)
    card = ModelCard.load(tmp_path / "made" / "README.md")
    absent = {"license", "language", "base_model", "datasets", "metrics", "widget", "model-index"}
    assert not absent & set(card.data.to_dict())
    for line in ("Not measured.", "Data and settings: not recorded.", "Memory in use: not measured.", "| not stated |"):
        assert line in card.text
    assert not (tmp_path / "made" / "samples").exists()
    # As train.py wrote it before it told what it trained on.
    old = {name: value for name, value in RESULTS.items() if name not in ("training", "samples")}
    (bare / "results.json").write_text(json.dumps(old))
    run_publish(monkeypatch, bare, tmp_path / "made")
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert "| voices heard in training | 0.900 | 0.600 |" in card.text
    assert "Questions (their number was not recorded)" in card.text and card.data.eval_results is None


def test_another_base_model_than_the_checkpoints_is_refused(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--speech_model says org/other, but the checkpoint was made from org/ears"):
        run_publish(monkeypatch, checkpoint, tmp_path / "made", "--speech_model", "org/other=mit")
    assert list(tmp_path.iterdir()) == []


def test_the_code_of_the_card_prints_the_answers_of_this_package(published, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    assert len(code) == 3
    clip_path = tmp_path / "clip.wav"
    soundfile.write(clip_path, clip(0.6), SAMPLING_RATE)
    (tmp_path / "my-model").symlink_to(published)
    monkeypatch.chdir(tmp_path)
    printed = []
    exec("".join(code), {"print": printed.append})

    model, processor = BlspKdForCausalLM.from_pretrained(published), BlspKdProcessor.from_pretrained(published)
    turn = user_turn("Repeat the words.", {"type": "audio", "path": str(clip_path)})
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(turn, **options)
    new_tokens = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    generated = processor.decode(new_tokens, skip_special_tokens=True)
    asked = BlspKdPipeline(model=model, processor=processor)(str(clip_path), instruction="Repeat the words.")
    transcribed = BlspKdSpeechRecognitionPipeline(model=model, processor=processor)(str(clip_path))
    assert printed == [asked["generated_text"], transcribed["text"], asked["generated_text"], generated]
    assert len(generated) > 5 and asked["generated_text"]


def test_a_template_with_a_missing_block_is_refused(published):
    facts = json.loads((published / "publication.json").read_text())["facts"]
    template = TEMPLATE.read_text().replace("<!-- results -->", "")
    with pytest.raises(ValueError, match="The template must have each block"):
        make_card(facts, template)


def test_the_model_card_of_this_repository_is_what_the_command_writes():
    facts = json.loads((ROOT / "tests" / "data" / "default_publication.json").read_text())["facts"]
    written = str(make_card(facts))
    assert written == (ROOT / "model_card.md").read_text()
    facts["results"]["speech_accuracy"]["seen_voices"] -= 0.1
    assert str(make_card(facts)) != written


# -- complete or nothing ----------------------------------------------------------------------------------------------


def test_what_fails_leaves_what_was_there(published, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "made"
    monkeypatch.setattr(publish, "make_card", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_publish(monkeypatch, checkpoint, folder)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"
    monkeypatch.undo()
    run_publish(monkeypatch, checkpoint, folder)
    before = contents(folder)
    monkeypatch.setattr(publish, "make_card", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_publish(monkeypatch, checkpoint, folder)
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def write(folder, **files):
    with complete_or_nothing(folder) as (made, record):
        for name, text in files.items():
            (made / name).write_text(text)
        record["facts"] = {}


def test_an_earlier_publication_is_replaced(tmp_path):
    write(tmp_path / "made", a="1", b="2")
    write(tmp_path / "made", a="3")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"a", "publication.json"}
    assert (tmp_path / "made" / "a").read_text() == "3" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name, problem", [("mine.txt", "added"), ("a", "changed")])
def test_what_somebody_else_put_there_is_never_replaced(name, problem, tmp_path):
    write(tmp_path / "made", a="1")
    (tmp_path / "made" / name).write_text("somebody's work")
    with pytest.raises(FileExistsError, match=rf"no earlier publication wrote, or that were changed.*'{name}'"):
        write(tmp_path / "made", a="2")
    assert (tmp_path / "made" / name).read_text() == "somebody's work", problem


def test_a_folder_of_other_things_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="holds .* no earlier publication wrote"):
        run_publish(monkeypatch, checkpoint, checkpoint)
    with pytest.raises(SystemExit, match="is no checkpoint"):
        run_publish(monkeypatch, tmp_path, tmp_path / "made")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_publishes_verifies_and_uploads(checkpoint, tmp_path):
    with StandInHub().running() as server:
        printed = run_script(
            SCRIPT,
            *(checkpoint, tmp_path / "made", "--verify", "--push", REPO_ID, "--private"),
            folder=tmp_path,
            flags=["-P"],  # without its folder on the path: it imports installed packages only
            timeout_s=300,
            PYTHONPATH=str(ROOT),
            HF_HOME=str(tmp_path / "home"),
            HF_ENDPOINT=server.url,
            HF_TOKEN="hf_test",
            HF_HUB_DISABLE_XET="1",
        )
    checks = re.findall(r"^(ok|FAILED) +(.+?)  +(.*)$", printed, re.M)
    assert {result for result, _, _ in checks} == {"ok"}, printed
    names = [name for _, name, _ in checks]
    ways = [*(f'pipeline("{task}")' for task in ("audio-text-to-text", "automatic-speech-recognition", "any-to-any"))]
    ways += ["AutoModel: logits", "AutoModel + AutoProcessor", "handler.py, a file", "transformers serve"]
    assert set(ways) <= set(names) and len(names) == 14
    assert len({came for _, name, came in checks if "logits" not in name and came.startswith(("'", '"'))}) == 1
    assert server.private and f"uploaded: {server.url}/{REPO_ID}/commit/" in printed
    assert_holds(server, tmp_path / "made")
    assert f"# {REPO_ID}" in (tmp_path / "made" / "README.md").read_text()


def test_a_folder_that_answers_otherwise_is_noticed():
    """Guards the table of checks: it would be worth nothing if it could not fail."""
    inputs, logits = {"input_ids": torch.arange(4)[None]}, torch.randn(1, 4, 8)
    expected = {"inputs": inputs, "logits": logits, "answer": "red"}
    good = {"inputs": inputs, "logits": {"AutoModel": logits}, "answers": {"handler.py": " red"}, "attempts": []}

    def failures(**changes):
        return [name for name, is_right, _ in compare({**good, **changes}, expected) if not is_right]

    assert failures() == []
    assert failures(attempts=["socket.connect huggingface.co"]) == ["network is left alone"]
    assert failures(inputs={"input_ids": torch.arange(1, 5)[None]}) == ["AutoProcessor: inputs"]
    assert failures(inputs={}) == ["AutoProcessor: inputs"]
    assert failures(logits={"AutoModel": logits + 1e-6}) == ["AutoModel: logits"]
    assert failures(logits={"AutoModel": logits[:, :3]}) == ["AutoModel: logits"]
    assert failures(answers={"handler.py": "ValueError: red"}) == ["handler.py"]
