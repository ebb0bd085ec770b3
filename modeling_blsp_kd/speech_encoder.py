"""Whisper's speech encoder on the true length of each clip, instead of on 30 padded seconds.

Same weights and layers as `transformers.models.whisper.modeling_whisper.WhisperEncoder`; only the length rule differs.
Leaves out: other encoder families, and audio longer than the encoder's position table (an error).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel, sinusoids


@dataclass
class SpeechEncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape (A, T, H)): A clips, T encoder frames, H encoder width.
        frame_mask (`torch.BoolTensor` of shape (A, T)): True at frames that belong to the clip.
    """

    frame_mask: torch.BoolTensor | None = None


class TrueLengthWhisperEncoder(WhisperEncoder):
    """A `WhisperEncoder` that accepts any number of mel frames up to its position table.

    Padding never reaches a valid frame: it is zero at the input of both convolutions (as the edge of a lone clip
    is) and masked in attention, so a clip gives the same frames alone and in any batch.
    """

    def _init_weights(self, module):
        super()._init_weights(module)
        # transformers never visits this module itself (it has no parameter of its own), only its embedding.
        if module is self.embed_positions:
            init.copy_(module.weight, sinusoids(*module.weight.shape))

    def forward(self, input_features, input_features_mask=None, **kwargs) -> SpeechEncoderOutput:
        """Encode log-mel features.

        Args:
            input_features (`torch.FloatTensor` of shape (A, num_mel_bins, num_mel_frames)).
            input_features_mask (`torch.Tensor` of shape (A, num_mel_frames), *optional*):
                True (or 1) at mel frames that belong to the clip. Omitted: all of them.

        Returns:
            [`SpeechEncoderOutput`], with T = ceil(num_mel_frames / 2).

        Raises:
            ValueError: more mel frames than the position table holds.
        """
        num_mel_frames = input_features.shape[-1]
        max_mel_frames = 2 * self.max_source_positions
        if num_mel_frames > max_mel_frames:
            raise ValueError(
                f"The speech encoder takes at most {max_mel_frames} mel frames, but got {num_mel_frames}. "
                "Split the audio into shorter clips."
            )
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(input_features.shape[0], num_mel_frames)
        mel_mask = input_features_mask.bool()
        frame_mask = mel_mask[:, ::2]

        if self.training and self.config.apply_spec_augment:
            # Whisper's own SpecAugment, which only its full model applies. It writes in place.
            input_features = WhisperModel._mask_input_features(self, input_features.clone(), mel_mask.long())
        hidden_states = (input_features * mel_mask[:, None]).to(self.conv1.weight.dtype)
        hidden_states = nn.functional.gelu(self.conv1(hidden_states)) * mel_mask[:, None]
        hidden_states = nn.functional.gelu(self.conv2(hidden_states)).transpose(1, 2)
        hidden_states = hidden_states + self.embed_positions.weight[: hidden_states.shape[1]]
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        attention_mask = create_bidirectional_mask(self.config, hidden_states, frame_mask)
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return SpeechEncoderOutput(last_hidden_state=self.layer_norm(hidden_states), frame_mask=frame_mask)
