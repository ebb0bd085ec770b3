"""The CFormer adapter: encoder frames to as many LLM input vectors as the transcript has text tokens.

Follows arXiv 2405.19041 and the authors' public code (blsp-emo, src/modeling_adapter.py at e27b8da), with two
corrections: pre-CIF layers do not attend to padding, and CIF rows are independent. Leaves out: the integration itself,
see `cif.py`, and the adapter of a fixed rate, see `subsampler.py`.

Shapes: N clips, W windows of clips, T encoder frames, U speech tokens, H encoder width, D LLM width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer
from transformers.utils import ModelOutput

from .blockwise_attention import CAUSAL, Blocks, with_attention_mask
from .cif import continuous_integrate_and_fire
from .cif_streaming import integrate_and_fire_at_threshold
from .ctc import NUM_CTC_CLASSES
from .speech_windows import is_within, join_windows, regroup, tokens_per_window


@dataclass
class AdapterOutput(ModelOutput):
    """The output of an adapter for N clips; T frames of the longest clip, U largest number of speech tokens.

    Args:
        speech_tokens (`torch.FloatTensor` of shape (N, U, D)): in the LLM's width, see [`llm_vectors`].
        num_speech_tokens (`torch.LongTensor` of shape (N,)): how many of them each clip has.
        alphas (`torch.FloatTensor` of shape (N, T), *optional*): unscaled CIF weight of each frame.
        alpha_sum (`torch.FloatTensor` of shape (N,), *optional*): their sum, the predicted token count.
        firing_places (`torch.FloatTensor` of shape (N, U), *optional*): see [`CifOutput`].
        ctc_logits (`torch.FloatTensor` of shape (N, T', 257), *optional*): of the joined frames, see `ctc.py`.
        num_ctc_frames (`torch.LongTensor` of shape (N,), *optional*): valid ones of them.
    """

    speech_tokens: torch.FloatTensor | None = None
    num_speech_tokens: torch.LongTensor | None = None
    alphas: torch.FloatTensor | None = None
    alpha_sum: torch.FloatTensor | None = None
    firing_places: torch.FloatTensor | None = None
    ctc_logits: torch.FloatTensor | None = None
    num_ctc_frames: torch.LongTensor | None = None


def _run_layers(layers, config, hidden_states, mask, blocks=None):
    if not layers:
        return hidden_states  # making a mask waits for the device
    hidden_states, attention_mask = with_attention_mask(config, hidden_states, mask, blocks)
    for layer in layers:
        hidden_states = layer(hidden_states, attention_mask)
    return hidden_states


def _run_layers_in_stretches(layers, config, hidden_states, mask, length: int):
    """Run layers like `_run_layers`, but let frames attend only within stretches of `length` frames.

    Every other layer's stretches begin half a stretch earlier, so what a border separates in one layer is together in
    the next (Liu et al., 2021).
    """
    num_rows, num_frames, _ = hidden_states.shape
    for index, layer in enumerate(layers):
        before = length // 2 if index % 2 else 0
        padding = (before, -(before + num_frames) % length)
        stretches = nn.functional.pad(hidden_states, (0, 0, *padding)).unflatten(1, (-1, length)).flatten(0, 1)
        stretch_mask = nn.functional.pad(mask, padding).unflatten(1, (-1, length)).flatten(0, 1)
        # A stretch of padding must attend to something, or softmax gives NaN. Its output is never read.
        stretches = _run_layers([layer], config, stretches, stretch_mask | ~stretch_mask.any(1, keepdim=True))
        hidden_states = stretches.unflatten(0, (num_rows, -1)).flatten(1, 2)[:, before : before + num_frames]
    return hidden_states


class FrameStacking(nn.Module):
    """Joins `stride` frames to one, so that layers cost less, and adds their output to the single frames again.

    CIF still integrates single frames, so the borders of tokens are as fine as without it.
    """

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.join_proj = nn.Linear(stride * dim, dim)
        self.split_proj = nn.Linear(dim, stride * dim)

    def join(self, frames: torch.Tensor, frame_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Join frames (W, T, H) with mask (W, T) to frames (W, ceil(T / stride), H) with a mask of their own."""
        missing = -frame_mask.shape[1] % self.stride
        frames = nn.functional.pad(frames.masked_fill(~frame_mask[..., None], 0.0), (0, 0, 0, missing))
        joined_mask = nn.functional.pad(frame_mask, (0, missing)).unflatten(1, (-1, self.stride)).any(-1)
        return self.join_proj(frames.unflatten(1, (-1, self.stride)).flatten(2)), joined_mask

    def split(self, joined: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Add to each frame its share of the joined frame: (W, T, H)."""
        shares = self.split_proj(joined).unflatten(2, (self.stride, -1)).flatten(1, 2)
        return frames + shares[:, : frames.shape[1]]


class CFormer(nn.Module):
    """Transformer layers over frames, CIF, transformer layers over tokens, projection to the LLM's width.

    The pre-CIF layers run at 50 frames/s and cost the most; `frame_stride` and `attention_window`, which the authors'
    code lacks, make them cheaper.

    Args:
        input_dim (`int`): encoder width H.
        output_dim (`int`): LLM width D.
        num_pre_layers, num_post_layers (`int`): layers before and after CIF.
        num_attention_heads (`int`), ffn_dim (`int`), dropout (`float`): of these layers.
        frame_stride (`int`): how many frames the layers before CIF take as one, see [`FrameStacking`].
        attention_window (`int` or None): length in joined frames of the stretches that the layers before CIF attend
            within; stretches shift by half from layer to layer. None: they attend to all.
        attn_implementation (`str`): attention of these layers, as in transformers.
        output (`str`): what becomes of the speech tokens outside of this module, see `expected_embeddings.py`.
        output_temperature (`float`): of the softmax of expected embeddings.
        has_ctc_head (`bool`): tell the characters of the transcript from the frames before CIF, see `ctc.py`.
    """

    one_to_one = True

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_pre_layers: int,
        num_post_layers: int,
        num_attention_heads: int,
        ffn_dim: int,
        dropout: float,
        attn_implementation: str,
        frame_stride: int = 1,
        attention_window: int | None = None,
        output: str = "projection",
        output_temperature: float = 1.0,
        has_ctc_head: bool = False,
    ):
        super().__init__()
        self.frame_stacking = FrameStacking(input_dim, frame_stride) if frame_stride > 1 else None
        self.attention_window = attention_window
        self.output, self.output_temperature = output, output_temperature
        self.layer_config = WhisperConfig(
            d_model=input_dim,
            encoder_attention_heads=num_attention_heads,
            encoder_ffn_dim=ffn_dim,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            attn_implementation=attn_implementation,
        )
        # Whisper's encoder layers, as the authors use.
        self.pre_layers = nn.ModuleList(WhisperEncoderLayer(self.layer_config) for _ in range(num_pre_layers))
        self.post_layers = nn.ModuleList(WhisperEncoderLayer(self.layer_config) for _ in range(num_post_layers))
        self.cif_proj = nn.Linear(input_dim - 1, input_dim)
        self.output_proj = nn.Linear(input_dim, output_dim)
        self.ctc_head = nn.Linear(input_dim, NUM_CTC_CLASSES) if has_ctc_head else None

    def set_attn_implementation(self, attn_implementation: str):
        self.layer_config._attn_implementation = attn_implementation

    def forward(
        self,
        hidden_states: torch.Tensor,
        frame_mask: torch.Tensor,
        target_lengths: torch.Tensor | None = None,
        windows_per_clip: torch.Tensor | None = None,
        is_causal: bool = False,
        blocks: Blocks | None = None,
    ) -> AdapterOutput:
        """Turn frames into as many speech tokens as the clip has text tokens.

        Args:
            hidden_states (W, T, H), frame_mask (W, T) bool: encoder frames of W windows of N clips.
            target_lengths (`torch.LongTensor` of shape (N,), *optional*): tokens to fire; omitted, they are predicted.
            windows_per_clip (`torch.LongTensor` of shape (N,), *optional*): omitted, every clip is one window.
            is_causal (`bool`): tokens attend to the tokens before them, and predicted tokens fire at the threshold, so
                that a token is the same however the clip goes on.
            blocks ([`Blocks`], *optional*): of encoder frames, which the layers before CIF attend within, without
                look-ahead.
        """
        stride = 1 if self.frame_stacking is None else self.frame_stacking.stride
        blocks = None if blocks is None else blocks.joined(stride)
        if self.frame_stacking is None:
            joined_mask = frame_mask
            joined = hidden_states = self._run_pre_layers(hidden_states, frame_mask, blocks)
        else:
            joined, joined_mask = self.frame_stacking.join(hidden_states, frame_mask)
            joined = self._run_pre_layers(joined, joined_mask, blocks)
            hidden_states = self.frame_stacking.split(joined, hidden_states)
        ctc = self._run_ctc_head(joined, joined_mask, windows_per_clip)
        alphas = torch.sigmoid(hidden_states[..., -1].float()).masked_fill(~frame_mask, 0.0)
        frames_per_window = frame_mask.sum(1)
        # The integral runs through the borders of windows: the next window completes what one leaves open.
        frame_mask, hidden_states, alphas = join_windows(windows_per_clip, frame_mask, hidden_states, alphas)
        # CIF integrates all channels. That of the alphas is dropped afterwards; dropping it before would cost a copy.
        if is_causal and target_lengths is None:
            cif = integrate_and_fire_at_threshold(hidden_states, alphas, frame_mask)
        else:
            cif = continuous_integrate_and_fire(hidden_states, alphas, frame_mask, target_lengths)

        speech_tokens = self.cif_proj(cif.speech_tokens[..., :-1])
        token_mask = is_within(cif.num_speech_tokens, speech_tokens.shape[1])
        if windows_per_clip is not None:
            # Tokens attend within the windows that they are complete in, as frames do.
            group_sizes = tokens_per_window(cif.firing_places, token_mask, frames_per_window, windows_per_clip)
            group_sizes = group_sizes[group_sizes > 0]
            speech_tokens = regroup(speech_tokens, token_mask, group_sizes)
            token_mask = is_within(group_sizes, speech_tokens.shape[1])
        attended = CAUSAL if is_causal else None
        speech_tokens = _run_layers(self.post_layers, self.layer_config, speech_tokens, token_mask, attended)
        speech_tokens = self.output_proj(speech_tokens)
        if windows_per_clip is not None:
            speech_tokens = regroup(speech_tokens, token_mask, cif.num_speech_tokens)
        return AdapterOutput(
            speech_tokens=speech_tokens,
            num_speech_tokens=cif.num_speech_tokens,
            alphas=alphas,
            alpha_sum=cif.alpha_sum,
            firing_places=cif.firing_places,
            **ctc,
        )

    def _run_ctc_head(self, joined, joined_mask, windows_per_clip) -> dict[str, torch.Tensor]:
        if self.ctc_head is None:
            return {}
        mask, logits = join_windows(windows_per_clip, joined_mask, self.ctc_head(joined))
        return {"ctc_logits": logits, "num_ctc_frames": mask.sum(1)}

    @torch.no_grad()
    def shift_alpha_logits(self, shift: float):
        """Add `shift` to the logit of every alpha, in the bias of the layer that the logits come from.

        Raises:
            ValueError: there is no layer before CIF, so the logits are a channel of the encoder's frames.
        """
        if self.frame_stacking is not None:
            self.frame_stacking.split_proj.bias.unflatten(0, (self.frame_stacking.stride, -1))[:, -1] += shift
        elif self.pre_layers:
            self.pre_layers[-1].fc2.bias[-1] += shift
        else:
            raise ValueError("Without a layer before CIF, no bias shifts the alphas: set num_pre_layers to 1 or more.")

    @torch.no_grad()
    def scale_speech_tokens(self, factor: float):
        """Multiply every speech token by `factor`."""
        self.output_proj.weight.mul_(factor)
        self.output_proj.bias.mul_(factor)

    def _run_pre_layers(self, frames, mask, blocks):
        if self.attention_window is None:
            return _run_layers(self.pre_layers, self.layer_config, frames, mask, blocks)
        return _run_layers_in_stretches(self.pre_layers, self.layer_config, frames, mask, self.attention_window)
