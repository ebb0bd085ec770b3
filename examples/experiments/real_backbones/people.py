"""Recordings of people: speakers held out for choices and for the final test, clips decoded to 16 kHz FLAC.

Speakers are drawn from the sorted names by the seed alone. Leaves out: recordings of single words.
"""

import os
import random
from pathlib import Path

import soundfile
import soxr
from tqdm import tqdm

from processing.manifests import read_objects, seconds

from ...tiny_world.espeak import SAMPLING_RATE
from .sentences import plain_words

# Wordings after which SmolLM2 repeats a text: its WER on the text of 28 sentences was 15 and 18 %. With "Write down the
# following text word for word." it was 42 %, with "Repeat what I say, word for word." 132 %.
REPEAT = (
    "Repeat the following text word for word, and nothing else.",
    "Repeat the following text word for word.",
)


def read_people(metadata: Path, longest_s: float) -> list[dict]:
    """Return a row for each recording of a sentence; `recording` is its file.

    Args:
        metadata: JSONL, one object per recording with `file_name`, `text`, `speaker` and `seconds`.

    Raises:
        ValueError: there is none.
    """
    rows, num_words, num_long = [], 0, 0
    for _, recording in read_objects(metadata):
        length_s = seconds("seconds", recording.get("seconds"))
        if len(recording["text"].split()) < 2:
            num_words += 1
        elif length_s > longest_s:
            num_long += 1
        else:
            rows.append(
                {
                    "recording": metadata.parent / recording["file_name"],
                    "text": " ".join(plain_words(recording["text"])),
                    "voice": f"people/{recording['speaker']}",
                }
            )
    print(
        f"{metadata}: {num_words} recordings of single words and {num_long} longer than {longest_s:g} s are left out."
    )
    if not rows:
        raise ValueError(f"{metadata} holds no sentence of up to {longest_s:g} s.")
    return rows


def split_people(rows: list[dict], seed: int, num_choices: int = 2, num_final: int = 2) -> dict[str, list[dict]]:
    """Return the rows of `train`, `choices` and `final`, which share no speaker.

    Raises:
        ValueError: no speaker is left for training.
    """
    speakers = sorted({row["voice"] for row in rows})
    if num_choices + num_final >= len(speakers):
        raise ValueError(f"{num_choices + num_final} speakers are to be held out, but {len(speakers)} speak.")
    drawn = random.Random(f"speakers {seed}").sample(speakers, num_choices + num_final)
    choices, final = set(drawn[:num_choices]), set(drawn[num_choices:])
    splits: dict[str, list[dict]] = {"train": [], "choices": [], "final": []}
    for row in rows:
        splits["choices" if row["voice"] in choices else "final" if row["voice"] in final else "train"].append(row)
    return splits


def write_people(rows: list[dict], folder: Path, is_training: bool) -> list[dict]:
    """Decode the recordings into `folder`/people, and return rows of a manifest in `folder`.

    Held-out rows are all asked for in the same way.
    """
    (folder / "people").mkdir(parents=True, exist_ok=True)
    written = []
    for row in tqdm(rows, desc="recordings of people", mininterval=1, disable=None):
        path = folder / "people" / f"{row['recording'].stem}.flac"
        if not path.exists():
            samples, rate = soundfile.read(row["recording"], dtype="float32", always_2d=True)
            samples = soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE).clip(-1, 1)
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            soundfile.write(unfinished, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
            os.replace(unfinished, path)
        instruction = random.Random(path.name).choice(REPEAT) if is_training else REPEAT[0]
        written.append(
            {
                "id": path.stem,
                "audio": str(path.relative_to(folder)),
                "text": row["text"],
                "voice": row["voice"],
                "duration": round(soundfile.info(path).duration, 3),
                "kind": "repeat",
                "instruction": instruction,
                "answer": row["text"],
            }
        )
    return written
