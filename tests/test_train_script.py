"""`examples/train.py` as users of Trainer drive it: epochs, evaluation while training, rows without answers, pushes.

Leaves out: its default run (`test_examples.py`) and what each field of TrainingArguments does to the Trainer.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import soundfile
import torch
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from examples import train
from modeling_blsp_kd import BlspKdConfig, BlspKdTrainer
from modeling_blsp_kd.distillation_options import DistillationOptions
from modeling_blsp_kd.training import building
from modeling_blsp_kd.training.building import build_model
from modeling_blsp_kd.training.options import (
    TINY_SPEECH_MODEL,
    TINY_TEXT_MODEL,
    Arguments,
    ModelOptions,
    encoder_learning_rate,
)
from modeling_blsp_kd.training.parameter_groups import optimizer_with_groups
from processing import BlspKdProcessor
from processing.publishing.facts import describe_parts
from processing.training_rows.options import DataOptions
from tests.helpers.models import make_model
from tests.helpers.prompts import clip
from tests.helpers.stand_in_hub import REPO_ID, StandInHub
from tests.helpers.trainers import make_trainer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def data(tmp_path):
    """Writes manifests of the same clips."""
    for index in range(4):
        soundfile.write(tmp_path / f"{index}.wav", clip(0.6, seed=index), 16_000)

    def write(name, *changes):
        rows = [
            {"audio": f"{index}.wav", "text": "the red cat ran", "response": "red", **change}
            for index, change in enumerate(changes)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def start(monkeypatch, output, *options, **given):
    arguments = {"output_dir": output, "use_cpu": True, "disable_tqdm": True, "report_to": "none", **given}
    arguments |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0, "freeze_speech_encoder": True}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *options])
    train.main()
    return json.loads((output / "results.json").read_text())


def test_the_model_card_of_this_repository_describes_the_default_model():
    facts = json.loads((ROOT / "tests" / "data" / "default_publication.json").read_text())["facts"]
    processor = BlspKdProcessor.from_backbones(TINY_SPEECH_MODEL, TINY_TEXT_MODEL)
    model = build_model(ModelOptions(), processor)
    assert describe_parts(model, facts["results"]["training"], {}) == facts["parts"]
    # What a record from before an option does not say is the option's default.
    assert model.config.distillation == asdict(DistillationOptions(**facts["losses"]))


def test_an_evaluation_without_answers_reports_what_can_be_computed(data, tmp_path, monkeypatch, capsys):
    """An `answer` is optional, but without one training ended in a KeyError, and its results were lost."""
    given = {"train_manifest": data("train", {}, {}, {}, {}), "eval_manifest": data("eval", {}, {}), "max_steps": 1}
    results = start(monkeypatch, tmp_path / "model", **given)
    assert {"response_kl", "input_kl", "token_count_accuracy", "token_count_error", "total_seconds"} <= set(results)
    assert not {"num_scored", "text_accuracy", "speech_accuracy"} & set(results) and len(results["samples"]) == 2
    printed = capsys.readouterr().out
    assert "No row of the evaluation has an 'answer'" in printed and "response kl" in printed
    assert printed.count("  answers ") == 2


@pytest.mark.long
def test_evaluation_while_training_and_the_best_model_work_with_a_manifest(data, tmp_path, monkeypatch):
    """Evaluation while training had no rows, and epochs were ignored, since steps had a default."""
    some = {"answer": "red", "voice": "a", "kind": "colour"}, {"instruction": "Repeat."}, {"answer": 4}
    given = {
        "train_manifest": data("train", *[{"voice": "a"}] * 4),
        "eval_manifest": data("eval", *some),
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_response_kl",
        "logging_steps": 1,
    }
    results = start(monkeypatch, tmp_path / "model", **given)
    assert results["training"]["steps"] == 4, "two epochs of two batches"
    assert results["num_scored"] == 2 and set(results["speech_accuracy"]["by_kind"]) == {"all", "colour"}
    assert set(results["text_accuracy"]) == {"seen_voices", "unnamed_voices", "by_kind"}
    state = json.loads((tmp_path / "model" / "checkpoint-4" / "trainer_state.json").read_text())
    values = {entry["step"]: entry["eval_response_kl"] for entry in state["log_history"] if "eval_loss" in entry}
    assert sorted(values) == [0, 2, 4]
    assert state["best_metric"] == min(values[2], values[4])
    assert results["response_kl"] == pytest.approx(state["best_metric"], rel=1e-4), "what is saved is the best model"


@pytest.mark.long
def test_results_are_there_before_what_may_fail(data, tmp_path, monkeypatch):
    given = {"train_manifest": data("train", {}, {}), "eval_manifest": data("eval", {"answer": "red"}), "max_steps": 1}

    def fail(*args, **kwargs):
        if args[3] == "audio":
            raise MemoryError("no room for answers")
        return []  # every row has its response

    monkeypatch.setattr(train, "answer_rows", fail)
    with pytest.raises(MemoryError):
        start(monkeypatch, tmp_path / "model", **given)
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["training"]["steps"] == 1 and "response_kl" in results
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "gone.wav"}, r"row 2 \(audio .*gone\.wav.*not found.* an evaluation leaves none out"),
        ({"audio": "broken.wav"}, r"row 2 \(audio .*cannot be decoded.* an evaluation leaves none out"),
        ({"audio": "silent.wav"}, r"row 2 \(audio .*is silent.* an evaluation leaves none out"),
        ({"audio": "click.wav"}, r"row 2 \(audio .*too short.* an evaluation leaves none out"),
    ],
)
def test_a_bad_clip_of_the_evaluation_is_found_first(change, message, data, tmp_path, monkeypatch):
    """It was found after the last step, as libsndfile's "System error.", with advice that held for training alone."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF of no use")
    soundfile.write(tmp_path / "silent.wav", 0 * clip(0.5), 16_000)
    soundfile.write(tmp_path / "click.wav", clip(0.02), 16_000)
    given = {"train_manifest": data("train", {}), "eval_manifest": data("eval", {}, change)}
    monkeypatch.setattr(building, "build_model", lambda *_: pytest.fail("the model is made afterwards"))
    with pytest.raises(ValueError, match=message) as caught:
        start(monkeypatch, tmp_path / "model", **given)
    assert "skip_bad_audio" not in str(caught.value) and "System error" not in str(caught.value)


