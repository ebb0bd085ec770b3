"""`load_audio`: one clip from anywhere gives one waveform, and what cannot be heard is refused by name."""

import base64
import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
import torch

from processing import audio_decoding
from processing.audio_loading import knows_rate, load_audio
from tests.helpers.audio_files import StandInDecoder, encode, encode_by_ffmpeg, tone
from tests.helpers.prompts import SAMPLING_RATE, clip

# How far each format may move a sample. Lossless ones: half a step of 16 bits.
FORMATS = {
    ("WAV", "PCM_16"): 4e-5,
    ("WAV", "FLOAT"): 0.0,
    ("FLAC", "PCM_16"): 4e-5,
    ("OGG", "VORBIS"): 0.05,
    ("MP3", "MPEG_LAYER_III"): 0.1,
}


def peak_frequency_hz(waveform, rate=SAMPLING_RATE):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return spectrum.argmax() * rate / len(waveform)


def float_wav_header(num_samples, rate=SAMPLING_RATE) -> bytes:
    size = 4 * num_samples
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    return riff + struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32, b"data", size)


def test_every_kind_of_input_gives_the_same_waveform(tmp_path):
    waveform = clip(0.3)
    contents = encode(waveform)
    path = tmp_path / "clip.wav"
    path.write_bytes(contents)
    kinds = {
        "path": path,
        "str": str(path),
        "bytes": contents,
        "bytearray": bytearray(contents),
        "memoryview": memoryview(contents),
        "array of bytes": np.frombuffer(contents, np.uint8),
        "tensor of bytes": torch.frombuffer(bytearray(contents), dtype=torch.uint8),
        "dict of an array of bytes": {"bytes": np.frombuffer(contents, np.uint8)},
        "file object": io.BytesIO(contents),
        "data URL": f"data:audio/wav;base64,{base64.b64encode(contents).decode()}",
        "dict of base64": {"base64": base64.b64encode(contents).decode()},
        "dict of base64 in lines": {"base64": base64.encodebytes(contents).decode()},
        "dict of a raw array": {"raw": waveform, "sampling_rate": SAMPLING_RATE},
        "dict of array": {"array": waveform, "sampling_rate": SAMPLING_RATE},
        "dict of bytes": {"bytes": contents, "path": None},
        "dict of path": {"bytes": None, "path": str(path)},
        "array first": {"array": waveform, "path": "not there.wav", "sampling_rate": SAMPLING_RATE},
        "bytes before path": {"bytes": contents, "path": "not there.wav"},
        "pair": (waveform, SAMPLING_RATE),
        "pair of numpy rate": (waveform, np.int64(SAMPLING_RATE)),
        "array": waveform,
        "float64": waveform.astype(np.float64),
        "list": waveform.tolist(),
        "tuple": tuple(waveform.tolist()),
        "tensor": torch.from_numpy(waveform),
        "decoder": StandInDecoder(waveform),
        "memoryview of floats": memoryview(waveform),
        "tensor in a pair": (torch.from_numpy(waveform).requires_grad_(), SAMPLING_RATE),
    }
    for kind, audio in kinds.items():
        loaded = load_audio(audio, SAMPLING_RATE)
        assert loaded.dtype == np.float32 and loaded.flags["C_CONTIGUOUS"], kind
        assert np.array_equal(loaded, waveform), kind


def test_the_result_is_a_copy_of_the_callers_array():
    waveform = clip(0.1)
    before = waveform.copy()
    load_audio(waveform, SAMPLING_RATE)[:] = 0
    assert np.array_equal(waveform, before)


@pytest.mark.parametrize("format, subtype", FORMATS)
def test_formats_keep_the_sound(tmp_path, format, subtype):
    waveform = tone()
    path = tmp_path / f"tone.{format.lower()}"
    path.write_bytes(encode(waveform, format=format, subtype=subtype))
    loaded = load_audio(path, SAMPLING_RATE)
    assert loaded.shape == waveform.shape
    assert np.abs(loaded - waveform).max() <= FORMATS[format, subtype]
    assert np.array_equal(load_audio(path.read_bytes(), SAMPLING_RATE), loaded)


