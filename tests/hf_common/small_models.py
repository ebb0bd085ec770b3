"""The small BLSP-KD configurations and inputs that transformers' common tests run on.

Leaves out: how positions grow beyond one clip per prompt, which this project's own tests cover.

Shapes: B prompts with one clip each, L prompt length.
"""

from dataclasses import dataclass

import torch

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from tests.helpers.models import speech_config, text_config

# Inside the vocabulary, after all ids that the tests cut the vocabulary down to or write themselves.
AUDIO_TOKEN_ID = 60
NUM_MEL_BINS = 8


@dataclass(frozen=True)
class Layout:
    """A layout of prompts: how the clips take their positions.

    Args:
        num_placeholders (`int`): in each prompt; 0: text only.
        num_speech_tokens (`int`): positions that each clip takes.
        num_mel_frames (`int`): of the longest clip.
        is_forced (`bool`): the CIF is told to fire `num_speech_tokens`.
    """

    num_placeholders: int
    num_speech_tokens: int
    num_mel_frames: int = 24
    is_forced: bool = True


TEXT_ONLY = Layout(num_placeholders=0, num_speech_tokens=0)
REPEATED = Layout(num_placeholders=4, num_speech_tokens=4)
ONE_TO_ONE = Layout(num_placeholders=1, num_speech_tokens=1)
GROWING = Layout(num_placeholders=1, num_speech_tokens=3)
# Three convolutions of stride 2 after the encoder's make one token of 16 mel frames, and three of 34 to 48.
SUBSAMPLED_ONE = Layout(num_placeholders=1, num_speech_tokens=1, num_mel_frames=16, is_forced=False)
SUBSAMPLED_GROWING = Layout(num_placeholders=1, num_speech_tokens=3, num_mel_frames=48, is_forced=False)


class ModelTester:
    """A model tester, as transformers' test mixins call it: sizes, a configuration and inputs."""

    batch_size = 7  # one test compares 7 prompts, and would invent those that are missing
    seq_length = 11
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    causal_lm_class = BlspKdForCausalLM

    def __init__(self, parent, family, adapter, plora, layout, freeze_speech_encoder=False):
        self.parent = parent
        self.family, self.adapter, self.plora, self.layout = family, adapter, plora, layout
        self.freeze_speech_encoder = freeze_speech_encoder
        # The tests' name for the number of positions that a prompt of `seq_length` tokens takes.
        self.encoder_seq_length = self.seq_length + layout.num_speech_tokens - layout.num_placeholders

    def get_config(self):
        # Both kinds of output head: of its own, and tied to the embeddings.
        tied = self.family == "qwen3"
        text = text_config(self.family, vocab_size=99, initializer_range=0.02, tie_word_embeddings=tied)
        speech = speech_config(num_mel_bins=NUM_MEL_BINS, max_source_positions=24, init_std=0.02)
        adapters = {
            "cformer": {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1},
            "subsampler": {"type": "subsampler", "bottleneck_dim": 16},
        }
        return BlspKdConfig(
            speech_config=speech,
            text_config=text,
            adapter=adapters[self.adapter],
            plora={"r": 4, "lora_dropout": 0.0} if self.plora else False,
            freeze_speech_encoder=self.freeze_speech_encoder,
            audio_token_id=AUDIO_TOKEN_ID,
        )

    def prepare_config_and_inputs_for_common(self):
        layout = self.layout
        # Two tokens of text at either end: tests pad there, and write ids of their own.
        input_ids = torch.randint(5, AUDIO_TOKEN_ID, (self.batch_size, self.seq_length))
        input_ids[:, 3 : 3 + layout.num_placeholders] = AUDIO_TOKEN_ID
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if layout.num_placeholders:
            # Clips of different lengths, the first being the longest.
            num_mel_frames = layout.num_mel_frames - 2 * (torch.arange(self.batch_size) % 3)
            mask = torch.arange(layout.num_mel_frames) < num_mel_frames[:, None]
            inputs["input_features"] = torch.randn(self.batch_size, NUM_MEL_BINS, layout.num_mel_frames)
            inputs["input_features_mask"] = mask.long()
            if layout.is_forced:
                inputs["num_speech_tokens"] = torch.full((self.batch_size,), layout.num_speech_tokens)
        return self.get_config(), inputs
