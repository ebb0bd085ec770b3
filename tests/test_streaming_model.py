"""Streaming models: attention in blocks, CIF that fires at the threshold, and what follows does not change what was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import VoxtralRealtimeFeatureExtractor, WhisperFeatureExtractor

from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.blockwise_attention import Blocks, with_attention_mask
from modeling_blsp_kd.cif_streaming import integrate_and_fire_at_threshold
from modeling_blsp_kd.training.building import build_model, build_processor
from modeling_blsp_kd.training.options import ModelOptions
from processing import BlspKdProcessor
from processing.speech_features import with_log_mel_max
from tests.helpers.encoders import config_of
from tests.helpers.literal_cif import literal_tokens
from tests.helpers.models import SMALL_CFORMER, make_config, make_model, vector_tolerance
from tests.helpers.prompts import clip, spoken_prompts

pytestmark = pytest.mark.numerical

# 8 frames, with 2 of the next chunk and 12 of those before; three layers in the encoder and two before CIF.
STREAMING = {"chunk_ms": 160, "look_ahead_ms": 40, "left_context_ms": 240}
DEEP = {"adapter": {**SMALL_CFORMER, "num_pre_layers": 2}, "speech": {"encoder_layers": 3}}


def streaming_model(streaming=None, **options):
    return make_model(streaming={**STREAMING, **(streaming or {})}, **{**DEEP, **options})


def mel(num_frames, seed=0, rows=1):
    return torch.randn(rows, 80, num_frames, generator=torch.Generator().manual_seed(seed))


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_context", [None, 0, 5])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_frames", [1, 4, 5, 11])
def test_the_mask_of_blocks_is_a_loop_over_frames(num_frames, look_ahead, left_context):
    chunk = 4
    blocks = Blocks(chunk, left_context, look_ahead)
    items = [(frame, frame // chunk, False) for frame in range(num_frames)]
    for block in range((num_frames - 1) // chunk):
        items += [((block + 1) * chunk + ahead, block, True) for ahead in range(look_ahead)]
    expected = torch.zeros(len(items), len(items), dtype=torch.bool)
    for row, (_, block, _) in enumerate(items):
        for column, (frame, block_of_key, is_copy) in enumerate(items):
            first = 0 if left_context is None else block * chunk - left_context
            if is_copy:
                expected[row, column] = block_of_key == block and frame < num_frames
            else:
                expected[row, column] = first <= frame < (block + 1) * chunk
    assert torch.equal(blocks.is_visible(num_frames, torch.device("cpu")), expected)


@torch.no_grad()
@pytest.mark.parametrize("changed", [70, 71, 79, 80, 81, 100])
def test_the_future_changes_a_frame_only_within_its_chunk_and_the_look_ahead(changed):
    """With a mask alone each layer would look further ahead, and attention windows that shift do."""
    model, features, other = streaming_model(), mel(150), mel(150)
    other[..., changed:] = mel(150, seed=1)[..., changed:]
    audio, audio_of_other = (model.get_audio_features(given) for given in (features, other))
    # Frame t comes from mel frames up to 2t + 2, and its chunk of 8 frames sees 2 more.
    first_changed = (changed - 1) // 2
    kept = (first_changed - 2) // 8 * 8
    for name in ("last_hidden_state", "alphas"):
        before, after = (getattr(each, name)[0] for each in (audio, audio_of_other))
        assert torch.equal(before[:kept], after[:kept])
        assert not torch.allclose(before[kept : kept + 8], after[kept : kept + 8])
    num_kept = int((audio.firing_places <= kept).sum())
    assert num_kept > 10
    torch.testing.assert_close(audio.pooler_output[0, :num_kept], audio_of_other.pooler_output[0, :num_kept])


@torch.no_grad()
def test_left_context_limits_what_a_frame_depends_on():
    """3 encoder layers and 2 before CIF reach back 5 times, each from the start of a chunk."""
    model, features, other = streaming_model({"left_context_ms": 80}), mel(400), mel(400)
    other[..., :20] += 1.0
    alphas, other_alphas = (model.get_audio_features(given).alphas[0] for given in (features, other))
    differs = (alphas != other_alphas).nonzero().flatten().tolist()
    assert 11 in differs and max(differs) < 8 * (11 // 8 + 1 + 5)


@torch.no_grad()
@pytest.mark.parametrize("frame_stride", [1, 2])
def test_a_clip_is_the_same_alone_and_in_a_batch(frame_stride):
    model = streaming_model(adapter={**DEEP["adapter"], "frame_stride": frame_stride})
    features = torch.full((2, 80, 130), 7.0)
    features[0, :, :71], features[1] = mel(71)[0], mel(130, seed=1)[0]
    mask = torch.arange(130) < torch.tensor([[71], [130]])
    together = model.get_audio_features(features, mask.long())
    for row, alone in enumerate([mel(71), mel(130, seed=1)]):
        audio = model.get_audio_features(alone)
        count = int(audio.num_speech_tokens)
        assert int(together.num_speech_tokens[row]) == count
        torch.testing.assert_close(
            together.pooler_output[row, :count], audio.pooler_output[0], **vector_tolerance(audio)
        )


@torch.no_grad()
def test_every_implementation_of_attention_gives_the_same_or_is_refused():
    model = streaming_model()
    by_sdpa = model.get_audio_features(mel(100)).pooler_output
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model.get_audio_features(mel(100)).pooler_output, by_sdpa, rtol=1e-4, atol=1e-4)
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        with_attention_mask(config, torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), Blocks(2))


@torch.no_grad()
def test_off_is_the_model_of_whole_clips_bit_for_bit_and_one_model_serves_any_chunk():
    plain, model = make_model(**DEEP), streaming_model()
    assert plain.config.streaming is None
    chunks = {}
    for chunk_ms in (80, 160, 320, None):
        model.config.streaming = {**STREAMING, "chunk_ms": chunk_ms}
        chunks[chunk_ms] = model.get_audio_features(mel(100)).last_hidden_state
    assert len({float(frames.abs().sum()) for frames in chunks.values()}) == 4
    assert torch.equal(chunks[None], plain.get_audio_features(mel(100)).last_hidden_state)
    model.config.streaming = False
    streamed, whole = (each.get_audio_features(mel(100)) for each in (model, plain))
    assert torch.equal(streamed.pooler_output, whole.pooler_output)


@torch.no_grad()
def test_hidden_states_are_those_of_frames_or_refused():
    model = streaming_model()
    with pytest.raises(ValueError, match="look_ahead_ms"):
        model.get_audio_features(mel(100), output_hidden_states=True)
    model.config.streaming = {**STREAMING, "look_ahead_ms": 0}
    assert model.get_audio_features(mel(100), output_hidden_states=True).hidden_states[0].shape[1] == 50


# -- CIF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_threshold_cif_is_the_unscaled_loop_and_a_residue_of_half(seed):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(3, 30, 5, generator=generator)
    alphas = torch.rand(3, 30, generator=generator) * torch.tensor([[0.6], [0.2], [0.01]])  # the last: below one half
    alphas[0, 4] = 3.3
    lengths = torch.randint(10, 31, (3,), generator=generator)
    mask = torch.arange(30) < lengths[:, None]
    frames[~mask], alphas[~mask] = torch.nan, torch.nan
    output = integrate_and_fire_at_threshold(frames, alphas, mask)
    for row, length in enumerate(lengths.tolist()):
        row_alphas = alphas[row, :length].double()
        total = float(row_alphas.sum())
        count = max(1, round(total))
        tokens = literal_tokens(frames[row, :length].double(), row_alphas, int(total) + 1)[:count]
        is_residue = count > int(total)
        if is_residue:
            tokens[-1] /= total - int(total)
            assert output.firing_places[row, count - 1] == length
        assert int(output.num_speech_tokens[row]) == count
        torch.testing.assert_close(output.speech_tokens[row, :count].double(), tokens, rtol=1e-5, atol=1e-5)
        assert not output.speech_tokens[row, count:].any() and (output.firing_places[row, count:] == -1).all()
        places = output.firing_places[row, : int(total)].double()
        ends = torch.cat([torch.zeros(1, dtype=torch.double), row_alphas.cumsum(0)])
        expected = np.interp(np.arange(1, int(total) + 1), ends.numpy(), np.arange(length + 1))
        torch.testing.assert_close(places, torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_threshold_cif_of_nothing_is_one_zero_token_and_of_nan_an_error():
    frames, mask = torch.randn(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)
    output = integrate_and_fire_at_threshold(frames, torch.zeros(1, 4), mask)
    assert output.num_speech_tokens.tolist() == [1] and not output.speech_tokens.any()
    with pytest.raises(ValueError, match="finite alphas"):
        integrate_and_fire_at_threshold(frames, torch.full((1, 4), torch.nan), mask)


# -- training and options ---------------------------------------------------------------------------------------------


def test_training_draws_chunks_and_scales_to_the_counts(collator, rows):
    model = streaming_model({"training_chunk_ms": [80, None]}, freeze_speech_encoder=False).train()
    batch = collator(rows)
    losses = set()
    for seed in range(8):
        torch.manual_seed(seed)
        output = model(**batch)
        losses.add(round(output.loss.item(), 5))
    assert len(losses) == 2
    output.loss.backward()
    for part in (model.audio_tower, model.adapter):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters() if parameter.requires_grad)
    audio = model.get_audio_features(
        batch["input_features"], batch["input_features_mask"], num_speech_tokens=batch["num_speech_tokens"]
    )
    assert torch.equal(audio.num_speech_tokens, batch["num_speech_tokens"])


@torch.no_grad()
def test_generate_reads_what_fired(processor):
    """Also clips that fire one token, and windows that follow each other."""
    windows = {"speech": {"max_source_positions": 40}, "text": {"max_position_embeddings": 4096}}  # frames of 750 ms
    times = {"chunk_ms": 6000, "left_context_ms": 6000, "look_ahead_ms": 1500, "training_chunk_ms": [6000]}
    model = streaming_model(times, **windows)
    inputs = spoken_prompts(processor, (0.3, 2.1))
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"streaming": {"chunk_ms": 0}}, "chunk_ms must be None or an integer of at least 1, got 0"),
        ({"streaming": {"chunk_ms": 650}}, "chunk_ms must be a multiple of 20 ms"),
        ({"streaming": {"look_ahead_ms": 30}}, "look_ahead_ms must be a multiple of 20 ms"),
        ({"streaming": {"look_ahead_ms": 320}}, "look_ahead_ms must be below the shortest chunk, 320"),
        ({"streaming": {"training_chunk_ms": []}}, "must not be empty"),
        ({"streaming": {"training_chunk_ms": [320, "640"]}}, "training_chunk_ms must be a list"),
        ({"streaming": {"training_chunk_ms": [330]}}, "training_chunk_ms must be a multiple of 20 ms"),
        ({"streaming": {"chunk": 640}}, r"Unknown option\(s\) \['chunk'\] in streaming.*chunk_ms"),
        ({"streaming": 640}, "streaming must be True, False or a dict"),
        ({"streaming": True, "adapter": {**SMALL_CFORMER, "attention_window": 4}}, "without attention_window"),
        ({"streaming": True, "adapter": {**SMALL_CFORMER, "frame_stride": 3}}, "multiple of 60 ms"),
        ({"streaming": True, "adapter": "subsampler"}, "needs adapter='cformer'"),
        ({"streaming": True, "speech_padding": "max_length"}, "silence after the clip would be its future"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize("name", ["wav2vec2-layer", "hubert-group", "wavlm-layer", "wav2vec2-bert", "parakeet"])
def test_encoders_that_see_the_future_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="(normalised over the clip).*Use an encoder of the Whisper family"):
        config_of(name, streaming=True)


def test_options_survive_a_file_and_assignment(tmp_path):
    config = make_config(streaming=True)
    assert config.streaming["chunk_ms"] == 640 and config.streaming["training_chunk_ms"] == [320, 640, 1280, None]
    config.streaming = {"chunk_ms": 320, "training_chunk_ms": (320, None)}
    config.save_pretrained(tmp_path)
    assert BlspKdConfig.from_pretrained(tmp_path).streaming == config.streaming
    with pytest.raises(ValueError, match="multiple"):
        config.streaming = {"chunk_ms": 1}


# -- features ---------------------------------------------------------------------------------------------------------


def test_features_with_a_fixed_maximum_do_not_depend_on_what_follows(backbones, tmp_path):
    processor = BlspKdProcessor.from_backbones(*backbones, global_log_mel_max=1.5)
    processor.save_pretrained(tmp_path)
    loaded = BlspKdProcessor.from_pretrained(tmp_path)
    quiet = 0.01 * clip(1.0)
    loud = np.concatenate([quiet, clip(1.0)])
    of_quiet, of_loud = (loaded.extract_features([each], 16_000)["input_features"][0] for each in (quiet, loud))
    # The last frames see the edge of the clip.
    np.testing.assert_allclose(of_quiet[:, :98], of_loud[:, :98], atol=1e-6)
    own = BlspKdProcessor.from_backbones(*backbones)
    of_quiet, of_loud = (own.extract_features([each], 16_000)["input_features"][0] for each in (quiet, loud))
    assert np.abs(of_quiet[:, :98] - of_loud[:, :98]).max() > 0.1


@pytest.mark.parametrize("hop_length", [160, 320])
def test_a_fixed_maximum_is_the_clips_own_where_they_are_the_same(hop_length):
    whisper = WhisperFeatureExtractor(hop_length=hop_length)
    options = {"sampling_rate": 16_000, "padding": "do_not_pad", "truncation": False, "return_tensors": "np"}
    expected = whisper(clip(1.3), **options)["input_features"]
    log_mel_max = 4 * expected.max() - 4  # Whisper takes (x + 4) / 4
    fixed = with_log_mel_max(whisper, log_mel_max)
    assert isinstance(fixed, VoxtralRealtimeFeatureExtractor)
    np.testing.assert_allclose(fixed(clip(1.3), **options)["input_features"], expected, atol=1e-6)


def test_a_fixed_maximum_is_for_log_mel_without_dither():
    with pytest.raises(ValueError, match="without dither"):
        with_log_mel_max(WhisperFeatureExtractor(dither=1e-4), 1.5)


@pytest.mark.long
def test_the_training_script_builds_model_and_features_together(tmp_path):
    processor = build_processor(options := ModelOptions(speech_streaming='{"chunk_ms": 320}'))
    model = build_model(options, processor)
    assert model.config.streaming["chunk_ms"] == 320
    assert processor.feature_extractor.global_log_mel_max == 1.5
    # A model of whole clips becomes a streaming one, which a further stage leaves as it is.
    processor, model = build_processor(plain := ModelOptions()), None
    model = build_model(plain, processor)
    for source in (model, processor):
        source.save_pretrained(tmp_path / "plain")
    options = ModelOptions(start_from=str(tmp_path / "plain"), speech_streaming="true")
    processor = build_processor(options)
    model = build_model(options, processor)
    assert model.config.streaming["chunk_ms"] == 640
    for source in (model, processor):
        source.save_pretrained(tmp_path / "streaming")
    options = ModelOptions(start_from=str(tmp_path / "streaming"))
    assert build_processor(options).feature_extractor.global_log_mel_max == 1.5
    assert build_model(options, processor).config.streaming == model.config.streaming
