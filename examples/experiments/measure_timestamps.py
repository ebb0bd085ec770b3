"""Measure the error of a model's word times, and fit the delay of its CIF.

    python -m examples.experiments.measure_timestamps --model outputs/default --save

espeak-ng synthesises the tiny world's sentences once more, because it reports the time of each word. Other clips come
from JSONL manifests whose rows have, beside `audio` and `text` (and, if known, `voice`), their `words`:
`[{"text": "the", "start": 0.12, "end": 0.25}, ...]`, in seconds:

    python -m examples.experiments.measure_timestamps --model DIR --train_manifest train.jsonl \\
        --eval_manifest test.jsonl

The delay is fitted on training clips and measured on others, on the words of the model's own transcription that are
right. Reported are absolute errors of starts and ends, raw (CIF's firing places) and corrected, in milliseconds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdProcessor
from processing.data_collator import continue_ids
from processing.evaluation.word_times import errors_of
from processing.manifests import read_manifest
from processing.spoken_inputs import user_turn

RAW = {"delay_s": 0.0, "silence": 0.0}
DELAYS_S = [round(0.02 * step, 2) for step in range(16)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BLSP-KD model")
    parser.add_argument("--train_manifest", help="clips to fit on; with --eval_manifest, instead of the tiny world")
    parser.add_argument("--eval_manifest", help="clips to measure on")
    parser.add_argument(
        "--num_clips", type=int, default=300, help="clips to fit on, and to measure on per kind of voice"
    )
    parser.add_argument("--allow_outside_paths", action="store_true", help="let audio paths leave a manifest's folder")
    parser.add_argument("--cache_dir", default="outputs/tiny_world_speech", help="folder of the tiny world's clips")
    parser.add_argument("--instruction", default="Repeat the words.", help="makes the model transcribe")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest transcription")
    parser.add_argument("--batch_size", type=int, default=32, help="clips at once")
    parser.add_argument("--results", help="JSON file for the results")
    parser.add_argument("--save", action="store_true", help="write the fitted delay into the model's config.json")
    options = parser.parse_args()

    processor = BlspKdProcessor.from_pretrained(options.model)
    model = BlspKdForCausalLM.from_pretrained(options.model, device_map="auto", dtype=fast_dtype()).eval()
    train_rows, eval_rows = load_rows(options)
    model.config.timestamps = {**model.config.timestamps, "delay_s": fit_delay(model, processor, train_rows, options)}

    fitted = model.config.timestamps
    results = {"timestamps": fitted, "num_fitted": len(train_rows), "errors_ms": {}}
    for voices, rows in eval_rows.items():
        results["errors_ms"][voices] = {}
        for name, timestamps in (("raw", RAW), ("corrected", fitted)):
            model.config.timestamps = timestamps
            errors = measure(model, processor, rows, options)
            results["errors_ms"][voices][name] = summarise(*errors) | {"num_clips": len(rows)}
    print_results(results)
    if options.results:
        Path(options.results).write_text(json.dumps(results, indent=2) + "\n")
    if options.save:
        config = Path(options.model, "config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), "timestamps": fitted}, indent=2) + "\n")


def load_rows(options) -> tuple[list[dict], dict[str, list[dict]]]:
    """Return rows with `words` to fit on, and rows to measure on by kind of voice."""
    if bool(options.train_manifest) != bool(options.eval_manifest):
        raise ValueError(
            "Give both --train_manifest and --eval_manifest, or neither: a fit is measured on other clips."
        )
    if options.train_manifest:
        train_rows, test_rows = (
            read_manifest(path, options.allow_outside_paths) for path in (options.train_manifest, options.eval_manifest)
        )
        seen = {row.get("voice") for row in train_rows}
        groups = {
            "seen voices": [row for row in test_rows if row.get("voice") in seen],
            "held out voices": [row for row in test_rows if row.get("voice") not in seen],
        }
        eval_rows = {voices: rows for voices, rows in groups.items() if rows}
    else:
        # Imported here: synthesis needs espeakng-loader, which a manifest does not.
        from ..tiny_world.speech import HELD_OUT_VOICES, TRAIN_VOICES

        train_rows = say("train", options.num_clips, TRAIN_VOICES, 20, options.cache_dir)
        eval_rows = {
            "seen voices": say("test", options.num_clips, TRAIN_VOICES, 21, options.cache_dir),
            "held out voices": say("test", options.num_clips, HELD_OUT_VOICES, 22, options.cache_dir),
        }
    for row in [*train_rows, *(row for rows in eval_rows.values() for row in rows)]:
        if not row.get("words"):
            raise ValueError(f"A row has no 'words' with their 'text', 'start' and 'end' in seconds: {row}.")
    return train_rows, eval_rows


def say(split: str, num_clips: int, voices, seed: int, cache_dir: str) -> list[dict]:
    """Synthesise sentences of the tiny world and return rows with the times of their words."""
    from ..tiny_world.speech import make_clips, word_times
    from ..tiny_world.world import sentences

    texts = [sentence.text for sentence in sentences(split, num_clips, seed)]
    speakers = [voices[index % len(voices)] for index in range(num_clips)]
    clips = make_clips(texts, speakers, seed, cache_dir)
    words = word_times(texts, speakers, seed)
    return [{"audio": str(clip), "text": text, "words": said} for clip, text, said in zip(clips, texts, words)]


@torch.inference_mode()
def fit_delay(model, processor, rows, options) -> float:
    """Return the delay with the least median error. Transcripts are given, so no recognition error affects it."""
    before, _ = processor.apply_chat_template(user_turn(options.instruction), add_generation_prompt=True).split(
        processor.audio_token
    )
    before_ids = processor.tokenize(before, add_special_tokens=False)["input_ids"]
    texts = [row["text"].strip() for row in rows]
    token_ids = continue_ids(processor, [before] * len(rows), [before_ids] * len(rows), texts)
    errors: dict[float, list] = {delay_s: [] for delay_s in DELAYS_S}
    silence = model.config.timestamps["silence"]
    for start in tqdm(range(0, len(rows), options.batch_size), desc="fitting", mininterval=1):
        batch = slice(start, start + options.batch_size)
        features = processor.extract_features([row["audio"] for row in rows[batch]])
        features = {name: torch.as_tensor(values, device=model.device) for name, values in features.items()}
        counts = torch.tensor([len(ids) for ids in token_ids[batch]], device=model.device)
        for delay_s in DELAYS_S:
            model.config.timestamps = {"delay_s": delay_s, "silence": silence}
            output = model.get_audio_features(**features, num_speech_tokens=counts, output_token_times=True)
            for row, ids, of_row in zip(rows[batch], token_ids[batch], output.token_times):
                errors[delay_s] += errors_of(row, processor.word_timestamps(ids, of_row[: len(ids)]))
    return min(DELAYS_S, key=lambda delay_s: np.median(np.abs(errors[delay_s])))


@torch.inference_mode()
def measure(model, processor, rows, options) -> tuple[np.ndarray, float]:
    """Return errors (W, 2) of starts and ends in the model's transcriptions, seconds, and the share of right words."""
    errors = []
    for start in tqdm(range(0, len(rows), options.batch_size), desc="measuring", mininterval=1):
        batch = rows[start : start + options.batch_size]
        inputs = processor.apply_chat_template(
            [user_turn(options.instruction, {"type": "audio", "audio": row["audio"]}) for row in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        ).to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, do_sample=False, return_timestamps=True
        )
        for row, sequence, times in zip(batch, output.sequences, output.token_timestamps):
            errors += errors_of(row, processor.word_timestamps(sequence, times))
    return np.array(errors).reshape(-1, 2), len(errors) / sum(len(row["words"]) for row in rows)


