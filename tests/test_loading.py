"""Full checkpoints: dtypes, devices, shards, quantisation; then what is switched on a loaded model.

Attention implementations, gradient checkpointing, another vocabulary, compilation and export, and text at no cost.
"""

import copy
import logging
import shutil
import warnings

import accelerate
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Wav2Vec2Config, Wav2Vec2Model

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.backbones import load_audio_tower
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from modeling_blsp_kd.training.output_head import check_output_head
from tests.helpers.models import SMALL_CFORMER, make_model, speech_config
from tests.helpers.prompts import spoken_prompts

pytestmark = pytest.mark.numerical

GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
TEXT = torch.arange(3, 12)[None]
SUBSAMPLER = {"type": "subsampler", "bottleneck_dim": 8}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def inputs(processor):
    return spoken_prompts(processor)


@pytest.fixture(scope="module")
def model():
    """Shared: no test changes it."""
    return make_model(plora=True)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    model.save_pretrained(folder)
    return folder


# -- dtypes, devices, shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [SMALL_CFORMER, SUBSAMPLER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "bfloat16"])
def test_a_dtype_is_that_of_all_parameters(dtype, adapter, inputs, tmp_path):
    make_model(plora=True, adapter=adapter).save_pretrained(tmp_path / "first")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert inputs["input_features"].dtype == torch.float32
    output = logits(loaded, inputs)
    assert output.dtype == expected and output.isfinite().all()
    assert logits(loaded, {**inputs, "input_features": inputs["input_features"].to(expected)}).isfinite().all()
    assert loaded.generate(**inputs, **GREEDY).shape == (2, inputs["input_ids"].shape[1] + 4)
    loaded.save_pretrained(tmp_path / "second")
    assert BlspKdForCausalLM.from_pretrained(tmp_path / "second").dtype == expected


PARTS = ("audio_tower", "adapter", "language_model.model.embed_tokens", "language_model.model.layers.0")
PARTS += ("language_model.model.layers.1", "language_model.model.norm", "language_model.model.rotary_emb")
PARTS += ("language_model.lm_head",)
ON_CPU = dict.fromkeys(PARTS, "cpu")
DEVICE_MAPS = {
    "auto": "auto",
    "root": {"": "cpu"},
    "parts": ON_CPU,
    "a layer and the head on disk": {
        **ON_CPU,
        "language_model.model.layers.1": "disk",
        "language_model.lm_head": "disk",
    },
    "embeddings on disk": {**ON_CPU, "language_model.model.embed_tokens": "disk"},
    "encoder on disk": {**ON_CPU, "audio_tower": "disk"},
    "adapter on disk": {**ON_CPU, "adapter": "disk"},
    "LLM on disk": {"audio_tower": "cpu", "adapter": "cpu", "language_model": "disk"},
    "all on disk": {"audio_tower": "disk", "adapter": "disk", "language_model": "disk"},
}


@pytest.mark.parametrize("adapter", [SMALL_CFORMER, SUBSAMPLER])
@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_devices_change_neither_logits_nor_tokens(name, adapter, inputs, tmp_path):
    if name == "all on disk" and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("accelerate before 1.15 refuses to offload a whole model to the disk")
    model = make_model(plora=True, adapter=adapter)
    model.save_pretrained(tmp_path / "model")
    given = copy.copy(DEVICE_MAPS[name])
    loaded = BlspKdForCausalLM.from_pretrained(
        tmp_path / "model", device_map=given, offload_folder=tmp_path / "offloaded"
    )
    assert given == DEVICE_MAPS[name]
    assert ("disk" in name) == any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_distilling_with_an_offloaded_head_is_refused(saved, collator, rows, tmp_path):
    """The losses read the head's weight directly."""
    device_map = {**ON_CPU, "language_model.lm_head": "disk"}
    loaded = BlspKdForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="output head is offloaded.*Keep it on a device"):
        loaded(**collator(rows))
    with pytest.raises(ValueError, match="output head is offloaded"):
        check_output_head(loaded.language_model)


def test_shards(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(BlspKdForCausalLM.from_pretrained(tmp_path), inputs), logits(model, inputs))


def test_the_generation_config_goes_along(backbones, processor, tmp_path):
    model = BlspKdForCausalLM.from_backbones(*backbones, audio_token_id=processor.audio_token_id, adapter=SMALL_CFORMER)
    llm = AutoModelForCausalLM.from_pretrained(backbones[1])
    assert model.generation_config is not llm.generation_config
    for name in ("eos_token_id", "do_sample", "top_k"):
        assert getattr(model.generation_config, name) == getattr(llm.generation_config, name)
    model.generation_config.top_k = 13
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert loaded.generation_config.top_k == 13


