"""Every line of the tables in docs/audio_inputs.md, against what processor, collator and pipeline make of it."""

import base64
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch

from processing import BlspKdDataCollator, BlspKdPipeline, audio_decoding
from processing.audio_loading import load_audio
from tests.helpers.audio_files import StandInDecoder, encode, encode_by_ffmpeg, tone
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE

PAGE = Path(__file__).parents[1] / "docs" / "audio_inputs.md"


def table(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def of_libsndfile(format, subtype, rate=SAMPLING_RATE):
    return lambda: encode(tone(rate=rate), rate, format, subtype)


def of_ffmpeg(container, codec, rate=SAMPLING_RATE, **options):
    return lambda: encode_by_ffmpeg(tone(), container, codec, coded_rate=rate, **options)


# By file, coding and decoder.
FILES = {
    ("wav", "PCM 8 bit", "libsndfile"): of_libsndfile("WAV", "PCM_U8"),
    ("wav", "PCM 16 bit", "libsndfile"): of_libsndfile("WAV", "PCM_16"),
    ("wav", "PCM 24 bit", "libsndfile"): of_libsndfile("WAV", "PCM_24"),
    ("wav", "PCM 32 bit", "libsndfile"): of_libsndfile("WAV", "PCM_32"),
    ("wav", "float 32 bit", "libsndfile"): of_libsndfile("WAV", "FLOAT"),
    ("wav", "float 64 bit", "libsndfile"): of_libsndfile("WAV", "DOUBLE"),
    ("wav", "A-law", "libsndfile"): of_libsndfile("WAV", "ALAW", 8_000),
    ("wav", "µ-law", "libsndfile"): of_libsndfile("WAV", "ULAW", 8_000),
    ("wav", "IMA ADPCM", "libsndfile"): of_libsndfile("WAV", "IMA_ADPCM"),
    ("wav", "MS ADPCM", "libsndfile"): of_libsndfile("WAV", "MS_ADPCM"),
    ("wav", "GSM 6.10", "libsndfile"): of_libsndfile("WAV", "GSM610", 8_000),
    ("wav", "G.721", "libsndfile"): of_libsndfile("WAV", "G721_32", 8_000),
    ("wav", "MP3", "libsndfile"): of_ffmpeg("wav", "libmp3lame"),
    ("flac", "FLAC", "libsndfile"): of_libsndfile("FLAC", "PCM_16"),
    ("ogg", "Vorbis", "libsndfile"): of_libsndfile("OGG", "VORBIS"),
    ("ogg", "Opus", "libsndfile"): of_libsndfile("OGG", "OPUS"),
    ("mp3", "MP3", "libsndfile"): of_libsndfile("MP3", "MPEG_LAYER_III"),
    ("aiff", "PCM 16 bit", "libsndfile"): of_libsndfile("AIFF", "PCM_16"),
    ("au", "PCM 16 bit", "libsndfile"): of_libsndfile("AU", "PCM_16"),
    ("au", "G.721", "libsndfile"): of_libsndfile("AU", "G721_32", 8_000),
    ("caf", "PCM 16 bit", "libsndfile"): of_libsndfile("CAF", "PCM_16"),
    ("m4a", "AAC", "FFmpeg"): of_ffmpeg("ipod", "aac", 44_100),
    ("m4a", "ALAC", "FFmpeg"): of_ffmpeg("ipod", "alac"),
    ("mp4", "AAC", "FFmpeg"): of_ffmpeg("mp4", "aac", 48_000),
    ("mp4", "AAC beside a video", "FFmpeg"): of_ffmpeg("mp4", "aac", video=True),
    ("mov", "AAC", "FFmpeg"): of_ffmpeg("mov", "aac", 44_100),
    ("aac", "AAC", "FFmpeg"): of_ffmpeg("adts", "aac", 44_100),
    ("webm", "Opus", "FFmpeg"): of_ffmpeg("webm", "libopus", 48_000),
    ("mkv", "FLAC", "FFmpeg"): of_ffmpeg("matroska", "flac"),
    ("3gp", "AMR", "FFmpeg"): of_ffmpeg("3gp", "libopencore_amrnb", 8_000),
    ("amr", "AMR", "FFmpeg"): of_ffmpeg("amr", "libopencore_amrnb", 8_000),
    ("wma", "WMA", "FFmpeg"): of_ffmpeg("asf", "wmav2", 44_100),
    ("wav", "G.726", "FFmpeg"): of_ffmpeg("wav", "g726", 8_000),
    ("ogg", "FLAC", "FFmpeg"): of_ffmpeg("ogg", "flac"),
}
LISTED = [(file, coding, decoder) for file, codings, decoder in table("Files") for coding in codings.split(", ")]


def test_every_file_of_the_table_is_tried():
    assert sorted(LISTED) == sorted(FILES)


def is_the_tone(loaded) -> bool:
    middle = loaded[3000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    is_in_tune = abs(spectrum.argmax() * SAMPLING_RATE / len(middle) - 440) <= 2
    return is_in_tune and 0.9 < len(loaded) / SAMPLING_RATE < 1.2 and 0.25 < np.std(middle) < 0.4


@pytest.mark.parametrize("line", LISTED, ids=" ".join)
def test_files(line, monkeypatch, tmp_path):
    contents = FILES[line]()
    path = tmp_path / "clip"
    path.write_bytes(contents)
    for audio in (contents, path):
        assert is_the_tone(load_audio(audio, SAMPLING_RATE))
    monkeypatch.setattr(audio_decoding, "av", None)
    if line[2] == "libsndfile":
        assert is_the_tone(load_audio(contents, SAMPLING_RATE))
    else:
        with pytest.raises(ValueError, match="pip install av"):
            load_audio(contents, SAMPLING_RATE)


# -- expressions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Return what the expressions of the tables name, in a folder with clip.wav."""
    samples = tone(duration_s=0.5)
    contents = encode(samples)
    (tmp_path / "clip.wav").write_bytes(contents)
    monkeypatch.chdir(tmp_path)
    data = base64.b64encode(contents).decode()
    return {
        "AudioDecoder": lambda contents: StandInDecoder(samples),
        "Path": Path,
        "base64": base64,
        "clip": (samples, SAMPLING_RATE),
        "contents": contents,
        "data": data,
        "np": np,
        "samples": samples,
        "torch": torch,
        "url": f"data:audio/wav;base64,{data}",
    }


def refusal(cell: str) -> tuple[tuple, list[str]] | None:
    """The kinds of errors that a cell of a table tells of, and their messages; None for what is not refused."""
    found = re.fullmatch(r"(\w*Error)(?: or (\w*Error))?: (.*)", cell)
    if found is None:
        return None
    errors = {"ValueError": ValueError, "TypeError": TypeError, "TemplateError": jinja2.TemplateError}
    return tuple(errors[name] for name in found.groups()[:2] if name), found[3].split("; ")


def check_refusal(call, told):
    errors, messages = told
    with pytest.raises(errors) as caught:
        call()
    assert any(message in str(caught.value) for message in messages), caught.value


def lines_of(heading: str):
    return [pytest.param(cell.strip("`"), told, id=cell.strip("`")) for cell, told in table(heading)]


def lines_with_errors(heading: str, refused: bool):
    return [line for line in lines_of(heading) if (refusal(line.values[1]) is not None) == refused]


@pytest.mark.parametrize("expression, told", lines_with_errors("Kinds of clips", refused=False))
def test_kinds_of_clips(expression, told, names, processor):
    def make():
        return eval(expression, names)

    expected = processor.extract_features([(names["samples"], SAMPLING_RATE)])["input_features"]
    assert np.array_equal(load_audio(make(), SAMPLING_RATE), names["samples"])
    assert np.array_equal(processor.extract_features([make()])["input_features"], expected)
    one = processor(f"say {processor.audio_token}", make())["input_features"].numpy()
    assert np.array_equal(one, expected)
    row = {"audio": make(), "text": "the red cat", "response": "the cat"}
    collated = BlspKdDataCollator(processor)([row])
    assert np.array_equal(collated["input_features"].numpy(), expected)


@pytest.fixture(scope="module")
def pipe(processor):
    return BlspKdPipeline(model=make_model(), processor=processor)


@pytest.fixture(scope="module")
def answer(pipe):
    return pipe((tone(duration_s=0.5), SAMPLING_RATE), max_new_tokens=4)


@pytest.mark.parametrize("expression, told", lines_with_errors("Kinds of clips", refused=False))
def test_kinds_of_clips_in_pipelines(expression, told, names, pipe, answer):
    assert pipe(eval(expression, names), max_new_tokens=4) == answer
    assert pipe({"audio": eval(expression, names)}, max_new_tokens=4) == answer
    assert pipe([eval(expression, names)], max_new_tokens=4) == [answer]


@pytest.mark.parametrize("expression, told", lines_with_errors("Kinds of clips", refused=True))
def test_what_is_no_clip(expression, told, names, processor):
    check_refusal(lambda: load_audio(eval(expression, names), SAMPLING_RATE), refusal(told))
    check_refusal(lambda: processor.extract_features([eval(expression, names)]), refusal(told))


@pytest.mark.parametrize("expression, told", lines_of("Range of samples"))
def test_range_of_samples(expression, told, names):
    samples = eval(expression, names)
    if refusal(told):
        check_refusal(lambda: load_audio(samples, SAMPLING_RATE), refusal(told))
        return
    loudness = 3 if expression.startswith("3 *") else 1
    one_step = 2**-7 if re.search("uint8|bfloat16", expression) else 2**-14
    np.testing.assert_allclose(load_audio(samples, SAMPLING_RATE), loudness * names["samples"], atol=one_step)


# -- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, told", lines_of("Blocks of a chat"))
def test_blocks_of_a_chat(expression, told, names, processor, pipe, answer):
    def chat():
        return [{"role": "user", "content": [eval(expression, names)]}]

    def tokenized():
        return processor.apply_chat_template(chat(), tokenize=True, return_dict=True)

    if refusal(told):
        check_refusal(tokenized, refusal(told))
        check_refusal(lambda: pipe(chat(), max_new_tokens=4), refusal(told))
        return
    expected = processor.extract_features([(names["samples"], SAMPLING_RATE)])["input_features"]
    assert np.array_equal(tokenized()["input_features"].numpy(), expected)
    assert pipe(chat(), max_new_tokens=4) == answer
