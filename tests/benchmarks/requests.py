"""Whole requests: features of the audio, prompt, first token or answer, beside speech LLMs that transformers has.

All have random weights, encoders of one size and the very same LLM; peers take features and lengths as they are
shipped (most pad to 30 s). Ultravox is not in transformers, so a stand-in (encoder, eight frames stacked, MLP) takes
its place, once as shipped and once on the true length. Leaves out: reading and resampling files.
"""

import copy
import math

import torch
from torch import nn
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder

from .measure import OURS, Case

RATE = 16_000
TOKENS_PER_S = 3.3  # of English
NUM_TEXT_TOKENS = 20
NUM_NEW_TOKENS = 32
# Against the authors' 4 + 4 layers over all frames: none before CIF, only what joins frames and splits them again.
CHEAP = {"frame_stride": 4, "num_pre_layers": 0, "num_post_layers": 2}
FEATURE_EXTRACTOR = WhisperFeatureExtractor()
# Name: encoder (width, layers, heads), LLM.
SIZES = {
    "24 M LLM": (
        (384, 4, 6),
        {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32_000}
        | {"num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "0.5 B LLM": (
        (512, 6, 8),
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
}
SMALL_SIZES = {
    "tiny LLM": (
        (32, 1, 2),
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
        | {"num_attention_heads": 2, "num_key_value_heads": 2},
    )
}


def cases(small: bool, device, dtype):
    for name, (encoder_size, llm_options) in (SMALL_SIZES if small else SIZES).items():
        systems = _systems(encoder_size, Qwen2Config(**llm_options), device, dtype)
        for batch_size in (1, 8):
            for duration_s in (3,) if small else (3, 10, 30):
                audio = [torch.randn(duration_s * RATE).mul(0.1).numpy() for _ in range(batch_size)]
                for num_new_tokens in (1, NUM_NEW_TOKENS):
                    if num_new_tokens > 1 and batch_size > 1:
                        continue  # after the first token, all do the same
                    until = "first token" if num_new_tokens == 1 else f"{num_new_tokens} tokens"
                    yield Case(
                        name=f"{name}, {batch_size} x {duration_s} s, {until}",
                        candidates={
                            system: lambda answer=answer, audio=audio, n=num_new_tokens: answer(audio, n)
                            for system, answer in systems.items()
                        },
                        memory_unit=("MiB", 2**20),
                        repeats=2 if small else 15,
                    )


def _systems(encoder_size, text_config, device, dtype) -> dict:
    """By name, what answers clips: (list of waveforms, number of new tokens) -> ids."""
    llm = AutoModelForCausalLM.from_config(text_config).to(device, dtype).eval().requires_grad_(False)
    width, _, heads = encoder_size
    systems = {
        OURS: _ours(encoder_size, llm, CHEAP, plora=False),
        f"{OURS}, partial LoRA": _ours(encoder_size, llm, CHEAP, plora=True),
        f"{OURS}, a layer before CIF": _ours(encoder_size, llm, {**CHEAP, "num_pre_layers": 1}, plora=False),
        f"{OURS}, authors' adapter, partial LoRA": _ours(encoder_size, llm, {}, plora=True),
    }
    token = text_config.vocab_size - 1
    whisper = {
        "num_mel_bins": 80,
        "encoder_layers": encoder_size[1],
        "num_hidden_layers": encoder_size[1],
        "encoder_attention_heads": heads,
        "num_attention_heads": heads,
    }
    qwen = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "d_model": width, "encoder_ffn_dim": 4 * width, **whisper},
        text_config=copy.deepcopy(text_config),
        audio_token_index=token,
    )
    flamingo = AudioFlamingo3Config(
        audio_config={"hidden_size": width, "intermediate_size": 4 * width, **whisper},
        text_config=copy.deepcopy(text_config),
        audio_token_id=token,
    )
    voxtral = VoxtralConfig(
        audio_config={"hidden_size": width, "intermediate_size": 4 * width, **whisper},
        text_config=copy.deepcopy(text_config),
        audio_token_id=token,
    )
    # A conformer block has about twice the weights of a Whisper layer.
    granite = GraniteSpeechConfig(
        encoder_config={"hidden_dim": width, "num_layers": math.ceil(encoder_size[1] / 2), "num_heads": heads},
        projector_config=Blip2QFormerConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            encoder_hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
        ),
        text_config=copy.deepcopy(text_config),
        audio_token_index=token,
        has_lora_adapter=False,
    )
    for name, model_class, config, hear in (
        ("Qwen2-Audio", Qwen2AudioForConditionalGeneration, qwen, _for_qwen2_audio),
        ("Audio Flamingo 3", AudioFlamingo3ForConditionalGeneration, flamingo, _for_audio_flamingo),
        ("Voxtral", VoxtralForConditionalGeneration, voxtral, _for_voxtral),
        ("Granite Speech", GraniteSpeechForConditionalGeneration, granite, _for_granite),
    ):
        systems[name] = _peer(model_class, config, llm, token, hear)
    for padding in ("max_length", "do_not_pad"):
        name = "stacking projector" if padding == "max_length" else "stacking projector, true length"
        systems[name] = _stacking(encoder_size, llm, padding)
    return systems


