"""The Subsampler adapter: encoder frames to LLM input vectors at a fixed rate.

Follows BLSP (arXiv 2309.00916). Leaves out: one vector per text token, see `adapters.py`.

Shapes: N clips, W windows of clips, T encoder frames, U speech tokens, H encoder width, D LLM width.
"""

import torch
from torch import nn

from .adapters import AdapterOutput
from .speech_windows import join_windows


class Subsampler(nn.Module):
    """Three stride-2 convolutions with GLU, a residual bottleneck, LayerNorm: a fixed number of tokens per second.

    Args:
        input_dim (`int`): encoder width H.
        output_dim (`int`): LLM width D.
        num_layers (`int`): convolutions, each halves the rate.
        kernel_size (`int`): odd.
        bottleneck_dim (`int`): width of the bottleneck.
    """

    one_to_one = False
    output = "projection"

    def __init__(self, input_dim: int, output_dim: int, num_layers: int, kernel_size: int, bottleneck_dim: int):
        super().__init__()
        widths = [input_dim] * num_layers + [output_dim]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width_in, 2 * width_out, kernel_size, stride=2, padding=kernel_size // 2)
            for width_in, width_out in zip(widths[:-1], widths[1:])
        )
        self.down_proj = nn.Linear(output_dim, bottleneck_dim, bias=False)
        self.up_proj = nn.Linear(bottleneck_dim, output_dim, bias=False)
        self.layer_norm = nn.LayerNorm(output_dim)

    def set_attn_implementation(self, attn_implementation: str):
        """Do nothing: this adapter has no attention."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        frame_mask: torch.Tensor,
        target_lengths: torch.Tensor | None = None,
        windows_per_clip: torch.Tensor | None = None,
    ) -> AdapterOutput:
        """Turn frames into speech tokens at a fixed rate.

        Args:
            hidden_states (W, T, H), frame_mask (W, T) bool: encoder frames of W windows of N clips.
            target_lengths: must be None, the rate is fixed.
            windows_per_clip (`torch.LongTensor` of shape (N,), *optional*): omitted, every clip is one window.
        """
        if target_lengths is not None:
            raise ValueError(
                "The subsampler adapter has a fixed rate and cannot make a given number of tokens. Leave "
                "target_lengths out, or use adapter='cformer'."
            )
        hidden_states = hidden_states.transpose(1, 2)
        mask = frame_mask
        for convolution in self.convolutions:
            # Masked before each convolution: a clip's last frames must not depend on what pads them.
            hidden_states = nn.functional.glu(convolution(hidden_states * mask[:, None]), dim=1)
            mask = mask[:, ::2]
        hidden_states = hidden_states.transpose(1, 2)
        bottleneck = self.up_proj(nn.functional.gelu(self.down_proj(hidden_states)))
        mask, speech_tokens = join_windows(windows_per_clip, mask, self.layer_norm(hidden_states + bottleneck))
        return AdapterOutput(speech_tokens=speech_tokens, num_speech_tokens=mask.sum(1))
