"""Write manifests of spoken digit strings from recordings of single digits, with one speaker held out.

    python -m examples.experiments.make_digit_manifest --recordings RECORDINGS/metadata.jsonl --output outputs/digits
    accelerate launch examples/train.py --train_manifest outputs/digits/train.jsonl \\
        --eval_manifest outputs/digits/test.jsonl --output_dir outputs/digits_model

`metadata.jsonl` has one object per recording with `file_name` (relative to it), `text` ("seven") and `speaker`, as the
Free Spoken Digit Dataset does after a small conversion; other texts are left out, and their number is printed. Strings
of 2 to 6 digits are joined from recordings of one speaker, with short pauses, at the recordings' own rate. No recording
is in both manifests. Questions about the strings are those of the tiny world, or with `--questions digits` those of
`human_speech/digits.py`, whose test strings are in no training string either.

Several `--held_out_speakers` are held out in turn: `train_without_NAME.jsonl` and `test_NAME.jsonl` for each. Training
manifests share their clips.

Training clips, and only they, can be varied: `--speeds` and `--quietest_db` per digit, `--noise` per string, and
`--synthetic_share` of the strings said by synthetic voices, in equal parts of each of the `--synthesizers`.
"""

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from processing.manifests import read_objects
from processing.training_rows.augmentation import Augmentation

from ..tiny_world.sentence_kinds import DIGITS
from ..tiny_world.world import digit_sentence, questions
from .human_speech.digits import draw_question, draw_string, kinds_of
from .human_speech.synthetic import SYNTHESIZERS, synthesize_recordings

LOUDNESS = 0.5  # of each digit's loudest sample


@dataclass
class Variation:
    """The rules by which digits are joined.

    Args:
        pauses_s: shortest and longest silence before, between and after them.
        of_digits, of_strings: what changes each recording, and the whole.
        quietest_db: a digit is quieter than `LOUDNESS` by up to this much.
    """

    pauses_s: tuple[float, float] = (0.05, 0.25)
    of_digits: Augmentation | None = None
    of_strings: Augmentation | None = None
    quietest_db: float = 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", required=True, help="metadata.jsonl of the recordings")
    parser.add_argument("--output", required=True, help="folder for clips and manifests")
    parser.add_argument("--held_out_speakers", nargs="+", help="default: the last in alphabetical order")
    parser.add_argument("--left_out_speaker", help="neither trained nor tested on, until all choices are made")
    parser.add_argument("--num_train", type=int, default=4000, help="training strings of a manifest")
    parser.add_argument("--num_test", type=int, default=400, help="test strings, half of them the held-out speaker's")
    parser.add_argument("--questions", choices=sorted(DRAWS), default="tiny_world", help="what is asked")
    parser.add_argument("--test_split", choices=("validation", "test"), default="test", help="with --questions digits")
    parser.add_argument("--repeat_share", type=float, default=0.5, help="of the training questions")
    parser.add_argument("--seed", type=int, default=0)
    training = parser.add_argument_group("training clips alone")
    training.add_argument("--pauses_s", type=float, nargs=2, default=Variation.pauses_s, help="shortest, longest")
    training.add_argument("--speeds", type=float, nargs="+", default=[], help="one is drawn for each digit")
    training.add_argument("--quietest_db", type=float, default=0.0, help="digits are quieter by up to this much")
    training.add_argument("--noise", help="in half of the strings: white, or a folder of recordings of noise")
    training.add_argument("--synthetic_share", type=float, default=0.0, help="of the strings: said by synthetic voices")
    training.add_argument(
        "--synthesizers", nargs="+", choices=sorted(SYNTHESIZERS), default=["espeak-ng"], help="of these voices"
    )
    options = parser.parse_args()
    if options.test_split != "test" and options.questions != "digits":
        parser.error("--test_split goes with --questions digits: the tiny world's questions have no splits of strings.")

    rng = random.Random(options.seed)
    pool = read_recordings(Path(options.recordings))
    if options.left_out_speaker is not None and pool.pop(options.left_out_speaker, None) is None:
        parser.error(f"--left_out_speaker {options.left_out_speaker!r} is not among {sorted(pool)}.")
    speakers = sorted(pool)
    if len(speakers) < 2:
        raise SystemExit(f"One speaker is held out and others are trained on, but there is only {speakers}.")
    held_out = sorted(set(options.held_out_speakers or speakers[-1:]))
    if not set(held_out) <= set(speakers):
        raise SystemExit(f"--held_out_speakers must be some of {speakers}, got {held_out}.")
    trained_on = [speaker for speaker in speakers if [speaker] != held_out]
    train_pool, test_pool = split_recordings(pool, trained_on, rng)

    output, draw = Path(options.output), DRAWS[options.questions]
    variation = Variation(
        options.pauses_s,
        of_digits=Augmentation(speeds=options.speeds),
        of_strings=Augmentation(noise=options.noise),
        quietest_db=options.quietest_db,
    )

    def train_rows(pool, num):
        questions = (draw("train", rng, options.repeat_share) for _ in range(num))
        return make_rows(output, "train", pool, sorted(pool), questions, num, rng, variation)

    def test_rows(name, pool, speakers, num):
        questions = (draw(options.test_split, rng) for _ in range(num))
        return make_rows(output, name, pool, speakers, questions, num, rng, Variation())

    num_each = round(options.synthetic_share * options.num_train / len(options.synthesizers))
    num_human = options.num_train - num_each * len(options.synthesizers)
    # A manifest has the strings of all speakers but one.
    rows = train_rows(train_pool, round(num_human * len(trained_on) / (len(speakers) - 1)))
    rate = soundfile.info(train_pool[trained_on[0]][DIGITS[0]][0]).samplerate
    for synthesizer in options.synthesizers if num_each else []:
        rows += train_rows(synthesize_recordings(synthesizer, output / "synthetic", rate, rng), num_each)
    for speaker in held_out:
        train, test = ("train", "test") if len(held_out) == 1 else (f"train_without_{speaker}", f"test_{speaker}")
        write_rows(output / f"{train}.jsonl", [row for row in rows if row["voice"] != speaker])
        seen = [other for other in speakers if other != speaker]
        num_held_out = options.num_test // 2
        tested = test_rows(test, pool, [speaker], num_held_out)
        tested += test_rows(test, test_pool, seen, options.num_test - num_held_out)
        write_rows(output / f"{test}.jsonl", tested)
        print(f"Wrote {output / train}.jsonl and {output / test}.jsonl; held out: {speaker}.")


