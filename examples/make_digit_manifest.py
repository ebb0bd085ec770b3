"""Manifests of spoken digit strings from recordings of single digits, one speaker held out.

    python examples/make_digit_manifest.py --recordings RECORDINGS/metadata.jsonl --output outputs/digits
    accelerate launch examples/train.py --train_manifest outputs/digits/train.jsonl \\
        --eval_manifest outputs/digits/test.jsonl --output_dir outputs/digits_model

`metadata.jsonl` has one object per recording with `file_name` (relative to it), `text` ("seven") and `speaker`, as the
Free Spoken Digit Dataset does after a small conversion; other texts are left out, and said so. Strings of 2 to 6 digits
are joined from recordings of one speaker, with short pauses, at the recordings' own rate. No recording is in both
manifests. Questions about the strings are those of the tiny world.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
from tiny_world.world import DIGITS, digit_sentence, questions
from tqdm import tqdm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", required=True, help="metadata.jsonl of the recordings")
    parser.add_argument("--output", required=True, help="folder for clips and manifests")
    parser.add_argument("--held_out_speaker", help="default: the last in alphabetical order")
    parser.add_argument("--num_train", type=int, default=4000, help="training strings")
    parser.add_argument("--num_test", type=int, default=400, help="test strings, half of them of the held-out speaker")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    pool = read_recordings(Path(options.recordings))
    speakers = sorted(pool)
    held_out = options.held_out_speaker or speakers[-1]
    if held_out not in pool:
        raise SystemExit(f"--held_out_speaker must be one of {speakers}, got {held_out!r}.")
    seen = [speaker for speaker in speakers if speaker != held_out]
    train_pool, test_pool = split_recordings(pool, seen, rng)

    output = Path(options.output)
    write_rows(output / "train.jsonl", make_rows(output, "train", train_pool, seen, options.num_train, rng, 0.5))
    num_held_out = options.num_test // 2
    rows = make_rows(output, "test", pool, [held_out], num_held_out, rng)
    rows += make_rows(output, "test", test_pool, seen, options.num_test - num_held_out, rng)
    write_rows(output / "test.jsonl", rows)
    print(f"Wrote {output / 'train.jsonl'} and {output / 'test.jsonl'}; held out: {held_out}.")


def read_recordings(metadata: Path) -> dict[str, dict[str, list[Path]]]:
    """speaker -> digit -> recordings."""
    pool, num_left_out = defaultdict(lambda: defaultdict(list)), 0
    for line in metadata.read_text().splitlines():
        row = json.loads(line)
        if row["text"] in DIGITS:
            pool[row["speaker"]][row["text"]].append(metadata.parent / row["file_name"])
        else:
            num_left_out += 1
    if not pool:
        raise SystemExit(f"{metadata} holds no recording whose text is one of {DIGITS}.")
    print(f"{num_left_out} recordings of other texts than a digit are left out.")
    return pool


def split_recordings(pool, speakers, rng, test_share=0.1):
    """Keep a share of every seen speaker's recordings of every digit for the test."""
    train, test = defaultdict(dict), defaultdict(dict)
    for speaker in speakers:
        for digit in DIGITS:
            recordings = sorted(pool[speaker][digit])
            rng.shuffle(recordings)
            num_test = max(1, round(test_share * len(recordings)))
            test[speaker][digit], train[speaker][digit] = recordings[:num_test], recordings[num_test:]
    return train, test


def make_rows(output, split, pool, speakers, num, rng, repeat_share=None):
    """Write `num` clips and return their rows, with speakers in turn."""
    (output / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(num), desc=f"{split} {' '.join(speakers)}"):
        speaker = speakers[index % len(speakers)]
        digits = [rng.choice(DIGITS) for _ in range(rng.randint(2, 6))]
        path = Path(split) / f"{speaker}_{index:05d}.flac"
        join([rng.choice(pool[speaker][digit]) for digit in digits], output / path, rng)
        suitable = questions(digit_sentence(digits))
        if repeat_share is not None:
            repeats = rng.random() < repeat_share
            suitable = [question for question in suitable if (question.kind == "repeat") == repeats]
        question = rng.choice(suitable)
        rows.append(
            {
                "audio": str(path),
                "text": " ".join(digits),
                "voice": speaker,
                "kind": question.kind,
                "instruction": question.instruction,
                "answer": question.answer,
            }
        )
    return rows


def join(recordings, path, rng):
    """Join recordings of one rate, each at the same loudness, with pauses of 50 to 250 ms around them."""
    pieces, rate = [], soundfile.info(recordings[0]).samplerate
    for recording in recordings:
        samples, own_rate = soundfile.read(recording, dtype="float32")
        if own_rate != rate:
            raise SystemExit(f"{recording} has {own_rate} Hz, the recording before it {rate} Hz; resample them first.")
        pieces += [np.zeros(int(rng.uniform(0.05, 0.25) * rate), np.float32), samples * (0.5 / np.abs(samples).max())]
    pieces.append(np.zeros(int(rng.uniform(0.05, 0.25) * rate), np.float32))
    soundfile.write(path, np.concatenate(pieces), rate, subtype="PCM_16")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
