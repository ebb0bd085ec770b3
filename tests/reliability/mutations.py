"""Breaks bytes and JSON values at random, and makes the headers of audio files lie.

Follows mutation fuzzers (AFL's bit flips, block repeats and splices). Leaves out: coverage, which compiled decoders do
not tell.
"""

import copy
import struct

NASTY = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"),
    "", " ", "x", "\0", "../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/a.wav", "data:audio/wav;base64,",
    "\ud800", "🦁" * 100, "<|audio|>", "x" * 20_000, [], {}, [[]], [None], [{}], {"a": {"b": None}}, {"type": "audio"},
)  # fmt: skip


def nasty_value(rng):
    if rng.random() < 0.03:
        deep = []
        for _ in range(400):
            deep = [deep]
        return deep
    return copy.deepcopy(NASTY[rng.integers(len(NASTY))])


# -- bytes ------------------------------------------------------------------------------------------------------------


def flip_bits(data: bytearray, rng, _others):
    for place in rng.integers(len(data), size=rng.integers(1, 20)):
        data[place] ^= 1 << rng.integers(8)


def flip_header_bits(data: bytearray, rng, _others):
    for place in rng.integers(min(len(data), 64), size=rng.integers(1, 8)):
        data[place] = rng.integers(256)


def truncate(data: bytearray, rng, _others):
    del data[rng.integers(len(data)) :]


def cut_out(data: bytearray, rng, _others):
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 200)]


def splice(data: bytearray, rng, others):
    other = others[rng.integers(len(others))]
    start = rng.integers(len(other))
    place = rng.integers(len(data))
    data[place : place + rng.integers(2_000)] = other[start : start + rng.integers(2_000)]


def repeat(data: bytearray, rng, _others):
    start = rng.integers(len(data))
    chunk = data[start : start + rng.integers(1, 4_000)]
    data[start:start] = chunk * int(rng.integers(1, 50))


def overwrite(data: bytearray, rng, _others):
    start, length = rng.integers(len(data)), int(rng.integers(1, 2_000))
    data[start : start + length] = rng.bytes(length) if rng.random() < 0.5 else bytes(length)


MUTATIONS = (flip_bits, flip_header_bits, truncate, cut_out, splice, repeat, overwrite)


def mutate_bytes(data: bytes, rng, others, at_most=3, mutations=MUTATIONS) -> bytes:
    """`data` after one to `at_most` mutations; pieces of `others` may get into it."""
    data = bytearray(data)
    for _ in range(rng.integers(1, at_most + 1)):
        if data:
            mutations[rng.integers(len(mutations))](data, rng, others)
    return bytes(data)


# -- headers of audio that lie ----------------------------------------------------------------------------------------

FIELDS = (0, 1, 2, 3, 7, 8, 9, 255, 999, 1_000, 65_535, 768_000, 2**31 - 1, 2**31, 2**32 - 1)


def lie(data: bytearray, rng, _others):
    """Change what the header says: rate, channels, width, and lengths up to many hours."""
    value = int(FIELDS[rng.integers(len(FIELDS))])
    if data[:4] == b"RIFF":
        lie_in_wav(data, rng, value)
    elif data[:4] == b"fLaC":
        lie_in_flac(data, rng)
    elif data[:4] == b"OggS":
        lie_in_ogg(data, rng)
    else:
        lie_in_mp3(data, rng, value)


def lie_in_wav(data: bytearray, rng, value: int):
    form, samples = data.find(b"fmt "), data.find(b"data")
    # (offset, width) of: format, channels, rate, bytes a second, bytes a frame, bits a sample; then of the lengths.
    places = [(form + offset, width) for offset, width in ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2), (22, 2), (4, 4))]
    places += [(samples + 4, 4), (4, 4)]
    place, width = places[rng.integers(len(places))]
    data[place : place + width] = (value % 256**width).to_bytes(width, "little")


def lie_in_flac(data: bytearray, rng):
    if rng.random() < 0.5:  # the 36 bits that tell how many samples there are: up to 49 days of 16 kHz
        data[21] = data[21] & 0xF0 | int(rng.integers(16))
        data[22:26] = rng.bytes(4)
    else:  # sizes of blocks and frames, rate, channels, width
        data[8 + rng.integers(14)] = rng.integers(256)


def lie_in_ogg(data: bytearray, rng):
    """Put the time of the last page far away; with a right checksum, or the page would be skipped."""
    page = data.rfind(b"OggS")
    data[page + 6 : page + 14] = struct.pack("<q", int(2 ** rng.uniform(0, 62)))
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = struct.pack("<I", ogg_checksum(data[page:]))


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of polynomial 0x04C11DB7, not reflected, from 0 (RFC 3533)."""
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum & 0x80000000 else 0)) & 0xFFFFFFFF
    return checksum


def lie_in_mp3(data: bytearray, rng, value: int):
    """The number of frames in the Xing or Info header."""
    for name in (b"Xing", b"Info"):
        place = data.find(name)
        if place >= 0:
            data[place + 8 : place + 12] = struct.pack(">I", value)
            return
    flip_header_bits(data, rng, None)


# -- JSON values ------------------------------------------------------------------------------------------------------


def mutate_json(value, rng, at_most=3):
    """A copy of a JSON value with one to `at_most` of its parts replaced, doubled, removed, wrapped or added."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.integers(1, at_most + 1)):
        places = list(_places(holder))
        container, key = places[rng.integers(len(places))]
        action = rng.integers(6)
        if action == 0 and container is not holder:
            del container[key]
        elif action == 1 and isinstance(container, list) and container is not holder:
            container.insert(key, copy.deepcopy(container[key]))
        elif action == 2:
            container[key] = [container[key]]
        elif action == 3 and isinstance(container[key], dict):
            container[key][str(nasty_value(rng))[:20]] = nasty_value(rng)
        elif action == 4 and isinstance(container, dict):
            container[key], other = nasty_value(rng), container[key]
            container[list(container)[rng.integers(len(container))]] = other
        else:
            container[key] = nasty_value(rng)
    return holder[0]


def _places(container):
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        yield container, key
        if isinstance(value, (dict, list)) and len(value) > 0 and not _is_deep(value):
            yield from _places(value)


def _is_deep(value) -> bool:
    """A nasty value that is nested hundreds of times."""
    for _ in range(50):
        if not (isinstance(value, list) and len(value) == 1):
            return False
        value = value[0]
    return True
