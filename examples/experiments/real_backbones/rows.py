"""Rows of manifests: which synthesizer says which text, and what became of it.

Leaves out: the making of a clip, see `clips`.
"""

import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .clips import make_clips, plan_clip
from .people import REPEAT
from .sentences import Sentence

MANIFEST_EVERY_S = 180


def deal(synthesizers: list, texts: Iterable[Sentence], key: str, seed: int) -> Iterator[tuple[Sentence, dict]]:
    """Yield each text with the plan of its clip, the synthesizers in turn.

    A clip is drawn by its text and how often that came before, so clips stay as they are when other texts are added.
    """
    num_times: Counter = Counter()
    for text, synthesizer in zip(texts, itertools.cycle(synthesizers)):
        name = synthesizer.name
        drawn_by = f"{key} {seed} {name} {num_times[name, text.text]} {text.text}"
        num_times[name, text.text] += 1
        yield text, plan_clip(synthesizer, text.written, text.text, drawn_by)


def write_clips(
    options, name, plans, is_training, rows=None, refused=None, most_rows=None, most_s=None, needs_words=False
):
    """Make clips until there are `most_rows` rows or `most_s` seconds, and write their manifest now and then."""
    rows, refused = ([] if rows is None else rows), ([] if refused is None else refused)
    first, num_refused, length_s, written_at = len(rows), 0, 0.0, time.monotonic()
    texts, plans = itertools.tee(plans)
    made = make_clips((plan for _, plan in plans), options.output, options.assets, options.workers, options.longest_s)
    for (text, _), (plan, result) in zip(texts, made):
        row = row_of(text, plan, result, is_training)
        if "refused" in result:
            refused.append(row)
            num_refused += 1
            if num_refused > max(20, len(rows) - first):
                raise RuntimeError(f"{num_refused} clips for {name} were refused, the last one as {row}.")
        elif "words" in row or not needs_words:
            rows.append(row)
            length_s += row["duration"]
        if time.monotonic() > written_at + MANIFEST_EVERY_S:
            write_manifest(options.output / f"{name}.jsonl", rows)
            written_at = time.monotonic()
        if (most_rows and len(rows) - first >= most_rows) or (most_s and length_s >= most_s):
            break
    made.close()
    write_manifest(options.output / f"{name}.jsonl", rows)
    if refused:
        write_manifest(options.output / f"refused_{name}.jsonl", refused)
    voices = Counter(row["voice"].partition("/")[0] for row in rows[first:])
    print(f"{name}: {dict(voices)}, {length_s / 3600:.2f} h; {len(refused)} refused", flush=True)


def row_of(text: Sentence, plan: dict, result: dict, is_training: bool) -> dict:
    """Return the manifest's row of a clip. A question is its own prompt, so its instruction is empty."""
    labels = dict(text.labels)
    if not labels:
        instruction = random.Random(result["audio"]).choice(REPEAT) if is_training else REPEAT[0]
        labels = {"kind": "repeat", "instruction": instruction, "answer": text.text}
    voice = f"{plan['synthesizer']}/{plan['settings']['voice']}"
    row = {"audio": result.pop("audio"), "text": text.text, "written": text.written, "voice": voice, **result}
    return {"id": row["audio"].removesuffix(".flac").removeprefix("clips/"), **row, "instruction": "", **labels}


def write_manifest(path: Path, rows: list[dict]):
    """Write rows under a name of their own first: a manifest that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, path)
