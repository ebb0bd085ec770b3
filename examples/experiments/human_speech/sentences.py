"""Write manifests of read sentences, with speakers held out and training sets of several sizes, each within the next.

    python -m examples.experiments.human_speech.sentences --recordings RECORDINGS/metadata.jsonl \\
        --output outputs/sentences

`metadata.jsonl` has one object per recording with `file_name` (relative to it), `text`, `speaker` and `seconds`, as
LibriSpeech does after a small conversion. Recordings of a single word, and those longer than `--longest_s`, are left
out, and their number is printed. The others are copied beside the manifests `train_MINUTES.jsonl`, `train.jsonl` (all
there is), `validation.jsonl` (to make choices on) and `test.jsonl`, which have no speaker in common. Text is in lower
case.
"""

import argparse
import json
import random
import shutil
from itertools import chain, zip_longest
from pathlib import Path

from processing.manifests import BadRow, read_objects, seconds

CLIPS = "clips"
INSTRUCTIONS = ("Repeat the words.", "Say it again.", "Write down what was said.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="metadata.jsonl of the recordings")
    parser.add_argument("--output", type=Path, required=True, help="folder for clips and manifests")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 40], help="sizes besides all there is")
    parser.add_argument("--longest_s", type=float, default=16.0, help="longest recording")
    parser.add_argument("--num_validation_speakers", type=int, default=2)
    parser.add_argument("--num_test_speakers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    recordings = read_sentences(options.recordings, options.longest_s)
    rows = list(recordings.values())
    speakers = sorted({row["voice"] for row in rows})
    num_held_out = options.num_test_speakers + options.num_validation_speakers
    if num_held_out >= len(speakers):
        parser.error(f"{num_held_out} speakers are to be held out, but {len(speakers)} speak. Hold out fewer.")
    rng.shuffle(speakers)
    test = set(speakers[: options.num_test_speakers])
    validation = set(speakers[options.num_test_speakers : num_held_out])
    train = in_turns([row for row in rows if row["voice"] not in test | validation], rng)

    total = minutes_of(train)
    if max(options.minutes) >= total:
        parser.error(f"--minutes are to be below the {total:.1f} that there are, got {max(options.minutes):g}.")
    manifests = {f"train_{minutes:g}": first_minutes(train, minutes) for minutes in sorted(options.minutes)}
    manifests["train"] = train
    for name, held_out in (("validation", validation), ("test", test)):
        manifests[name] = [{**row, "instruction": INSTRUCTIONS[0]} for row in rows if row["voice"] in held_out]
    (options.output / CLIPS).mkdir(parents=True, exist_ok=True)
    for recording in recordings:
        shutil.copy(recording, options.output / CLIPS)
    for name, chosen in manifests.items():
        path = options.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{path}: {len(chosen)} sentences, {minutes_of(chosen):.1f} minutes")


def read_sentences(metadata: Path, longest_s: float) -> dict[Path, dict]:
    """Return a manifest's row for each recording of a sentence; the file name determines the instruction.

    Raises:
        ValueError: there is none, or two files have the same name.
    """
    rows, num_words, num_long = {}, 0, 0
    for origin, recording in read_objects(metadata):
        try:
            length_s = seconds("seconds", recording.get("seconds"))
        except BadRow as error:
            raise ValueError(f"{origin}: {error}.") from None
        if len(recording["text"].split()) < 2:
            num_words += 1
        elif length_s > longest_s:
            num_long += 1
        else:
            path, text = metadata.parent / recording["file_name"], recording["text"].lower()
            rows[path] = {
                "audio": f"{CLIPS}/{path.name}",
                "text": text,
                "voice": recording["speaker"],
                "duration": length_s,
                "kind": "repeat",
                "instruction": random.Random(path.name).choice(INSTRUCTIONS),
                "answer": text,
            }
    print(f"{num_words} recordings of single words and {num_long} longer than {longest_s:g} s are left out.")
    if not rows:
        raise ValueError(f"{metadata} holds no sentence of up to {longest_s:g} s. Raise --longest_s, or look at it.")
    if len({path.name for path in rows}) < len(rows):
        raise ValueError(f"{metadata} names files of one name in several folders. Rename them: clips share one folder.")
    return rows


def in_turns(rows: list[dict], rng: random.Random) -> list[dict]:
    """Shuffle rows with the speakers in turn, so that a small set has as many speakers as a large one."""
    of_speaker: dict[str, list[dict]] = {}
    for row in rng.sample(rows, len(rows)):
        of_speaker.setdefault(row["voice"], []).append(row)
    return [row for row in chain(*zip_longest(*of_speaker.values())) if row is not None]


def first_minutes(rows: list[dict], minutes: float) -> list[dict]:
    """Return the first rows that together are no longer than `minutes`."""
    chosen, seconds = [], 0.0
    for row in rows:
        seconds += row["duration"]
        if seconds > 60 * minutes:
            break
        chosen.append(row)
    return chosen


def minutes_of(rows: list[dict]) -> float:
    return sum(row["duration"] for row in rows) / 60


if __name__ == "__main__":
    main()
