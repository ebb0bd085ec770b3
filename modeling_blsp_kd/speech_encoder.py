"""Speech encoders: features of clips (log-mel or waveform) to frames that do not depend on padding.

Whisper runs on the true length of each clip, or on 30 padded seconds as it was pretrained; other encoders are used as
transformers has them. Leaves out: making features (the processor), what differs between the families of encoders
(`encoder_families.py`), and cutting long clips (`speech_windows.py`).

Shapes: W windows of clips (a short clip is one), T frames, H encoder width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, WhisperConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids
from transformers.utils.output_capturing import capture_outputs

from .blockwise_attention import Blocks, with_attention_mask
from .encoder_families import ENCODER_FAMILIES, count_frames
from .speech_windows import is_within

# Whisper's convolutions run on multiples of this. torch and oneDNN prepare a convolution for every new length and keep
# it (up to 1,024 of them, 20 to 100 kB each), so clips of many lengths would be slow and fill the memory.
MEL_FRAMES_STEP = 50


@dataclass
class SpeechEncoderOutput(BaseModelOutput):
    """The output of any speech encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (W, T, H)): encoder frames.
        frame_mask (`torch.BoolTensor` of shape (W, T)): True at frames that belong to the clip.
    """

    frame_mask: torch.BoolTensor = None  # always there; fields of a `ModelOutput` need a default


class TrueLengthWhisperEncoder(WhisperEncoder):
    """A `WhisperEncoder` that accepts any number of mel frames up to its position table.

    Padding never reaches a valid frame: it is zero at the input of both convolutions (as the edge of a lone clip
    is) and masked in attention, so a clip gives the same frames alone and in any batch.

    With `pad_to_window` digital silence follows every clip instead, up to the full window, and the encoder attends to
    it, as in Whisper's pretraining. The output is still cut and masked to the clip.
    """

    pad_to_window = False

    def initialize_weights(self):
        super().initialize_weights()
        self.initialize_positions()

    def initialize_positions(self):
        """Put sinusoids into the position table, where transformers' rule for embeddings has put noise.

        A table that came from a checkpoint stays as it is.
        """
        init.copy_(self.embed_positions.weight, sinusoids(*self.embed_positions.weight.shape))

    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        blocks: Blocks | None = None,
        **kwargs,
    ) -> SpeechEncoderOutput:
        """Encode log-mel features.

        Args:
            input_features (`torch.FloatTensor` of shape (W, num_mel_bins, num_mel_frames)).
            input_features_mask (`torch.Tensor` of shape (W, num_mel_frames), *optional*):
                True (or 1) at mel frames that belong to the clip. Omitted: all of them.
            blocks ([`Blocks`], *optional*): of frames, which limit attention. Omitted: frames attend to the whole clip.

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
                "Split the audio into windows."
            )
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(input_features.shape[0], num_mel_frames)
        mel_mask = input_features_mask.bool()
        frame_mask = mel_mask[:, ::2]

        if self.training and self.config.apply_spec_augment and num_mel_frames > self.config.mask_time_length:
            input_features = spec_augment(self.config, input_features, mel_mask)
        if self.pad_to_window:
            input_features, mel_mask = _follow_by_silence(input_features, mel_mask, max_mel_frames)
        hidden_states = self.convolve(input_features, mel_mask)
        hidden_states = hidden_states + self.positions(0, hidden_states.shape[1], hidden_states.device)
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        hidden_states, attention_mask = with_attention_mask(self.config, hidden_states, mel_mask[:, ::2], blocks)
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layer_norm(hidden_states)[:, : frame_mask.shape[1]]
        return SpeechEncoderOutput(last_hidden_state=hidden_states, frame_mask=frame_mask)

    def positions(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the position embeddings of frames `start` to `stop` of a window: (stop - start, H)."""
        # Called, not indexed: an offloaded table is fetched by a call.
        return self.embed_positions(torch.arange(start, stop, device=device))

    def convolve(self, input_features: torch.Tensor, mel_mask: torch.Tensor) -> torch.Tensor:
        """Run the convolutions on log-mel (W, num_mel_bins, num_mel_frames), with zeros at padding, to (W, T, H).

        Frame t comes from mel frames 2t - 2 to 2t + 2.
        """
        num_frames = mel_mask[:, ::2].shape[1]
        missing = -mel_mask.shape[1] % MEL_FRAMES_STEP
        is_valid = nn.functional.pad(mel_mask, (0, missing))[:, None]
        hidden_states = (nn.functional.pad(input_features, (0, missing)) * is_valid).to(self.conv1.weight.dtype)
        hidden_states = nn.functional.gelu(self.conv1(hidden_states)) * is_valid
        hidden_states = nn.functional.gelu(self.conv2(hidden_states))[..., :num_frames]
        return hidden_states.transpose(1, 2)


def spec_augment(config: WhisperConfig, log_mel: torch.Tensor, mel_mask: torch.Tensor) -> torch.Tensor:
    """Return log-mel (W, num_mel_bins, num_mel_frames) with random spans of frames and of bins zeroed (SpecAugment).

    Follows arXiv 1904.08779 as `WhisperModel` applies it, with the same random numbers. `WhisperEncoder` has no
    SpecAugment.
    """
    num_windows, num_mel_bins, num_mel_frames = log_mel.shape
    if config.mask_time_prob > 0:
        share, span, fewest = config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
        is_masked = _random_spans(mel_mask.sum(1).tolist(), num_mel_frames, share, span, fewest)
        log_mel = log_mel.masked_fill(is_masked.to(log_mel.device)[:, None], 0.0)
    if config.mask_feature_prob > 0:
        share, span, fewest = config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks
        is_masked = _random_spans([num_mel_bins] * num_windows, num_mel_bins, share, span, fewest)
        log_mel = log_mel.masked_fill(is_masked.to(log_mel.device)[..., None], 0.0)
    return log_mel


def _random_spans(lengths: list[int], length: int, share: float, span: int, fewest: int) -> torch.BoolTensor:
    """Return True in random spans of at most `share` of each row's own length: (rows, length)."""
    if not 1 <= span <= length:
        raise ValueError(f"SpecAugment masks spans of {span}, but they must be of 1 to {length}, all there is.")
    rounding = np.random.rand()

    def count(row_length: int) -> int:
        wanted = max(int(share * row_length / span + rounding), fewest)
        return min(wanted, length // span, max(row_length - span + 1, 0))

    is_masked = torch.zeros(len(lengths), length, dtype=torch.bool)
    for row, row_length in zip(is_masked, lengths if count(length) > 0 else ()):
        starts = np.random.choice(np.arange(row_length - span + 1), count(row_length), replace=False)
        for start in starts if len(starts) else [length - 1]:  # a row without a span has padding there
            row[start : start + span] = True
    return is_masked


def _follow_by_silence(log_mel, mel_mask, num_mel_frames: int):
    """Put the features of digital silence after each clip, (W, num_mel_bins, <= num_mel_frames).

    Returns:
        `tuple`: features (W, num_mel_bins, num_mel_frames) and a mask of ones.

    Whisper's feature extractor clips log10 power at 1e-10 and at 8 below the clip's maximum, then takes (x + 4) / 4.
    """
    loudest = log_mel.masked_fill(~mel_mask[:, None], -torch.inf).amax((1, 2))
    silence = (loudest - 2.0).clamp(min=-1.5)[:, None, None]
    missing = num_mel_frames - log_mel.shape[-1]
    log_mel, mel_mask = nn.functional.pad(log_mel, (0, missing)), nn.functional.pad(mel_mask, (0, missing))
    return torch.where(mel_mask[:, None], log_mel, silence), torch.ones_like(mel_mask)


def encoder_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the encoder that a config is for."""
    return TrueLengthWhisperEncoder if config.model_type == "whisper" else MODEL_MAPPING[type(config)]


def build_speech_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a speech encoder with random weights.

    Args:
        config (`PreTrainedConfig`): of a model type in `ENCODER_FAMILIES`.
    """
    if config.model_type != "whisper":
        return AutoModel.from_config(config)
    with local_torch_dtype(config.dtype or torch.get_default_dtype()):
        return TrueLengthWhisperEncoder(config)


def encode_speech(
    audio_tower: PreTrainedModel, input_features: torch.Tensor, input_features_mask: torch.Tensor, **kwargs
) -> SpeechEncoderOutput:
    """Run any supported encoder on windows of clips.

    Args:
        input_features (`torch.FloatTensor` of shape (W, ...)): what the encoder's feature extractor makes, zero-padded.
        input_features_mask (`torch.Tensor` of shape (W, length)): 1 at what belongs to the clip, on the time axis.
    """
    if isinstance(audio_tower, TrueLengthWhisperEncoder):
        return audio_tower(input_features, input_features_mask, return_dict=True, **kwargs)
    config, mask = audio_tower.config, input_features_mask.long()
    is_valid = mask.bool().reshape(*mask.shape, *[1] * (input_features.ndim - 2))
    input_features = input_features.masked_fill(~is_valid, 0.0).to(audio_tower.dtype)
    if getattr(config, "feat_extract_norm", None) == "group" and not bool(mask.all()):
        # Its first layer normalises over time, padding included: only equal lengths can share a batch.
        alone = [
            encode_speech(audio_tower, clip[None, : int(clip_mask.sum())], clip_mask[None, clip_mask.bool()], **kwargs)
            for clip, clip_mask in zip(input_features, mask)
        ]
        return SpeechEncoderOutput(
            last_hidden_state=pad_sequence([output.last_hidden_state[0] for output in alone], batch_first=True),
            frame_mask=pad_sequence([output.frame_mask[0] for output in alone], batch_first=True),
        )
    if audio_tower.training and hasattr(config, "mask_time_length"):
        length = input_features.shape[1]
        if input_features.ndim == 2:
            length = count_frames(config, length)
        if length <= config.mask_time_length:
            # SpecAugment refuses clips that are shorter than the span that it masks.
            kwargs["mask_time_indices"] = mask.new_zeros(len(mask), length, dtype=torch.bool)
    encoded = audio_tower(input_features, attention_mask=mask, return_dict=True, **kwargs)
    frames = encoded.last_hidden_state
    if ENCODER_FAMILIES[config.model_type].returns_mask:
        frame_mask = encoded.attention_mask
    else:
        frame_mask = is_within(count_frames(config, mask.sum(1)), frames.shape[1])
    return SpeechEncoderOutput(
        last_hidden_state=frames,
        hidden_states=encoded.hidden_states,
        attentions=encoded.attentions,
        frame_mask=frame_mask.bool(),
    )
