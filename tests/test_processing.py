"""`BlspKdProcessor`: one placeholder per audio, features that do not depend on the batch, the LLM's own template."""

import copy
import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.utils import logging as transformers_logging

from processing import BlspKdProcessor
from tests.helpers.chats import assert_same, text_block, tokenized, user
from tests.helpers.models import VOCAB_SIZE
from tests.helpers.prompts import SAMPLING_RATE, clip, make_tokenizer, spoken_prompts

pytestmark = pytest.mark.numerical

AUDIO = "<|audio|>"


@pytest.fixture
def fresh_warnings(caplog):
    """transformers says each warning once per process; let this test hear it again."""
    transformers_logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


# -- placeholders and padding -----------------------------------------------------------------------------------------


def test_one_placeholder_per_audio_stays_one(processor):
    prompt = f"repeat {AUDIO} and {AUDIO}"
    inputs = processor(prompt, [clip(0.3), clip(2.0)], sampling_rate=SAMPLING_RATE)
    assert processor.audio_token_id == VOCAB_SIZE  # outside the LLM's vocabulary
    assert (inputs["input_ids"] == VOCAB_SIZE).sum() == 2
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == prompt
    assert inputs["input_features"].shape[0] == 2
    assert sorted(inputs) == sorted(processor.model_input_names)


def test_text_alone_has_no_features(processor):
    inputs = processor("the red cat")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert inputs["input_ids"].tolist() == [processor.tokenizer("the red cat")["input_ids"]]


def test_a_batch_equals_each_prompt_alone_bit_for_bit(processor):
    prompts = [f"{AUDIO} the red cat ran to the river", f"cat {AUDIO}", "river", f"{AUDIO} and {AUDIO}"]
    clips = [clip(duration_s, seed=seed) for seed, duration_s in enumerate([0.7, 1.9, 0.2, 1.1])]
    of_prompt = [[0], [1], [], [2, 3]]
    batch = processor(prompts, clips, sampling_rate=SAMPLING_RATE)
    for row, (prompt, indices) in enumerate(zip(prompts, of_prompt)):
        alone = processor(prompt, [clips[index] for index in indices] or None, sampling_rate=SAMPLING_RATE)
        num_tokens = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -num_tokens:], alone["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - num_tokens) + (
            [1] * num_tokens
        )
        for place, index in enumerate(indices):
            num_mel_frames = len(clips[index]) // 160
            mine = batch["input_features"][index]
            assert torch.equal(mine[:, :num_mel_frames], alone["input_features"][place][:, :num_mel_frames])
            assert (mine[:, num_mel_frames:] == 0).all()
            expected_mask = (torch.arange(mine.shape[1]) < num_mel_frames).long()
            assert torch.equal(batch["input_features_mask"][index], expected_mask)
    assert batch["input_features"].dtype == torch.float32


def test_features_are_whispers_own_on_the_true_length(processor):
    waveform = clip(0.9)
    mel = WhisperFeatureExtractor()(
        waveform, sampling_rate=SAMPLING_RATE, padding="do_not_pad", return_tensors="pt"
    ).input_features
    inputs = processor(AUDIO, waveform, sampling_rate=SAMPLING_RATE)
    assert torch.equal(inputs["input_features"], mel)
    assert inputs["input_features"].abs().max() > 0.1


@pytest.mark.parametrize("num_samples", [400, 8_000, 8_001, 8_159, 8_160, 16_000])
def test_a_clip_has_one_mel_frame_per_ten_milliseconds(processor, num_samples):
    inputs = processor(AUDIO, clip(1.0)[:num_samples], sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].shape == (1, 80, num_samples // 160)
    assert inputs["input_features_mask"].sum() == num_samples // 160


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_arrays_of_another_rate_are_resampled(processor, rate):
    waveform = clip(0.5, rate=rate)
    inputs = processor(AUDIO, waveform, sampling_rate=rate)
    assert inputs["input_features"].shape[-1] == 50
    assert_same(processor(AUDIO, (waveform, rate)), inputs)
    assert_same(processor(AUDIO, {"array": waveform, "sampling_rate": rate}), inputs)


def test_an_audio_block_may_tell_the_rate_of_its_array(processor):
    """The rate of a chat block was ignored, and an 8 kHz array heard at double speed."""
    blocks = [{"type": "audio", "audio": clip(1.0, rate=8000), "sampling_rate": 8000}]
    turn = [{"role": "user", "content": blocks}]
    inputs = processor.apply_chat_template(turn, tokenize=True, return_dict=True)
    assert inputs["input_features"].shape[-1] == 100


def test_the_rate_may_come_in_audio_kwargs_as_in_transformers(processor):
    """A rate in audio_kwargs was ignored, so 8 kHz speech was heard at double speed."""
    waveform = clip(0.5, rate=8_000)
    expected = processor(AUDIO, waveform, sampling_rate=8_000)
    assert_same(processor(AUDIO, waveform, audio_kwargs={"sampling_rate": 8_000}), expected)
    conversation = user({"type": "audio", "audio": waveform})
    by_name = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, processor_kwargs={"sampling_rate": 8_000}
    )
    nested = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, processor_kwargs={"audio_kwargs": {"sampling_rate": 8_000}}
    )
    assert_same(nested, by_name)
    assert torch.equal(nested["input_features"], expected["input_features"])


