"""The speech encoder on true lengths: equal to Whisper where Whisper is defined, and blind to padding."""

import pytest
import torch
from conftest import speech_config
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TrueLengthWhisperEncoder(speech_config(encoder_layers=2)).eval()


def mel(num_frames, seed=0):
    return torch.randn(1, 80, num_frames, generator=torch.Generator().manual_seed(seed))


def test_equals_whisper_on_thirty_seconds(encoder):
    whisper = WhisperEncoder(encoder.config).eval()
    whisper.load_state_dict(encoder.state_dict())
    features = mel(3000)
    assert torch.equal(encoder(features).last_hidden_state, whisper(features).last_hidden_state)


@pytest.mark.parametrize("num_frames", [1, 2, 31, 100])
def test_a_clip_is_the_same_alone_and_in_a_batch(encoder, num_frames):
    """Padding leaked through the convolutions and the attention of naive true-length encoders."""
    alone = encoder(mel(num_frames))
    features = torch.full((2, 80, 120), 7.0)  # garbage as padding
    features[0, :, :num_frames] = mel(num_frames)[0]
    features[1] = mel(120, seed=1)[0]
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[0, num_frames:] = 0
    batch = encoder(features, mask)
    num_encoded = (num_frames + 1) // 2
    assert batch.frame_mask.sum(1).tolist() == [num_encoded, 60]
    torch.testing.assert_close(
        batch.last_hidden_state[0, :num_encoded], alone.last_hidden_state[0], rtol=1e-5, atol=1e-5
    )


def test_too_many_frames_are_an_error(encoder):
    with pytest.raises(ValueError, match="at most 3000 mel frames, but got 3001"):
        encoder(mel(3001))


def test_positions_missing_from_a_checkpoint_are_sinusoids_again(encoder, tmp_path):
    """Out-of-tree code lost Whisper's position table when a checkpoint lacked it."""
    state = {key: value for key, value in encoder.state_dict().items() if "embed_positions" not in key}
    encoder.save_pretrained(tmp_path, state_dict=state)
    loaded = TrueLengthWhisperEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.embed_positions.weight.data, sinusoids(1500, 16))


def test_spec_augment_only_in_training_and_never_in_the_callers_tensor():
    torch.manual_seed(0)
    encoder = TrueLengthWhisperEncoder(speech_config(apply_spec_augment=True, mask_time_prob=0.5)).eval()
    features = mel(200)
    untouched = features.clone()
    plain = encoder(features).last_hidden_state
    assert torch.equal(encoder(features).last_hidden_state, plain)
    assert not torch.equal(encoder.train()(features).last_hidden_state, plain)
    assert torch.equal(features, untouched)
