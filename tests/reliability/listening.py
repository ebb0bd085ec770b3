"""One session listens to an hour of speech: memory stays flat, and a probe's answer the same.

    python -m tests.reliability.listening --model outputs/streaming
    python -m tests.reliability.listening --short        # seconds of work: does it run?

The audio is not played in real time: a session is given pieces as fast as it reads them. It is made of clips in random
order, with gaps of noise, in pieces of random size. Without --model the shipped model of the tiny world is taken as a
streaming one, which it was not trained to be. Leaves out: several sessions, see `tests/test_speech_session.py`.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.training.building import LOG_MEL_MAX
from processing import BlspKdProcessor
from processing.speech_features import with_log_mel_max
from tests.helpers.prompts import SAMPLING_RATE
from tests.reliability.soak import allocated_bytes, memory_facts, read_clips, resident_bytes, verdict

TINY_WORLD = Path(__file__).parents[2] / "examples" / "tiny_world"
ANSWER = {"do_sample": False, "max_new_tokens": 8}
INSTRUCTIONS = ("Repeat the words.", "Name the animal.", None)


def load(folder: Path) -> tuple[BlspKdForCausalLM, BlspKdProcessor]:
    """A streaming model with its processor, or a model of whole clips made one."""
    model, processor = BlspKdForCausalLM.from_pretrained(folder).eval(), BlspKdProcessor.from_pretrained(folder)
    if model.config.streaming is None:
        model.config.streaming = {"left_context_ms": 5120, "look_ahead_ms": 160}
        processor.feature_extractor = with_log_mel_max(processor.feature_extractor, LOG_MEL_MAX)
    return model, processor


class Speech:
    """Endless speech in pieces of random size; the same seed gives the same."""

    def __init__(self, clips: list[np.ndarray], seed: int):
        self.clips, self.random, self.generator = clips, random.Random(seed), np.random.default_rng(seed)

    def pieces(self, duration_s: float):
        missing = int(duration_s * SAMPLING_RATE)
        while missing > 0:
            gap = 0.01 * self.generator.standard_normal(self.random.randint(0, SAMPLING_RATE)).astype(np.float32)
            samples = np.concatenate([self.random.choice(self.clips), gap])[:missing]
            missing -= len(samples)
            while len(samples):
                size = self.random.choice((1, 160, 480, 1600, 8000))
                yield samples[:size]
                samples = samples[size:]


def listen(session, speech: Speech, minutes: float, probe_every: int, each_probe=print) -> dict:
    """Speak until so many minutes were heard; `each_probe` is called with what is known so far."""
    probe = speech.clips[0]
    heard_s, num_turns, num_tokens, drifts, unexpected, memory = 0.0, 0, 0, [], [], []
    start, expected = time.monotonic(), None
    while heard_s < 60 * minutes or len(memory) < 2:
        session.instruction = speech.random.choice(INSTRUCTIONS)
        # Mostly questions, and sometimes half a minute without a stop, over the border of a window.
        duration_s = speech.random.choice((2.0, 4.0, 8.0, 35.0))
        try:
            for piece in speech.pieces(duration_s):
                num_tokens += len(session.push(piece).speech_tokens)
                heard_s += len(piece) / SAMPLING_RATE
            answer = session.answer(**ANSWER)
            if speech.random.random() < 0.2:
                session.interrupt()
            "".join(answer)
        except ValueError as error:
            if "LLM's context holds" not in str(error):
                unexpected.append(f"turn {num_turns}: {error!r:.300}")
            session.reset()
        num_turns += 1
        if num_turns % probe_every == 0 or heard_s >= 60 * minutes:
            session.reset()
            session.instruction = INSTRUCTIONS[0]
            for begin in range(0, len(probe), 1600):
                session.push(probe[begin : begin + 1600])
            got = ("".join(session.answer(**ANSWER)), session.num_cached)
            expected = expected or got
            if got != expected:
                drifts.append({"turn": num_turns, "expected": expected, "got": got})
            session.reset()
            elapsed_s = time.monotonic() - start
            memory.append((round(elapsed_s, 1), num_turns, resident_bytes(), allocated_bytes()))
            found = {
                "minutes": round(heard_s / 60, 2),
                "turns": num_turns,
                "speech_tokens": num_tokens,
                "seconds_of_work": round(elapsed_s, 1),
                "probes": len(memory),
                "drifts": drifts,
                "unexpected": unexpected,
                "memory": memory_facts(memory),
            }
            each_probe({name: value for name, value in found.items() if name != "memory"})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=TINY_WORLD / "model")
    parser.add_argument("--clips", type=Path, default=TINY_WORLD / "clips", help="folder of FLAC files of 16 kHz")
    parser.add_argument("--minutes", type=float, default=60.0, help="of speech")
    parser.add_argument("--probe_every", type=int, default=25, help="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/listening"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    minutes, probe_every = (0.2, 2) if args.short else (args.minutes, args.probe_every)
    model, processor = load(args.model)
    speech = Speech(read_clips(args.clips), args.seed)
    found = listen(processor.listen(model, end_of_speech=True), speech, minutes, probe_every)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "listening.json").write_text(json.dumps(found, indent=2) + "\n")
    memory = found["memory"]
    print(
        f"{found['minutes']} minutes in {found['seconds_of_work']} s, {found['turns']} turns, {found['probes']} probes"
    )
    print(f"memory {memory['end_bytes'] / 2**20:.0f} MiB, grew by {memory['growth_bytes'] / 2**20:.1f} MiB")
    if wrong := verdict(found):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
