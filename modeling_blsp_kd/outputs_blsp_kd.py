"""What `BlspKdForCausalLM` returns: of `get_audio_features`, and of `forward`.

Shapes: B prompts, L expanded prompt length, N audio clips, T encoder frames, U speech tokens of a clip, H encoder
width, D LLM width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast


@dataclass
class BlspKdAudioOutput(BaseModelOutputWithPooling):
    """The output of encoder and adapter for N clips.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (N, T, H)): encoder frames.
        pooler_output (`torch.FloatTensor` of shape (N, U, D)): speech tokens for the LLM.
        num_speech_tokens (`torch.LongTensor` of shape (N,)): how many of them each clip has.
        frame_mask (`torch.BoolTensor` of shape (N, T)): True at frames of the clip.
        alphas (`torch.FloatTensor` of shape (N, T), *optional*): unscaled CIF weights (CFormer only).
        alpha_sum (`torch.FloatTensor` of shape (N,), *optional*): predicted token counts (CFormer only).
        firing_places (`torch.FloatTensor` of shape (N, U), *optional*):
            encoder frames (from the start) at which each token is complete, see [`CifOutput`]; -1 past a clip's count
            (CFormer only).
        token_times (`torch.FloatTensor` of shape (N, U, 2), *optional*):
            if requested: seconds from the start of the clip where each token begins and ends, corrected
            as `config.timestamps` says; NaN past a clip's count (CFormer only). Uncorrected, tokens end at firing
            places times `frame_duration_s`.
        token_states (`torch.FloatTensor` of shape (N, U, D)): what the transcript is read off, with the LLM's
            embeddings as output matrix; the speech tokens themselves, unless the adapter has another `output`.
        ctc_logits (`torch.FloatTensor` of shape (N, T', 257), *optional*), num_ctc_frames (`torch.LongTensor` of
            shape (N,), *optional*): while the distillation option `ctc` is on, see `ctc.py`.
    """

    num_speech_tokens: torch.LongTensor | None = None
    frame_mask: torch.BoolTensor | None = None
    alphas: torch.FloatTensor | None = None
    alpha_sum: torch.FloatTensor | None = None
    firing_places: torch.FloatTensor | None = None
    token_times: torch.FloatTensor | None = None
    token_states: torch.FloatTensor | None = None
    ctc_logits: torch.FloatTensor | None = None
    num_ctc_frames: torch.LongTensor | None = None


@dataclass
class BlspKdOutputWithPast(CausalLMOutputWithPast):
    """The output of `forward`.

    Args:
        loss (`torch.FloatTensor`, *optional*): weighted sum of the loss parts, or cross-entropy of `labels`.
        logits (`torch.FloatTensor` of shape (B, L, V), *optional*): not computed in a distillation step.
        loss_parts (`dict[str, torch.FloatTensor]`, *optional*):
            of a distillation step: name -> (sum, count), detached. Their quotient is the mean that the loss weighs.
            Beside the losses: `token_count_accuracy`, `token_count_error` (mean absolute), and in evaluation
            `response_agreement`, the share of response tokens at which speech and text have the same likeliest token.
    """

    loss_parts: dict[str, torch.FloatTensor] | None = None
