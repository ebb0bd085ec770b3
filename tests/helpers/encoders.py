"""Small speech encoders other than Whisper, and models and processors with them."""

import torch
from transformers import (
    HubertConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from processing import BlspKdProcessor

from .models import SMALL_CFORMER, text_config

WAVEFORM_OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 10,
    "initializer_range": 0.2,
}
ENCODERS = {
    **{
        f"{config_class.model_type}-{norm}": (config_class, {**WAVEFORM_OPTIONS, "feat_extract_norm": norm})
        for config_class in (Wav2Vec2Config, HubertConfig, WavLMConfig)
        for norm in ("group", "layer")
    },
    "wav2vec2-bert": (
        Wav2Vec2BertConfig,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 10,
            "conv_depthwise_kernel_size": 5,
            "feature_projection_input_dim": 160,
        },
    ),
    "parakeet": (
        ParakeetEncoderConfig,
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "subsampling_conv_channels": 4,
        },
    ),
}


def encoder_config(name):
    config_class, options = ENCODERS[name]
    return config_class(**options)


def config_of(name, **options):
    text = text_config(max_position_embeddings=4096)
    return BlspKdConfig(
        speech_config=encoder_config(name), text_config=text, adapter=SMALL_CFORMER, audio_token_id=300, **options
    )


def model_of(name, **options):
    torch.manual_seed(0)
    return BlspKdForCausalLM(config_of(name, plora=True, **options)).eval()


def extractor_of(name):
    if name == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
    if name == "parakeet":
        return ParakeetFeatureExtractor()
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=name.endswith("layer"))


def processor_of(name, processor):
    return BlspKdProcessor(extractor_of(name), processor.tokenizer, chat_template=processor.chat_template)