@pytest.mark.parametrize("side", ["left", "right", None])
def test_batches_are_left_padded_whatever_the_llms_tokenizer_says(other_processor, side):
    """A tokenizer saved with padding_side="right", as many LLMs have, made right-padded batches for generation."""
    tokenizer = make_tokenizer()
    if side is not None:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    other = other_processor(tokenizer=tokenizer)
    inputs = other(["cat", "the red cat"])
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    right = other(["cat", "the red cat"], padding_side="right")
    assert right["attention_mask"][0, -1] == 0 and right["attention_mask"][:, 0].all()


def test_lists_without_padding_on_request(processor):
    inputs = processor(
        [AUDIO, f"cat {AUDIO}"], [clip(0.1)] * 2, sampling_rate=SAMPLING_RATE, padding=False, return_tensors=None
    )
    assert inputs["input_ids"] == [processor.tokenizer(text)["input_ids"] for text in (AUDIO, f"cat {AUDIO}")]
    assert isinstance(inputs["input_features"], np.ndarray)


@pytest.mark.parametrize("kind", ["list of floats", "array", "tensor", "list of one"])
def test_one_clip_needs_no_list(processor, kind):
    waveform = clip(0.1)
    audio = {
        "list of floats": waveform.tolist(),
        "array": waveform,
        "tensor": torch.from_numpy(waveform),
        "list of one": [waveform],
    }[kind]
    expected = processor(AUDIO, (waveform, SAMPLING_RATE))
    assert_same(processor(AUDIO, audio, sampling_rate=SAMPLING_RATE), expected)


def test_the_callers_arguments_stay_as_they_are(processor):
    conversation = user(text_block("repeat"), {"type": "audio", "audio": clip(0.1)})
    before = copy.deepcopy(conversation)
    processor_kwargs = {"padding": True}
    processor.apply_chat_template(conversation, tokenize=True, return_dict=True, processor_kwargs=processor_kwargs)
    assert processor_kwargs == {"padding": True}
    assert conversation[0]["content"][0] == before[0]["content"][0]
    assert np.array_equal(conversation[0]["content"][1]["audio"], before[0]["content"][1]["audio"])
    clips = [clip(0.1)]
    processor(AUDIO, clips, sampling_rate=SAMPLING_RATE)
    assert np.array_equal(clips[0], clip(0.1))


@pytest.mark.parametrize("duration_s", [30.0, 30.01, 60.0, 61.5])
def test_features_of_a_long_clip_are_those_of_its_thirty_second_parts(processor, duration_s):
    """Whisper's extractor clips at 8 below the loudest moment of what it is given, and the model sees parts apart."""
    waveform = clip(duration_s)
    waveform[: 30 * SAMPLING_RATE] *= 0.1
    pieces = np.split(waveform, range(30 * SAMPLING_RATE, len(waveform), 30 * SAMPLING_RATE))
    if len(pieces[-1]) < 800:  # the rest is filled up with silence to the length of two analysis windows
        pieces[-1] = np.pad(pieces[-1], (0, 800 - len(pieces[-1])))
    parts = [processor(AUDIO, piece, sampling_rate=SAMPLING_RATE)["input_features"][0] for piece in pieces]
    inputs = processor(AUDIO, waveform, sampling_rate=SAMPLING_RATE)
    assert torch.equal(inputs["input_features"][0], torch.cat(parts, dim=1))
    assert inputs["input_features_mask"].shape == (1, inputs["input_features"].shape[2])
    assert inputs["input_features_mask"].all()


