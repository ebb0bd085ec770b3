"""Small random models: of all LLM families that tests need, full and thin, and the bare LLM inside one."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM

VOCAB_SIZE = 300  # of the tokenizer, without the audio token
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox")
SMALL_CFORMER = {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1}


def text_config(family="llama", **overrides):
    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large, so that a wrong input visibly changes the output
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt_neox":
        options["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma2"):
        options["head_dim"] = 8
    if family == "gemma2":
        options["final_logit_softcapping"] = 5.0
    return AutoConfig.for_model(family, **{**options, **overrides})


def speech_config(**overrides):
    options = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
        "init_std": 0.2,
        "vocab_size": 10,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    return WhisperConfig(**{**options, **overrides})


def make_config(family="llama", adapter=SMALL_CFORMER, speech=None, text=None, **options):
    return BlspKdConfig(
        speech_config=speech_config(**(speech or {})),
        text_config=text_config(family, **(text or {})),
        adapter=adapter,
        audio_token_id=VOCAB_SIZE,
        **options,
    )


def make_model(family="llama", seed=0, train_plora=True, **options) -> BlspKdForCausalLM:
    """A small random model in eval mode. `train_plora`: B of partial LoRA is not zero, as after training."""
    torch.manual_seed(seed)
    model = BlspKdForCausalLM(make_config(family, **options)).eval()
    # The adapter's linear layers start small; give its output the size of token embeddings.
    for parameter in model.adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if model.plora is not None and train_plora:
        for parameter in model.plora.parameters:
            parameter.data.normal_(std=0.3)
    return model


def make_thin_model(backbones, seed=1, **options) -> BlspKdForCausalLM:
    """A thin model with partial LoRA that is not zero, as after training."""
    options = {"audio_token_id": 300, "adapter": SMALL_CFORMER, "plora": True, "thin": True, **options}
    torch.manual_seed(seed)
    model = BlspKdForCausalLM.from_backbones(*backbones, **options)
    if model.plora is not None:
        for parameter in model.plora.parameters:
            parameter.data.normal_(std=0.3)
    return model


def base_llm(model):
    """The LLM without any LoRA layer, with the same weights."""
    base = AutoModelForCausalLM.from_config(model.config.text_config).to(model.dtype)
    state = {
        key.replace(".base_layer", ""): value
        for key, value in model.language_model.state_dict().items()
        if "lora_" not in key
    }
    base.load_state_dict(state)
    return base.eval()


def embed_the_transcript(model, batch):
    """Have `get_audio_features` give the LLM's embeddings of each row's own content tokens, as if speech were text."""
    encode = model.get_audio_features

    def get_audio_features(*args, **kwargs):
        audio = encode(*args, **kwargs)
        embeds = torch.zeros_like(audio.pooler_output)
        for row, (ids, is_content) in enumerate(zip(batch["teacher_input_ids"], batch["teacher_is_content"])):
            embeds[row, : is_content.sum()] = model.get_input_embeddings()(ids[is_content])
        audio.pooler_output = embeds
        return audio

    model.get_audio_features = get_audio_features


def vector_tolerance(audio) -> dict:
    """Return how far speech tokens in float32 may lie from these of one clip, when they are computed in other parts.

    CIF's fractions are differences of an integral that grows with the clip, and so does its rounding.
    """
    rounding = torch.finfo(torch.float32).eps * float(audio.alpha_sum) * float(audio.pooler_output.abs().max())
    return {"rtol": 1e-5, "atol": max(1e-5, 4 * rounding)}
