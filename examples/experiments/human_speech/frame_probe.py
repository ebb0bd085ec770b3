"""Classify digits from a frozen encoder's frames, with each speaker held out in turn.

    python -m examples.experiments.human_speech.frame_probe --recordings RECORDINGS/metadata.jsonl \\
        --speech_model WHISPER_TINY_EN --synthesizers espeak-ng flite --output outputs/frame_probe

This separates what the frames contain from what an adapter makes of them. Four probes classify each speaker's
recordings. They are trained on the other speakers; on these and synthetic voices; on these with each voice's mean
subtracted from its frames, which needs more than one clip of a voice; and on the other speakers and half of the
speaker's own recordings (scored on the other half). Leaves out: strings, and so the counting of digits.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn
from tqdm import tqdm
from transformers import WhisperFeatureExtractor

from modeling_blsp_kd.backbones import load_audio_tower
from processing.audio_loading import load_audio

from ...tiny_world.sentence_kinds import DIGITS
from ..make_digit_manifest import read_recordings
from .synthetic import SYNTHESIZERS, synthesize_recordings

SAMPLING_RATE = 16_000
SILENCE_S = 0.15  # before and after each digit
NUM_PARTS = 4
NUM_STEPS = 400
BATCH_SIZE = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="metadata.jsonl of the recordings")
    parser.add_argument("--speech_model", required=True, help="Whisper: Hub id or folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for frame_probe.json and .md")
    parser.add_argument("--synthesizers", nargs="+", choices=sorted(SYNTHESIZERS), default=["espeak-ng"])
    parser.add_argument("--speech_padding", choices=("do_not_pad", "max_length"), default="do_not_pad")
    parser.add_argument("--num_seeds", type=int, default=3, help="probes of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)

    hear = Hearing(options.speech_model, options.speech_padding)
    recordings = read_recordings(options.recordings)
    people = {speaker: hear(pool, speaker) for speaker, pool in sorted(recordings.items())}
    # Synthetic voices have the bandwidth of the recordings.
    rate = soundfile.info(next(iter(recordings.values()))[DIGITS[0]][0]).samplerate
    synthetic, rng = [], random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for synthesizer in options.synthesizers:
            pool = synthesize_recordings(synthesizer, Path(folder), rate, rng)
            synthetic.append([hear(digits, voice) for voice, digits in pool.items()])
    table = {
        speaker: compare(speaker, people, synthetic, options.num_seeds)
        for speaker in tqdm(people, desc="training probes")
    }
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"speech_padding": options.speech_padding, "synthesizers": options.synthesizers, "speakers": table}
    (options.output / "frame_probe.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "frame_probe.md").write_text(as_markdown(results))
    print(as_markdown(results))


class Hearing:
    """A frozen Whisper encoder that turns recordings of single digits into rows for a probe."""

    def __init__(self, speech_model: str, speech_padding: str):
        self.feature_extractor = WhisperFeatureExtractor.from_pretrained(speech_model)
        self.audio_tower = load_audio_tower(speech_model, dtype=torch.float32).eval()
        self.audio_tower.pad_to_window = speech_padding == "max_length"

    @torch.no_grad()
    def __call__(self, recordings: dict[str, list[Path]], voice: str):
        """Encode recordings of one voice.

        Args:
            recordings: digit -> paths.
            voice: for the progress bar.

        Returns:
            float32 (num_recordings, NUM_PARTS * H): means of the parts' frames; and int64 (num_recordings,): digits.
        """
        rows, digits = [], []
        for digit, paths in tqdm(recordings.items(), desc=f"hearing {voice}", leave=False):
            for path in paths:
                silence: np.ndarray = np.zeros(round(SILENCE_S * SAMPLING_RATE), np.float32)
                clip = np.concatenate([silence, load_audio(path, SAMPLING_RATE), silence])
                features = self.feature_extractor(
                    clip, sampling_rate=SAMPLING_RATE, padding="longest", truncation=False, return_tensors="pt"
                )
                frames = self.audio_tower(features.input_features).last_hidden_state[0]
                num_silent = round(len(frames) * len(silence) / len(clip))
                rows.append(pool_parts(frames[num_silent : len(frames) - num_silent]))
                digits.append(DIGITS.index(digit))
        return torch.stack(rows), torch.tensor(digits)


def pool_parts(frames):
    """Return (NUM_PARTS * H,): means of consecutive parts of (T, H), equally long up to a frame; none is empty."""
    borders = [round(part * len(frames) / NUM_PARTS) for part in range(NUM_PARTS + 1)]
    parts = [frames[min(first, len(frames) - 1) : max(end, first + 1)] for first, end in zip(borders, borders[1:])]
    return torch.cat([part.mean(0) for part in parts])


def compare(speaker, people, synthetic, num_seeds) -> dict:
    """Return accuracies on one speaker's recordings, per seed, of four kinds of training data, and frequent confusions.

    Args:
        speaker: who is held out, of `people`.
        people: speaker -> (rows, digits), see `Hearing`.
        synthetic: for each synthesizer a list of such pairs, one for each voice.
        num_seeds: probes of each kind.
    """
    voices = [[voice for name, voice in people.items() if name != speaker], *synthetic]
    others, *synthetic = map(join, voices)
    without_means = [join(map(take_mean_off, group)) for group in voices]
    rows, digits = people[speaker]
    own_without_mean, _ = take_mean_off(people[speaker])
    scores: dict[str, list[float]] = {
        "others": [],
        "others_and_synthetic": [],
        "without_means": [],
        "others_and_own_half": [],
    }
    confused: Counter = Counter()
    for seed in range(num_seeds):
        scores["others"].append(accuracy(train_probe([others], seed)(rows), digits))
        predicted = train_probe([others, *synthetic], seed)(rows)
        scores["others_and_synthetic"].append(accuracy(predicted, digits))
        scores["without_means"].append(accuracy(train_probe(without_means, seed)(own_without_mean), digits))
        wrong = predicted != digits
        confused.update(zip(digits[wrong].tolist(), predicted[wrong].tolist()))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        own, rest = order[: len(rows) // 2], order[len(rows) // 2 :]
        probe = train_probe([others, (rows[own], digits[own])], seed)
        scores["others_and_own_half"].append(accuracy(probe(rows[rest]), digits[rest]))
    per_seed = {f"{DIGITS[said]} as {DIGITS[heard]}": num / num_seeds for (said, heard), num in confused.most_common(5)}
    return {"recordings": len(rows), "accuracies": scores, "most_confused": per_seed}


def accuracy(predicted, digits) -> float:
    return (predicted == digits).float().mean().item()


def join(pairs):
    """Concatenate pairs of rows and digits to one pair."""
    return tuple(map(torch.cat, zip(*pairs)))


def take_mean_off(voice):
    """Subtract the mean of one voice from its rows."""
    rows, digits = voice
    return rows - rows.mean(0), digits


def train_probe(groups, seed):
    """Train a classifier of one hidden layer on groups of (rows, digits), each drawn from equally often."""
    torch.manual_seed(seed)
    mean = torch.stack([rows.mean(0) for rows, _ in groups]).mean(0)
    std = torch.stack([rows.std(0) for rows, _ in groups]).mean(0) + 1e-5
    probe = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(len(mean), 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, len(DIGITS))
    )
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(NUM_STEPS):
        rows, digits = groups[torch.randint(len(groups), ())]
        batch = torch.randint(len(rows), (BATCH_SIZE,))
        logits = probe((rows[batch] - mean) / std)
        loss = nn.functional.cross_entropy(logits, digits[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probe.eval()
    return lambda rows: probe((rows - mean) / std).argmax(1)


def as_markdown(results: dict) -> str:
    lines = [
        "# Single digits from the encoder's frames, speakers held out",
        "",
        f"Mean [lowest, highest] accuracy of probes of several seeds; `speech_padding` {results['speech_padding']}; "
        f"synthetic voices: {', '.join(results['synthesizers'])}.",
        "",
        "| speaker | recordings | trained on others | and synthetic voices | these, each voice's mean taken off "
        "| others and half of his own | with synthetic voices most often mistakes |",
        "|---|---|---|---|---|---|---|",
    ]
    for speaker, row in results["speakers"].items():
        cells = [f"{np.mean(seeds):.3f} [{min(seeds):.3f}, {max(seeds):.3f}]" for seeds in row["accuracies"].values()]
        confused = ", ".join(f"{pair} {times:.0f}" for pair, times in row["most_confused"].items())
        lines.append(f"| {speaker} | {row['recordings']} | {' | '.join(cells)} | {confused} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
