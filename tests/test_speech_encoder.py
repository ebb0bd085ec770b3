"""Speech encoders: equal to transformers' own where those are defined, and blind to padding."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    ParakeetCTCConfig,
    ParakeetForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.encoder_families import count_frames, window_of
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder, encode_speech, spec_augment
from processing import BlspKdDataCollator, BlspKdProcessor
from tests.helpers.encoders import ENCODERS, config_of, encoder_config, extractor_of, model_of, processor_of
from tests.helpers.models import SMALL_CFORMER, make_config, make_model, speech_config
from tests.helpers.prompts import SAMPLING_RATE, clip

pytestmark = pytest.mark.numerical


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


@torch.no_grad()
def test_convolutions_meet_few_lengths(encoder):
    """torch keeps each convolution that it prepared: memory grew by 23 kB with every clip of a new length."""
    met, whisper = set(), WhisperEncoder(encoder.config).eval().double()
    whisper.load_state_dict(encoder.double().state_dict())
    for conv in (encoder.conv1, encoder.conv2):
        conv.register_forward_hook(lambda _module, inputs, _output: met.add(inputs[0].shape[-1]))
    for num_frames in range(1, 201):
        features = mel(num_frames).double()
        output = encoder(features).last_hidden_state
        hidden_states = torch.nn.functional.gelu(whisper.conv2(torch.nn.functional.gelu(whisper.conv1(features))))
        hidden_states = hidden_states.transpose(1, 2) + whisper.embed_positions.weight[: (num_frames + 1) // 2]
        for layer in whisper.layers:
            hidden_states = layer(hidden_states, None)
        torch.testing.assert_close(output, whisper.layer_norm(hidden_states))
    assert met == {50, 100, 150, 200}


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prob, length, fewest", [(0.05, 10, 2), (0.9, 7, 0), (0.02, 40, 0), (0.0, 10, 0), (0.3, 1, 3)])
def test_spec_augment_is_whispers_own_draw_for_draw(prob, length, fewest, seed):
    """Its method was called with an encoder in the place of the model that it is a method of."""
    masks = {"mask_time_prob": prob, "mask_time_length": length, "mask_time_min_masks": fewest}
    of_bins = {"mask_feature_prob": prob, "mask_feature_length": min(length, 20), "mask_feature_min_masks": fewest}
    config = speech_config(apply_spec_augment=True, **masks, **of_bins)
    model = WhisperModel(config).train()
    features = torch.randn(4, 80, 90, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(90) < torch.tensor([[90], [41], [39], [5]])
    np.random.seed(seed)
    expected, after = model._mask_input_features(features.clone(), mask.long()), np.random.rand()
    np.random.seed(seed)
    assert torch.equal(spec_augment(config, features, mask), expected)
    assert np.random.rand() == after


@pytest.mark.parametrize("prob", ["mask_time_prob", "mask_feature_prob"])
@pytest.mark.parametrize("length", [0, 91])
def test_spec_augment_refuses_spans_that_do_not_fit(prob, length):
    lengths = {"mask_time_length": length, "mask_feature_length": length}
    config = speech_config(**{"mask_time_prob": 0.0, prob: 0.1}, **lengths)
    with pytest.raises(ValueError, match=rf"SpecAugment masks spans of {length}, but they must be of 1 to (80|90)"):
        spec_augment(config, torch.zeros(1, 80, 90), torch.ones(1, 90))


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "parakeet"])
@pytest.mark.parametrize("adapter", [{}, {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2}])
def test_frames_are_counted_as_transformers_does(name, adapter):
    """transformers counts the frames of a length only in private methods."""
    config = encoder_config(name)
    config.update({} if name.startswith("hubert") else adapter)
    own = AutoModel.from_config(config)
    lengths = torch.tensor([400, 401, 719, 720, 16_000, 479_999])
    expected = own._get_feat_extract_output_lengths(lengths)
    assert torch.equal(count_frames(config, lengths), expected)
    assert [count_frames(config, length) for length in lengths.tolist()] == expected.tolist()


# -- thirty padded seconds of Whisper ---------------------------------------------------------------------------------


def silence_of(log_mel):
    """The feature that Whisper's extractor gives digital silence in a clip: 8 below its loudest, in log10 power."""
    power = log_mel.double() * 4 - 4
    return (max(float(power.max()) - 8, -10.0) + 4) / 4


