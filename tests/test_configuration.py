"""`BlspKdConfig`: the authors' defaults, exact round trips, and an error for every option that means nothing."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, WhisperConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd import configuration_blsp_kd as configuration
from modeling_blsp_kd.configuration_blsp_kd import CUSTOM_PIPELINES
from tests.helpers.models import FAMILIES, VOCAB_SIZE, make_config, speech_config, text_config

AUTHORS_CFORMER = {
    "type": "cformer",
    "num_pre_layers": 4,
    "num_post_layers": 4,
    "num_attention_heads": 2,  # the tests' encoder's own
    "ffn_dim": 32,  # likewise
    "dropout": 0.0,
    "frame_stride": 1,
    "attention_window": None,
    "output": "projection",
    "output_temperature": 1.0,
}
AUTHORS_PLORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}
AUTHORS_DISTILLATION = {
    "response_kl": 1.0,
    "input_kl": 1.0,
    "quantity": 1.0,
    "response_ce": 0.0,
    "transcript_ce": 0.0,
    "ctc": 0.0,
    "end_of_turn_kl": 0.0,
    "layer_alignment": 0.0,
    "divergence": "forward",
    "jsd_beta": 0.5,
    "early_tokens": 0,
    "early_weight": 1.0,
    "hardest_share": 1.0,
    "alignment_layers": [],
    "alignment_distance": "cosine",
    "temperature": 2.0,
}


def config(**options):
    return BlspKdConfig(speech_config=speech_config(), text_config=text_config(), **options)


def plain(made):
    """All that a config says, without the place it was loaded from."""
    return {name: value for name, value in made.to_dict().items() if name != "_name_or_path"}


def saved_and_loaded(original, folder):
    original.save_pretrained(folder)
    return BlspKdConfig.from_pretrained(folder)


# -- defaults and forms -----------------------------------------------------------------------------------------------


def test_defaults_are_the_authors():
    made = config()
    assert made.adapter == AUTHORS_CFORMER
    assert made.plora is None
    assert made.distillation == AUTHORS_DISTILLATION
    assert made.freeze_speech_encoder is True
    assert config(plora=True).plora == AUTHORS_PLORA


def test_it_needs_no_arguments():
    made = BlspKdConfig()
    assert isinstance(made.speech_config, WhisperConfig) and isinstance(made.text_config, LlamaConfig)
    assert made.adapter["num_attention_heads"] == made.speech_config.encoder_attention_heads
    assert made.adapter["ffn_dim"] == made.speech_config.encoder_ffn_dim


def test_subsampler_defaults():
    made = config(adapter="subsampler")
    assert made.adapter == {"type": "subsampler", "num_layers": 3, "kernel_size": 5, "bottleneck_dim": 512}
    # A fixed rate has neither one token per text token nor a count to learn.
    assert made.distillation == {**AUTHORS_DISTILLATION, "input_kl": 0.0, "quantity": 0.0}


@pytest.mark.parametrize("adapter", ["cformer", "subsampler"])
def test_a_name_and_a_dict_mean_the_same(adapter):
    assert config(adapter=adapter) == config(adapter={"type": adapter})


@pytest.mark.parametrize("off", [None, False])
def test_plora_off(off):
    assert config(plora=off) == config()


def test_plora_on_with_defaults_in_three_ways():
    assert config(plora=True) == config(plora={}) == config(plora=AUTHORS_PLORA)


def test_given_options_are_kept_and_the_others_are_defaults():
    made = config(
        adapter={"type": "cformer", "num_pre_layers": 0, "dropout": 0.1},
        plora={"r": 4, "target_modules": ["q_proj"]},
        distillation={"response_ce": 0.5, "quantity": 0, "temperature": 1},
    )
    assert made.adapter == {**AUTHORS_CFORMER, "num_pre_layers": 0, "dropout": 0.1}
    assert made.plora == {**AUTHORS_PLORA, "r": 4, "target_modules": ["q_proj"]}
    assert made.distillation == {**AUTHORS_DISTILLATION, "response_ce": 0.5, "quantity": 0, "temperature": 1}


def test_nested_configs_may_be_dicts():
    from_dicts = BlspKdConfig(speech_config=speech_config().to_dict(), text_config=text_config("qwen2").to_dict())
    from_configs = BlspKdConfig(speech_config=speech_config(), text_config=text_config("qwen2"))
    assert from_dicts.to_dict() == from_configs.to_dict()
    assert type(from_dicts.text_config) is type(text_config("qwen2"))


def test_the_callers_dicts_stay_as_they_are():
    given = {
        "speech_config": speech_config().to_dict(),
        "text_config": text_config().to_dict(),
        "adapter": {"type": "cformer", "num_pre_layers": 1},
        "plora": {"r": 2},
        "distillation": {"response_ce": 1.0},
        "part_dtypes": {"adapter": "float32"},
    }
    before = copy.deepcopy(given)
    made = BlspKdConfig(**given)
    assert given == before
    made.adapter["dropout"] = made.plora["lora_dropout"] = made.distillation["quantity"] = 0.5
    made.part_dtypes["plora"] = "float32"
    assert given == before


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_tied_as_the_llms(tied):
    assert make_config(text={"tie_word_embeddings": tied}).tie_word_embeddings is tied


def test_every_auto_class_finds_the_model():
    auto_map = config().auto_map
    assert auto_map["AutoConfig"] == "configuration_blsp_kd.BlspKdConfig"
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        assert auto_map[name] == "modeling_blsp_kd.BlspKdForCausalLM"


def test_a_saved_config_names_all_pipelines_and_a_loaded_one_those_that_are_not_registered(tmp_path, monkeypatch):
    """`pipeline` knew no task of a model that was trained, only those of one that was published."""
    own = {"impl": "my_pipeline.Translator", "pt": ["AutoModelForCausalLM"]}
    given = config(custom_pipelines={"translation": own})
    given.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert written == {**CUSTOM_PIPELINES, "translation": own}
    assert BlspKdConfig.registered_tasks == ("audio-text-to-text",), "by the package `processing`"
    assert set(given.custom_pipelines) == {"automatic-speech-recognition", "translation"}
    monkeypatch.setattr(BlspKdConfig, "registered_tasks", ())
    assert BlspKdConfig.from_pretrained(tmp_path).custom_pipelines == written
    with pytest.raises(ValueError, match="custom_pipelines must be None, or give the code of each task, got 'asr'"):
        config(custom_pipelines="asr")


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_of_any_llm_is_the_same(family, tmp_path):
    original = make_config(family, plora={"r": 3})
    loaded = saved_and_loaded(original, tmp_path)
    assert plain(loaded) == plain(original)
    assert type(loaded.text_config) is type(original.text_config) is type(text_config(family))
    assert loaded.get_text_config() is loaded.text_config
    assert loaded.text_config.hidden_size == original.text_config.hidden_size == 32
    assert plain(AutoConfig.from_pretrained(tmp_path)) == plain(original)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "subsampler", "plora": True},
        {"adapter": {"type": "subsampler", "num_layers": 1, "kernel_size": 3, "bottleneck_dim": 8}},
        {"plora": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}},
        {"distillation": {"input_kl": 0.0, "transcript_ce": 0.3, "temperature": 0.5}},
        {"freeze_speech_encoder": False, "audio_token_id": 7},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_saving_twice_changes_nothing(options, tmp_path):
    original = config(**options)
    loaded = saved_and_loaded(original, tmp_path / "one")
    again = saved_and_loaded(loaded, tmp_path / "two")
    assert plain(loaded) == plain(original)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    for name in ("adapter", "plora", "distillation", "freeze_speech_encoder", "audio_token_id"):
        assert getattr(again, name) == getattr(original, name), name
    assert BlspKdConfig(**json.loads((tmp_path / "one" / "config.json").read_text())).plora == original.plora


def test_general_options_of_transformers_are_accepted(tmp_path):
    made = config(attn_implementation="eager", dtype="bfloat16", use_cache=False, num_labels=2)
    assert saved_and_loaded(made, tmp_path).dtype == made.dtype
    made.save_pretrained(tmp_path)
    assert BlspKdConfig.from_pretrained(tmp_path, attn_implementation="eager")._attn_implementation == "eager"


def test_options_given_at_loading_beat_the_saved_ones(tmp_path):
    """They were set past all checks: `plora=True` stayed True, and the model could not be built."""
    config(audio_token_id=5, plora={"r": 3}, distillation={"quantity": 0.5}).save_pretrained(tmp_path)
    given = {"audio_token_id": 6, "plora": True, "adapter": "cformer", "distillation": {"response_ce": 1.0}}
    assert plain(BlspKdConfig.from_pretrained(tmp_path, **given)) == plain(config(**given))
    with pytest.raises(ValueError, match=r"Unknown option\(s\) \['rank'\] in plora"):
        BlspKdConfig.from_pretrained(tmp_path, plora={"rank": 4})
    with pytest.raises(ValueError, match=r"quantity=0\.5 needs one speech token per text token"):
        BlspKdConfig.from_pretrained(tmp_path, adapter="subsampler", distillation={"quantity": 0.5})
    kept, unused = BlspKdConfig.from_pretrained(tmp_path, foo=1, return_unused_kwargs=True)
    assert kept.plora["r"] == 3 and unused == {"foo": 1}


def test_what_is_accepted_can_be_built():
    for adapter in ("subsampler", {"type": "cformer", "num_pre_layers": 0, "num_post_layers": 0}):
        model = BlspKdForCausalLM(make_config(adapter=adapter))
        assert model.config.adapter["type"] in ("subsampler", "cformer")


@pytest.mark.parametrize("loads", [AutoConfig.from_pretrained, BlspKdConfig.from_pretrained])
def test_a_misspelt_option_of_loading_is_refused(loads, tmp_path):
    """transformers drops options that a config does not have, and the model was loaded as it was stored."""
    make_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['plorra'\] in BlspKdConfig\. Known: .* Did you mean plora\?"):
        loads(tmp_path, plorra=True)
    assert loads(tmp_path, plora=True, trust_remote_code=True, adapter_kwargs={}).plora is not None


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        # misspelt names
        (
            {"adaptor": "cformer"},
            r"Unknown option\(s\) \['adaptor'\] in BlspKdConfig\. Known: .*'adapter'.*\. Did you mean adapter\?",
        ),
        ({"lora": True, "distilation": {}}, r"\['distilation', 'lora'\] in .* Did you mean distillation and plora\?"),
        ({"audio_token_index": 7}, r"\['audio_token_index'\] in .* Did you mean audio_token_id\?"),
        ({"adapter": "conformer"}, r"adapter must be one of \['cformer', 'subsampler'\].*, got 'conformer'"),
        ({"adapter": {"num_pre_layers": 1}}, r"adapter must be one of .* whose 'type' is, got None"),
        ({"adapter": {"type": "cformer", "layers": 3}}, r"Unknown option\(s\) \['layers'\] in the cformer adapter"),
        ({"adapter": {"type": "subsampler", "dropout": 0}}, r"\['dropout'\] in the subsampler adapter\. Known: \["),
        ({"plora": {"lora_aplha": 8}}, r"\['lora_aplha'\] in plora\. .* Did you mean lora_alpha\?"),
        ({"plora": {"rank": 8}}, r"Unknown option\(s\) \['rank'\] in plora\. Known: \['r',"),
        ({"distillation": {"kl": 1.0}}, r"Unknown option\(s\) \['kl'\] in distillation\. Known: \['response_kl',"),
        # values
        ({"adapter": {"type": "cformer", "num_pre_layers": -1}}, r"num_pre_layers must be an integer .* 0, got -1"),
        ({"adapter": {"type": "cformer", "num_post_layers": 1.5}}, r"num_post_layers must be an integer .*, got 1\.5"),
        ({"adapter": {"type": "cformer", "num_pre_layers": True}}, r"num_pre_layers must be an integer .*, got True"),
        ({"adapter": {"type": "cformer", "num_attention_heads": 3}}, r"must divide the encoder width 16, got 3"),
        ({"adapter": {"type": "cformer", "num_attention_heads": 0}}, r"must divide the encoder width 16, got 0"),
        ({"adapter": {"type": "cformer", "ffn_dim": 0}}, r"ffn_dim must be an integer of at least 1, got 0"),
        ({"adapter": {"type": "cformer", "frame_stride": 0}}, r"frame_stride must be an integer of at least 1, got 0"),
        ({"adapter": {"type": "cformer", "frame_stride": 2.0}}, r"frame_stride must be an integer .*, got 2\.0"),
        ({"adapter": {"type": "cformer", "attention_window": 0}}, r"attention_window must be None or an .* 1, got 0"),
        ({"adapter": {"type": "cformer", "dropout": 1.0}}, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"adapter": {"type": "cformer", "dropout": -0.1}}, r"dropout must lie in \[0, 1\), got -0\.1"),
        ({"adapter": {"type": "subsampler", "num_layers": 0}}, r"num_layers must be at least 1, got 0"),
        ({"adapter": {"type": "subsampler", "kernel_size": 4}}, r"kernel_size must be odd, got 4"),
        ({"adapter": {"type": "subsampler", "kernel_size": -1}}, r"kernel_size must be odd, got -1"),
        ({"adapter": {"type": "subsampler", "bottleneck_dim": 0}}, r"bottleneck_dim must be at least 1, got 0"),
        ({"plora": {"r": 0}}, r"plora option r must be an integer of at least 1, got 0"),
        ({"plora": {"r": 2.0}}, r"plora option r must be an integer of at least 1, got 2\.0"),
        ({"plora": {"lora_dropout": 1}}, r"lora_dropout must lie in \[0, 1\), got 1"),
        ({"plora": {"use_dora": True}}, "plora does not support use_dora: DoRA rescales"),
        ({"plora": {"lora_bias": True}}, "plora does not support lora_bias: a bias after B"),
        ({"plora": {"bias": "all"}}, "plora does not support lora_bias: a bias after B"),
        ({"distillation": {"quantity": -1}}, r"distillation option quantity must be at least 0, got -1"),
        ({"distillation": {"response_kl": "1"}}, r"distillation option response_kl must be at least 0, got '1'"),
        ({"distillation": {"input_kl": float("nan")}}, r"distillation option input_kl must be at least 0, got nan"),
        ({"distillation": {"temperature": 0}}, r"distillation option temperature must be above 0, got 0"),
        (
            {"distillation": {"divergence": "js"}},
            r"divergence must be one of \('forward', 'reverse', 'jsd'\), got 'js'",
        ),
        ({"distillation": {"divergence": "jsd", "jsd_beta": 1.0}}, r"jsd_beta must lie between 0 and 1, got 1\.0"),
        ({"distillation": {"jsd_beta": 0.1}}, r"jsd_beta=0\.1 has no effect without divergence='jsd'"),
        ({"distillation": {"early_weight": 2.0}}, r"early_weight=2\.0 has no effect without early_tokens above 0"),
        ({"distillation": {"early_tokens": 0.5}}, r"option early_tokens must be an integer of at least 0, got 0\.5"),
        ({"distillation": {"hardest_share": 0}}, r"distillation option hardest_share must lie in \(0, 1\], got 0"),
        ({"distillation": {"layer_alignment": 1.0}}, r"layer_alignment=1\.0 has no effect without alignment_layers"),
        ({"distillation": {"alignment_layers": [1]}}, r"alignment_layers=\[1\] has no effect without layer_alignment"),
        (
            {"distillation": {"layer_alignment": 1.0, "alignment_layers": [1, 3]}},
            r"alignment_layers names \[3\], but the LLM has the hidden states 0 to 2",
        ),
        (
            {"distillation": {"alignment_layers": 1}},
            r"alignment_layers must be a list of integers of at least 0, got 1",
        ),
        ({"distillation": {"alignment_distance": "l2"}}, r"must be one of \('cosine', 'mse'\), got 'l2'"),
        ({"distillation": {"temperature": -2.0}}, r"distillation option temperature must be at least 0, got -2\.0"),
        ({"plora": {1: 2}}, r"Unknown option\(s\) \['1'\] in plora"),
        ({"audio_token_id": -1}, "audio_token_id must be a token id of at least 0, got -1"),
        ({"part_dtypes": {"adaptor": "float32"}}, r"part_dtypes must be .* for parts among .*'adapter'"),
        ({"part_dtypes": {"adapter": ["float32"]}}, r"part_dtypes must be None, or give the name of a .* dtype"),
        ({"freeze_speech_encoder": "no"}, "freeze_speech_encoder must be True or False, got 'no'"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


# -- assignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("distillation", {"response_kl": -5}),
        ("distillation", {"kl": 1.0}),
        ("distillation", "response_kl"),
        ("plora", {"r": 0}),
        ("plora", {"lora_aplha": 8}),
        ("plora", "yes"),
        ("adapter", "nonsense"),
        ("adapter", {"type": "cformer", "num_attention_heads": 3}),
        ("adapter", None),
        ("timestamps", {"delay_s": 2.0}),
        ("timestamps", {"silence": 1.0}),
        ("speech_padding", "max"),
        ("freeze_speech_encoder", "no"),
        ("audio_token_id", -1),
        ("backbones", {"audio_tower": {}}),
        ("part_dtypes", {"adapter": "int8"}),
    ],
)
def test_assigning_nonsense_raises_the_error_of_the_constructor(name, value):
    """`config.distillation = {"response_kl": -5}` was accepted, and training minimised a negative loss."""
    with pytest.raises(ValueError) as of_constructor:
        config(**{name: value})
    made = config()
    before = copy.deepcopy(made.to_dict())
    with pytest.raises(ValueError) as of_assignment:
        setattr(made, name, value)
    assert str(of_assignment.value) == str(of_constructor.value)
    assert made.to_dict() == before


@pytest.mark.parametrize(
    "name, value",
    [
        ("distillation", {"response_ce": 0.5}),
        ("distillation", None),
        ("plora", True),
        ("plora", {"r": 2}),
        ("plora", False),
        ("adapter", "cformer"),
        ("adapter", {"type": "cformer", "num_pre_layers": 1}),
        ("timestamps", {"delay_s": 0.2}),
        ("speech_padding", "max_length"),
        ("audio_token_id", 7),
    ],
)
def test_an_assigned_option_is_stored_as_the_constructor_stores_it(name, value, tmp_path):
    made = config()
    setattr(made, name, value)
    assert made.to_dict() == config(**{name: value}).to_dict()
    for again in (copy.deepcopy(made), saved_and_loaded(made, tmp_path)):
        assert plain(again) == plain(made)
        with pytest.raises(ValueError, match="plora option r"):
            again.plora = {"r": 0}


def test_an_assignment_that_contradicts_another_option_is_refused():
    made = config()
    with pytest.raises(ValueError, match=r"input_kl=1\.0 needs one speech token per text token.*Set it to 0"):
        made.adapter = "subsampler"
    made.distillation = {"input_kl": 0, "quantity": 0}
    made.adapter = "subsampler"
    assert made.to_dict() == config(adapter="subsampler", distillation={"input_kl": 0, "quantity": 0}).to_dict()
    waveforms = BlspKdConfig(speech_config=AutoConfig.for_model("wav2vec2"), text_config=text_config())
    with pytest.raises(ValueError, match="speech_padding='max_length' is for Whisper"):
        waveforms.speech_padding = "max_length"


def test_an_option_that_was_changed_in_place_is_checked_when_it_is_read():
    """The stored dicts are plain, so an item of one can be assigned unchecked; the model never computes with it."""
    made = make_config(plora=True)
    model = BlspKdForCausalLM(make_config(plora=True))
    made.distillation["response_kl"] = model.config.distillation["response_kl"] = -5
    message = "distillation option response_kl must be at least 0, got -5"
    with pytest.raises(ValueError, match=message):
        getattr(made, "distillation_options")  # noqa: B009
    inputs = {"input_features": torch.zeros(1, 80, 100), "num_speech_tokens": torch.tensor([1])}
    tokens = {"input_ids": torch.tensor([[VOCAB_SIZE, 5]]), "labels": torch.tensor([[-100, 5]])}
    teacher = {"teacher_input_ids": torch.tensor([[4, 5]]), "teacher_attention_mask": torch.ones(1, 2)}
    marks = {"teacher_is_content": torch.tensor([[True, False]]), "teacher_is_response": torch.tensor([[False, True]])}
    with pytest.raises(ValueError, match=message):
        model(**inputs, **tokens, **teacher, **marks)
    model.config.distillation = {}
    assert model(**inputs, **tokens, **teacher, **marks).loss.isfinite()
    made.distillation, made.plora["r"] = {}, 0
    with pytest.raises(ValueError, match="plora option r must be an integer of at least 1, got 0"):
        BlspKdForCausalLM(made)


@pytest.mark.parametrize("name", ["input_kl", "quantity", "transcript_ce"])
def test_a_loss_of_one_to_one_adapters_is_refused_with_the_subsampler(name):
    with pytest.raises(ValueError, match=rf"{name}=0\.5 needs one speech token per text token.*use adapter='cformer'"):
        config(adapter="subsampler", distillation={name: 0.5})
    assert config(adapter="subsampler", distillation={name: 0}).distillation[name] == 0


@pytest.mark.parametrize("model_type", ["clap", "llama"])
def test_what_is_no_speech_encoder_is_refused(model_type):
    with pytest.raises(ValueError, match=rf"speech_config must be of a model type among .*, got '{model_type}'"):
        BlspKdConfig(speech_config=AutoConfig.for_model(model_type), text_config=text_config())


def test_what_libraries_set_on_a_config_is_not_saved(tmp_path):
    """A training script set `pretraining_tp`, and the saved model could not be loaded again."""
    noted = config()
    noted.pretraining_tp = 1
    noted.save_pretrained(tmp_path)
    assert BlspKdConfig.from_pretrained(tmp_path).to_dict() == config().to_dict()


def test_an_unknown_option_in_a_saved_config_is_refused(tmp_path):
    config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "adaptor": "cformer"}))
    with pytest.raises(ValueError, match=r"Unknown option\(s\) \['adaptor'\]"):
        BlspKdConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pad_token_id", "next_versions_option", "kl"])
def test_an_option_of_another_version_of_transformers_is_warned_of(name, tmp_path, monkeypatch):
    """Any key that transformers 5.23 does not write was an error, so the next version's files could not be read."""
    messages = []
    monkeypatch.setattr(configuration.logger, "warning_once", messages.append)
    config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, name: 3}))
    loaded = BlspKdConfig.from_pretrained(tmp_path)
    assert len(messages) == 1 and f"Unknown option(s) ['{name}'] in BlspKdConfig have no effect" in messages[0]
    loaded.save_pretrained(tmp_path)
    messages.clear()
    assert plain(BlspKdConfig.from_pretrained(tmp_path)) == plain(config())
    assert not messages


def test_an_llm_that_is_passed_in_keeps_its_attention():
    """A model built around an LLM and its config object set that config's attention to None, which runs as eager."""
    llm = AutoModelForCausalLM.from_config(text_config())
    before = llm.config._attn_implementation
    config = BlspKdConfig(speech_config=speech_config(), text_config=llm.config, audio_token_id=300)
    BlspKdForCausalLM(config, language_model=llm)
    assert llm.config._attn_implementation == before == "sdpa"
