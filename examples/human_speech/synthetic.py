"""Recordings of single digits by all of espeak-ng's voices, as further speakers to train on.

Leaves out: voices that whisper or are hardly to be understood.
"""

import random
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr
from tiny_world.speech import SAMPLING_RATE, synthesize
from tiny_world.world import DIGITS
from tqdm import tqdm

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
LEFT_OUT = {"Alien", "Demonic", "Mr serious", "croak", "klatt6", "whisper", "whisperf"}
SILENCE = 0.01


def synthesize_recordings(folder: Path, sampling_rate: int, rng: random.Random, num_takes: int = 2):
    """Have every voice say every digit, each time with another accent, speed and pitch.

    Args:
        folder: for the files, without silence at their ends.
        sampling_rate: of the files, Hz.

    Returns:
        voice -> digit -> paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variants = sorted(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())
    pool = {}
    for variant in tqdm([variant for variant in variants if variant not in LEFT_OUT], desc="synthesising digits"):
        pool[f"espeak {variant}"] = {word: [] for word in DIGITS}
        for word in DIGITS * num_takes:
            voice = f"{rng.choice(ACCENTS)}+{variant}"
            samples = synthesize(word, voice, speed=rng.randint(80, 260), pitch=rng.randint(20, 80))
            loud = np.flatnonzero(np.abs(samples) > SILENCE)
            samples = soxr.resample(samples[loud[0] : loud[-1] + 1], SAMPLING_RATE, sampling_rate)
            takes = pool[f"espeak {variant}"][word]
            takes.append(folder / f"{variant}_{word}_{len(takes)}.flac")
            soundfile.write(takes[-1], samples.clip(-1, 1), sampling_rate, subtype="PCM_16")
    return pool