def _features(audio, padding: str):
    """Log-mel features (A, 80, length), and their lengths."""
    made = FEATURE_EXTRACTOR(
        audio, sampling_rate=RATE, padding=padding, return_attention_mask=True, truncation=False, return_tensors="pt"
    )
    return made["input_features"], made["attention_mask"]


def _prompts(audio, num_audio_tokens: int, token: int) -> dict:
    """Prompts of an audio and text, (B, L)."""
    row = torch.full((num_audio_tokens + NUM_TEXT_TOKENS,), 3)
    row[10 : 10 + num_audio_tokens] = token
    input_ids = row.repeat(len(audio), 1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _answer(model, inputs: dict, num_new_tokens: int):
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return model.generate(**inputs, do_sample=False, max_new_tokens=num_new_tokens, pad_token_id=0)


def _ours(encoder_size, llm, adapter: dict, plora: bool):
    width, num_layers, heads = encoder_size
    speech_config = WhisperConfig(
        d_model=width, encoder_layers=num_layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
    )
    config = BlspKdConfig(
        speech_config=speech_config,
        text_config=llm.config.to_dict(),
        adapter={"type": "cformer", **adapter},
        plora=plora,
        audio_token_id=llm.config.vocab_size,
    )
    # Modules of its own (partial LoRA wraps them), but the very weights of the LLM.
    own_llm = copy.deepcopy(llm, {id(parameter): parameter for parameter in llm.parameters()})
    model = BlspKdForCausalLM(config, language_model=own_llm).to(llm.device, llm.dtype).eval()

    def answer(audio, num_new_tokens: int):
        features, mask = _features(audio, "longest")
        inputs = {
            **_prompts(audio, 1, config.audio_token_id),
            "input_features": features,
            "input_features_mask": mask,
            # Random weights would fire at any rate.
            "num_speech_tokens": torch.tensor([round(TOKENS_PER_S * len(clip) / RATE) for clip in audio]),
        }
        return _answer(model, inputs, num_new_tokens)

    return answer


def _peer(model_class, config, llm, token: int, hear):
    with torch.device("meta"):
        model = model_class(config)
    model.model.language_model, model.lm_head = llm.base_model, llm.lm_head
    model.to(llm.dtype)
    for ears in model.model.children():
        if ears is not llm.base_model:
            ears.to_empty(device=llm.device)
            for buffer in ears.buffers():
                buffer.zero_()
            for parameter in ears.parameters():
                nn.init.normal_(parameter, std=0.02)
    model.eval()
    if llm.config._attn_implementation != "sdpa":
        raise RuntimeError(f"{model_class.__name__} changed the attention of the LLM that all share.")

    def answer(audio, num_new_tokens: int):
        features, num_audio_tokens = hear(audio)
        return _answer(model, {**_prompts(audio, num_audio_tokens, token), **features}, num_new_tokens)

    return answer


def _for_qwen2_audio(audio):
    features, mask = _features(audio, "max_length")
    return {"input_features": features, "feature_attention_mask": mask}, _halved_twice(mask)


def _for_audio_flamingo(audio):
    features, mask = _features(audio, "max_length")
    return {"input_features": features, "input_features_mask": mask}, _halved_twice(mask)


def _halved_twice(mask) -> int:
    return (((int(mask[0].sum()) - 1) // 2 + 1) - 2) // 2 + 1


def _for_voxtral(audio):
    features, _ = _features(audio, "max_length")
    return {"input_features": features}, features.shape[-1] // 8


def _for_granite(audio):
    features, _ = _features(audio, "longest")
    pairs = features.transpose(1, 2)[:, : features.shape[-1] // 2 * 2].reshape(len(audio), -1, 160)
    num_audio_tokens = math.ceil(pairs.shape[1] / 15) * 3
    mask = torch.ones(len(audio), num_audio_tokens, dtype=torch.bool)
    return {"input_features": pairs, "input_features_mask": mask}, num_audio_tokens


def _stacking(encoder_size, llm, padding: str):
    width, num_layers, heads = encoder_size
    encoder = TrueLengthWhisperEncoder(
        WhisperConfig(
            d_model=width, encoder_layers=num_layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
        )
    )
    hidden_size = llm.config.hidden_size
    projector = nn.Sequential(nn.Linear(8 * width, 2 * hidden_size), nn.GLU(), nn.Linear(hidden_size, hidden_size))
    encoder, projector = (module.to(llm.device, llm.dtype).eval() for module in (encoder, projector))

    @torch.no_grad()
    def answer(audio, num_new_tokens: int):
        features, mask = _features(audio, "max_length" if padding == "max_length" else "longest")
        length = int(mask.sum(1).max())
        # As shipped it hears 30 s of which it keeps the frames of the clip.
        frames = encoder(features.to(llm.device, llm.dtype)).last_hidden_state[:, : math.ceil(length / 2)]
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % 8))
        speech = projector(frames.reshape(len(audio), -1, 8 * width))
        prompts = _prompts(audio, speech.shape[1], 3)
        embeds = llm.get_input_embeddings()(prompts.pop("input_ids").to(llm.device))
        embeds[:, 10 : 10 + speech.shape[1]] = speech
        return _answer(llm, {"inputs_embeds": embeds, **prompts}, num_new_tokens)

    return answer
