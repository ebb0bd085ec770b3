"""Make clips of synthetic speech: cached by all that determines their sound, resumable, several at a time.

A clip's file gets its name only when it is complete, and a ledger (`clips.jsonl`) keeps its length, its words or why it
was refused. A run that was killed goes on from there. Leaves out: noise and rooms, which training adds.
"""

import hashlib
import json
import multiprocessing
import os
import random
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ...tiny_world.espeak import SAMPLING_RATE
from .synthesizers import open_synthesizer

SILENCE = 10 ** (-45 / 20)  # a peak below it is no speech
LOUDNESS_DB = (-32.0, -17.0)  # root mean square of a clip, drawn
PADDING_S = (0.1, 0.4)
SHORTEST_S = 0.2
CHARACTERS_PER_S = (4.0, 40.0)


class BadSpeech(ValueError):
    """Raised when a synthesizer gave no fit speech; the message is the reason."""


def plan_clip(synthesizer, written: str, text: str, key: str) -> dict:
    """Return all that determines a clip: the voice and its settings, level and silences, drawn from `key`.

    Args:
        synthesizer: an open one, see `synthesizers`.
        written: what it says; `text`: the same in words alone.
        key: seed, place and anything else that tells this clip from others.
    """
    rng = random.Random(key)
    return {
        "synthesizer": synthesizer.name,
        "settings": synthesizer.draw(rng),
        "written": written,
        "text": text,
        "loudness_db": round(rng.uniform(*LOUDNESS_DB), 1),
        "padding_s": [round(rng.uniform(*PADDING_S), 3) for _ in range(2)],
    }


def clip_name(plan: dict) -> str:
    """Return the name of a planned clip, relative to the folder."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:20]
    return f"clips/{plan['synthesizer']}/{digest[:2]}/{digest[2:]}.flac"


def make_clips(
    plans: Iterable[dict], folder: Path, assets: Path | None, num_workers: int, longest_s: float
) -> Generator[tuple[dict, dict]]:
    """Yield each plan, in order, with what became of it, making clips as far as they are not in `folder` yet.

    The ledger decides: a clip that it does not list is made again.

    Yields:
        (plan, result): `audio` and `duration` (seconds), `words` where the synthesizer tells times; or `refused`, the
        reason why the speech was not fit.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a worker was killed; run it again.
    """
    ledger = Ledger(folder / "clips.jsonl")
    waiting: deque[tuple] = deque()
    # The parent holds torch, by `processing`; a fork shares its memory, and the children do not use it.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork")) as pool:
        for plan in plans:
            name = clip_name(plan)
            known = ledger.find(name, folder)
            waiting.append((plan, name, known or pool.submit(_make_clip, plan, folder / name, assets, longest_s)))
            # Few ahead: the caller may stop at any time.
            if len(waiting) > 2 * num_workers:
                yield _finish(waiting.popleft(), ledger)
        while waiting:
            yield _finish(waiting.popleft(), ledger)


def _finish(clip, ledger):
    plan, name, result = clip
    if not isinstance(result, dict):
        result = result.result()
        ledger.add(name, result)
    return plan, {"audio": name, **result}


class Ledger:
    """What became of each clip: one JSON object per line. A line that a kill cut short is as if it was not there."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, dict] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    self.results[entry.pop("clip")] = entry
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue

    def find(self, name: str, folder: Path) -> dict | None:
        result = self.results.get(name)
        return result if result and ("refused" in result or (folder / name).exists()) else None

    def add(self, name: str, result: dict):
        # One write, begun with a new line: a line cut short before it stays by itself.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps({'clip': name, **result})}".encode())
        self.results[name] = result


def _make_clip(plan, path, assets, longest_s):
    synthesizer = open_synthesizer(plan["synthesizer"], assets)
    try:
        samples, rate, words = synthesizer.say(plan["written"], plan["settings"])
        samples = finish_speech(samples, rate, plan, longest_s)
    except BadSpeech as error:
        return {"refused": str(error)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.unfinished"
    soundfile.write(unfinished, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    os.replace(unfinished, path)
    result: dict = {"duration": round(len(samples) / SAMPLING_RATE, 3)}
    # espeak-ng says two words with one time here and there; then there are no times.
    if words is not None and len(words) == len(plan["text"].split()):
        before_s = plan["padding_s"][0]
        result["words"] = [
            {"text": text, "start": round(word["start"] + before_s, 3), "end": round(word["end"] + before_s, 3)}
            for text, word in zip(plan["text"].split(), words)
        ]
    return result


def finish_speech(samples: np.ndarray, rate: int, plan: dict, longest_s: float) -> np.ndarray:
    """Return the speech at 16 kHz, at the planned level, with silence before and after.

    Raises:
        BadSpeech: it is empty, silent, longer than `longest_s`, or far too short or long for its text.
    """
    if len(samples) / rate < SHORTEST_S:
        raise BadSpeech("empty")
    if not np.isfinite(samples).all():
        raise BadSpeech("not finite")
    if np.abs(samples).max() < SILENCE:
        raise BadSpeech("silent")
    if len(samples) / rate > longest_s:
        raise BadSpeech("too long")
    slowest, fastest = CHARACTERS_PER_S
    if not slowest <= len(plan["text"]) / (len(samples) / rate) <= fastest:
        raise BadSpeech("length does not fit the text")
    samples = soxr.resample(np.asarray(samples, dtype=np.float32), rate, SAMPLING_RATE)
    gain = 10 ** (plan["loudness_db"] / 20) / np.sqrt(np.mean(samples**2))
    samples = samples * min(gain, 0.99 / np.abs(samples).max())
    return np.pad(samples, [round(seconds * SAMPLING_RATE) for seconds in plan["padding_s"]])