@pytest.mark.parametrize("rate", [SAMPLING_RATE, 44_100])
def test_a_file_is_read_in_blocks_as_if_at_once(rate, monkeypatch):
    """Blocks must not be heard: mixing and resampling give what they give of the whole file, bit for bit."""
    channels = np.stack([clip(5.0, seed=seed, rate=rate) for seed in range(2)], axis=1)
    whole = channels.mean(axis=1)
    expected = whole if rate == SAMPLING_RATE else soxr.resample(whole, rate, SAMPLING_RATE)
    assert np.array_equal(load_audio(encode(channels, rate), SAMPLING_RATE), expected)
    monkeypatch.setattr(audio_decoding, "BLOCK_FRAMES", 1_001)
    assert np.array_equal(load_audio(encode(channels, rate), SAMPLING_RATE), expected)


def test_memory_is_that_of_the_result_not_of_the_file():
    """Eight channels of 192 kHz were decoded whole: 100 times the memory of the clip that came out."""
    contents = encode(np.repeat(tone(duration_s=5.0, rate=192_000)[:, None], 8, axis=1), 192_000, "FLAC", "PCM_16")
    tracemalloc.start()
    loaded = load_audio(contents, SAMPLING_RATE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(contents) + 4 * loaded.nbytes + 32 * audio_decoding.BLOCK_FRAMES * 4


def test_opus_keeps_the_tone():
    loaded = load_audio(encode(tone(duration_s=1.0), format="OGG", subtype="OPUS"), SAMPLING_RATE)
    assert len(loaded) == SAMPLING_RATE
    assert abs(peak_frequency_hz(loaded) - 440) <= 1


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
def test_whole_numbers_are_full_scale_of_their_type(dtype):
    """Integers were divided by their largest value: off from every file decoder, and 8-bit audio sat around 0.5."""
    subtype = {np.int16: "PCM_16", np.int32: "PCM_32", np.uint8: "PCM_U8"}[dtype]
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    samples = rng.integers(info.min, info.max, size=500, dtype=dtype, endpoint=True)
    samples[:2] = info.min, info.max
    if dtype is np.uint8:
        samples_for_file = ((samples.astype(np.int16) - 128) << 8).astype(np.int16)
    else:
        samples_for_file = samples
    from_file = load_audio(encode(samples_for_file, subtype=subtype), SAMPLING_RATE)
    loaded = load_audio(samples, SAMPLING_RATE)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, from_file)
    assert np.array_equal(load_audio(torch.from_numpy(samples), SAMPLING_RATE), loaded)
    assert loaded.min() == -1.0 and loaded.max() <= 1.0


@pytest.mark.parametrize("format, subtype", [*FORMATS, ("OGG", "OPUS"), ("AIFF", "PCM_16"), ("CAF", "PCM_16")])
def test_an_array_of_a_files_bytes_is_the_file(format, subtype):
    """`np.fromfile(path, np.uint8)` and what web frameworks hand over were taken for 8-bit samples, which is noise."""
    of_format = encode(tone(), format=format, subtype=subtype)
    for contents in (of_format, encode_by_ffmpeg(tone(), "ipod", "aac"), encode_by_ffmpeg(tone(), "adts", "aac")):
        expected = load_audio(contents, SAMPLING_RATE)
        for audio in (memoryview(contents), np.frombuffer(contents, np.uint8)):
            assert np.array_equal(load_audio(audio, SAMPLING_RATE), expected)


