"""Thin checkpoints: what they hold, loading as what was saved, exact resuming, and naming a backbone that is gone."""

import copy
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
)

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from processing.publishing.verify import COMMIT
from tests.helpers.models import SMALL_CFORMER, make_thin_model, text_config
from tests.helpers.prompts import spoken_prompts
from tests.helpers.trainers import make_trainer

pytestmark = pytest.mark.numerical

TEXT = torch.arange(3, 12)[None]
OTHER_COMMIT = COMMIT[::-1]


def saved_names(folder) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_state(actual, expected):
    assert set(actual.state_dict()) == set(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert actual.state_dict()[name].dtype == value.dtype and torch.equal(actual.state_dict()[name], value), name


@pytest.fixture(scope="module")
def inputs(processor):
    return spoken_prompts(processor)


@pytest.fixture(scope="module")
def model(backbones):
    """Shared: no test changes it."""
    return make_thin_model(backbones)


@pytest.fixture(scope="module")
def thin(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def own_backbones(backbones, tmp_path):
    """Copies that a test may change."""
    return [shutil.copytree(folder, tmp_path / "backbones" / folder.name) for folder in backbones]


# -- what it holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"plora": False}, {"adapter": {"type": "subsampler", "bottleneck_dim": 8}}])
def test_it_holds_the_adapter_and_partial_lora(options, backbones, tmp_path):
    model = make_thin_model(backbones, **options)
    model.save_pretrained(tmp_path)
    expected = {name for name in model.state_dict() if name.startswith("adapter.") or "lora_" in name}
    assert saved_names(tmp_path) == expected
    assert any("lora_" in name for name in expected) == (model.plora is not None)
    model.requires_grad_(False).save_pretrained(tmp_path / "frozen")
    assert saved_names(tmp_path / "frozen") == expected, "what was trained stays so when it is frozen for use"


def test_it_holds_a_trained_encoder_with_its_statistics(backbones, inputs, tmp_path):
    """Batch statistics are no parameters, but they move in training all the same."""
    torch.manual_seed(0)
    encoder_config = ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        subsampling_conv_channels=8,
    )
    ParakeetEncoder(encoder_config).save_pretrained(tmp_path / "encoder")
    model = make_thin_model((tmp_path / "encoder", backbones[1]), freeze_speech_encoder=False)
    for name, buffer in model.audio_tower.named_buffers():
        if "batch" in name or "running" in name:
            buffer += 3
    for parameter in model.audio_tower.parameters():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "thin")
    encoder_names = {name for name in saved_names(tmp_path / "thin") if name.startswith("audio_tower.")}
    assert encoder_names == {f"audio_tower.{name}" for name in model.audio_tower.state_dict()}
    assert any("running_mean" in name for name in encoder_names)
    assert_same_state(BlspKdForCausalLM.from_pretrained(tmp_path / "thin"), model)
    half = BlspKdForCausalLM.from_pretrained(tmp_path / "thin", dtype=torch.bfloat16)
    counters = [buffer for name, buffer in half.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(counter.dtype == torch.long and counter == 3 for counter in counters)


@pytest.mark.parametrize(
    "part", ["language_model.model.layers.0.mlp.up_proj.base_layer.weight", "audio_tower.layers.0.fc1.bias"]
)
def test_what_its_user_unfroze_survives_saving_twice(part, backbones, model, inputs, tmp_path):
    changed = make_thin_model(backbones)
    changed.get_parameter(part).requires_grad_(True).data += 1
    changed.save_pretrained(tmp_path / "first")
    expected = logits(changed, inputs)
    assert part in saved_names(tmp_path / "first") and not torch.equal(expected, logits(model, inputs))
    for folder, next_folder in (("first", "second"), ("second", "third")):
        loaded = BlspKdForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(loaded, inputs), expected)
        assert loaded.get_parameter(part).requires_grad
        loaded.save_pretrained(tmp_path / next_folder)
        assert saved_names(tmp_path / next_folder) == saved_names(tmp_path / "first")


