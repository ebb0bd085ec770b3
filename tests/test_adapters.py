"""Adapters: counts, batch independence, gradients, and what they refuse."""

import pytest
import torch

from modeling_blsp_kd.adapters import CFormer
from modeling_blsp_kd.cif import continuous_integrate_and_fire
from modeling_blsp_kd.subsampler import Subsampler
from tests.helpers.models import make_model

pytestmark = pytest.mark.numerical

CHEAPER = {"frame_stride": 3, "attention_window": 4}


@pytest.fixture(params=["cformer", "cheaper cformer", "subsampler"])
def adapter(request):
    torch.manual_seed(0)
    if request.param != "subsampler":
        return CFormer(16, 24, 1, 2, 2, 32, 0.0, "sdpa", **CHEAPER if "cheaper" in request.param else {}).eval()
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
        together.speech_tokens[0, :num_tokens], alone.speech_tokens[0, :num_tokens], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("targets", [[1, 1], [5, 17], [30, 2]])
def test_cformer_fires_exactly_as_told(targets):
    torch.manual_seed(0)
    adapter = CFormer(16, 24, 1, 1, 2, 32, 0.0, "sdpa")
    output = adapter(torch.randn(2, 20, 16), torch.ones(2, 20, dtype=torch.bool), torch.tensor(targets))
    assert output.num_speech_tokens.tolist() == targets
    assert output.speech_tokens.shape == (2, max(targets), 24)


def test_cformer_without_transformer_layers_is_only_cif_and_projections():
    adapter = CFormer(16, 24, 0, 0, 2, 32, 0.0, "sdpa")
    output = adapter(torch.randn(1, 20, 16), torch.ones(1, 20, dtype=torch.bool))
    assert output.num_speech_tokens.item() == output.alpha_sum.round().clamp(min=1).item()


# -- cheaper layers before CIF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 2, 9])
@pytest.mark.parametrize("num_frames, length", [(1, 1), (4, 6), (12, 12), (13, 15)])
def test_layers_on_joined_frames_are_a_loop_over_groups_and_cif_integrates_single_frames(num_frames, length, target):
    torch.manual_seed(0)
    adapter = CFormer(16, 24, 1, 0, 2, 32, 0.0, "sdpa", frame_stride=3).eval()
    stacking = adapter.frame_stacking
    hidden_states = torch.full((1, length, 16), 1000.0)
    hidden_states[:, :num_frames] = frames(num_frames)
    mask = torch.arange(length)[None] < num_frames
    output = adapter(hidden_states, mask, None if target is None else torch.tensor([target]))

    groups = [frames(num_frames)[0, start : start + 3] for start in range(0, num_frames, 3)]
    filled = [torch.cat([*group, *[torch.zeros(16)] * (3 - len(group))]) for group in groups]
    joined = adapter.pre_layers[0](torch.stack([stacking.join_proj(group) for group in filled])[None], None)[0]
    expected = []
    for group, layer_output in zip(groups, joined):
        shares = stacking.split_proj(layer_output).view(3, 16)
        expected += [frame + share for frame, share in zip(group, shares)]
    expected = torch.stack(expected)
    torch.testing.assert_close(output.alphas[0, :num_frames], torch.sigmoid(expected[:, -1]), rtol=1e-5, atol=1e-5)
    assert not output.alphas[0, num_frames:].any()
    cif = continuous_integrate_and_fire(
        expected[None, :, :-1],
        torch.sigmoid(expected[None, :, -1]),
        target_lengths=None if target is None else torch.tensor([target]),
    )
    torch.testing.assert_close(output.firing_places, cif.firing_places, rtol=1e-4, atol=1e-4)
    tokens = adapter.output_proj(adapter.cif_proj(cif.speech_tokens))
    torch.testing.assert_close(output.speech_tokens, tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "num_layers, reached",
    [
        (1, range(5, 10)),  # of stretches 0-5, 5-10, 10-12
        (2, range(3, 12)),  # and of 0-3, 3-8, 8-12: the second layer's begin half a stretch earlier
        (3, range(12)),
    ],
)
def test_attention_stays_inside_stretches_that_shift_from_layer_to_layer(num_layers, reached):
    torch.manual_seed(0)
    adapter = CFormer(16, 24, num_layers, 0, 2, 32, 0.0, "sdpa", attention_window=5).eval()
    for parameter in adapter.pre_layers.parameters():
        parameter.data.normal_(std=0.3)
    mask = torch.ones(1, 12, dtype=torch.bool)
    alphas = adapter(frames(12), mask).alphas
    changed = frames(12)
    changed[:, 7] = frames(1, seed=1)
    differs = (adapter(changed, mask).alphas - alphas).abs()[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == list(reached)
    adapter.pre_layers = adapter.pre_layers[:1]
    for length in (12, 40):
        adapter.attention_window = length
        wide = adapter(frames(12), mask).alphas
        adapter.attention_window = None
        torch.testing.assert_close(wide, adapter(frames(12), mask).alphas)


@pytest.mark.parametrize("num_frames, num_tokens", [(1500, 188), (8, 1), (9, 2), (1, 1)])
def test_subsampler_keeps_one_frame_in_eight(num_frames, num_tokens):
    adapter = Subsampler(16, 24, num_layers=3, kernel_size=5, bottleneck_dim=8)
    output = adapter(torch.randn(1, num_frames, 16), torch.ones(1, num_frames, dtype=torch.bool))
    assert output.num_speech_tokens.tolist() == [num_tokens]
    assert output.speech_tokens.shape == (1, num_tokens, 24)


def test_subsampler_refuses_a_token_count():
    adapter = Subsampler(16, 24, num_layers=3, kernel_size=5, bottleneck_dim=8)
    with pytest.raises(ValueError, match="fixed rate and cannot make a given number"):
        adapter(torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool), torch.tensor([3]))


def test_alphas_of_bfloat16_weights_are_float32():
    model = make_model().to(torch.bfloat16)
    audio = model.get_audio_features(torch.randn(1, 80, 100).bfloat16())
    assert audio.alphas.dtype == audio.alpha_sum.dtype == torch.float32
    assert audio.pooler_output.dtype == torch.bfloat16
