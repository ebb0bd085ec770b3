"""Speech for the tiny world: espeak-ng says its sentences, and the clips are kept as 16 kHz FLAC files.

Follows the C interface of espeak-ng 1.52 (speak_lib.h), whose library and voices come with `espeakng-loader`.
Leaves out: noise, echo, human speech, and systems without `fork` (on Windows use WSL).
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import espeakng_loader
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

SAMPLING_RATE = 16_000
TRAIN_VOICES = (  # an accent and a timbre; espeak-ng's plain "en" is British, and it knows no "en-gb"
    "en-us+m1", "en+m2", "en-us+m3", "en+m5", "en-us+m7", "en+m8",
    "en+f1", "en-us+f2", "en+f4", "en-us+f5", "en-us+Andrea", "en+steph",
)  # fmt: skip
HELD_OUT_VOICES = ("en-us+m4", "en+f3", "en-us+linda")

# Of speak_lib.h:
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_CHARS_UTF8 = 1
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
    """Say `text`.

    The C library holds one voice at a time for the whole process: call this from one thread only. Its sound depends,
    inaudibly, on what the process said before; the files of `make_clips` do not.

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


def _speak(text, voice, speed, pitch):
    """The samples of [`synthesize`], and espeak-ng's events: (type, text position, length, seconds, phoneme)."""
    espeak = _load_espeak()
    _, _, variant = voice.partition("+")
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    if (variant and not (variants / variant).is_file()) or espeak.library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(
            f"espeak-ng has no voice {voice!r}. Give a language and a variant, such as {TRAIN_VOICES[0]!r}; "
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


def make_clips(
    texts: list[str], voices: list[str], seed: int, cache_dir: str | Path, num_workers: int | None = None
) -> list[Path]:
    """Make one FLAC file per text, or find it in `cache_dir` from an earlier run.

    Speed (150-200 words per minute), pitch (35-65) and the silence before and after (0.1-0.2 s each) are drawn per clip
    from `seed` and the clip's index. A file is named by all that determines its sound, and it gets that name only
    when it is complete, so a run that was stopped leaves nothing that a later run would take for a finished clip.

    Args:
        texts: what is said in each clip.
        voices: who says it, as many as `texts`.
        cache_dir: folder for the files; made if it does not exist.
        num_workers: processes, since espeak-ng speaks with one voice per process. Omitted: one per core, at most 8.

    Returns:
        paths of 16 kHz mono 16-bit FLAC files, in the order of `texts`.

    Raises:
        ValueError: `texts` and `voices` differ in number.
        RuntimeError: a worker stopped; its own error is on stderr.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    clips = {}
    paths = []
    for settings in _settings_of_clips(texts, voices, seed):
        path = cache_dir / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]}.flac"
        paths.append(path)
        if not path.exists():
            clips[path] = settings
    _run_workers([{"path": str(path.absolute()), **settings} for path, settings in clips.items()], num_workers)
    return paths


def word_times(texts: list[str], voices: list[str], seed: int, num_workers: int | None = None) -> list[list[dict]]:
    """When each word is said in the clips that `make_clips` makes of the same arguments, by espeak-ng's own account.

    A word ends where the next one begins, or where a pause begins.

    Args:
        texts, voices, seed, num_workers: as in `make_clips`; the sentences are spoken once more.

    Returns:
        for each clip a list of dict with the keys `text`, `start` and `end` (seconds from the start of the clip).

    Raises:
        ValueError, RuntimeError: as `make_clips`.
    """
    return _run_workers(
        [{"path": None, **settings} for settings in _settings_of_clips(texts, voices, seed)], num_workers
    )


def _settings_of_clips(texts, voices, seed):
    if len(texts) != len(voices):
        raise ValueError(f"Every clip needs one voice, but there are {len(texts)} texts and {len(voices)} voices.")
    for index, (text, voice) in enumerate(zip(texts, voices)):
        rng = random.Random(f"clip {seed} {index}")
        yield {
            "text": text,
            "voice": voice,
            "speed": rng.randint(150, 200),
            "pitch": rng.randint(35, 65),
            "silence_before_s": round(rng.uniform(0.1, 0.2), 3),
            "silence_after_s": round(rng.uniform(0.1, 0.2), 3),
        }


def _run_workers(jobs, num_workers):
    """The words of clips, which are written where a job has a path."""
    if not jobs:
        return []
    num_workers = min(num_workers or min(os.cpu_count() or 1, 8), len(jobs))
    words: list = [None] * len(jobs)
    progress = tqdm(total=len(jobs), desc="synthesising speech", mininterval=1)

    def run(worker):
        words[worker::num_workers] = _run_worker(jobs[worker::num_workers], progress)

    with progress, ThreadPoolExecutor(num_workers) as pool:
        for finished in [pool.submit(run, worker) for worker in range(num_workers)]:
            finished.result()
    return words


def _run_worker(jobs, progress):
    """Have one process make clips, one at a time, and tell their words.

    A bare interpreter on this file and not `multiprocessing`, which would import the caller's script, and with it
    torch, once more in every worker.
    """
    words = []
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).absolute())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        to_worker, from_worker = cast(IO[str], worker.stdin), cast(IO[str], worker.stdout)
        for job in jobs:
            try:
                to_worker.write(json.dumps(job) + "\n")
                to_worker.flush()
                done = from_worker.readline()
            except BrokenPipeError:
                done = ""
            if not done:
                to_worker.close()
                raise RuntimeError(
                    f"A speech worker stopped at {job}. Its own error is printed above; "
                    "the clips made so far are kept, so run this again once that is mended."
                )
            words.append(json.loads(done))
            progress.update()
    return words


def _work():
    """In a worker: make the clips that stdin describes, one per line, and answer a line of words for each.

    espeak-ng goes on where the last utterance left its oscillators, which no call of its interface resets, so the same
    words sound a little different each time. So each clip is spoken by a fork of a worker that has said only "ready".
    """
    synthesize("ready", TRAIN_VOICES[0])  # loads the dictionary once instead of in every fork
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


if __name__ == "__main__":
    _work()
