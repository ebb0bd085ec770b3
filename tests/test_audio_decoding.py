"""Files of phones, browsers and telephones become what was recorded; what is broken or too long is refused by name."""

import importlib.util
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers.dynamic_module_utils import get_imports

from processing import audio_decoding, c_stderr
from processing.audio_containers import container_of
from processing.audio_decoding import audio_info
from processing.audio_loading import load_audio
from tests.helpers.audio_files import encode, encode_by_ffmpeg, tone
from tests.helpers.prompts import SAMPLING_RATE

# Container and codec as FFmpeg names them, the rate that the codec takes, and the name that we give the container.
BY_FFMPEG = {
    "m4a": ("ipod", "aac", 16_000, "mp4"),
    "m4a of 44.1 kHz": ("ipod", "aac", 44_100, "mp4"),
    "aac": ("adts", "aac", 16_000, "aac"),
    "webm": ("webm", "libopus", 48_000, "webm"),
    "mkv": ("matroska", "flac", 16_000, "webm"),
    "amr": ("amr", "libopencore_amrnb", 8_000, "amr"),
    "3gp": ("3gp", "libopencore_amrnb", 8_000, "mp4"),
    "wma": ("asf", "wmav2", 44_100, "wma"),
    "caf with alac": ("caf", "alac", 16_000, "caf"),
    "wav with g726": ("wav", "g726", 8_000, "wav"),
}
# Of telephones, which libsndfile can only read from beginning to end.
SEQUENTIAL = [("WAV", "GSM610"), ("WAV", "G721_32"), ("AU", "G721_32"), ("AU", "G723_24"), ("AIFF", "GSM610")]


def of(kind, duration_s=1.0, **options):
    container, codec, rate, _ = BY_FFMPEG[kind]
    return encode_by_ffmpeg(tone(duration_s=duration_s), container, codec, coded_rate=rate, **options)


def check_tone(loaded, duration_s=1.0):
    """The tone, in place and loud as it was, apart from how codecs begin and end."""
    assert loaded.dtype == np.float32
    assert duration_s - 0.06 <= len(loaded) / SAMPLING_RATE <= duration_s + 0.15
    middle = loaded[3000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * SAMPLING_RATE / len(middle) - 440) <= 2
    assert 0.8 * 0.5 / np.sqrt(2) < np.sqrt(np.mean(middle**2)) < 1.1 * 0.5 / np.sqrt(2)


@pytest.mark.parametrize("kind", BY_FFMPEG)
def test_files_of_phones_and_browsers_are_decoded(kind, tmp_path):
    """They were "Format not recognised", whatever was installed."""
    contents = of(kind)
    path = tmp_path / "clip"
    path.write_bytes(contents)
    loaded = load_audio(contents, SAMPLING_RATE)
    check_tone(loaded)
    assert np.array_equal(load_audio(path, SAMPLING_RATE), loaded)
    for audio in (contents, path):
        assert audio_info(audio).duration_s == pytest.approx(1.0, abs=0.15)
        assert audio_info(audio).format == BY_FFMPEG[kind][3]


@pytest.mark.parametrize("format, subtype", SEQUENTIAL)
def test_telephony_is_read_from_beginning_to_end(format, subtype, monkeypatch):
    """It failed with "frames must be specified for non-seekable files", and named no clip."""
    contents = encode(tone(rate=8_000), 8_000, format, subtype)
    loaded = load_audio(contents, SAMPLING_RATE)
    check_tone(loaded)
    monkeypatch.setattr(audio_decoding, "BLOCK_FRAMES", 1_001)
    assert np.array_equal(load_audio(contents, SAMPLING_RATE), loaded)


def test_stereo_is_averaged():
    channels = np.stack([tone(), np.zeros(SAMPLING_RATE, np.float32)], axis=1)
    loaded = load_audio(encode_by_ffmpeg(channels, "matroska", "flac"), SAMPLING_RATE)
    np.testing.assert_allclose(loaded, tone() / 2, atol=2**-15)


def test_the_sound_of_a_video_is_heard():
    check_tone(load_audio(encode_by_ffmpeg(tone(), "mp4", "aac", video=True), SAMPLING_RATE))


def test_a_video_without_sound_is_refused():
    with pytest.raises(ValueError, match="is a mp4 file without an audio track"):
        load_audio(encode_by_ffmpeg(None, "mp4", None, video=True), SAMPLING_RATE)


def test_a_browsers_recording_is_decoded_before_its_length_is_known():
    """MediaRecorder streams webm and mp4, so their headers tell no duration, or a wrong one."""
    webm = of("webm", live="1")
    assert audio_info(webm).duration_s == pytest.approx(1.0, abs=0.05)
    check_tone(load_audio(webm, SAMPLING_RATE))
    check_tone(load_audio(of("m4a", movflags="frag_keyframe+empty_moov"), SAMPLING_RATE), duration_s=1.06)
    with pytest.raises(ValueError, match=r"lasts 0\.5\d s, but a clip may last at most 0\.5 s\. Split it"):
        load_audio(webm, SAMPLING_RATE, max_duration_s=0.5)


@pytest.mark.parametrize("kind", BY_FFMPEG)
def test_a_long_file_is_refused_by_its_header(kind, monkeypatch):
    contents = of(kind, duration_s=3.0)
    monkeypatch.setattr(audio_decoding._FFmpegFile, "blocks", lambda file: pytest.fail("the samples were read"))
    with pytest.raises(ValueError, match=r"the audio of \d+ bytes lasts [34]\.\d\d s, but .* at most 2 s"):
        load_audio(contents, SAMPLING_RATE, max_duration_s=2.0)