def test_a_long_clip_and_a_short_one_share_a_batch(processor):
    clips = [clip(0.5, seed=1), clip(31.0, seed=2)]
    batch = processor(AUDIO * 2, clips, sampling_rate=SAMPLING_RATE)
    assert batch["input_features_mask"].sum(1).tolist() == [50, 3100]
    for row, waveform in enumerate(clips):
        alone = processor(AUDIO, waveform, sampling_rate=SAMPLING_RATE)["input_features"][0]
        assert torch.equal(batch["input_features"][row, :, : alone.shape[1]], alone)
        assert (batch["input_features"][row, :, alone.shape[1] :] == 0).all()


@pytest.mark.parametrize("kind", ["log-mel", "waveform", "filter bank"])
def test_pad_features_pads_the_time_axis_with_zeros(processor, kind):
    if kind != "log-mel":
        processor = BlspKdProcessor(Wav2Vec2FeatureExtractor(), processor.tokenizer)
    shape = {"log-mel": (3, "length"), "waveform": ("length",), "filter bank": ("length", 3)}[kind]
    axis = shape.index("length")
    lengths = [4, 7, 1]
    rng = np.random.default_rng(0)
    clips = [rng.random([length if size == "length" else size for size in shape]) for length in lengths]
    padded = processor.pad_features(clips)
    features, mask = padded["input_features"], padded["input_features_mask"]
    assert features.dtype == np.float32 and mask.dtype == np.int64
    assert features.shape == (3, *(7 if size == "length" else size for size in shape))
    assert mask.tolist() == [[1] * length + [0] * (7 - length) for length in lengths]
    for row, one in enumerate(clips):
        kept, rest = np.split(features[row], [lengths[row]], axis=axis)
        assert np.array_equal(kept, one.astype(np.float32)) and not rest.any()
    assert clips[0].shape[axis] == 4  # the caller's arrays stay as they are


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audio_token", [AUDIO, "<speech>"])
def test_a_saved_processor_gives_identical_outputs(other_processor, tmp_path, audio_token):
    other = other_processor(audio_token=audio_token)
    other.save_pretrained(tmp_path / "saved")
    loaded = BlspKdProcessor.from_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["audio_token"] == audio_token == loaded.audio_token
    assert saved["auto_map"]["AutoProcessor"] == "processing_blsp_kd.BlspKdProcessor"
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == other.chat_template == loaded.chat_template
    assert loaded.audio_token_id == other.audio_token_id
    assert_same(spoken_prompts(loaded), spoken_prompts(other))
    conversation = user({"type": "audio"}, text_block("cat"))
    assert audio_token in loaded.apply_chat_template(conversation) == other.apply_chat_template(conversation)


# -- what is refused, and what is warned of ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, num_audios, message",
    [
        ("cat", 1, r"holds 0 '<\|audio\|>' placeholder\(s\) \(per prompt: \[0\]\), but 1 audio\(s\)"),
        (AUDIO, 0, r"holds 1 .*, but 0 audio\(s\)"),
        ([AUDIO, f"{AUDIO}{AUDIO}"], 2, r"holds 3 .*\(per prompt: \[1, 2\]\), but 2 audio\(s\)"),
        ([AUDIO, "cat"], 2, r"holds 1 .*, but 2 audio\(s\).* exactly once for every audio"),
    ],
)
def test_placeholders_and_audios_must_match(processor, text, num_audios, message):
    with pytest.raises(ValueError, match=message):
        processor(text, [clip(0.1)] * num_audios or None, sampling_rate=SAMPLING_RATE)


def test_a_placeholder_typed_by_the_user_is_caught(processor):
    conversation = user(text_block(f"say {AUDIO}"), {"type": "audio", "audio": clip(0.1)})
    with pytest.raises(ValueError, match=r"holds 2 .*, but 1 audio\(s\)"):
        tokenized(processor, conversation)


def test_an_audio_block_without_audio_is_caught(processor):
    with pytest.raises(ValueError, match=r"holds 1 .*, but 0 audio\(s\)"):
        tokenized(processor, user({"type": "audio"}))


@pytest.mark.parametrize("name", ["audios", "images", "paddin"])
def test_unknown_arguments_are_refused(processor, name):
    """transformers' processors drop arguments that they do not know, an old name of the audio among them."""
    with pytest.raises(ValueError, match=rf"Unknown argument\(s\) \['{name}'\].*It takes 'text', 'audio'"):
        processor(AUDIO, clip(0.1), sampling_rate=SAMPLING_RATE, **{name: [clip(0.1)]})


def test_audio_without_text_is_refused(processor):
    with pytest.raises(ValueError, match=r"needs text: a prompt with '<\|audio\|>'"):
        processor(audio=clip(0.1))