@pytest.mark.parametrize("unfreeze", [False, True])
def test_tied_embeddings_stay_tied(unfreeze, backbones, inputs, tmp_path):
    """Unfrozen ones came back in the input embeddings alone."""
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(text_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "llm")
    model = make_thin_model((backbones[0], tmp_path / "llm"))
    if unfreeze:
        model.get_input_embeddings().weight.requires_grad_(True).data += 0.1
    model.save_pretrained(tmp_path / "thin")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_resized_vocabulary_is_refused(backbones, tmp_path):
    """It was saved without complaint, and could not be loaded: its new embeddings are no longer the backbone's."""
    model = make_thin_model(backbones)
    with pytest.raises(ValueError, match="vocabulary"):
        model.resize_token_embeddings(320, mean_resizing=False)
        model.save_pretrained(tmp_path)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [BlspKdForCausalLM, AutoModelForCausalLM])
def test_it_loads_as_what_was_saved(auto_class, thin, model, inputs):
    loaded = auto_class.from_pretrained(thin)
    assert type(loaded) is BlspKdForCausalLM and not loaded.training
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).requires_grad == parameter.requires_grad, name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_auto_keeps_the_dtypes_of_training(stored, own_backbones, inputs, tmp_path):
    AutoModelForCausalLM.from_pretrained(own_backbones[1], dtype=stored).save_pretrained(own_backbones[1])
    model = make_thin_model(own_backbones, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name or name.startswith("adapter.")} == {
        torch.float32
    }
    assert dtypes["language_model.lm_head.weight"] == torch.bfloat16
    model.save_pretrained(tmp_path / "thin")
    for options in ({}, {"dtype": "auto"}):
        loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin", **options)
        assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == dtypes
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16"])
def test_an_explicit_dtype_is_that_of_all(dtype, own_backbones, inputs, tmp_path):
    AutoModelForCausalLM.from_pretrained(own_backbones[1], dtype=torch.float16).save_pretrained(own_backbones[1])
    make_thin_model(own_backbones).save_pretrained(tmp_path / "thin")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin", dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert loaded.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_a_conversion_survives_saving(backbones, thin, inputs, tmp_path):
    """The encoder, or after `to` both backbones, came back in the dtype that they were trained in."""
    for number, loaded in enumerate(
        [BlspKdForCausalLM.from_pretrained(thin, dtype=torch.bfloat16), make_thin_model(backbones).to(torch.bfloat16)]
    ):
        loaded.save_pretrained(tmp_path / str(number))
        assert_same_state(BlspKdForCausalLM.from_pretrained(tmp_path / str(number)), loaded)


def test_the_old_name_of_dtype_is_not_ignored(thin):
    """`torch_dtype` was taken, and did nothing."""
    loaded = BlspKdForCausalLM.from_pretrained(thin, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "cpu",
        {"": "cpu"},
        {"audio_tower": "cpu", "adapter": "cpu", "language_model": "cpu"},
        {"audio_tower": "cpu", "adapter": "cpu", "language_model.model": "cpu", "language_model.lm_head": "cpu"},
        {
            "audio_tower": "cpu",
            **{f"adapter.{name}": "cpu" for name in ("pre_layers", "post_layers", "cif_proj", "output_proj")},
            "language_model": "cpu",
        },
    ],
    ids=["auto", "device", "root", "parts", "finer LLM", "finer adapter"],
)
def test_device_maps(device_map, thin, model, inputs):
    given = copy.copy(device_map)
    loaded = BlspKdForCausalLM.from_pretrained(thin, device_map=device_map)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert device_map == given