# -- quantisation -----------------------------------------------------------------------------------------------------


def bits_and_bytes(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao_int8():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of kernels for other devices as it is imported
        logging.disable(logging.WARNING)
        try:
            quantization = pytest.importorskip("torchao.quantization")
        finally:
            logging.disable(logging.NOTSET)
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTISATIONS = {
    "4-bit": (lambda: bits_and_bytes(load_in_4bit=True), lambda linear: type(linear).__name__ == "Linear4bit"),
    "8-bit": (lambda: bits_and_bytes(load_in_8bit=True), lambda linear: type(linear).__name__ == "Linear8bitLt"),
    "torchao": (torchao_int8, lambda linear: type(linear.weight).__name__ == "Int8Tensor"),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about devices that are not here
def test_a_quantisation_may_be_a_dict(tmp_path):
    make_model(plora=True).save_pretrained(tmp_path)
    given = {**bits_and_bytes(load_in_8bit=True).to_dict()}
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    layer = loaded.language_model.model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear8bitLt" and type(layer.lora_A["plora"]) is torch.nn.Linear
    assert type(loaded.adapter.output_proj) is torch.nn.Linear


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of torchao and bitsandbytes, about devices that are not here
@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize("adapter, with_plora", [(SMALL_CFORMER, True), (SMALL_CFORMER, False), (SUBSAMPLER, True)])
def test_quantisation_is_for_the_llms_linear_layers(kind, adapter, with_plora, inputs, tmp_path):
    make_config, is_quantised = QUANTISATIONS[kind]
    quantization_config = make_config()
    given = copy.deepcopy(quantization_config.to_dict())
    model = make_model(plora=with_plora, adapter=adapter, text={"hidden_size": 128, "intermediate_size": 128})
    model.save_pretrained(tmp_path / "plain")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantization_config)
    assert quantization_config.to_dict() == given
    # Saved before it is run: on a CPU bitsandbytes then packs 4-bit weights, and rounds their scales.
    loaded.save_pretrained(tmp_path / "quantised")
    suffix = "_proj.base_layer" if with_plora else "_proj"
    num_quantised = 0
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_expected = name.startswith("language_model.model.layers") and name.endswith(suffix)
            assert is_quantised(module) == is_expected, name
            num_quantised += is_expected
    assert num_quantised == 2 * 7
    for name, parameter in model.named_parameters():
        if "lora_" in name or not name.startswith("language_model."):
            actual = loaded.get_parameter(name)
            assert actual.dtype == torch.float32 and torch.equal(actual, parameter), name
    assert torch.equal(loaded.get_output_embeddings().weight.float(), model.get_output_embeddings().weight)

    # Speech tokens are heard in full precision.
    with torch.no_grad():
        heard = [
            heard_by.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
            for heard_by in (loaded, model)
        ]
    assert torch.equal(*heard)
    output = logits(loaded, inputs)
    assert output.isfinite().all() and not torch.equal(output, logits(model, inputs))
    again = BlspKdForCausalLM.from_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(again, inputs), output)
    assert torch.equal(again.generate(**inputs, **GREEDY), loaded.generate(**inputs, **GREEDY))
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.long
def test_the_users_own_exemptions_from_quantisation_are_added(saved):
    """They took the place of ours: partial LoRA became int8, which cannot be trained, and loading failed."""
    quantization_config = bits_and_bytes(load_in_8bit=True, llm_int8_skip_modules=["language_model.model.layers.0"])
    loaded = BlspKdForCausalLM.from_pretrained(saved, quantization_config=quantization_config)
    exempt, quantised = (layer.mlp.up_proj for layer in loaded.language_model.model.layers)
    assert type(exempt.base_layer) is torch.nn.Linear and type(quantised.base_layer).__name__ == "Linear8bitLt"
    assert type(quantised.lora_A["plora"]) is type(loaded.adapter.output_proj) is torch.nn.Linear
    assert type(loaded.get_output_embeddings()) is torch.nn.Linear
    assert quantization_config.llm_int8_skip_modules == ["language_model.model.layers.0"]


# -- attention implementations ----------------------------------------------------------------------------------------


