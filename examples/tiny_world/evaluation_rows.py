"""Print the rows that `examples/evaluate.py` takes without other data, and synthesise their clips on first use.

    python -m examples.tiny_world.evaluation_rows --limit 20

The rows are those that `examples/train.py` scores on, one JSON object per line.
"""

import argparse
import json

from .dataset import make_rows
from .speech import HELD_OUT_VOICES, TRAIN_VOICES


def main():
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_world.evaluation_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--split", default="test", help="train, test or final")
    parser.add_argument("--num_utterances", type=int, default=480, help="rows per kind of voice")
    parser.add_argument("--cache_dir", default="outputs/tiny_world_speech", help="where clips are kept")
    parser.add_argument("--limit", type=int, help="make the first rows only")
    options = parser.parse_args()
    for row in make_evaluation_rows(options.split, options.num_utterances, options.cache_dir, options.limit):
        print(json.dumps(row))


def make_evaluation_rows(split: str, num_utterances: int, cache_dir: str, limit: int | None = None) -> list[dict]:
    """Make rows of seen and of held-out voices in turn, so that the first rows have both.

    Questions for the Spanish of a sentence count as translations, too.

    Args:
        split, cache_dir: see `make_rows`.
        num_utterances: number of rows per kind of voice.
        limit: make only the first rows and their clips; omitted, all.
    """
    groups = []
    limit_of_group = None if limit is None else -(-limit // 2)
    for seed, voices in enumerate((TRAIN_VOICES, HELD_OUT_VOICES), start=1):
        rows = make_rows(split, num_utterances, voices, seed, cache_dir, with_words=True, limit=limit_of_group)
        for row in rows:
            row["is_seen_voice"] = voices is TRAIN_VOICES
            if row["kind"] == "spanish":
                row["translation"] = row["answer"]
        groups.append(rows)
    return [row for pair in zip(*groups) for row in pair][:limit]


if __name__ == "__main__":
    main()