@pytest.mark.parametrize("offloaded", [["layers.1"], ["embed_tokens", "layers.0", "layers.1", "norm"]], ids=len)
def test_an_llm_on_disk_keeps_its_partial_lora(offloaded, thin, model, inputs, tmp_path):
    """PEFT put the matrices of offloaded layers nowhere, and speech was read with garbage."""
    parts = [f"model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")] + ["lm_head"]
    device_map = {f"language_model.{name}": "cpu" for name in parts}
    device_map |= {f"language_model.model.{name}": "disk" for name in offloaded}
    device_map |= {"audio_tower": "cpu", "adapter": "cpu"}
    loaded = BlspKdForCausalLM.from_pretrained(thin, device_map=device_map, offload_folder=str(tmp_path))
    assert loaded.language_model.model.layers[1].mlp.up_proj.base_layer.weight.is_meta
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_shards(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(BlspKdForCausalLM.from_pretrained(tmp_path), model)


def test_other_arguments_of_loading(thin, model, inputs, tmp_path):
    expected = logits(model, inputs)
    config = BlspKdConfig.from_pretrained(thin)
    before = config.to_dict()
    for given in (config, thin):
        loaded, info = BlspKdForCausalLM.from_pretrained(thin, config=given, output_loading_info=True)
        assert torch.equal(logits(loaded, inputs), expected)
        assert set(info) >= {"missing_keys", "unexpected_keys", "mismatched_keys"} and not any(info.values())
    BlspKdForCausalLM.from_pretrained(thin, config=config, attn_implementation="eager", dtype=torch.bfloat16)
    assert config.to_dict() == before and config._attn_implementation != "eager"
    shutil.copytree(thin, tmp_path / "sub")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path, subfolder="sub")
    assert torch.equal(logits(loaded, inputs), expected)
    changed = BlspKdForCausalLM.from_pretrained(thin, distillation={"temperature": 3.0})
    assert changed.config.distillation["temperature"] == 3.0
    with pytest.raises(TypeError, match=r"Unknown argument.* for a thin checkpoint: \['nonsense'\]"):
        BlspKdForCausalLM.from_pretrained(thin, nonsense=1)


def test_what_transformers_serve_passes_on_is_accepted(thin, model, inputs):
    """Its progress bar's class was an unknown argument, so that a thin checkpoint could not be served."""
    loaded = BlspKdForCausalLM.from_pretrained(thin, trust_remote_code=True, tqdm_class=None)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, ("sdpa", "sdpa", "sdpa")),
        ("eager", ("eager", "eager", "eager")),
        ({"text_config": "eager", "speech_config": "sdpa"}, ("eager", "sdpa", "sdpa")),
        ({"text_config": "sdpa", "speech_config": "eager"}, ("sdpa", "eager", "sdpa")),
    ],
)
def test_attention_implementation_of_each_part(given, expected, thin, model, inputs):
    loaded = BlspKdForCausalLM.from_pretrained(thin, attn_implementation=given)
    configs = (loaded.language_model.config, loaded.audio_tower.config, loaded.adapter.layer_config)
    assert tuple(config._attn_implementation for config in configs) == expected
    valid = inputs["attention_mask"].bool()[:, -5:]
    torch.testing.assert_close(
        logits(loaded, inputs)[:, -5:][valid], logits(model, inputs)[:, -5:][valid], rtol=1e-3, atol=1e-3
    )


def test_the_generation_config_is_kept(backbones, tmp_path):
    model = make_thin_model(backbones)
    assert model.generation_config.top_k == 11
    model.save_pretrained(tmp_path / "thin")
    assert BlspKdForCausalLM.from_pretrained(tmp_path / "thin").generation_config.top_k == 11
    model.generation_config.top_k = 13
    model.save_pretrained(tmp_path / "thin")
    assert BlspKdForCausalLM.from_pretrained(tmp_path / "thin").generation_config.top_k == 13
    (tmp_path / "thin" / "generation_config.json").unlink()
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin").generation_config
    assert loaded.top_k == 11 and loaded.eos_token_id == [2, 7]


# -- saving, and full checkpoints -------------------------------------------------------------------------------------


def test_saving_does_not_change_the_config(backbones, tmp_path, monkeypatch):
    model = make_thin_model(backbones)
    before = copy.deepcopy(model.config.to_dict())
    of_transformers = {"architectures", "dtype"}  # which its own save_pretrained writes
    for full in (True, False):
        model.save_pretrained(tmp_path / str(full), full=full)
        after = model.config.to_dict()
        assert {name for name in after if after[name] != before.get(name)} <= of_transformers
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "broken", full=True)
    assert model.config.backbones == before["backbones"] is not None


