"""From options to the data set that the Trainer gets.

Leaves out: the tiny world's rows and missing responses, which are made before (`train.py`).
"""

import logging
from pathlib import Path

from modeling_blsp_kd.training.batch_order import data_seed

from .augmentation import Augmentation
from .clips import BadClipError, ClipFeatures, SkippedClips, audio_name, lengths
from .data_sets import RowsInMemory, StreamedRows
from .mixtures import Source, read_mixture, stream_sources
from .options import DataOptions

SKIPPED_FILE = "skipped_audio.jsonl"
logger = logging.getLogger(__name__)


def training_sources(options: DataOptions) -> list[Source]:
    """Where training rows come from; empty for the tiny world."""
    if options.train_mixture:
        return read_mixture(options.train_mixture)
    return [Source(manifest=options.train_manifest)] if options.train_manifest else []


def training_data(rows: list[dict], options: DataOptions, args, processor) -> RowsInMemory | StreamedRows:
    """What to train on.

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
    hear = ClipFeatures(
        processor,
        augmentation=Augmentation(options.speeds, options.noise, options.noise_snr_db, options.noise_share),
        skipped=skipped,
        # The tiny world's clips fit in memory.
        keep=options.keep_features or not training_sources(options),
        seed=seed,
    )
    if options.streaming:
        stream = stream_sources(training_sources(options), seed, options.shuffle_buffer, options.allow_outside_paths)
        return StreamedRows(stream, hear, seed, options.length_buffer, options.seconds_per_token)

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
    return RowsInMemory(kept, kept_lengths, hear)
