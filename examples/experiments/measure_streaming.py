"""Train the tiny world's model in streaming form, and measure it by the length of its chunks.

    python -m examples.experiments.measure_streaming --seeds 1 2 3

`train.py` trains each seed on the data and for the steps of the default run, from the shipped model of whole clips
(`--start_from`; "" begins anew); other options are passed on to it. A run that was stopped goes on, and one that is
complete is only measured. Reported for each chunk: the share of right answers of seen and of held-out voices, and of
clips in which as many tokens fire as the transcript has, beside a model of whole clips (the shipped one, or
`--offline`). Clips are read in chunks at once, which gives the vectors and answers of a session
(`tests/test_speech_session.py`).

For the end of speech, a session hears clips and noise after each: reported are how long after a clip its end was told,
and how often that came before the clip was over.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.audio_loading import load_audio
from processing.evaluation.answering import answer_rows
from processing.manifests import read_manifest

ROOT = Path(__file__).parents[2]
PIECE_S, NOISE_S, NOISE = 0.02, 4.0, 1e-3
NAMES = ("seen_voices", "held_out_voices", "all_voices", "exact_token_count")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one model each")
    parser.add_argument("--output", type=Path, default=Path("outputs/streaming"), help="folder of models and results")
    parser.add_argument("--offline", default=ROOT / "examples/tiny_world/model", help="model of whole clips to compare")
    parser.add_argument(
        "--start_from", default=ROOT / "examples/tiny_world/model", help="model of whole clips; or none"
    )
    parser.add_argument("--chunks_ms", type=int, nargs="+", default=[320, 640, 1280, 0], help="0: full context")
    parser.add_argument("--silences_ms", type=int, nargs="+", default=[300, 500, 700], help="of the rule")
    parser.add_argument("--num_ends", type=int, default=240, help="clips whose end is to be told")
    parser.add_argument("--num_utterances", type=int, default=6000, help="clips to train on")
    parser.add_argument("--num_eval_utterances", type=int, default=480, help="test clips per kind of voice")
    parser.add_argument("--cache_dir", default="outputs/tiny_world_speech", help="where clips are kept")
    options, for_training = parser.parse_known_args()
    folders = [train(seed, options, for_training) for seed in options.seeds]
    rows, train_rows = (
        read_manifest(Path(options.cache_dir, f"{split}-{number}.jsonl"))
        for split, number in (("test", options.num_eval_utterances), ("train", options.num_utterances))
    )
    seen = {row["voice"] for row in train_rows}
    results: dict = {"num_rows": len(rows), "offline": measure(*load(options.offline), rows, seen), "seeds": {}}
    for seed, folder in zip(options.seeds, folders):
        model, processor = load(folder)
        own, by_chunk = model.config.streaming, {}
        for chunk_ms in options.chunks_ms:
            model.config.streaming = {**own, "chunk_ms": chunk_ms or None}
            by_chunk[f"{chunk_ms} ms" if chunk_ms else "full context"] = measure(model, processor, rows, seen)
        model.config.streaming = own
        ends = {
            silence_ms: measure_ends(model, processor, rows[: options.num_ends], {"silence_ms": silence_ms})
            for silence_ms in options.silences_ms
        }
        results["seeds"][seed] = {"streaming": own, "by_chunk": by_chunk, "end_of_speech": ends}
        (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "results.md").write_text(text := table(results))
    print(f"\n{text}")


def train(seed: int, options: argparse.Namespace, for_training: list[str]) -> Path:
    """Train the model of a seed, unless that is done, and return its folder."""
    folder = options.output / f"seed{seed}"
    if (folder / "results.json").exists() and "speech_accuracy" in json.loads((folder / "results.json").read_text()):
        return folder
    command = [sys.executable, ROOT / "examples/train.py", "--speech_streaming", '{"chunk_ms": 640}', "--seed", seed]
    command += ["--output_dir", folder, "--cache_dir", options.cache_dir, "--resume_from_checkpoint", "true"]
    command += ["--num_utterances", options.num_utterances, "--num_eval_utterances", options.num_eval_utterances]
    command += ["--start_from", options.start_from] if options.start_from else []
    subprocess.run([*map(str, command), *for_training], check=True, env={"PYTHONPATH": str(ROOT), **os.environ})
    return folder


def load(folder: str | Path) -> tuple[BlspKdForCausalLM, BlspKdProcessor]:
    model = BlspKdForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.float32).eval()
    return model, BlspKdProcessor.from_pretrained(folder)


@torch.inference_mode()
def measure(model, processor, rows: list[dict], seen_voices: set, batch_size: int = 32) -> dict[str, float]:
    """Return the shares of right answers, and of clips with as many speech tokens as their transcript has tokens."""
    right = np.array([given == row["answer"] for row, given in zip(rows, answer_rows(model, processor, rows, "audio"))])
    is_seen = np.array([row["voice"] in seen_voices for row in rows])
    collate, num_exact = BlspKdDataCollator(processor), 0
    for start in tqdm(range(0, len(rows), batch_size), desc="counting tokens", mininterval=1):
        # The collator counts the transcript's tokens; it also wants a response, which nothing reads here.
        batch = collate([{**row, "response": "-"} for row in rows[start : start + batch_size]])
        clips = {name: batch[name].to(model.device) for name in ("input_features", "input_features_mask")}
        counts = model.get_audio_features(**clips).num_speech_tokens.cpu()
        num_exact += int((counts == batch["num_speech_tokens"]).sum())
    shares = [float(right[group].mean()) for group in (is_seen, ~is_seen, np.ones_like(is_seen))]
    return dict(zip(NAMES, [*shares, num_exact / len(rows)]))


def measure_ends(model, processor, rows: list[dict], rule: dict) -> dict[str, float]:
    """Return how long after a clip its end was told (seconds), and the shares told before it and never."""
    rate = processor.feature_extractor.sampling_rate
    noise = (NOISE * np.random.default_rng(0).standard_normal(int(NOISE_S * rate))).astype(np.float32)
    piece, session = int(PIECE_S * rate), processor.listen(model, end_of_speech=rule)
    delays_s: list[float] = []
    for row in tqdm(rows, desc="listening", mininterval=1):
        clip = load_audio(row["audio"], rate)
        said = len(clip) - int(np.argmax(np.abs(clip[::-1]) > 0.01 * np.abs(clip).max()))  # without silence at its end
        samples = np.concatenate([clip[:said], noise])
        session.reset()
        for start in range(0, len(samples), piece):
            session.push(samples[start : start + piece])
            if session.has_ended:
                delays_s.append((start + piece - said) / rate)
                break
    late = [delay_s for delay_s in delays_s if delay_s >= 0] or [float("nan")]
    return {
        "median_s": float(np.median(late)),
        "percentile_95_s": float(np.percentile(late, 95)),
        "before_the_end": sum(delay_s < 0 for delay_s in delays_s) / len(rows),
        "never": (len(rows) - len(delays_s)) / len(rows),
    }


def table(results: dict) -> str:
    """Return the results in Markdown; means over seeds."""
    names = [name.replace("_", " ") for name in NAMES]
    lines = [f"{results['num_rows']} clips, seeds {', '.join(map(str, results['seeds']))}.", ""]
    lines += [f"| model | {' | '.join(names)} |", "|---|--:|--:|--:|--:|"]
    cells = " | ".join(f"{results['offline'][name]:.3f}" for name in NAMES)
    lines.append(f"| of whole clips | {cells} |")
    by_seed = list(results["seeds"].values())
    for chunk in by_seed[0]["by_chunk"]:
        cells = " | ".join(f"{np.mean([each['by_chunk'][chunk][name] for each in by_seed]):.3f}" for name in NAMES)
        lines.append(f"| streaming, {chunk} | {cells} |")
    lines += ["", "| silence | told after the end, s | 95th percentile | told before the end | never |"]
    lines.append("|---|--:|--:|--:|--:|")
    for silence_ms in by_seed[0]["end_of_speech"]:
        found = [each["end_of_speech"][silence_ms] for each in by_seed]
        cells = " | ".join(f"{np.mean([each[name] for each in found]):.3f}" for name in found[0])
        lines.append(f"| {silence_ms} ms | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