def padded_encoder(num_layers=2):
    torch.manual_seed(0)
    encoder = TrueLengthWhisperEncoder(speech_config(encoder_layers=num_layers)).eval()
    encoder.pad_to_window = True
    whisper = WhisperEncoder(encoder.config).eval()
    whisper.load_state_dict(encoder.state_dict())
    return encoder, whisper


@pytest.mark.parametrize("num_frames", [1, 75, 200, 2999, 3000])
@pytest.mark.parametrize("level", [0.0, -3.0])
@torch.no_grad()
def test_max_length_equals_whisper_on_features_padded_by_hand_with_silence(level, num_frames):
    encoder, whisper = padded_encoder()
    features = 0.3 * mel(num_frames) + level  # so quiet that the floor of 1e-10 counts, or not
    by_hand = torch.full((1, 80, 3000), silence_of(features))
    by_hand[..., :num_frames] = features
    output = encoder(features)
    num_encoded = (num_frames + 1) // 2
    assert output.last_hidden_state.shape == (1, num_encoded, 16) and output.frame_mask.all()
    expected = whisper(by_hand).last_hidden_state[:, :num_encoded]
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_max_length_equals_whispers_own_padding_but_at_the_clips_end(processor):
    """Stock Whisper pads the waveform, so the analysis windows at the end (25 ms) straddle clip and silence."""
    encoder, whisper = padded_encoder()
    waveform = clip(2.0)
    stock = WhisperFeatureExtractor()(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    ours = processor("<|audio|>", waveform, sampling_rate=SAMPLING_RATE)["input_features"]
    assert stock.shape[-1] == 3000 and ours.shape[-1] == 200
    torch.testing.assert_close(ours[..., :199], stock[..., :199], rtol=0, atol=1e-5)
    torch.testing.assert_close(stock[..., 202:], torch.full((1, 80, 2798), silence_of(ours)), rtol=0, atol=1e-5)
    expected = whisper(stock).last_hidden_state[:, :100]
    difference = (encoder(ours).last_hidden_state - expected).abs().amax(-1)[0]
    # Convolutions reach two mel frames ahead: only the last encoder frame hears those mel frames directly. The others
    # attend to three of 3000 mel frames that differ.
    assert difference[:99].max() < 0.01 * expected.abs().mean()
    encoder.pad_to_window = False
    true_length = (encoder(ours).last_hidden_state - expected).abs().amax(-1)[0]
    assert true_length[:99].max() > 0.1 * expected.abs().mean()  # silence does matter


@torch.no_grad()
def test_max_length_is_the_same_alone_and_in_a_batch():
    encoder, _ = padded_encoder()
    features = torch.full((3, 80, 120), 7.0)  # garbage as padding
    lengths = [31, 120, 77]
    for row, length in enumerate(lengths):
        features[row, :, :length] = mel(length, seed=row)[0]
    mask = torch.arange(120) < torch.tensor(lengths)[:, None]
    batch = encoder(features, mask)
    assert batch.last_hidden_state.shape == (3, 60, 16)
    assert batch.frame_mask.sum(1).tolist() == [16, 60, 39]
    for row, length in enumerate(lengths):
        alone = encoder(mel(length, seed=row)).last_hidden_state[0]
        torch.testing.assert_close(batch.last_hidden_state[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_the_models_frames_end_with_the_clip_whatever_the_padding():
    features = mel(75)
    heard = {
        padding: make_model(speech_padding=padding).get_audio_features(features)
        for padding in ("do_not_pad", "max_length")
    }
    for audio in heard.values():
        assert audio.last_hidden_state.shape[1] == audio.alphas.shape[1] == int(audio.frame_mask.sum()) == 38
    assert not torch.allclose(heard["do_not_pad"].last_hidden_state, heard["max_length"].last_hidden_state)


def test_other_speech_paddings_are_errors():
    with pytest.raises(
        ValueError, match=r"speech_padding must be one of \('do_not_pad', 'max_length'\), got 'longest'"
    ):
        make_config(speech_padding="longest")
    with pytest.raises(ValueError, match="speech_padding='max_length' is for Whisper.* 'hubert' takes any length"):
        config_of("hubert-group", speech_padding="max_length")


# -- other encoders ---------------------------------------------------------------------------------------------------


def features_of(name, length, seed=0):
    """One clip of some length in the encoder's own features."""
    shape = {"wav2vec2-bert": (1, length, 160), "parakeet": (1, length, 80)}.get(name, (1, 100 * length))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def literal_num_frames(name, length):
    if name == "wav2vec2-bert":
        return length
    if name == "parakeet":
        return -(-length // 8)
    length *= 100
    for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)):
        length = (length - kernel) // stride + 1
    return length


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_other_encoders_are_blind_to_padding_and_equal_the_stock_model(name):
    """Group norm averages over padding, and convolutions reach into it."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(encoder_config(name)).eval()
    lengths = [33, 80, 57]
    clips = [features_of(name, length, seed) for seed, length in enumerate(lengths)]
    unit = clips[0].shape[1] // 33
    batch = torch.full((3, 80 * unit, *clips[0].shape[2:]), 7.0)  # garbage as padding
    for row, features in enumerate(clips):
        batch[row, : features.shape[1]] = features[0]
    mask = torch.arange(80 * unit) < unit * torch.tensor(lengths)[:, None]
    together = encode_speech(encoder, batch, mask.long())
    assert together.frame_mask.dtype == torch.bool
    for row, features in enumerate(clips):
        alone = encode_speech(encoder, features, torch.ones(features.shape[:2]))
        num_frames = literal_num_frames(name, lengths[row])
        assert alone.last_hidden_state.shape == (1, num_frames, 16) and alone.frame_mask.all()
        torch.testing.assert_close(alone.last_hidden_state, encoder(features).last_hidden_state, rtol=1e-5, atol=1e-5)
        assert together.frame_mask[row].tolist() == [
            frame < num_frames for frame in range(len(together.frame_mask[row]))
        ]
        torch.testing.assert_close(
            together.last_hidden_state[row, :num_frames], alone.last_hidden_state[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["wav2vec2-group", "wavlm-layer", "wav2vec2-bert", "parakeet"])
@torch.no_grad()
def test_the_whole_path_with_other_encoders(name, processor, tmp_path):
    """From waveforms to text with the encoder's own feature extractor, alone, in a batch, and after saving."""
    model, processor = model_of(name), processor_of(name, processor)
    clips = [clip(0.6, 0), clip(1.37, 1), clip(0.81, 2)]
    greedy = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    batch = processor(["repeat<|audio|>"] * 3, clips, sampling_rate=SAMPLING_RATE)
    together = model.generate(**batch, **greedy)
    extractor = extractor_of(name)
    for row, waveform in enumerate(clips):
        alone = processor("repeat<|audio|>", waveform, sampling_rate=SAMPLING_RATE)
        assert torch.equal(model.generate(**alone, **greedy)[0, -5:], together[row, -5:])
        own = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        own = own[extractor.model_input_names[0]][:, : alone["input_features"].shape[1]]
        torch.testing.assert_close(alone["input_features"], own)
        assert alone["input_features_mask"].all()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = BlspKdProcessor.from_pretrained(tmp_path)
    assert type(loaded.feature_extractor) is type(extractor)
    again = loaded(["repeat<|audio|>"] * 3, clips, sampling_rate=SAMPLING_RATE)
    assert all(torch.equal(again[key], batch[key]) for key in batch)
    assert torch.equal(BlspKdForCausalLM.from_pretrained(tmp_path).generate(**again, **greedy), together)


@pytest.mark.parametrize(
    "name", ["whisper", "wav2vec2-group", "hubert-layer", "wavlm-group", "wav2vec2-bert", "parakeet"]
)
@torch.no_grad()
def test_processor_and_model_agree_where_a_window_ends(name, processor):
    """Sixty seconds are two windows; a border elsewhere would put frames of two normalisations into one window."""
    if name == "whisper":
        model = make_model(text={"max_position_embeddings": 4096})
    else:
        model, processor = model_of(name), processor_of(name, processor)
    window, time_axis = window_of(model.config.speech_config)
    pieces = [clip(30.0, 0), clip(30.0, 1)]
    inputs = processor("<|audio|>", np.concatenate(pieces), sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].shape[time_axis] == 2 * window
    one = processor("<|audio|>", pieces[0], sampling_rate=SAMPLING_RATE)["input_features"]
    assert one.shape[time_axis] == window
    assert torch.equal(inputs["input_features"].narrow(time_axis, 0, window), one)
    frames = model.get_audio_features(one, torch.ones(1, window)).last_hidden_state
    assert frames.shape[1] * model.frame_duration_s == pytest.approx(30.0, abs=model.frame_duration_s)
    parts = processor("<|audio|>" * 2, pieces, sampling_rate=SAMPLING_RATE)
    whole = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    heard = model.get_audio_features(parts["input_features"], parts["input_features_mask"])
    assert torch.equal(whole.last_hidden_state[0], heard.last_hidden_state.flatten(0, 1))


@pytest.mark.parametrize("name", ["wav2vec2-group", "wav2vec2-bert", "parakeet"])
@pytest.mark.parametrize("num_samples", [400, 480_001])
@torch.no_grad()
def test_the_shortest_clip_and_the_shortest_rest_of_one_are_heard(name, num_samples, processor):
    """0.025 s are one analysis window; some feature extractors make nothing, or NaN, of one."""
    model, processor = model_of(name), processor_of(name, processor)
    inputs = processor("<|audio|>", clip(31.0)[:num_samples], sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].isfinite().all()
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    assert audio.frame_mask.any() and audio.pooler_output.isfinite().all()


def saved_speech_model(kind, folder):
    torch.manual_seed(1)
    if kind == "ParakeetForCTC":
        config = ParakeetCTCConfig(encoder_config=ENCODERS["parakeet"][1], vocab_size=10)
        model, name = ParakeetForCTC(config), "parakeet"
    elif kind == "Wav2Vec2BertModel":
        model, name = Wav2Vec2BertModel(encoder_config("wav2vec2-bert")), "wav2vec2-bert"
    else:
        name = "wav2vec2-layer"
        model = {"Wav2Vec2Model": Wav2Vec2Model, "Wav2Vec2ForCTC": Wav2Vec2ForCTC}[kind](encoder_config(name))
    model.save_pretrained(folder)
    extractor_of(name).save_pretrained(folder)
    encoder = {"Wav2Vec2ForCTC": "wav2vec2", "ParakeetForCTC": "encoder"}.get(kind)
    return (getattr(model, encoder) if encoder else model).eval()


@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2BertModel", "ParakeetForCTC"])
@torch.no_grad()
def test_from_backbones_takes_other_encoders_alone_or_under_a_head(kind, backbones, tmp_path):
    encoder = saved_speech_model(kind, tmp_path)
    processor = BlspKdProcessor.from_backbones(tmp_path, backbones[1])
    model = BlspKdForCausalLM.from_backbones(
        tmp_path, backbones[1], audio_token_id=processor.audio_token_id, adapter=SMALL_CFORMER
    )
    expected = encoder.state_dict()
    assert set(model.audio_tower.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.audio_tower.state_dict().items())
    inputs = processor("repeat<|audio|>", clip(0.7), sampling_rate=SAMPLING_RATE)
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    mask = torch.ones(inputs["input_features"].shape[:2], dtype=torch.long)
    stock = encoder(inputs["input_features"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(audio.last_hidden_state, stock, rtol=1e-5, atol=1e-5)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["wav2vec2-group", "wav2vec2-layer"])
def test_a_distillation_step_over_another_encoder(name, freeze, processor, rows):
    model = model_of(name, freeze_speech_encoder=freeze)
    batch = BlspKdDataCollator(processor_of(name, processor))(rows)
    assert batch["input_features"].ndim == 2
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    gradients = [parameter.grad for parameter in model.audio_tower.parameters()]
    if freeze:
        assert all(gradient is None for gradient in gradients)
    else:
        # Of the whole encoder, from its first convolution on; not the vector that only SpecAugment writes.
        assert model.audio_tower.feature_extractor.conv_layers[0].conv.weight.grad.abs().max() > 0
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is not None for parameter in model.adapter.parameters())
    # Each clip's loss is its own: the mean over clips of the quantity loss is that of the clips alone.
    alone = [model.eval()(**BlspKdDataCollator(processor_of(name, processor))([row])) for row in rows]
    expected = sum(float(output.loss_parts["quantity"][0]) for output in alone)
    assert float(model(**batch).loss_parts["quantity"][0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("durations_s", [(2.0, 0.15), (30.1,)], ids=["short clip", "short rest"])
def test_spec_augment_of_another_encoder_spares_what_is_shorter_than_its_mask(durations_s, processor):
    """Group norm encodes each window alone, and SpecAugment refuses inputs shorter than the span that it masks."""
    model, processor = (
        model_of("wav2vec2-group", freeze_speech_encoder=False).train(),
        processor_of("wav2vec2-group", processor),
    )
    assert model.audio_tower.config.mask_time_prob > 0
    clips = [clip(duration_s) for duration_s in durations_s]
    inputs = processor("<|audio|>" * len(clips), clips, sampling_rate=SAMPLING_RATE)
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    assert audio.pooler_output.isfinite().all()
