"""Cases of the tests of the pipelines and of the endpoint handler: a repository folder, and clips good and bad."""

import base64
import struct
from pathlib import Path

import numpy as np

from .audio_files import encode
from .models import make_model
from .prompts import SAMPLING_RATE, clip

INSTRUCTION = "repeat the words"
# The smallest first box of an MP4 file, and of a Matroska one.
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200)
WEBM = b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\xf7\x81\x01\x42\xf2\x81\x04\x42\xf3\x81\x08\x42\x82\x84webm" + bytes(
    200
)


def make_readable_model(processor):
    """A small random model that says characters: halves of them all look alike, and would hide a difference."""
    model = make_model(plora=True)
    texts = processor.batch_decode([[token] for token in range(len(processor.tokenizer))])
    unreadable = [token for token, text in enumerate(texts) if not text.isascii() or not text.isprintable()]
    model.generation_config.suppress_tokens = [*unreadable, *processor.tokenizer.all_special_ids]
    return model


def make_repository(folder: Path, processor) -> Path:
    """A model as it lies on the Hub."""
    make_readable_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def base64_of(contents: bytes) -> str:
    return base64.b64encode(contents).decode()


def with_not_a_number() -> np.ndarray:
    waveform = clip(0.3)
    waveform[100] = np.nan
    return waveform


def flac_that_claims(num_samples: int) -> bytes:
    """A short FLAC file whose header tells of `num_samples` (36 bits, from bit 108 of its stream information)."""
    contents = bytearray(encode(clip(0.3), format="FLAC", subtype="PCM_16"))
    contents[21] = contents[21] & 0xF0 | num_samples >> 32
    contents[22:26] = struct.pack(">I", num_samples & 0xFFFFFFFF)
    return bytes(contents)


def wav_of_rate(rate: int) -> bytes:
    contents = bytearray(encode(clip(0.3)))
    contents[24:28] = struct.pack("<I", rate)
    return bytes(contents)


# Contents of files, and what is said about them.
BAD_FILES = {
    "no bytes": (b"", "the audio of 0 bytes cannot be decoded"),
    "text": (b"this is no audio\n" * 20, "cannot be decoded: .* Expected wav, flac, ogg/opus or mp3"),
    "noise": (np.random.default_rng(0).bytes(3000), "the audio of 3000 bytes cannot be decoded"),
    "truncated flac": (encode(clip(1.0), format="FLAC", subtype="PCM_16")[:9000], "cannot be decoded: .*damaged"),
    "cut wav header": (encode(clip(0.3))[:30], "the audio of 30 bytes cannot be decoded"),
    "silence": (encode(np.zeros(8000, np.float32)), r"is silent: 0\.50 s"),
    "not a number": (encode(with_not_a_number()), "holds NaN or infinite samples"),
    "no samples": (encode(np.zeros(0, np.float32)), r"is empty \(0 samples\)"),
    "rate 0": (wav_of_rate(0), "cannot be decoded"),
    "rate 1": (wav_of_rate(1), r"sampling rate of .* whole number of Hz \(1000 to 768000\), got 1\.|lasts 4800"),
    "shorter than a window": (encode(clip(0.01)), r"is too short: 0\.0100 s"),
    "too long": (encode(np.full(601_000, 0.1, np.float32), 1000, subtype="PCM_U8"), r"lasts 601\.0+ s, but"),
    "claims hours": (flac_that_claims(10 * 3600 * SAMPLING_RATE), r"lasts 36000\.0+ s, but"),
    "mp4": (MP4, "cannot be decoded: .*another format"),
    "webm": (WEBM, "cannot be decoded: .*another format"),
    "20 channels": (encode(np.full((400, 20), 0.5, np.float32)), "has 20 channels. Expected at most 8"),
}