def test_a_full_checkpoint_of_it_needs_no_backbones(own_backbones, inputs, tmp_path):
    model = make_thin_model(own_backbones)
    model.save_pretrained(tmp_path / "thin")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    loaded.save_pretrained(tmp_path / "full", full=True)
    loaded.save_pretrained(tmp_path / "thin again")
    assert saved_names(tmp_path / "thin again") == saved_names(tmp_path / "thin")
    for folder in own_backbones:
        shutil.rmtree(folder)
    full = BlspKdForCausalLM.from_pretrained(tmp_path / "full")
    assert full.config.backbones is None
    assert_same_state(full, model)
    assert torch.equal(logits(full, inputs), logits(model, inputs))
    assert str(tmp_path) not in (tmp_path / "full" / "config.json").read_text()


# -- backbones that are gone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index, part", [(0, "audio_tower"), (1, "language_model")])
def test_a_missing_backbone_is_named(index, part, own_backbones, tmp_path):
    make_thin_model(own_backbones).save_pretrained(tmp_path / "thin")
    own_backbones[index].rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=f"The {part} of this thin .*{own_backbones[index]} .*there is no such folder"):
        BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    (tmp_path / "elsewhere").rename(own_backbones[index])
    BlspKdForCausalLM.from_pretrained(tmp_path / "thin")


@pytest.mark.parametrize("index, part", [(0, "audio_tower"), (1, "language_model")])
def test_a_changed_backbone_is_named(index, part, own_backbones, tmp_path):
    make_thin_model(own_backbones).save_pretrained(tmp_path / "thin")
    file = own_backbones[index] / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"The {part} of this thin checkpoint has changed.*{own_backbones[index]}"):
        BlspKdForCausalLM.from_pretrained(tmp_path / "thin")


def test_hub_backbones_are_named_by_commit(hub_backbones, inputs, tmp_path):
    """Later commits do not change it, for it asks for the one that it was trained on."""
    model = make_thin_model(hub_backbones)
    assert model.config.backbones == {
        "audio_tower": {"name_or_path": "org/ears", "revision": COMMIT},
        "language_model": {"name_or_path": "org/llm", "revision": COMMIT},
    }
    model.save_pretrained(tmp_path / "thin")
    repository = tmp_path / "home" / "hub" / "models--org--llm"
    shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / OTHER_COMMIT)
    (repository / "refs" / "main").write_text(OTHER_COMMIT)
    newer = repository / "snapshots" / OTHER_COMMIT / "model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(newer).items()}
    newer.unlink()
    save_file(weights, newer, metadata={"format": "pt"})
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert make_thin_model(hub_backbones).config.backbones["language_model"]["revision"] == OTHER_COMMIT
    pinned = make_thin_model(hub_backbones, text_kwargs={"revision": COMMIT})
    assert pinned.config.backbones == model.config.backbones


@pytest.mark.parametrize("name, part", [("ears", "audio_tower"), ("llm", "language_model")])
def test_a_missing_commit_is_named(name, part, hub_backbones, tmp_path):
    make_thin_model(hub_backbones).save_pretrained(tmp_path / "thin")
    repository = tmp_path / "home" / "hub" / f"models--org--{name}"
    (repository / "snapshots" / COMMIT).rename(repository / "snapshots" / OTHER_COMMIT)
    (repository / "refs" / "main").write_text(OTHER_COMMIT)
    message = rf"The {part} of this thin checkpoint cannot be loaded: org/{name} \(revision {COMMIT}\)"
    with pytest.raises(OSError, match=message):
        BlspKdForCausalLM.from_pretrained(tmp_path / "thin")


