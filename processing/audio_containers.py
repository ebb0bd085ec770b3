"""Recognise the format of an audio file by its first bytes, and name the library that decodes it.

Follows the magic numbers of the formats. Names and types that a sender gives to a file are not trusted.
"""

from typing import NamedTuple


class Container(NamedTuple):
    """A file format, known by the bytes that its files hold at `offset`."""

    magic: bytes
    offset: int
    name: str
    demuxer: str | None  # FFmpeg's name for it; None if FFmpeg never decodes it
    is_of_libsndfile: bool = False  # then FFmpeg decodes only the codecs that libsndfile lacks


CONTAINERS = (
    Container(b"RIFF", 0, "wav", "wav", is_of_libsndfile=True),
    Container(b"RF64", 0, "wav", None, is_of_libsndfile=True),
    Container(b"fLaC", 0, "flac", None, is_of_libsndfile=True),
    Container(b"OggS", 0, "ogg", "ogg", is_of_libsndfile=True),
    Container(b"FORM", 0, "aiff", "aiff", is_of_libsndfile=True),
    Container(b".snd", 0, "au", None, is_of_libsndfile=True),
    Container(b"caff", 0, "caf", "caf", is_of_libsndfile=True),
    Container(b"ID3", 0, "mp3", None, is_of_libsndfile=True),
    Container(b"ftyp", 4, "mp4", "mov"),  # and m4a, 3gp
    Container(b"\x1aE\xdf\xa3", 0, "webm", "matroska"),
    Container(b"#!AMR", 0, "amr", "amr"),
    Container(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "wma", "asf"),
)
AAC = Container(b"\xff", 0, "aac", "aac")
MP3 = Container(b"\xff", 0, "mp3", None, is_of_libsndfile=True)
MAGIC_BYTES = 12


def container_of(beginning: bytes) -> Container | None:
    """Return the container that the first `MAGIC_BYTES` bytes of a file identify, or None."""
    for container in CONTAINERS:
        if beginning.startswith(container.magic, container.offset):
            return container
    # A frame of MPEG audio begins with eleven set bits, its version and its layer. The layer of AAC is 0.
    if len(beginning) > 3 and beginning[0] == 0xFF and beginning[1] & 0xE0 == 0xE0:
        if beginning[1] & 0xF6 == 0xF0:
            return AAC
        # Some values of version, layer, bit rate and sampling rate are reserved.
        is_header = beginning[1] & 0x18 != 0x08 and beginning[1] & 0x06 and beginning[2] >> 4 != 15
        return MP3 if is_header and beginning[2] & 0x0C != 0x0C else None
    return None
