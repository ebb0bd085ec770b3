"""Write manifests of the tiny world beside their clips, which are synthesised on first use.

    python -m examples.tiny_world.make_manifests --train outputs/tiny_world_speech/train-6000.jsonl \\
        --test outputs/tiny_world_speech/test-480.jsonl

`examples/train.py` calls it for its default run. Test rows are by seen voices, then by held-out ones.
"""

import argparse
import json
import os
from pathlib import Path

from .dataset import make_rows
from .speech import HELD_OUT_VOICES, TRAIN_VOICES


def main():
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_world.make_manifests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", type=Path, help="manifest to write")
    parser.add_argument("--test", type=Path, help="manifest to write")
    parser.add_argument("--num_utterances", type=int, default=6000, help="training rows")
    parser.add_argument("--num_eval_utterances", type=int, default=480, help="test rows per kind of voice")
    options = parser.parse_args()
    if options.train:
        folder = options.train.parent
        write(options.train, make_rows("train", options.num_utterances, TRAIN_VOICES, 0, folder, repeat_share=0.5))
    if options.test:
        folder, number = options.test.parent, options.num_eval_utterances
        groups = enumerate((TRAIN_VOICES, HELD_OUT_VOICES), start=1)
        rows = [row for seed, voices in groups for row in make_rows("test", number, voices, seed, folder)]
        write(options.test, rows)


def write(manifest: Path, rows: list[dict]):
    """Write rows whose clips lie beside the manifest."""
    lines = [json.dumps({**row, "audio": os.path.relpath(row["audio"], manifest.parent)}) + "\n" for row in rows]
    if manifest.exists() and manifest.read_text() == "".join(lines):
        return  # a folder that is complete may be read-only
    manifest.parent.mkdir(parents=True, exist_ok=True)
    unfinished = manifest.with_suffix(f".{os.getpid()}.unfinished")  # several trainings may share the folder
    unfinished.write_text("".join(lines))
    os.replace(unfinished, manifest)


if __name__ == "__main__":
    main()