@pytest.mark.parametrize(
    "clip_of, knows",
    [
        (lambda contents: contents, True),
        (memoryview, True),
        (lambda contents: np.frombuffer(contents, np.uint8), True),
        (lambda contents: torch.frombuffer(bytearray(contents), dtype=torch.uint8), True),
        (io.BytesIO, True),
        (lambda contents: StandInDecoder(tone()), True),
        (lambda contents: {"bytes": contents}, True),
        (lambda contents: {"raw": tone(), "sampling_rate": 8_000}, True),
        (lambda contents: (tone(), 8_000), True),
        (lambda contents: {"raw": tone()}, False),
        (lambda contents: {"array": tone(), "sampling_rate": None}, False),
        (lambda contents: tone(), False),
        (lambda contents: torch.from_numpy(tone()), False),
        (lambda contents: tone().tolist(), False),
        (lambda contents: np.full(1600, 128, np.uint8), False),
        (lambda contents: memoryview(tone()), False),
    ],
)
def test_all_kinds_but_arrays_know_their_rate(clip_of, knows):
    """Open files were said to be arrays without a rate."""
    assert knows_rate(clip_of(encode(tone()))) is knows


def test_8_bit_samples_are_no_file():
    samples = np.full(1600, 128, np.uint8)
    samples[::2] = 255
    loaded = load_audio(samples, SAMPLING_RATE)
    assert len(loaded) == 1600 and loaded.max() == 127 / 128


def test_a_bfloat16_tensor_is_read():
    """numpy has no such type: "Got unsupported ScalarType BFloat16", without a word on audio."""
    waveform = torch.from_numpy(clip(0.1)).bfloat16()
    assert np.array_equal(load_audio(waveform, SAMPLING_RATE), waveform.float().numpy())


@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_channels_are_averaged_whichever_axis_they_are_on(num_channels):
    channels = np.stack([clip(0.1, seed=seed) for seed in range(num_channels)], axis=1)
    expected = channels.mean(axis=1)
    for audio in (channels, channels.T, torch.from_numpy(channels.T), encode(channels)):
        loaded = load_audio(audio, SAMPLING_RATE)
        assert loaded.shape == (len(channels),)
        np.testing.assert_allclose(loaded, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["file", "pair", "dict", "source_rate"])
def test_resampling_keeps_frequency_loudness_and_length(rate, kind):
    waveform = tone(997.0, duration_s=1.0, rate=rate)
    if kind == "source_rate":
        loaded = load_audio(waveform, SAMPLING_RATE, source_rate=rate)
    else:
        audio = {
            "file": encode(waveform, rate),
            "pair": (waveform, rate),
            "dict": {"array": waveform, "sampling_rate": rate},
        }[kind]
        loaded = load_audio(audio, SAMPLING_RATE)
    assert loaded.dtype == np.float32
    assert len(loaded) == SAMPLING_RATE
    assert abs(peak_frequency_hz(loaded) - 997) <= 1
    middle = slice(2000, -2000)
    np.testing.assert_allclose(loaded[middle], tone(997.0)[middle], atol=5e-3)


@pytest.mark.parametrize("num_channels", [1, 2])
def test_a_decoder_of_datasets_gives_its_samples_and_rate(num_channels):
    """Rows of `datasets` 4 and newer hold torchcodec's decoder, which was a TypeError."""
    channels = np.stack([tone(997.0, rate=8_000)] * num_channels)
    expected = load_audio((channels[0], 8_000), SAMPLING_RATE)
    assert np.array_equal(load_audio(StandInDecoder(channels, 8_000), SAMPLING_RATE), expected)
    assert np.array_equal(load_audio(StandInDecoder(channels, 8_000), SAMPLING_RATE, source_rate=44_100), expected)


def test_a_rate_of_its_own_beats_source_rate():
    contents, waveform = encode(tone(rate=44_100), 44_100), tone(rate=44_100)
    for audio in (contents, (waveform, 44_100), {"array": waveform, "sampling_rate": 44_100}):
        assert len(load_audio(audio, SAMPLING_RATE, source_rate=8_000)) == SAMPLING_RATE


def test_a_dict_without_rate_takes_source_rate():
    assert len(load_audio({"array": clip(0.5)}, SAMPLING_RATE, source_rate=8_000)) == SAMPLING_RATE
    assert len(load_audio({"array": clip(0.5)}, SAMPLING_RATE)) == SAMPLING_RATE // 2


def test_exactly_the_longest_duration_is_accepted():
    assert len(load_audio(clip(0.5), SAMPLING_RATE, max_duration_s=0.5)) == SAMPLING_RATE // 2


