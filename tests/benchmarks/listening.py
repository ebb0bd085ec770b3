"""Measure a session that listens, against the same model on whole clips: how long after the last sample it answers.

    python -m tests.benchmarks.listening
    python -m tests.benchmarks.listening --small          # seconds of work: does it run?
    python -m tests.benchmarks.listening --clock cpu      # on a machine that has other work, too

The LLMs and encoders are those of `requests.py`, with random weights, and CIF is shifted to as many tokens a second as
English has. A clip is as long as it says and up to a chunk more, so that it ends anywhere in a chunk. It is pushed in
pieces of 20 ms as fast as the session reads them; timed are the last piece and the answer, until the first token is
known. The other candidate hears the same clip at once, with full attention. Leaves out: accuracy, which
`examples/experiments/measure_streaming.py` measures.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, StoppingCriteria, WhisperConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.training.building import LOG_MEL_MAX
from modeling_blsp_kd.training.options import TINY_SPEECH_MODEL, TINY_TEXT_MODEL
from processing import BlspKdProcessor
from processing.speech_features import with_log_mel_max
from processing.spoken_inputs import user_turn
from processing.streaming_features import FeatureStream

from . import report
from .requests import CHEAP, FEATURE_EXTRACTOR, RATE, SIZES, SMALL_SIZES, TOKENS_PER_S

CHUNK_MS, PIECE = 640, RATE // 50
DURATIONS_S = (3, 10, 30, 120)
NUM_TOKENS = 4  # the first, and steps of decoding
INSTRUCTION = "Repeat the words."
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Clock(StoppingCriteria):
    """Notes when each token of an answer is known; stops nothing."""

    def __init__(self, now):
        self.now, self.times_s = now, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times_s.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes that run in seconds and mean nothing")
    parser.add_argument("--only", default="", help="part of the names of the LLMs to measure")
    parser.add_argument("--repeats", type=int, default=20, help="clips of each length and LLM")
    parser.add_argument("--minutes", type=float, default=60.0, help="of each LLM, after which no new repeat begins")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder for the results")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="what is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    durations_s = (1, 2) if options.small else DURATIONS_S
    where, results = report.machine(torch.device("cpu"), torch.float32, options.clock), []
    for name, sizes in (SMALL_SIZES if options.small else SIZES).items():
        if options.only not in name:
            continue
        model, processor = make_listener(*sizes)
        results.append({"name": name, "clips": []})
        start, random = time.monotonic(), np.random.default_rng(0)
        for repeat in range(3 if options.small else options.repeats):
            if repeat and time.monotonic() - start > 60 * options.minutes:
                break
            for duration_s in durations_s:  # interleaved, so that whatever else runs meets all of them alike
                num_samples = duration_s * RATE + random.integers(CHUNK_MS * RATE // 1000)
                samples = (0.1 * random.standard_normal(num_samples)).astype(np.float32)
                found = streamed(model, processor, samples, CLOCKS[options.clock])
                found["encoder_real_time_factor"] = encoded(model, processor, samples, CLOCKS[options.clock])
                found["whole_clip_s"] = at_once(model, processor, samples, CLOCKS[options.clock])
                results[-1]["clips"].append({"about_s": duration_s, "duration_s": num_samples / RATE, **found})
                print(name, *(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
                # After each clip, so that a run that is stopped keeps the others.
                where["load_average_after"] = os.getloadavg()[0]
                text = write(options.output, where, results)
    print(f"\n{text}")


def write(folder: Path, where: dict, results: list[dict]) -> str:
    """Write what was measured so far, and return it in Markdown."""
    for result in results:
        groups = {clip["about_s"]: [] for clip in result["clips"]}
        for clip in result["clips"]:
            groups[clip["about_s"]].append(clip)
        result["rows"] = {about_s: summary(clips) for about_s, clips in groups.items()}
        result["slope"] = slope(result["clips"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "listening.json").write_text(json.dumps({"machine": where, "results": results}, indent=1))
    (folder / "listening.md").write_text(text := table(where, results))
    return text


def make_listener(encoder_size, llm_options) -> tuple[BlspKdForCausalLM, BlspKdProcessor]:
    """Return a streaming model of random weights, and a processor whose token ids the LLM has, too."""
    width, num_layers, heads = encoder_size
    speech_config = WhisperConfig(
        d_model=width, encoder_layers=num_layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
    )
    processor = BlspKdProcessor.from_backbones(TINY_SPEECH_MODEL, TINY_TEXT_MODEL)
    processor.feature_extractor = with_log_mel_max(FEATURE_EXTRACTOR, LOG_MEL_MAX)  # Whisper's, as in `requests.py`
    config = BlspKdConfig(
        speech_config=speech_config,
        # The smallest one has fewer tokens than the tokenizer.
        text_config=Qwen2Config(**{**llm_options, "vocab_size": max(512, llm_options["vocab_size"])}).to_dict(),
        adapter={"type": "cformer", **CHEAP},
        streaming={"chunk_ms": CHUNK_MS},
        audio_token_id=processor.audio_token_id,
    )
    model = BlspKdForCausalLM(config).eval().requires_grad_(False)
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32)
    features = {name: torch.from_numpy(each) for name, each in processor.extract_features([noise], RATE).items()}
    logits = torch.logit(model.get_audio_features(**features).alphas[0].double())
    wanted, low, high = TOKENS_PER_S * model.frame_duration_s, -20.0, 20.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(logits + middle).mean() < wanted else (low, middle)
    model.adapter.shift_alpha_logits(low)
    return model, processor


def streamed(model, processor, samples: np.ndarray, now) -> dict[str, float]:
    """Return how long a session took after the last sample, and what it had done before."""
    session, clock, chunks_s = processor.listen(model, instruction=INSTRUCTION, sampling_rate=RATE), Clock(now), []
    before = begin = now()
    *pieces, last = np.split(samples, range(PIECE, len(samples), PIECE))
    for piece in pieces:
        heard, before_piece = session.push(piece), before
        before = now()
        if len(heard.alphas):
            chunks_s.append(before - before_piece)
    num_cached = session.num_cached
    end = now()
    session.push(last)
    "".join(session.answer(**_greedy(clock)))
    answered_s = clock.times_s[0] - end
    steps_s = np.diff(clock.times_s)
    num_prompt = session.num_cached - (len(clock.times_s) - 1)  # the last token was not read any more
    return {
        "first_token_s": answered_s,
        "chunk_s": statistics.median(chunks_s or [0.0]),
        "decoding_step_s": float(np.median(steps_s)),
        "real_time_factor": (end - begin) / (len(samples) / RATE),
        "cached_share": num_cached / num_prompt,
    }


def encoded(model, processor, samples: np.ndarray, now) -> float:
    """Return the real-time factor of features, encoder and adapter, without the LLM."""
    stream, features, begin = model.stream_speech(), FeatureStream(processor.feature_extractor), now()
    for start in range(0, len(samples), PIECE):
        features.add(samples[start : start + PIECE])
        while features.num_ready >= (count := stream.num_wanted):
            stream.push(torch.from_numpy(features.frames(count)))
            features.take(count)
    return (now() - begin) / (len(samples) / RATE)


def at_once(model, processor, samples: np.ndarray, now) -> float:
    """Return how long the model takes for a whole clip, if it does not stream."""
    streaming, model.config.streaming = model.config.streaming, None
    try:
        clock, begin = Clock(now), now()
        chat = user_turn(INSTRUCTION, {"type": "audio", "audio": (samples, RATE)})
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        model.generate(**inputs, **_greedy(clock))
        return clock.times_s[0] - begin
    finally:
        model.config.streaming = streaming


def _greedy(clock: Clock) -> dict:
    return {
        "do_sample": False,
        "max_new_tokens": NUM_TOKENS,
        "min_new_tokens": NUM_TOKENS,
        "pad_token_id": 0,
        "stopping_criteria": [clock],
    }


def summary(clips: list[dict]) -> dict[str, float]:
    """Return medians, and the 95th percentiles of what a user waits for."""
    found = {name: statistics.median(clip[name] for clip in clips) for name in clips[0]}
    for name in ("first_token_s", "whole_clip_s"):
        found[f"{name}_p95"] = float(np.percentile([clip[name] for clip in clips], 95))
    return {**found, "num_clips": len(clips)}


def slope(clips: list[dict]) -> dict[str, float]:
    """Return by how much the first token is later for a second more of speech, and the standard error of that."""
    duration_s, first_token_s = (np.array([clip[name] for clip in clips]) for name in ("duration_s", "first_token_s"))
    centred = duration_s - duration_s.mean()
    if not centred.any():
        return {"s_per_s": float("nan"), "standard_error": float("nan")}
    slope = float(centred @ first_token_s / (centred @ centred))
    rest = first_token_s - first_token_s.mean() - slope * centred
    return {
        "s_per_s": slope,
        "standard_error": float(np.sqrt(rest @ rest / max(1, len(rest) - 2) / (centred @ centred))),
    }


def table(where: dict, results: list[dict]) -> str:
    """Return the results in Markdown."""
    lines = [
        f"{where['date']}, {where['processor']} ({where['cores']} cores), float32, 1 thread, {where['clock']} time, "
        f"torch {where['versions']['torch']}, transformers {where['versions']['transformers']}. Load average "
        f"{where['load_average_before']:.1f} before and {where['load_average_after']:.1f} after.",
        "",
        "| LLM | clip | streamed: first token, ms, median (95th percentile) | whole clip | a chunk | a decoding step "
        "| cached at the end | real-time factor | without the LLM | clips |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for duration_s, row in result["rows"].items():
            ms = {name: f"{1000 * value:.0f}" for name, value in row.items()}
            lines.append(
                f"| {result['name']} | {duration_s} s | {ms['first_token_s']} ({ms['first_token_s_p95']}) | "
                f"{ms['whole_clip_s']} ({ms['whole_clip_s_p95']}) | {ms['chunk_s']} | {ms['decoding_step_s']} | "
                f"{row['cached_share']:.1%} | {row['real_time_factor']:.3f} | "
                f"{row['encoder_real_time_factor']:.3f} | {row['num_clips']} |"
            )
    lines.append("")
    for result in results:
        found = result["slope"]
        lines.append(
            f"{result['name']}: each second of speech makes the first token {1000 * found['s_per_s']:.3f} ms later "
            f"(standard error {1000 * found['standard_error']:.3f})."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
