"""Speech for the tiny world: espeak-ng says its sentences, and the clips are kept as 16 kHz FLAC files.

`espeak.py` talks to espeak-ng; this file has the voices, and distributes clips among workers.
Leaves out: noise, echo, human speech.
"""

import hashlib
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from tqdm import tqdm

from modeling_blsp_kd.devices import usable_cores

from . import espeak

TRAIN_VOICES = (  # an accent and a timbre; espeak-ng's plain "en" is British, and it knows no "en-gb"
    "en-us+m1", "en+m2", "en-us+m3", "en+m5", "en-us+m7", "en+m8",
    "en+f1", "en-us+f2", "en+f4", "en-us+f5", "en-us+Andrea", "en+steph",
)  # fmt: skip
HELD_OUT_VOICES = ("en-us+m4", "en+f3", "en-us+linda")


def make_clips(
    texts: list[str],
    voices: list[str],
    seed: int,
    cache_dir: str | Path,
    num_workers: int | None = None,
    numbers: list[int] | None = None,
) -> list[Path]:
    """Make one FLAC file per text, or find it in `cache_dir` from an earlier run.

    Speed (150-200 words per minute), pitch (35-65) and the silence before and after (0.1-0.2 s each) are drawn per clip
    from `seed` and the clip's number. A file is named by all that determines its sound, and it gets that name only
    when it is complete, so a run that was stopped leaves nothing that a later run would take for a finished clip.

    Args:
        texts: what is said in each clip.
        voices: who says it, as many as `texts`.
        cache_dir: folder for the files; made if it does not exist.
        num_workers: processes, since espeak-ng speaks with one voice per process. Omitted: one per core, at most 8.
        numbers: the clips' numbers, as many as `texts`; 0, 1, ... if omitted.

    Returns:
        paths of 16 kHz mono 16-bit FLAC files, in the order of `texts`.

    Raises:
        ValueError: `texts`, `voices` and `numbers` are not equally many.
        RuntimeError: a worker stopped; its own error is on stderr.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    clips = {}
    paths = []
    for settings in _settings_of_clips(texts, voices, seed, numbers):
        path = cache_dir / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]}.flac"
        paths.append(path)
        if not path.exists():
            clips[path] = settings
    _run_workers([{"path": str(path.absolute()), **settings} for path, settings in clips.items()], num_workers)
    return paths


def word_times(
    texts: list[str],
    voices: list[str],
    seed: int,
    num_workers: int | None = None,
    numbers: list[int] | None = None,
) -> list[list[dict]]:
    """Return the times that espeak-ng reports for the words in the clips that `make_clips` makes of the same arguments.

    A word ends where the next one begins, or where a pause begins.

    Args:
        texts, voices, seed, num_workers, numbers: as in `make_clips`; the sentences are spoken once more.

    Returns:
        for each clip a list of dict with the keys `text`, `start` and `end` (seconds from the start of the clip).

    Raises:
        ValueError, RuntimeError: as `make_clips`.
    """
    return _run_workers(
        [{"path": None, **settings} for settings in _settings_of_clips(texts, voices, seed, numbers)], num_workers
    )


def _settings_of_clips(texts, voices, seed, numbers):
    if len(texts) != len(voices):
        raise ValueError(f"Every clip needs one voice, but there are {len(texts)} texts and {len(voices)} voices.")
    for number, text, voice in zip(range(len(texts)) if numbers is None else numbers, texts, voices, strict=True):
        rng = random.Random(f"clip {seed} {number}")
        yield {
            "text": text,
            "voice": voice,
            "speed": rng.randint(150, 200),
            "pitch": rng.randint(35, 65),
            "silence_before_s": round(rng.uniform(0.1, 0.2), 3),
            "silence_after_s": round(rng.uniform(0.1, 0.2), 3),
        }


def _run_workers(jobs, num_workers):
    """Return the words of clips; a clip is written if its job has a path."""
    if not jobs:
        return []
    num_workers = min(num_workers or min(usable_cores(), 8), len(jobs))
    words: list = [None] * len(jobs)
    progress = tqdm(total=len(jobs), desc="synthesising speech", mininterval=1)

    def run(worker):
        words[worker::num_workers] = _run_worker(jobs[worker::num_workers], progress)

    with progress, ThreadPoolExecutor(num_workers) as pool:
        for finished in [pool.submit(run, worker) for worker in range(num_workers)]:
            finished.result()
    return words


def _run_worker(jobs, progress):
    """Make clips in one process, one at a time, and return their words.

    The process is a bare interpreter on `espeak.py`. `multiprocessing` would import the caller's script again in every
    worker, and torch with it.
    """
    words = []
    command = [sys.executable, str(Path(espeak.__file__).absolute())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
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