def test_a_clip_shorter_than_one_window_is_refused(processor):
    with pytest.raises(ValueError, match=r"too short: 0\.0249 s, expected at least one analysis window of 0\.025 s"):
        processor(AUDIO, clip(1.0)[:399], sampling_rate=SAMPLING_RATE)


def test_a_clip_longer_than_ten_minutes_is_refused(processor):
    with pytest.raises(ValueError, match=r"lasts 600\.10 s, but a clip may last at most 600 s"):
        processor(AUDIO, clip(600.1), sampling_rate=SAMPLING_RATE)


def test_an_unusable_clip_is_named_by_its_place_in_the_batch(processor, tmp_path):
    """Of sixty-four arrays one was silent, and the message did not tell which."""
    silent = np.zeros(8000, np.float32)
    with pytest.raises(ValueError, match="Audio 1 of the batch: the audio array is silent"):
        processor([AUDIO] * 3, [clip(0.1), silent, clip(0.1)], sampling_rate=SAMPLING_RATE)
    with pytest.raises(FileNotFoundError, match="Audio 1 of the batch: Audio file not found"):
        processor([AUDIO] * 2, [clip(0.1), tmp_path / "nowhere.wav"], sampling_rate=SAMPLING_RATE)
    with pytest.raises(TypeError, match="Audio 0 of the batch: Expected audio as a path"):
        processor(AUDIO, [None])


def test_truncation_must_not_drop_a_placeholder(processor):
    prompt = f"the red cat {AUDIO}"
    num_tokens = len(processor.tokenizer(prompt)["input_ids"])
    kept = processor(prompt, clip(0.1), sampling_rate=SAMPLING_RATE, truncation=True, max_length=num_tokens)
    assert kept["input_ids"].shape[1] == num_tokens
    with pytest.raises(ValueError, match=r"Truncation would drop 1 of 1 audio placeholder\(s\). Raise max_length"):
        processor(prompt, clip(0.1), sampling_rate=SAMPLING_RATE, truncation=True, max_length=num_tokens - 1)


def test_a_tokenizer_without_the_audio_token_is_refused():
    with pytest.raises(ValueError, match=r"does not know the audio token '<\|audio\|>'.*from_backbones"):
        BlspKdProcessor(WhisperFeatureExtractor(), make_tokenizer())


@pytest.mark.parametrize("audio", [clip(0.1), {"array": clip(0.1)}], ids=["array", "dict"])
def test_arrays_without_a_rate_warn(processor, fresh_warnings, audio):
    """A dict without a rate, and any array in a chat, were taken as 16 kHz without a word."""
    message = "without a sampling_rate and are taken as 16000 Hz"
    inputs = processor(AUDIO, audio)
    assert message in fresh_warnings.text
    assert_same(inputs, processor(AUDIO, audio, sampling_rate=SAMPLING_RATE))

    fresh_warnings.clear()
    transformers_logging.warning_once.cache_clear()
    processor.apply_chat_template(user({"type": "audio", "audio": audio}), tokenize=True, return_dict=True)
    assert message in fresh_warnings.text


def test_audio_that_brings_its_rate_does_not_warn(processor, fresh_warnings, tmp_path):
    soundfile.write(tmp_path / "clip.wav", clip(0.1), SAMPLING_RATE)
    path = tmp_path / "clip.wav"
    audios = [path, str(path), path.read_bytes(), (clip(0.1), SAMPLING_RATE), {"path": str(path)}]
    audios.append({"array": clip(0.1), "sampling_rate": SAMPLING_RATE})
    processor(AUDIO * len(audios), audios)
    processor(AUDIO, clip(0.1), sampling_rate=SAMPLING_RATE)
    tokenized(processor, user({"type": "audio", "audio": clip(0.1)}))
    assert "sampling_rate" not in fresh_warnings.text


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "a list of at least one message"),
        ("hello", "a list of at least one message, but got 'hello'"),
        (None, "a list of at least one message, but got None"),
        (["hello"], "a dict with 'role' and 'content', but got 'hello'"),
        ([[{"role": "user", "content": "hello"}], "hello"], "a list of at least one message, but got 'hello'"),
        ([{"role": "user", "content": 5}], "a text or a list of blocks .* got 5"),
        ([{"role": "user", "content": ["hello"]}], r"a text or a list of blocks .* got \['hello'\]"),
    ],
)
def test_what_is_no_chat_is_told_so(processor, chat, message):
    """AttributeErrors from inside transformers (found by the fuzzer)."""
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