def summarise(errors: np.ndarray, share_right: float) -> dict:
    """Return median and 90th percentile of absolute errors, and the median of signed ones, in milliseconds."""
    summary: dict[str, float | dict] = {"words_right": share_right, "num_words": len(errors)}
    for name, values in (("start", errors[:, 0]), ("end", errors[:, 1]), ("both", errors.ravel())):
        values = 1000 * values
        summary[name] = {
            "median": float(np.median(np.abs(values))) if len(values) else None,
            "percentile_90": float(np.percentile(np.abs(values), 90)) if len(values) else None,
            "bias": float(np.median(values)) if len(values) else None,
        }
    return summary


def print_results(results: dict):
    print(f"\ndelay {results['timestamps']['delay_s']:.2f} s, fitted on {results['num_fitted']} training clips")
    print(f"{'error in ms, median (90th percentile)':38} {'clips':>6} {'words right':>12}", end="")
    print("".join(f"{name:>14}" for name in ("starts", "ends", "both")))
    for voices, by_name in results["errors_ms"].items():
        for name, summary in by_name.items():
            print(f"{voices + ', ' + name:38} {summary['num_clips']:6} {summary['words_right']:12.3f}", end="")
            for part in ("start", "end", "both"):
                median, percentile = summary[part]["median"], summary[part]["percentile_90"]
                print(f"{'-' if median is None else f'{median:.0f} ({percentile:.0f})':>14}", end="")
            print()


if __name__ == "__main__":
    main()