# -- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("adapter.cif_proj.bias"), r"missing are \['adapter.cif_proj.bias'\]"),
        (lambda weights: weights.update(nonsense=torch.zeros(1)), r"unknown are \['nonsense'\]"),
    ],
)
def test_missing_and_unknown_weights_are_named(change, message, thin, tmp_path):
    folder = shutil.copytree(thin, tmp_path / "thin")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not fit its config.*{message}"):
        BlspKdForCausalLM.from_pretrained(folder)


def test_weights_of_another_shape_are_named(thin):
    with pytest.raises(ValueError, match=r"pre_layers.0.fc1.weight is floating point \(.*\) instead of .*\(24, "):
        BlspKdForCausalLM.from_pretrained(thin, adapter={**SMALL_CFORMER, "ffn_dim": 24})


# -- a quantised LLM --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_llm(tmp_path_factory):
    """Wide enough for blocks of 4-bit weights."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(text_config(hidden_size=128, intermediate_size=128)).save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_quantised_llm_comes_back_bit_for_bit(backbones, wide_llm, inputs, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    before = copy.deepcopy(four_bit.to_dict())
    wide = (backbones[0], wide_llm)
    trained = make_thin_model(wide, text_kwargs={"quantization_config": four_bit})
    trained.save_pretrained(tmp_path / "trained")
    make_thin_model(wide).save_pretrained(tmp_path / "plain")
    assert saved_names(tmp_path / "trained") == saved_names(tmp_path / "plain")
    expected = logits(trained, inputs)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(loaded, inputs), expected)
    # Quantised when loaded, a checkpoint of a plain LLM is the same.
    late = BlspKdForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four_bit)
    assert torch.equal(logits(late, inputs), expected)
    assert four_bit.to_dict() == before
    for model in (trained, loaded, late):
        for name, module in model.named_modules():
            is_quantised = isinstance(module, bitsandbytes.nn.Linear4bit)
            assert is_quantised == (name.startswith("language_model") and name.endswith("_proj.base_layer")), name
        for name, parameter in model.named_parameters():
            if "lora_" in name or not name.startswith("language_model"):
                assert parameter.dtype == torch.float32, name
    for options, quantised in (({"full": True}, trained), ({"full": True}, loaded), ({"full": True}, late)):
        with pytest.raises(ValueError, match="The LLM alone was quantised .* a full checkpoint .* could not be loaded"):
            quantised.save_pretrained(tmp_path / "full", **options)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(BlspKdForCausalLM.from_pretrained(tmp_path / "again"), inputs), expected)


@pytest.mark.long
def test_a_full_checkpoint_of_a_model_with_a_quantised_llm_is_refused(backbones, wide_llm, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    model = make_thin_model((backbones[0], wide_llm), thin=False, text_kwargs={"quantization_config": four_bit})
    with pytest.raises(ValueError, match="The LLM alone was quantised .*thin=True"):
        model.save_pretrained(tmp_path)


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_speech_encoder", [True, False])
def test_resuming_gives_the_uninterrupted_loss_curve(
    freeze_speech_encoder, backbones, processor, collator, tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: warnings.append(message))
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear", "learning_rate": 5e-3}

    def losses(model, **resume):
        trainer = make_trainer(tmp_path, processor, collator, model=model, **options)
        trainer.train(**resume)
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    checkpoint = tmp_path / "checkpoint-3"
    model = make_thin_model(backbones, freeze_speech_encoder=freeze_speech_encoder)
    whole = losses(model)
    assert list(whole) == list(range(1, 7)) and len(set(whole.values())) == 6
    fresh = make_thin_model(backbones, seed=9, freeze_speech_encoder=freeze_speech_encoder)
    for resumed in (fresh, BlspKdForCausalLM.from_pretrained(checkpoint)):
        # The Trainer keeps the log of the first steps too.
        curve = losses(resumed, resume_from_checkpoint=str(checkpoint))
        assert {step: curve[step] for step in (4, 5, 6)} == {step: whole[step] for step in (4, 5, 6)}
        assert_same_state(resumed, model)
    assert not [message for message in warnings if "keys in the checkpoint" in message]
    assert all("lora_" in name or not name.startswith("language_model") for name in saved_names(checkpoint))
