"""Adapters: counts, batch independence, gradients, and what they refuse."""

import pytest
import torch
from conftest import make_model

from modeling_blsp_kd.adapters import CFormer, Subsampler


@pytest.fixture(params=["cformer", "subsampler"])
def adapter(request):
    torch.manual_seed(0)
    if request.param == "cformer":
        return CFormer(16, 24, 1, 2, 2, 32, 0.0, "sdpa").eval()
    return Subsampler(16, 24, num_layers=3, kernel_size=5, bottleneck_dim=8).eval()


def frames(num_frames, seed=0):
    return torch.randn(1, num_frames, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_frames", [1, 9, 40])
def test_a_clip_is_the_same_alone_and_in_a_batch(adapter, num_frames):
    """The authors' pre-CIF layers attend to padding, and their CIF rows disturb each other."""
    alone = adapter(frames(num_frames), torch.ones(1, num_frames, dtype=torch.bool))
    batch = torch.full((2, 64, 16), 3.0)
    batch[0, :num_frames] = frames(num_frames)
    batch[1] = frames(64, seed=1)
    mask = torch.arange(64) < torch.tensor([[num_frames], [64]])
    together = adapter(batch, mask)
    assert together.num_speech_tokens[0] == alone.num_speech_tokens[0]
    num_tokens = int(alone.num_speech_tokens)
    torch.testing.assert_close(
        together.speech_embeds[0, :num_tokens], alone.speech_embeds[0, :num_tokens], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("targets", [[1, 1], [5, 17], [30, 2]])
def test_cformer_fires_exactly_as_told(targets):
    torch.manual_seed(0)
    adapter = CFormer(16, 24, 1, 1, 2, 32, 0.0, "sdpa")
    output = adapter(torch.randn(2, 20, 16), torch.ones(2, 20, dtype=torch.bool), torch.tensor(targets))
    assert output.num_speech_tokens.tolist() == targets
    assert output.speech_embeds.shape == (2, max(targets), 24)


def test_cformer_without_transformer_layers_is_only_cif_and_projections():
    adapter = CFormer(16, 24, 0, 0, 2, 32, 0.0, "sdpa")
    output = adapter(torch.randn(1, 20, 16), torch.ones(1, 20, dtype=torch.bool))
    assert output.num_speech_tokens.item() == output.alpha_sum.round().clamp(min=1).item()


@pytest.mark.parametrize("num_frames, num_tokens", [(1500, 188), (8, 1), (9, 2), (1, 1)])
def test_subsampler_keeps_one_frame_in_eight(num_frames, num_tokens):
    adapter = Subsampler(16, 24, num_layers=3, kernel_size=5, bottleneck_dim=8)
    output = adapter(torch.randn(1, num_frames, 16), torch.ones(1, num_frames, dtype=torch.bool))
    assert output.num_speech_tokens.tolist() == [num_tokens]
    assert output.speech_embeds.shape == (1, num_tokens, 24)


def test_subsampler_refuses_a_token_count():
    adapter = Subsampler(16, 24, num_layers=3, kernel_size=5, bottleneck_dim=8)
    with pytest.raises(ValueError, match="fixed rate and cannot make a given number"):
        adapter(torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool), torch.tensor([3]))


def test_alphas_of_bfloat16_weights_are_float32():
    model = make_model().to(torch.bfloat16)
    audio = model.get_audio_features(torch.randn(1, 80, 100).bfloat16())
    assert audio.alphas.dtype == audio.alpha_sum.dtype == torch.float32
    assert audio.pooler_output.dtype == torch.bfloat16