def read_recordings(metadata: Path) -> dict[str, dict[str, list[Path]]]:
    """Return speaker -> digit -> recordings."""
    pool: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    num_left_out = 0
    for _, row in read_objects(metadata):
        if row["text"] in DIGITS:
            pool[row["speaker"]][row["text"]].append(metadata.parent / row["file_name"])
        else:
            num_left_out += 1
    if not pool:
        raise SystemExit(f"{metadata} holds no recording whose text is one of {DIGITS}.")
    print(f"{num_left_out} recordings of other texts than a digit are left out.")
    return pool


def split_recordings(pool, speakers, rng, test_share=0.1):
    """Keep a share of every speaker's recordings of every digit for the test."""
    train: dict[str, dict[str, list[Path]]] = defaultdict(dict)
    test: dict[str, dict[str, list[Path]]] = defaultdict(dict)
    for speaker in speakers:
        for digit in DIGITS:
            recordings = sorted(pool[speaker][digit])
            rng.shuffle(recordings)
            num_test = max(1, round(test_share * len(recordings)))
            test[speaker][digit], train[speaker][digit] = recordings[:num_test], recordings[num_test:]
    return train, test


def draw_of_tiny_world(split, rng, repeat_share=None):
    """Draw words and one of the tiny world's questions about them; a `repeat_share` of these ask for all words."""
    words = [rng.choice(DIGITS) for _ in range(rng.randint(2, 6))]
    suitable = questions(digit_sentence(words))
    if repeat_share is not None:
        repeats = rng.random() < repeat_share
        suitable = [question for question in suitable if (question.kind == "repeat") == repeats]
    return words, rng.choice(suitable)


def draw_of_digits(split, rng, repeat_share=None):
    """Draw a string of one split and one of the questions of `human_speech/digits.py`."""
    words = draw_string(split, rng)
    kinds = kinds_of(words)
    if repeat_share is not None:
        kinds = ["repeat"] if rng.random() < repeat_share else [kind for kind in kinds if kind != "repeat"]
    return words, draw_question(words, rng.choice(kinds), rng)


DRAWS = {"tiny_world": draw_of_tiny_world, "digits": draw_of_digits}


def make_rows(output, folder, pool, speakers, drawn, num, rng, variation):
    """Write `num` clips of words and questions and return their rows, with speakers in turn."""
    (output / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (words, question) in enumerate(tqdm(drawn, total=num, desc=f"{folder}, {len(speakers)} speakers")):
        speaker = speakers[index % len(speakers)]
        path = Path(folder) / f"{speaker}_{index:05d}.flac".replace(" ", "_")
        join([rng.choice(pool[speaker][word]) for word in words], output / path, rng, variation)
        rows.append(
            {
                "audio": str(path),
                "text": " ".join(words),
                "voice": speaker,
                "kind": question.kind,
                "instruction": question.instruction,
                "answer": question.answer,
            }
        )
    return rows


def join(recordings, path, rng, variation):
    """Join recordings of one rate with pauses around them."""
    generator = np.random.default_rng(rng.getrandbits(64))
    rate = soundfile.info(recordings[0]).samplerate

    def pause():
        return np.zeros(int(rng.uniform(*variation.pauses_s) * rate), np.float32)

    pieces = []
    for recording in recordings:
        samples, own_rate = soundfile.read(recording, dtype="float32")
        if own_rate != rate:
            raise SystemExit(f"{recording} has {own_rate} Hz, the recording before it {rate} Hz; resample them first.")
        if variation.of_digits:
            samples = variation.of_digits(samples, rate, generator)
        loudness = LOUDNESS * 10 ** (-rng.uniform(0, variation.quietest_db) / 20)
        pieces += [pause(), samples * (loudness / np.abs(samples).max())]
    joined = np.concatenate([*pieces, pause()])
    if variation.of_strings:
        joined = variation.of_strings(joined, rate, generator)
    soundfile.write(path, joined.clip(-1, 1), rate, subtype="PCM_16")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