def test_quiet_speech_is_not_silent():
    assert len(load_audio(clip(0.1) * 1e-3, SAMPLING_RATE)) == 1600


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [str, lambda path: path, lambda path: {"path": str(path)}])
def test_a_missing_file_is_named(tmp_path, wrap):
    with pytest.raises(FileNotFoundError, match=r"Audio file not found: '.*nowhere\.wav'"):
        load_audio(wrap(tmp_path / "nowhere.wav"), SAMPLING_RATE)


def test_a_folder_is_no_audio_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="Audio file not found"):
        load_audio(tmp_path, SAMPLING_RATE)


def test_corrupt_contents_are_refused_without_a_memory_address(tmp_path):
    """The message read 'Error opening <_io.BytesIO object at 0x7faab0>: Format not recognised.. Expected wav'."""
    noise = np.random.default_rng(0).bytes(2000)
    with pytest.raises(ValueError, match=r"the audio of 2000 bytes cannot be decoded: [^<.]+\. Expected wav, flac"):
        load_audio(noise, SAMPLING_RATE)
    path = tmp_path / "noise.wav"
    path.write_bytes(noise)
    with pytest.raises(ValueError, match=r"noise\.wav cannot be decoded: [^<.]+\. Expected wav, flac"):
        load_audio(path, SAMPLING_RATE)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.wav"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.wav cannot be decoded"):
        load_audio(path, SAMPLING_RATE)
    with pytest.raises(ValueError, match="the audio of 0 bytes cannot be decoded"):
        load_audio(b"", SAMPLING_RATE)


def test_a_header_without_samples_is_refused():
    with pytest.raises(ValueError, match=r"is empty \(0 samples\)"):
        load_audio(encode(np.zeros(0, np.float32), subtype="PCM_16"), SAMPLING_RATE)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_flac_is_refused_rather_than_shortened(kept):
    contents = encode(clip(2.0), format="FLAC", subtype="PCM_16")
    with pytest.raises(ValueError, match="cannot be decoded: .*damaged"):
        load_audio(contents[: int(kept * len(contents))], SAMPLING_RATE)


def test_a_wav_cut_inside_its_header_is_refused():
    with pytest.raises(ValueError, match="the audio of 30 bytes cannot be decoded"):
        load_audio(encode(clip(0.2))[:30], SAMPLING_RATE)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("of", [np.zeros, torch.zeros, lambda shape: (np.zeros(shape), 8_000)])
def test_an_empty_array_is_refused(of, shape):
    """Of no samples in channels the mean was NaN, and the error spoke of that."""
    audio = of(shape)
    with pytest.raises(ValueError, match=r"the audio array is empty \(0 samples\)"):
        load_audio(audio, SAMPLING_RATE)


@pytest.mark.parametrize("level", [0.0, 5e-5])
def test_a_silent_clip_is_refused(level):
    with pytest.raises(ValueError, match=r"the audio array is silent: 0\.50 s with no sample above 0\.0001"):
        load_audio(np.full(8000, level), SAMPLING_RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value):
    waveform = clip(0.1)
    waveform[17] = value
    with pytest.raises(ValueError, match="the audio array holds NaN or infinite samples"):
        load_audio(waveform, SAMPLING_RATE)


def test_a_long_array_is_refused():
    with pytest.raises(ValueError, match=r"the audio array lasts 1\.50 s, but .* at most 1 s\. Split it"):
        load_audio(clip(1.5), SAMPLING_RATE, max_duration_s=1.0)
    with pytest.raises(ValueError, match=r"lasts 601\.00 s, but .* at most 600 s"):
        load_audio(np.ones(601_000, np.float32), SAMPLING_RATE, source_rate=1_000)


def test_a_long_decoder_is_refused_before_it_decodes(monkeypatch):
    monkeypatch.setattr(StandInDecoder, "get_all_samples", lambda decoder: pytest.fail("the samples were read"))
    with pytest.raises(ValueError, match=r"the audio of the decoder lasts 1\.50 s, but .* at most 1 s\. Split it"):
        load_audio(StandInDecoder(clip(1.5)), SAMPLING_RATE, max_duration_s=1.0)


