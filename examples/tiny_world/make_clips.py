"""Remake the short clips of `examples/tiny_world/clips`, which the demo offers to those without a microphone.

    python -m examples.tiny_world.make_clips

Test sentences in held-out voices, so the default run has trained on neither. Leaves out: `metadata.jsonl` has a row for
every question that a sentence can answer, in its first wording; the demo shows the first row of each clip.
"""

import json
import shutil
import tempfile
from pathlib import Path

from .speech import HELD_OUT_VOICES, make_clips
from .world import INSTRUCTIONS, sentences

FOLDER = Path(__file__).parent / "clips"
CLIPS = {  # what is said: its file, and what is asked first
    "the yellow sheep jumped to the shop": ("sheep.flac", "spanish"),
    "victor had three bottles and sold two": ("bottles.flac", "calculate"),
    "tom said the soup was very good": ("soup.flac", "sentiment"),
    "four three nine two zero": ("digits.flac", "figures"),
}


def main():
    drawn = {sentence.text: sentence for sentence in sentences("test", 200, seed=3)}
    rows = []
    with tempfile.TemporaryDirectory() as made:
        voices = [HELD_OUT_VOICES[index % len(HELD_OUT_VOICES)] for index in range(len(CLIPS))]
        paths = make_clips(list(CLIPS), voices, seed=0, cache_dir=made)
        for (text, (name, first)), path in zip(CLIPS.items(), paths):
            shutil.copyfile(path, FOLDER / name)
            answers = drawn[text].answers
            rows += [
                {"file_name": name, "text": text, "instruction": INSTRUCTIONS[kind][0], "answer": answers[kind]}
                for kind in sorted(answers, key=lambda kind: kind != first)
            ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (FOLDER / "metadata.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
