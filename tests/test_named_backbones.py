"""Thin checkpoints whose backbones are elsewhere: named by the user, of another revision, of another architecture."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, WhisperConfig, pipeline

from examples import app, infer
from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM, backbone_names
from modeling_blsp_kd.backbone_names import checksum, trained_revision
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from modeling_blsp_kd.training.building import build_model
from modeling_blsp_kd.training.options import ModelOptions
from processing.demo import page
from processing.evaluation.predictions import settings_of
from processing.publishing.verify import COMMIT
from tests.helpers.models import make_thin_model, speech_config, text_config
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts
from tests.helpers.trainers import make_trainer

pytestmark = pytest.mark.numerical

PARTS = ("audio_tower", "language_model")
EVALUATE = Path(__file__).parents[1] / "examples" / "evaluate.py"


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(backbone_names.logger, "warning", said.append)
    return said


@pytest.fixture(scope="module")
def inputs(processor):
    return spoken_prompts(processor)


@pytest.fixture
def places(backbones, tmp_path):
    """Where the backbones are now; the checkpoint does not know."""
    return {part: str(shutil.copytree(folder, tmp_path / "now" / part)) for part, folder in zip(PARTS, backbones)}


@pytest.fixture
def thin(backbones, processor, tmp_path):
    """A checkpoint that was trained on folders which are gone."""
    folders = [shutil.copytree(folder, tmp_path / "then" / folder.name) for folder in backbones]
    make_thin_model(folders).save_pretrained(tmp_path / "thin")
    processor.save_pretrained(tmp_path / "thin")
    shutil.rmtree(tmp_path / "then")
    return tmp_path / "thin"


@pytest.fixture(scope="module")
def expected(backbones, inputs):
    return logits(make_thin_model(backbones), inputs)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def change(folder) -> str:
    """Alter a weight of a backbone, and return the checksum that it has now."""
    weights = load_file(Path(folder, "model.safetensors"))
    next(iter(weights.values())).view(-1)[0] += 0.5
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return checksum(folder)


# -- the same weights in another place --------------------------------------------------------------------------------


def with_a_config(folder, backbones):
    config = BlspKdConfig.from_pretrained(folder, backbones=backbones)
    return BlspKdForCausalLM.from_pretrained(folder, config=config)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder, backbones: BlspKdForCausalLM.from_pretrained(folder, backbones=backbones),
        lambda folder, backbones: AutoModel.from_pretrained(folder, backbones=backbones, trust_remote_code=True),
        with_a_config,
        lambda folder, backbones: (
            pipeline("audio-text-to-text", model=str(folder), model_kwargs={"backbones": backbones}).model
        ),
    ],
    ids=["the class", "AutoModel", "a config", "pipeline"],
)
def test_backbones_are_found_where_the_user_says(load, thin, places, inputs, expected, warnings, tmp_path):
    given = dict(places)
    model = load(thin, places)
    assert torch.equal(logits(model, inputs), expected) and warnings == [] and places == given
    stored = BlspKdConfig.from_pretrained(thin).backbones
    assert model.config.backbones == {part: {**stored[part], "name_or_path": places[part]} for part in PARTS}
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(BlspKdForCausalLM.from_pretrained(tmp_path / "again"), inputs), expected)


def test_one_backbone_may_be_named(thin, places, inputs, expected):
    with pytest.raises(OSError, match=r"The audio_tower .* name another place .*backbones=\{\"audio_tower\": "):
        BlspKdForCausalLM.from_pretrained(thin, backbones={"language_model": places["language_model"]})
    named = BlspKdForCausalLM.from_pretrained(thin, backbones=places)
    named.save_pretrained(thin)
    moved = shutil.move(places["language_model"], Path(places["language_model"]).with_name("moved"))
    model = BlspKdForCausalLM.from_pretrained(thin, backbones={"language_model": Path(moved)}, plora=False)
    assert model.plora is None and model.config.backbones["language_model"]["name_or_path"] == str(moved)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"decoder": "org/llm"}, "must be a dict that gives a Hub id or a folder for some of .'audio_tower', "),
        ("org/llm", "must be a dict that gives a Hub id or a folder for some of"),
        ({"language_model": 7}, "must give for language_model a Hub id, a folder, or a dict of name_or_path and rev"),
        ({"language_model": {"revision": "main"}}, "must give for language_model a Hub id"),
        ({"language_model": {"name_or_path": "x", "trained_revision": "main"}}, "must give for language_model a Hub"),
    ],
)
def test_nonsense_is_refused(given, message, thin):
    with pytest.raises(ValueError, match=message):
        BlspKdForCausalLM.from_pretrained(thin, backbones=given)


def test_a_full_checkpoint_takes_no_backbones(thin, places, tmp_path):
    BlspKdForCausalLM.from_pretrained(thin, backbones=places).save_pretrained(tmp_path / "full", full=True)
    with pytest.raises(ValueError, match="names those of a thin checkpoint, but this one is full"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", backbones=places)


# -- another revision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_another_revision_is_a_warning_or_an_error_that_names_both(part, thin, places, warnings, tmp_path):
    trained = BlspKdConfig.from_pretrained(thin).backbones[part]["revision"]
    found = change(places[part])
    message = f"The {part} is another revision than in training: .*{trained}.*{places[part]}.*{found}"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(thin, backbones=places, on_other_revision="error")
    with pytest.raises(ValueError, match=r"on_other_revision must be one of \('warn', 'error'\), got 'ignore'"):
        BlspKdForCausalLM.from_pretrained(thin, backbones=places, on_other_revision="ignore")
    model = BlspKdForCausalLM.from_pretrained(thin, backbones=places)
    [said] = warnings
    assert trained in said and found in said
    assert model.config.backbones[part] == {
        "name_or_path": places[part],
        "revision": found,
        "trained_revision": trained,
    }
    # Saved, it names what it is made of, and still tells what training saw.
    model.save_pretrained(tmp_path / "again")
    BlspKdForCausalLM.from_pretrained(tmp_path / "again")
    assert len(warnings) == 2 and trained in warnings[1] and found in warnings[1]
    change(places[part])
    with pytest.raises(ValueError, match=f"The {part} of this thin checkpoint has changed"):
        BlspKdForCausalLM.from_pretrained(tmp_path / "again")
    demanded = {**places, part: {"name_or_path": places[part], "revision": trained}}
    with pytest.raises(ValueError, match=f"The {part} of this thin checkpoint has changed"):
        BlspKdForCausalLM.from_pretrained(thin, backbones=demanded)


def test_weights_of_the_hub_are_compared_with_the_checksum_of_training(
    thin, places, hub_backbones, inputs, expected, warnings, tmp_path
):
    """As of a published checkpoint whose training had folders: org/llm is the same files, org/ears is not."""
    trained = BlspKdConfig.from_pretrained(thin).backbones
    model = BlspKdForCausalLM.from_pretrained(thin, backbones=dict(zip(PARTS, hub_backbones)))
    [said] = warnings
    assert "The audio_tower" in said and trained["audio_tower"]["revision"] in said and COMMIT in said
    assert model.config.backbones == {
        "audio_tower": {
            "name_or_path": "org/ears",
            "revision": COMMIT,
            "trained_revision": trained["audio_tower"]["revision"],
        },
        "language_model": {"name_or_path": "org/llm", "revision": COMMIT},
    }
    with pytest.raises(OSError, match=r"The language_model .* org/llm \(revision v2\)"):
        other = {**places, "language_model": {"name_or_path": "org/llm", "revision": "v2"}}
        BlspKdForCausalLM.from_pretrained(thin, backbones=other)


def test_a_folder_in_place_of_a_commit_is_another_revision(hub_backbones, places, warnings, tmp_path):
    make_thin_model(hub_backbones).save_pretrained(tmp_path / "of the hub")
    BlspKdForCausalLM.from_pretrained(tmp_path / "of the hub", backbones={"language_model": "org/llm"})
    assert warnings == []
    given = {"language_model": places["language_model"]}
    BlspKdForCausalLM.from_pretrained(tmp_path / "of the hub", backbones=given)
    assert COMMIT in warnings[0] and checksum(given["language_model"]) in warnings[0]


# -- another architecture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, message",
    [
        ({"hidden_size": 64}, "hidden_size is 64 instead of 32"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1 instead of 2"),
        ({"vocab_size": 320}, "vocab_size is 320 instead of 300"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2 instead of 4; head_dim is 16 instead of 8"),
        ({"family": "qwen2"}, "model_type is qwen2 instead of llama"),
    ],
)
def test_an_llm_of_another_architecture_is_an_error(other, message, thin, places):
    AutoModelForCausalLM.from_config(text_config(**other)).save_pretrained(places["language_model"])
    with pytest.raises(
        ValueError, match=f"{places['language_model']} cannot be the language_model of this .*{message}"
    ):
        BlspKdForCausalLM.from_pretrained(thin, backbones=places)


def test_an_encoder_of_another_architecture_is_an_error(thin, places):
    config = WhisperConfig(**{**speech_config().to_dict(), "d_model": 32, "encoder_layers": 2})
    TrueLengthWhisperEncoder(config).save_pretrained(places["audio_tower"])
    message = "cannot be the audio_tower .*hidden_size is 32 instead of 16; num_hidden_layers is 2 instead of 1"
    with pytest.raises(ValueError, match=message):
        BlspKdForCausalLM.from_pretrained(thin, backbones=places)


def test_an_llm_that_lacks_weights_is_an_error(thin, places):
    """transformers makes them up, and only logs it."""
    file = Path(places["language_model"], "model.safetensors")
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights \['model.layers.1.mlp.up_proj.weight'\] are missing"):
        BlspKdForCausalLM.from_pretrained(thin, backbones=places)


# -- training ---------------------------------------------------------------------------------------------------------


def test_further_training_is_of_the_backbones_that_were_found(thin, places, processor, collator, tmp_path):
    change(places["language_model"])
    options = ModelOptions(start_from=str(thin), backbones=json.dumps(places), freeze_speech_encoder=True)
    model = build_model(options, processor)
    assert "trained_revision" in model.config.backbones["language_model"]
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path / "run", processor, collator, model=model, **saving).train()
    stored = BlspKdConfig.from_pretrained(tmp_path / "run" / "checkpoint-1").backbones
    assert stored["language_model"] == {
        "name_or_path": places["language_model"],
        "revision": checksum(places["language_model"]),
    }
    # A resumed training goes on with the same weights in another place, and with no others.
    copied = shutil.copytree(places["language_model"], tmp_path / "copied")
    for is_changed in (False, True):
        if is_changed:
            change(copied)
        given = json.dumps({**places, "language_model": str(copied)})
        model = build_model(ModelOptions(start_from=str(thin), backbones=given, freeze_speech_encoder=True), processor)
        trainer = make_trainer(tmp_path / "run", processor, collator, model=model, **saving)
        if is_changed:
            with pytest.raises(ValueError, match=f"checkpoint-1 was trained on another language_model: .*{copied}"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_backbones_of_a_new_model_have_their_own_options():
    with pytest.raises(ValueError, match="--backbones .* of --start_from. A new model takes --text_model and --speech"):
        ModelOptions(backbones="{}")


# -- scripts ----------------------------------------------------------------------------------------------------------


def test_infer_takes_them(thin, places, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", clip(0.5), SAMPLING_RATE)
    command = ["infer.py", "--model", str(thin), "--audio", str(tmp_path / "a.wav"), "--max_new_tokens", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--backbones", "audio_tower=there"])
    with pytest.raises(ValueError, match="--backbones must be a JSON object such as"):
        infer.main()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*command, "--backbones", json.dumps(places), "--on_other_revision", "error"])
    infer.main()
    assert capsys.readouterr().out.strip()


def test_app_takes_them(thin, places, monkeypatch):
    loaded = []
    monkeypatch.setattr(page, "launch", lambda *args: None)
    monkeypatch.setattr(page, "build_page", lambda listener, clips: loaded.append(listener.model))
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(thin), "--backbones", json.dumps(places)])
    app.main()
    assert loaded[0].config.backbones["audio_tower"]["name_or_path"] == places["audio_tower"]


def test_evaluate_takes_them(thin, places, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("evaluate_script", EVALUATE)
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    command = ["evaluate.py", "--model", str(thin), "--output", str(tmp_path / "out"), "--backbones"]
    monkeypatch.setattr(sys, "argv", [*command, json.dumps(places)])
    options = evaluate.parse_options()
    found = evaluate.load_systems(options, {}).model.config.backbones
    # Predictions go on only with the same weights, wherever they are.
    assert settings_of("speech", options, "data")["backbones"] == [trained_revision(found[part]) for part in PARTS]