def test_a_decoder_that_fails_is_a_clear_error(monkeypatch):
    def fail(decoder):
        raise RuntimeError("Invalid data found")

    monkeypatch.setattr(StandInDecoder, "get_all_samples", fail)
    with pytest.raises(ValueError, match="The audio of StandInDecoder cannot be decoded: Invalid data found"):
        load_audio(StandInDecoder(clip(0.5)), SAMPLING_RATE)


@pytest.mark.parametrize("peak", [1.0, 1.4, 4.0, 32.0])
def test_floats_may_clip(peak):
    waveform = clip(0.1) / np.abs(clip(0.1)).max() * np.float32(peak)
    np.testing.assert_array_equal(load_audio(waveform, SAMPLING_RATE), waveform)


@pytest.mark.parametrize("wrap", [np.asarray, list, torch.from_numpy, encode])
def test_integers_that_were_made_floats_are_refused(wrap):
    """Samples of 16 bits that some step turned into floats were taken as they are, 90 dB too loud."""
    samples = np.round(clip(0.1) * 2**15).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"far too loud: a sample of \d{4,5}\. Expected floats within \[-1, 1\].*32768 for 16 bits"
    ):
        load_audio(wrap(samples), SAMPLING_RATE)
    # What the message says to do.
    assert np.array_equal(load_audio(samples / np.float32(32768), SAMPLING_RATE), samples / np.float32(32768))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, list])
def test_16_bit_samples_in_wider_integers_are_refused(dtype):
    """They were called silent, which they are at the full scale of 32 or 64 bits."""
    samples = np.round(clip(0.1) * 2**15).astype(np.int16)
    samples = abs(samples) if dtype is np.uint32 else samples
    wide = samples.tolist() if dtype is list else samples.astype(dtype)
    with pytest.raises(ValueError, match=r"numbers from -?\d+ to \d+, and their full scale is not clear\. Give 16-bit"):
        load_audio(wide, SAMPLING_RATE)
    assert np.array_equal(load_audio(np.asarray(wide, dtype=np.int16), SAMPLING_RATE), samples / np.float32(2**15))


def test_sums_of_16_bit_channels_are_refused():
    """They reach beyond 16 bits, and were called silent for that."""
    channel = np.round(clip(0.1) / abs(clip(0.1)).max() * 32767).astype(np.int16)
    with pytest.raises(ValueError, match=r"numbers from -\d{5} to \d{5}, and their full scale is not clear"):
        load_audio(np.stack([channel, channel]).astype(np.int32).sum(axis=0, dtype=np.int32), SAMPLING_RATE)


def test_zeros_of_any_type_are_silent():
    for dtype in (np.int16, np.int32, np.int64, np.float32):
        with pytest.raises(ValueError, match="is silent"):
            load_audio(np.zeros(1600, dtype), SAMPLING_RATE)


