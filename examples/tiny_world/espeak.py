"""Speech from espeak-ng: samples, and the time of each word; run as a script, a worker that writes clips.

Follows the C interface of espeak-ng 1.52 (speak_lib.h), whose library and voices come with `espeakng-loader`.
Leaves out: systems without `fork` (on Windows use WSL). Imports no module of this folder, because the worker is a bare
interpreter on this file.
"""

import ctypes
import functools
import itertools
import json
import os
import re
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
EXAMPLE_VOICE = "en-us+m1"  # an accent and a timbre

# Of speak_lib.h:
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_CHARS_UTF8 = 1
_PHONEMES_IPA = 0x02
_EVENT_LIST_TERMINATED = 0
_EVENT_WORD = 1
_EVENT_END = 5  # of a clause
_EVENT_PHONEME = 7


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters from the start of the text, from 1
        ("length", ctypes.c_int),  # of a word, in characters
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_ON_SAMPLES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def synthesize(text: str, voice: str, speed: int = 175, pitch: int = 50) -> np.ndarray:
    """Synthesise `text`.

    The C library has one voice at a time for the whole process, so call this from one thread only. The samples depend
    slightly on what the process said before; the files of `make_clips` do not.

    Args:
        text: English words.
        voice: a language and a variant, as in "en-us+m1".
        speed: words per minute, 80 to 450.
        pitch: 0 to 100.

    Returns:
        float32 array of shape (num_samples,), at 16 kHz, within -1..1.

    Raises:
        ValueError: espeak-ng does not know `voice`.
        RuntimeError: espeak-ng cannot be loaded, or could not say `text`.
    """
    return _speak(text, voice, speed, pitch)[0]


def synthesize_words(text: str, voice: str, speed: int = 175, pitch: int = 50) -> tuple[np.ndarray, list[dict]]:
    """Return the samples of [`synthesize`], and the words: a list of dict with `text`, `start` and `end` (seconds)."""
    samples, events = _speak(text, voice, speed, pitch)
    return samples, _words(text, events, silence_before_s=0.0)


def phonemes(text: str, voice: str) -> str:
    """Return the pronunciation of `text` in the International Phonetic Alphabet, with stress and punctuation.

    Args:
        voice: a language of espeak-ng, as in "en-us".

    Raises:
        ValueError: espeak-ng does not know `voice`.
        RuntimeError: espeak-ng cannot be loaded.
    """
    library = _load_espeak().library
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}. Give a language, such as 'en-us'.")
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    parts = []
    # The library drops punctuation.
    for part in re.split(r"([,.;:!?]+)", text):
        if re.search(r"\w", part):
            rest = ctypes.c_char_p(part.encode())
            clauses = []
            while rest.value:
                clause = library.espeak_TextToPhonemes(ctypes.byref(rest), _CHARS_UTF8, _PHONEMES_IPA)
                clauses.append(clause.decode())
            part = (" " if part.startswith(" ") else "") + " ".join(clauses).strip()
        parts.append(part)
    return re.sub(r"\([a-z-]+\)", "", "".join(parts)).strip()  # without the marks of a change of language


def _speak(text, voice, speed, pitch):
    """Return the samples of [`synthesize`] and espeak-ng's events: (type, text position, length, seconds, phoneme)."""
    espeak = _load_espeak()
    _, _, variant = voice.partition("+")
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    if (variant and not (variants / variant).is_file()) or espeak.library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(
            f"espeak-ng has no voice {voice!r}. Give a language and a variant, such as {EXAMPLE_VOICE!r}; "
            f"the variants are the files in {variants}."
        )
    espeak.library.espeak_SetParameter(_PARAMETER_RATE, speed, 0)
    espeak.library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    espeak.chunks.clear()
    espeak.events.clear()
    utf8 = text.encode() + b"\0"
    status = espeak.library.espeak_Synth(utf8, len(utf8), 0, 1, 0, _CHARS_UTF8, None, None)
    espeak.library.espeak_Synchronize()
    if status != 0 or not espeak.chunks:
        raise RuntimeError(f"espeak-ng could not say {text!r} (status {status}). Give it at least one English word.")
    samples = np.concatenate(espeak.chunks).astype(np.float32) / 32768
    return soxr.resample(samples, espeak.sampling_rate, SAMPLING_RATE).clip(-1, 1), list(espeak.events)


class _Espeak:
    """The loaded C library, its sampling rate, and the samples and events of the utterance in progress."""

    def __init__(self):
        try:
            self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise RuntimeError(
                f"The espeak-ng library could not be loaded ({error}). Reinstall it: pip install espeakng-loader."
            ) from error
        data_path = espeakng_loader.get_data_path()
        self.sampling_rate = self.library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise RuntimeError(
                f"espeak-ng could not read its data in {data_path} (espeak_Initialize gave {self.sampling_rate}). "
                "It refuses paths of more than some 150 characters: use a virtual environment with a shorter path."
            )
        self.library.espeak_ng_SetRandSeed(1)  # of breath; else it is the time
        self.chunks = []
        self.events = []
        self._on_samples = _ON_SAMPLES(self._keep)  # the C side does not keep it alive
        self.library.espeak_SetSynthCallback(self._on_samples)

    def _keep(self, samples, num_samples, events):
        if samples and num_samples > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        for event in itertools.takewhile(lambda event: event.type != _EVENT_LIST_TERMINATED, events):
            # The string belongs to phonemes; other events have a number in its place.
            phoneme = event.id.string.decode(errors="replace") if event.type == _EVENT_PHONEME else ""
            place = (event.text_position, event.length, event.audio_position / 1000)
            self.events.append((event.type, *place, phoneme))
        return 0


@functools.cache
def _load_espeak():
    return _Espeak()


def _work():
    """Make the clips that stdin describes, one per line, and print a line with the words of each.

    espeak-ng continues where the last utterance left its oscillators, which no call of its interface resets, so the
    same words give slightly different samples each time. Each clip is therefore made by a fork of a worker that has
    said only "ready".
    """
    synthesize("ready", EXAMPLE_VOICE)  # loads the dictionary once instead of in every fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(_make_clip(**json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(1)


def _make_clip(path, text, voice, speed, pitch, silence_before_s, silence_after_s):
    speech, events = _speak(text, voice, speed, pitch)
    if path is not None:
        padding = (round(silence_before_s * SAMPLING_RATE), round(silence_after_s * SAMPLING_RATE))
        unfinished = f"{path}.{os.getpid()}.unfinished"
        soundfile.write(unfinished, np.pad(speech, padding), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        os.replace(unfinished, path)
    return _words(text, events, silence_before_s)


def _words(text, events, silence_before_s):
    words: list[dict] = []
    for kind, position, length, time_s, phoneme in events:
        time_s = round(silence_before_s + time_s, 3)
        is_pause = kind == _EVENT_PHONEME and phoneme.startswith("_")
        if words and words[-1]["end"] is None and (is_pause or kind in (_EVENT_WORD, _EVENT_END)):
            words[-1]["end"] = time_s
        if kind == _EVENT_WORD:
            words.append({"text": text[position - 1 : position - 1 + length], "start": time_s, "end": None})
    return words


if __name__ == "__main__":
    _work()