def test_silence_and_channels_are_checked_as_in_any_file():
    with pytest.raises(ValueError, match="bytes is silent: 1.0"):
        load_audio(encode_by_ffmpeg(np.zeros(SAMPLING_RATE, np.float32), "ipod", "aac"), SAMPLING_RATE)


@pytest.mark.parametrize("kind", ["m4a", "aac", "webm", "mkv", "amr", "3gp"])
def test_a_truncated_file_is_refused_rather_than_shortened(kind):
    contents = of(kind, duration_s=3.0)
    with pytest.raises(ValueError, match="cannot be decoded: .*damaged"):
        load_audio(contents[: len(contents) // 2], SAMPLING_RATE)


@pytest.mark.parametrize("kind", BY_FFMPEG)
def test_without_ffmpeg_the_error_says_what_to_install(kind, monkeypatch):
    contents = of(kind)
    monkeypatch.setattr(audio_decoding, "av", None)
    for call in (lambda: load_audio(contents, SAMPLING_RATE), lambda: audio_info(contents)):
        with pytest.raises(ValueError, match=r"the audio of \d+ bytes .*pip install av"):
            call()


def test_published_code_loads_without_ffmpeg(monkeypatch):
    """transformers asks for each package that a model's code imports, unless it stands under `try:`."""
    assert "av" not in get_imports(audio_decoding.__file__)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    spec = importlib.util.spec_from_file_location("processing.without_av", audio_decoding.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.audio_info(encode(tone())).duration_s == 1
    with pytest.raises(ValueError, match="cannot be decoded: .*FFmpeg .pip install av"):
        module.audio_info(b"no audio")
    with pytest.raises(ValueError, match="of the format mp4, which needs FFmpeg: pip install av"):
        module.audio_info(of("m4a"))


@pytest.mark.parametrize(
    "playlist",
    [b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile '%s'\n"],
)
def test_a_file_that_names_other_files_opens_none_of_them(playlist, tmp_path):
    """FFmpeg, left to guess, plays playlists: whoever sends one could have any file of a server read."""
    (tmp_path / "secret.wav").write_bytes(encode(tone()))
    contents = playlist % str(tmp_path / "secret.wav").encode()
    for named in (contents, b"\x00\x00\x00\x18ftyp" + contents, b"RIFF" + contents, b"#!AMR" + contents):
        with pytest.raises(ValueError, match="cannot be decoded"):
            load_audio(named, SAMPLING_RATE)


def test_files_are_told_by_their_beginning():
    for format, subtype, name in [
        ("WAV", "PCM_16", "wav"),
        ("FLAC", "PCM_16", "flac"),
        ("OGG", "VORBIS", "ogg"),
        ("OGG", "OPUS", "ogg"),
        ("MP3", "MPEG_LAYER_III", "mp3"),
        ("AIFF", "PCM_16", "aiff"),
        ("AU", "PCM_16", "au"),
        ("CAF", "PCM_16", "caf"),
    ]:
        contents = encode(tone(), format=format, subtype=subtype)
        assert container_of(contents).name == audio_info(contents).format == name
    for kind, (_, _, _, name) in BY_FFMPEG.items():
        assert container_of(of(kind)).name == name
    for beginning in (b"", b"\xff", b"\xff\xff\xff\xff", bytes(12), b"hello world, "):
        assert container_of(beginning) is None


# -- what libraries print ---------------------------------------------------------------------------------------------

DAMAGED_MP3 = """
import io, sys
import numpy as np, soundfile
from processing.audio_decoding import audio_info
from processing.audio_loading import load_audio

file = io.BytesIO()
soundfile.write(file, 0.5 * np.sin(np.arange(32_000) / 8), 16_000, format="MP3")
contents = bytearray(file.getvalue())
contents[1_000:1_100] = np.random.default_rng(0).bytes(100)
contents = bytes(contents)
print("PART", file=sys.stderr)
soundfile.read(io.BytesIO(contents))
print("PART", file=sys.stderr)
audio_info(contents), load_audio(contents, 16_000)
print("PART", file=sys.stderr)
soundfile.read(io.BytesIO(contents))
"""
of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do not let stderr be set")


@pytest.mark.long
@of_glibc
def test_libmpg123_does_not_write_to_the_terminal():
    """Every damaged mp3 of a data set left lines such as "[src/libmpg123/layer3.c:INT123_do_layer3()] error"."""
    # In a process of its own, since pytest replaces what C code writes to.
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED_MP3], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    _, theirs, ours, theirs_again = done.stderr.split("PART")
    assert "resync" in theirs, "the clip makes it write"
    assert ours.strip() == ""
    assert theirs_again == theirs, "what others print is left alone"


@of_glibc
def test_stderr_comes_back_after_many_threads():
    start = threading.Barrier(8)

    def silence(_):
        start.wait()
        for _ in range(200):
            with c_stderr.silenced_c_stderr():
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(silence, range(8)))
    assert c_stderr._stderr.value == c_stderr._standard


def test_ffmpeg_prints_nothing(capfd):
    damaged = bytearray(of("aac"))
    damaged[2_000:2_100] = bytes(100)
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_audio(bytes(damaged), SAMPLING_RATE)
    assert capfd.readouterr() == ("", "")