def test_a_long_file_is_refused_by_its_header(tmp_path, monkeypatch):
    """Five hours of samples would fill the memory; the header alone tells that they are too many."""
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        file.write(float_wav_header(num_samples=36_000 * SAMPLING_RATE // 2))
        file.truncate(44 + 4 * 36_000 * SAMPLING_RATE // 2)  # sparse: takes no disk
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("the samples were read"))
    with pytest.raises(ValueError, match=r"long\.wav lasts 18000\.00 s, but .* at most 600 s"):
        load_audio(path, SAMPLING_RATE)


@pytest.mark.parametrize("rate", [0, -16_000, 999, 10**9, 16_000.0, "16000"])
def test_a_bad_rate_is_refused(rate):
    for audio, source_rate in [((clip(0.1), rate), None), (clip(0.1), rate)]:
        with pytest.raises(ValueError, match=rf"whole number of Hz \(1000 to 768000\), got {rate!r}"):
            load_audio(audio, SAMPLING_RATE, source_rate)
    with pytest.raises(ValueError, match="whole number of Hz"):
        load_audio({"array": clip(0.1), "sampling_rate": rate}, SAMPLING_RATE)


@pytest.mark.parametrize("url", ["https://example.org/a.wav", "hf://datasets/a/b.flac"])
def test_a_url_is_refused(url):
    with pytest.raises(ValueError, match=r"not from URLs, got '.*'\. Download it first"):
        load_audio(url, SAMPLING_RATE)


@pytest.mark.parametrize("audio", [None, object(), ["a", "b"], [[0.1, 0.2], [0.3]], np.array([True, False]), {1.0}])
def test_a_wrong_type_is_named(audio):
    with pytest.raises(TypeError, match=r"Expected audio as a path, bytes, dict, .* got <class"):
        load_audio(audio, SAMPLING_RATE)


@pytest.mark.parametrize("shape", [(2, 3, 400), (400, 9), (9, 400), ()])
def test_too_many_dimensions_or_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"Expected one clip of shape \(samples,\).* got an array of shape"):
        load_audio(np.full(shape, 0.5), SAMPLING_RATE)


@pytest.mark.parametrize("audio", [{}, {"sampling_rate": 16_000}, {"array": None, "bytes": None, "path": None}])
def test_a_dict_without_audio_is_refused(audio):
    with pytest.raises(ValueError, match="An audio dict needs 'array', 'raw', 'bytes', 'base64' or 'path', but has"):
        load_audio(audio, SAMPLING_RATE)


@pytest.mark.parametrize("text", ["not base64!", "abc", "AAAA====AAAA", "é"])
def test_bad_base64_is_refused(text):
    for audio in ({"base64": text}, f"data:audio/wav;base64,{text}"):
        with pytest.raises(ValueError, match=rf"The base64 audio \({len(text)} characters\) is not valid base64"):
            load_audio(audio, SAMPLING_RATE)


def test_base64_must_be_a_string():
    with pytest.raises(TypeError, match="Expected base64 audio as a string, got <class 'int'>"):
        load_audio({"base64": 7}, SAMPLING_RATE)


@pytest.mark.parametrize("url", ["data:audio/wav,abc", "data:", "data:audio/wav;base64"])
def test_a_data_url_without_base64_is_refused(url):
    with pytest.raises(
        ValueError, match=r"Expected a data URL 'data:audio/wav;base64,\.\.\.', got one that begins 'data:"
    ):
        load_audio(url, SAMPLING_RATE)


def test_a_file_of_many_channels_is_refused():
    with pytest.raises(ValueError, match="has 20 channels. Expected at most 8"):
        load_audio(encode(np.full((400, 20), 0.5, np.float32)), SAMPLING_RATE)


def test_a_text_file_object_is_refused(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_text("words")
    with (
        path.open() as file,
        pytest.raises(TypeError, match=r"binary mode \('rb'\), but reading it gave <class 'str'>"),
    ):
        load_audio(file, SAMPLING_RATE)


@pytest.mark.parametrize("path", ["a\0b.wav", "x" * 5000])
def test_what_cannot_be_a_path_is_refused(path):
    """A base64 string given as a path raised OSError 'File name too long' with all of it in the message."""
    with pytest.raises(FileNotFoundError, match="Audio file not found|cannot be an audio file: File name too long"):
        load_audio(path, SAMPLING_RATE)


def test_a_clip_too_loud_to_resample_is_refused():
    """Finite samples near the limit of float32 became infinite in resampling, and came out so."""
    waveform = np.where(np.arange(8000) % 100 < 50, 3e38, -3e38).astype(np.float32)
    with pytest.raises(ValueError, match=r"far too loud: a sample of 3e\+38\. Expected floats within"):
        load_audio((waveform, 8_000), SAMPLING_RATE)


def test_a_clip_of_which_resampling_leaves_nothing_is_refused():
    """A header damaged to a high rate and a few samples gave a clip of no samples, without an error."""
    with pytest.raises(ValueError, match=r"too short: 2 sample\(s\) of 768000 Hz are none at 16000"):
        load_audio((np.array([0.5, -0.5], np.float32), 768_000), SAMPLING_RATE)