def implementations(model) -> tuple[str, str, str]:
    configs = (model.language_model.config, model.audio_tower.config, model.adapter.layer_config)
    return tuple(config._attn_implementation for config in configs)


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, ("sdpa", "sdpa", "sdpa")),
        ("eager", ("eager", "eager", "eager")),
        ({"text_config": "eager", "speech_config": "sdpa"}, ("eager", "sdpa", "sdpa")),
        ({"text_config": "sdpa", "speech_config": "eager"}, ("sdpa", "eager", "sdpa")),
        ({"": "eager", "text_config": "sdpa", "speech_config": "sdpa"}, ("sdpa", "sdpa", "eager")),
    ],
)
def test_attention_of_each_part_is_chosen_at_loading_and_later(given, expected, saved, model, inputs):
    reference = logits(model, inputs)
    is_token = reference.new_ones(reference.shape[:2], dtype=torch.bool)
    is_token[0, : -int(model(**{name: value[:1] for name, value in inputs.items()}).logits.shape[1])] = False
    loaded = BlspKdForCausalLM.from_pretrained(saved, attn_implementation=given)
    assert implementations(loaded) == expected
    torch.testing.assert_close(logits(loaded, inputs)[is_token], reference[is_token], rtol=1e-3, atol=1e-3)
    if given is not None:
        switched = BlspKdForCausalLM.from_pretrained(saved)
        switched.set_attn_implementation(given)
        assert implementations(switched) == expected
        assert torch.equal(logits(switched, inputs), logits(loaded, inputs))


def test_eager_attention_returns_its_weights(saved, inputs):
    model = BlspKdForCausalLM.from_pretrained(saved, attn_implementation="eager")
    output = model(**inputs, output_attentions=True)
    length = output.logits.shape[1]
    assert [weights.shape for weights in output.attentions] == [(2, 4, length, length)] * 2


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # many still call it so
@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_every_layer_is_checkpointed_and_no_gradient_changes(enable, freeze, use_reentrant, collator, rows):
    model = make_model(plora={"lora_dropout": 0.0}, freeze_speech_encoder=freeze).train()
    batch = collator(rows)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    inside_layers = {  # a checkpoint holds what is inside a layer's own forward
        "audio_tower": [layer.self_attn_layer_norm for layer in model.audio_tower.layers],
        "adapter": [layer.self_attn_layer_norm for layer in [*model.adapter.pre_layers, *model.adapter.post_layers]],
        "language_model": [layer.input_layernorm for layer in model.language_model.model.layers],
    }
    runs = dict.fromkeys(inside_layers, 0)
    for part, modules in inside_layers.items():
        for module in modules:

            def count(*args, part=part):
                runs[part] += 1

            module.register_forward_pre_hook(count)
    gradients()
    without = dict(runs)
    assert without == {"audio_tower": 1, "adapter": 2, "language_model": 2 + 2}, "the teacher runs the LLM, too"
    runs.update(dict.fromkeys(runs, 0))
    getattr(model, enable)(*([] if use_reentrant is None else [{"use_reentrant": use_reentrant}]))
    actual = gradients()
    assert runs == {"audio_tower": 1 if freeze else 2, "adapter": 4, "language_model": 2 + 4}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert actual[name] is not None and torch.equal(actual[name], gradient), name
    model.gradient_checkpointing_disable()
    runs.update(dict.fromkeys(runs, 0))
    gradients()
    assert runs == without


# -- another vocabulary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [320, 299])
def test_another_vocabulary(size, tied, inputs, tmp_path):
    model = make_model(text={"tie_word_embeddings": tied}, plora=True).double()
    before = logits(model, inputs)
    model.resize_token_embeddings(size, mean_resizing=False)
    resized = logits(model, inputs)
    assert resized.shape[-1] == size
    kept = min(size, 300)
    # Close, not equal: another number of columns may be multiplied by another kernel.
    torch.testing.assert_close(resized[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float64 and torch.equal(logits(loaded, inputs), resized)
    assert loaded.config.text_config.vocab_size == loaded.config.get_text_config().vocab_size == size
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert loaded.generate(**inputs, **GREEDY).shape[0] == 2
    assert not loaded.get_input_embeddings().weight.requires_grad


# -- compilation and export -------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.long
def test_compiled_it_answers_the_same(processor, no_compiled_code):
    model = make_model(plora=True, adapter=SUBSAMPLER, text={"num_hidden_layers": 1}).double()
    one = spoken_prompts(processor, durations_s=(0.5,))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**one).logits, logits(model, one))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=TEXT).logits, model(input_ids=TEXT).logits)


