"""From options to rows and to the data sets that the Trainer gets.

`responses.py` makes missing responses in between.
"""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from modeling_blsp_kd.training.batch_order import data_seed
from processing.manifests import read_manifest
from processing.processing_blsp_kd import BlspKdProcessor

from .augmentation import Augmentation
from .clips import BadClipError, ClipFeatures, SkippedClips, audio_name, duration_s, lengths
from .data_sets import RowsInMemory, StreamedRows
from .kept_teacher import TeacherOnDisk
from .mixtures import Source, read_mixture, read_sources, stream_sources
from .options import DataOptions

SKIPPED_FILE = "skipped_audio.jsonl"
logger = logging.getLogger(__name__)


def training_sources(options: DataOptions) -> list[Source]:
    """Return where training rows come from.

    Raises:
        ValueError: options name neither a manifest nor a mixture.
    """
    if options.train_mixture:
        return read_mixture(options.train_mixture)
    if options.train_manifest:
        return [Source(manifest=options.train_manifest)]
    raise ValueError("There are no rows to train on. Give --train_manifest or --train_mixture.")


def load_rows(options: DataOptions, seed: int) -> tuple[list[dict], list[dict]]:
    """Return training rows (none if they are streamed) and evaluation rows (none without a manifest)."""
    eval_rows = read_manifest(options.eval_manifest, options.allow_outside_paths) if options.eval_manifest else []
    sources = training_sources(options)
    return [] if options.streaming else read_sources(sources, seed, options.allow_outside_paths), eval_rows


def training_data(
    rows: list[dict], options: DataOptions, args: Any, processor: BlspKdProcessor
) -> RowsInMemory | StreamedRows:
    """Return the data set to train on.

    Args:
        rows: all of them, with their responses; of no use if they are streamed.
        args (`TrainingArguments`).

    Raises:
        BadClipError: a row's audio is missing or no audio, and `--skip_bad_audio` is not set.
        ValueError: no row is left.
    """
    seed = data_seed(args)
    skipped = None
    if options.skip_bad_audio:
        skipped = SkippedClips(Path(args.output_dir, SKIPPED_FILE))
        if args.process_index == 0 and not args.resume_from_checkpoint:
            skipped.path.unlink(missing_ok=True)
    clip_features = ClipFeatures(
        processor,
        augmentation=Augmentation(options.speeds, options.noise, options.noise_snr_db, options.noise_share),
        skipped=skipped,
        keep=options.keep_features,
        seed=seed,
    )
    if options.streaming:
        stream = stream_sources(training_sources(options), seed, options.shuffle_buffer, options.allow_outside_paths)
        return StreamedRows(stream, clip_features, seed, options.length_buffer, options.seconds_per_token)

    kept, kept_lengths = [], []
    for row in rows:
        try:
            kept_lengths += lengths([row], processor.tokenizer, options.seconds_per_token)
            kept.append(row)
        except BadClipError as error:
            if skipped is None:
                raise
            skipped.add(row, error)
    if not kept:
        raise ValueError(f"Of {len(rows)} training rows none has audio that can be used.")
    if num_text_only := sum(audio_name(row) is None for row in kept):
        logger.info("%d of %d training rows have no audio: they train on text alone.", num_text_only, len(kept))
    teacher = TeacherOnDisk(options.kept_teacher) if options.kept_teacher else None
    return RowsInMemory(kept, kept_lengths, clip_features, teacher)


def evaluation_data(rows: list[dict], length_column: str = "length") -> Dataset:
    """Return the data set to evaluate on: what the collator reads, and the length that batches are grouped by."""
    read = ("audio", "text", "instruction", "response")
    return Dataset.from_list(
        [{**{name: row.get(name) for name in read}, length_column: duration_s(row)} for row in rows]
    )