def test_a_missing_clip_of_the_training_is_not_found(data, tmp_path, monkeypatch):
    given = {"train_manifest": data("train", {}, {"audio": "gone.wav"}), "max_steps": 1}
    with pytest.raises(ValueError, match=r"row 2 .*not found: .*gone\.wav.*--skip_bad_audio true"):
        start(monkeypatch, tmp_path / "model", **given)


def parse(*words):
    return HfArgumentParser(Arguments).parse_args_into_dataclasses(["--use_cpu", "true", *words])[0]


def test_epochs_count_unless_steps_are_given():
    """Steps had a default, so that --num_train_epochs did nothing."""
    assert parse().max_steps == 2400
    epochs = parse("--num_train_epochs", "1.5")
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 1.5)
    assert parse("--num_train_epochs", "2", "--max_steps", "7").max_steps == 7


def test_a_stream_has_no_epochs(data):
    options = DataOptions(train_manifest=data("train", {}), streaming=True)
    with pytest.raises(ValueError, match="no epochs to count. Give --max_steps"):
        building.make_trainer(ModelOptions(), options, parse("--num_train_epochs", "1"))


@pytest.mark.parametrize(
    "words", [("--optim", "galore_adamw", "--optim_target_modules", "adapter"), ("--optim", "lomo")]
)
def test_optimisers_with_groups_of_their_own_are_refused_by_the_script(words):
    """GaLore's groups were replaced by the script's, so that it was plain AdamW."""
    with pytest.raises(ValueError, match="takes its own groups of parameters"):
        parse(*words)


def test_refused_arguments_are_refused_before_any_work():
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1: "):
        parse("--label_smoothing_factor", "0.1")


def test_weights_decay_that_decay_in_the_trainer():
    """The script let biases and norms decay, too."""
    args = parse("--weight_decay", "0.1", "--learning_rate", "1e-3")
    model = make_model(freeze_speech_encoder=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _, options = optimizer_with_groups(model, args, encoder_learning_rate(ModelOptions(), args))
    decaying = {names[id(each)] for group in options["params"] if group["weight_decay"] for each in group["params"]}
    expected = BlspKdTrainer.get_decay_parameter_names(None, model)
    assert decaying == {name for name, parameter in model.named_parameters() if parameter.requires_grad} & set(expected)
    of_encoder = {names[id(each)] for group in options["params"] if group.get("lr") == 4e-4 for each in group["params"]}
    assert of_encoder == {name for name in names.values() if name.startswith("audio_tower.")} - {
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    }


def test_the_trainer_alone_has_the_groups_of_the_script(processor, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1, learning_rate=1e-3, report_to="none")
    model = make_model(freeze_speech_encoder=False)
    trainer = BlspKdTrainer(model, args, processing_class=processor, encoder_learning_rate=4e-4)
    groups = trainer.create_optimizer().param_groups
    _, expected = optimizer_with_groups(model, args, 4e-4)
    assert len(groups) == len(expected["params"]) == 4
    for group, other in zip(groups, expected["params"]):
        assert all(one is another for one, another in zip(group["params"], other["params"], strict=True))
        assert (group["lr"], group["weight_decay"]) == (other.get("lr", 1e-3), other["weight_decay"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="bring their own groups"):
        BlspKdTrainer(model, args, processing_class=processor, encoder_learning_rate=4e-4, optimizers=(optimizer, None))
    args.optim = OptimizerNames.LOMO
    with pytest.raises(ValueError, match="optim='lomo' takes its own groups of parameters"):
        BlspKdTrainer(model, args, processing_class=processor, encoder_learning_rate=4e-4)


def test_documented_differences_of_defaults_are_all():
    """Defaults of script and library differed without a word."""
    text = (ROOT / "docs" / "training.md").read_text()
    rows = dict(line.strip("| \n").split(" | ", 1) for line in text.splitlines() if line.startswith("| `"))
    own, theirs = Arguments(use_cpu=True), TrainingArguments("x", use_cpu=True)
    chosen = {name for name in vars(Arguments) if name in TrainingArguments.__dataclass_fields__}
    chosen -= {"output_dir", "dataloader_pin_memory", "remove_unused_columns"}
    shown = {name: (getattr(own, name), getattr(theirs, name)) for name in sorted(chosen)}
    shown["freeze_speech_encoder"] = ModelOptions().freeze_speech_encoder, BlspKdConfig().freeze_speech_encoder
    for name, values in shown.items():
        values = [
            value.value if isinstance(value, (IntervalStrategy,)) else getattr(value, "value", value)
            for value in values
        ]
        assert rows.get(f"`{name}`", "").startswith(f"`{values[0]}` | `{values[1]}`"), (name, values)


# -- pushes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with StandInHub().running() as server:
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url, token="hf_stand_in"))
        yield server


