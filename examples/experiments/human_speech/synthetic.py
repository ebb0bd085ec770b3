"""Synthesise single digits in the voices of espeak-ng and flite, as further speakers to train on.

espeak-ng (`espeakng-loader`) has many voices, whose sound is computed from formants; flite (a program, `apt-get install
flite`) has few, made from people's recordings. Leaves out: voices that whisper or are hard to understand.
"""

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from ...tiny_world.sentence_kinds import DIGITS

ESPEAK_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
ESPEAK_LEFT_OUT = {"Alien", "Demonic", "Mr serious", "croak", "klatt6", "whisper", "whisperf"}
FLITE_VOICES = ("awb", "kal", "rms", "slt")
SILENCE = 0.01


def synthesize_recordings(synthesizer: str, folder: Path, sampling_rate: int, rng: random.Random):
    """Synthesise every digit in every voice, each time with another speed and pitch (and accent, for espeak-ng).

    Args:
        synthesizer: one of `SYNTHESIZERS`.
        folder: for the files, without silence at their ends.
        sampling_rate: of the files, Hz.

    Returns:
        voice -> digit -> paths.

    Raises:
        ImportError: espeak-ng is not installed.
        RuntimeError: flite is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voices, num_takes = SYNTHESIZERS[synthesizer]()
    pool: dict[str, dict[str, list]] = {}
    for name, say in tqdm(voices.items(), desc=f"{synthesizer} says digits"):
        speaker = f"{synthesizer} {name}"
        pool[speaker] = {word: [] for word in DIGITS}
        for word in DIGITS * num_takes:
            samples, rate = say(word, rng)
            loud = np.flatnonzero(np.abs(samples) > SILENCE)
            samples = soxr.resample(samples[loud[0] : loud[-1] + 1], rate, sampling_rate)
            takes = pool[speaker][word]
            takes.append(folder / f"{speaker}_{word}_{len(takes)}.flac".replace(" ", "_"))
            soundfile.write(takes[-1], samples.clip(-1, 1), sampling_rate, subtype="PCM_16")
    return pool


# A word to samples and their rate.
Say = Callable[[str, random.Random], tuple[np.ndarray, int]]


def espeak_voices() -> tuple[dict[str, Say], int]:
    """Return voices by name, and the number of takes per digit (more if there are few voices)."""
    # Imported here: espeakng-loader is an extra.
    import espeakng_loader

    from ...tiny_world.espeak import SAMPLING_RATE, synthesize

    def saying(variant):
        def say(word, rng):
            voice = f"{rng.choice(ESPEAK_ACCENTS)}+{variant}"
            return synthesize(word, voice, speed=rng.randint(80, 260), pitch=rng.randint(20, 80)), SAMPLING_RATE

        return say

    variants = sorted(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())
    return {variant: saying(variant) for variant in variants if variant not in ESPEAK_LEFT_OUT}, 2


def flite_voices() -> tuple[dict[str, Say], int]:
    """Return voices by name and the number of takes per digit, as `espeak_voices`."""
    program = shutil.which("flite")
    if program is None:
        raise RuntimeError(
            "The synthetic voices need the program flite, and it is not on the PATH: apt-get install flite."
        )

    def saying(voice):
        def say(word, rng):
            settings = {"duration_stretch": rng.uniform(0.7, 1.5), "int_f0_target_mean": rng.uniform(80, 220)}
            options = [part for name, value in settings.items() for part in ("--setf", f"{name}={value:.3f}")]
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                subprocess.run([program, "-voice", voice, *options, "-t", word, "-o", file.name], check=True)
                samples, rate = soundfile.read(file.name, dtype="float32")
            # Simulate longer and shorter vocal tracts, because there are few voices.
            return samples, round(rate * rng.uniform(0.85, 1.2))

        return say

    return {voice: saying(voice) for voice in FLITE_VOICES}, 20


SYNTHESIZERS = {"espeak-ng": espeak_voices, "flite": flite_voices}