@pytest.mark.filterwarnings("ignore")  # of torch.export about itself
def test_text_forward_and_audio_tower_can_be_exported(model, inputs):
    program = torch.export.export(model, (), {"input_ids": TEXT, "use_cache": False}, strict=False)
    with torch.no_grad():
        exported = program.module()(input_ids=TEXT + 1, use_cache=False).logits
        torch.testing.assert_close(exported, model(input_ids=TEXT + 1).logits)
    audio = (inputs["input_features"], inputs["input_features_mask"])
    program = torch.export.export(model.audio_tower, audio, strict=False)
    with torch.no_grad():
        exported = program.module()(audio[0] * 0.5, audio[1]).last_hidden_state
        torch.testing.assert_close(exported, model.audio_tower(audio[0] * 0.5, audio[1]).last_hidden_state)


# -- text costs nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
def test_only_a_prompt_with_audio_does_lora_arithmetic(cache, inputs):
    """Text prompts and decoding steps run the LLM alone."""
    model = make_model(plora=True)
    calls = []
    for layer in model.plora.layers:
        for module in (layer.lora_A["plora"], layer.lora_B["plora"], layer.lora_dropout["plora"]):
            module.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        model(input_ids=TEXT)
    model.generate(input_ids=TEXT, **GREEDY, cache_implementation=cache)
    assert not calls
    audio = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    num_speech_tokens = int(model.get_audio_features(**audio).num_speech_tokens.sum())
    logits(model, inputs)
    assert calls == [num_speech_tokens] * (3 * len(model.plora.layers)), "speech positions alone cost arithmetic"
    calls.clear()
    model.generate(**inputs, **GREEDY, cache_implementation=cache)
    assert calls == [num_speech_tokens] * (3 * len(model.plora.layers)), "decoding steps must do none"


@pytest.fixture
def messages(monkeypatch):
    """The messages that transformers logs about loading."""
    logged = []
    for name in ("modeling_utils", "utils.loading_report", "configuration_utils"):
        logger = transformers.utils.logging.get_logger(f"transformers.{name}")
        monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: logged.append(str(message)))
    return logged


def test_a_plain_load_is_silent(saved, messages):
    """Nothing is wrong, so nothing is said: no key is missing, unexpected or initialised anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlspKdForCausalLM.from_pretrained(saved)
    assert not messages


WAV2VEC2 = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WAV2VEC2 |= {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
WAV2VEC2 |= {"vocab_size": 12, "codevector_dim": 8, "proj_codevector_dim": 8, "use_weighted_layer_sum": True}


def whole_speech_model(kind: str, folder):
    config = speech_config() if kind.startswith("Whisper") else Wav2Vec2Config(**WAV2VEC2)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def add_tensor(folder, name: str):
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(1)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "kind",
    ["WhisperForConditionalGeneration", "WhisperModel", "WhisperForAudioClassification", "Wav2Vec2ForCTC"]
    + ["Wav2Vec2ForPreTraining", "Wav2Vec2ForSequenceClassification", "Wav2Vec2ForXVector"],
)
def test_other_parts_of_a_whole_speech_model_are_left_out_in_silence(kind, backbones, tmp_path, messages):
    """At every build and at every load of a thin checkpoint, Whisper's whole decoder was listed as unexpected."""
    folder = whole_speech_model(kind, tmp_path / "speech")
    built = BlspKdForCausalLM.from_backbones(folder, backbones[1], audio_token_id=300, adapter=SMALL_CFORMER, thin=True)
    built.save_pretrained(tmp_path / "thin")
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path / "thin")
    expected_class = TrueLengthWhisperEncoder if kind.startswith("Whisper") else Wav2Vec2Model
    assert type(built.audio_tower) is type(loaded.audio_tower) is expected_class
    assert not messages


@pytest.mark.parametrize(
    "kind, name, reported",
    [
        ("WhisperForConditionalGeneration", "model.encoder.layers.7.fc1.weight", "layers.7.fc1.weight"),
        ("WhisperForConditionalGeneration", "model.encoders.weight", "model.encoders.weight"),
        ("Wav2Vec2ForCTC", "wav2vec2.encoder.decoder.weight", "encoder.decoder.weight"),
    ],
)
def test_weights_that_no_speech_model_has_are_reported(kind, name, reported, tmp_path, messages):
    folder = whole_speech_model(kind, tmp_path / "speech")
    add_tensor(folder, name)
    load_audio_tower(folder)
    [report] = messages
    assert reported in report and report.count("UNEXPECTED") == 2  # its line, and the legend


def test_names_that_are_expected_beside_an_encoder_are_reported_beside_a_model(saved, tmp_path, messages):
    folder = shutil.copytree(saved, tmp_path / "saved")
    for name in ("decoder.weight", "proj_out.weight"):
        add_tensor(folder, name)
    BlspKdForCausalLM.from_pretrained(folder)
    assert len(messages) == 1 and "decoder.weight" in messages[0] and "proj_out.weight" in messages[0]