def code_of(files):
    return {name for name in files if name.endswith(".py")}


@pytest.mark.parametrize("strategy", ["every_save", "end", "checkpoint"])
def test_every_push_has_code_and_card(strategy, hub, tmp_path, processor, collator):
    """Pushes while training had weights and no code, and the card called the model "a fine-tuned version of []"."""
    trainer = make_trainer(
        tmp_path / "m",
        processor,
        collator,
        max_steps=2,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        push_to_hub=True,
        hub_model_id=REPO_ID,
        hub_token="hf_stand_in",
        hub_private_repo=True,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    trainer.train()
    if strategy == "end":
        assert "model.safetensors" not in hub.files
        trainer.push_to_hub()
    assert hub.private
    assert {"modeling_blsp_kd.py", "plora.py", "processing_blsp_kd.py"} <= code_of(hub.files)
    assert "trainer.py" not in hub.files
    assert ("last-checkpoint/optimizer.pt" in hub.files) == (strategy == "checkpoint")
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.pipeline_tag, card.data.library_name) == ("audio-text-to-text", "transformers")
    assert "custom_code" in card.data.tags and "trust_remote_code=True" in card.text
    assert "2 steps of 8 rows" in card.text and "- eval_response_kl: " in card.text and "[](" not in card.text
    folder = tmp_path / "pulled"
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.long
def test_the_script_pushes_its_card(hub, data, tmp_path, monkeypatch):
    given = {"train_manifest": data("train", {}, {}), "eval_manifest": data("eval", {"answer": "red"}), "max_steps": 1}
    given |= {"push_to_hub": True, "hub_model_id": REPO_ID, "hub_token": "hf_stand_in", "save_strategy": "no"}
    results = start(monkeypatch, tmp_path / "model", **given)
    assert hub.num_commits == 1, "one push, with everything"
    assert {"results.json", "samples/1.wav", "modeling_blsp_kd.py", "processing_blsp_kd.py"} <= set(hub.files)
    card = ModelCard(hub.files["README.md"].decode())
    assert "1 questions on clips that were not trained on" in card.text
    assert f"{results['response_kl']:.3f}" in card.text and "examples/tiny_world/llm" in card.text
    assert card.data.widget[0]["output"]["text"] == results["samples"][0]["output"]


def test_a_recognition_warm_up_asks_the_llm_nothing(data, tmp_path, monkeypatch):
    """Rows of transcripts alone were answered by the LLM first, although no loss read the answers."""
    manifest = data("train", *({"response": None} for _ in range(4)))
    asked = []
    monkeypatch.setattr(building, "add_responses", lambda rows, *_: asked.extend(rows))
    calibrated = []
    monkeypatch.setattr(building, "calibrate_adapter", lambda model, batches: calibrated.extend(batches))
    losses = {"transcript_ce": 1.0, "quantity": 1.0, "response_kl": 0.0, "input_kl": 0.0}
    given = {"train_manifest": manifest, "max_steps": 1, "calibrate_adapter": True, "max_batch_length": 1.3}
    start(monkeypatch, tmp_path / "model", "--distillation", json.dumps(losses), **given)
    assert not asked and sum(len(batch["num_speech_tokens"]) for batch in calibrated) == 4
    with pytest.raises(ValueError, match="--max_batch_length needs the lengths of all rows"):
        start(monkeypatch, tmp_path / "model", "--streaming", "true", **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate_adapter", "true", "--adapter", "subsampler"], "but a subsampler predicts none"),
        (["--kept_frames", "frames.safetensors"], "add --freeze_speech_encoder true"),
    ],
)
def test_what_parts_cannot_do_is_told_before_any_work(options, message, tmp_path, monkeypatch):
    """These errors came after the LLM had answered all rows, which may take hours."""
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=message):
        train.main()
