"""Asks one pipeline with partial LoRA from 64 threads at once: each answer is bit for bit what it is alone.

    python -m tests.reliability.threads                      # 64 threads, 16 requests each, a small random model
    python -m tests.reliability.threads --model FOLDER       # a model with partial LoRA, saved with its processor
    python -m tests.reliability.threads --short              # seconds: does it run?

Requests are answers, streams, streams that interleave or are left, logits of text and of speech, answers to text, and
inputs that are refused. Leaves out: training, which is not for several threads.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import collections
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import WhisperFeatureExtractor

from modeling_blsp_kd import BlspKdForCausalLM, plora_layers
from processing import BlspKdProcessor
from processing.pipeline_blsp_kd import BlspKdPipeline
from tests.helpers.prompts import clip, make_tokenizer, spoken_prompts
from tests.helpers.spoken_cases import make_readable_model

NUM_THREADS, NUM_REQUESTS, NUM_CLIPS = 64, 16, 8
SHORT = {"threads": 8, "requests": 4}
NEW_TOKENS = 12
# Python changes threads after this many seconds, a fiftieth of its default, so that they meet at more places.
SWITCH_INTERVAL_S = 1e-4


@dataclass
class Outcome:
    """Return the outcome of one request: "same", "different", or the error that it ended with."""

    kind: str
    number: int
    outcome: str
    seconds: float


def build_pipeline(folder: str | None) -> BlspKdPipeline:
    """A saved model's, or that of a small random model."""
    if folder is not None:
        model, processor = BlspKdForCausalLM.from_pretrained(folder), BlspKdProcessor.from_pretrained(folder)
        if model.plora is None:
            raise SystemExit(f"{folder} has no partial LoRA, whose threads are to be tested. Name another model.")
    else:
        with tempfile.TemporaryDirectory() as parts:
            WhisperFeatureExtractor().save_pretrained(parts)
            make_tokenizer().save_pretrained(parts)
            processor = BlspKdProcessor.from_backbones(parts, parts)
        model = make_readable_model(processor)
    return BlspKdPipeline(model, processor=processor, max_new_tokens=NEW_TOKENS, do_sample=False)


def kinds(pipe: BlspKdPipeline) -> dict[str, Callable[[int], object]]:
    """Return the requests by name, each a function of the number of a clip."""
    model = pipe.model
    clips = [clip(0.4 + 0.15 * number, seed=number) for number in range(NUM_CLIPS)]
    prompts = [
        spoken_prompts(pipe.processor, durations_s=(0.3 + 0.1 * number, 0.5)).to(model.device)
        for number in range(NUM_CLIPS)
    ]
    texts = [torch.arange(3, 12 + number, device=model.device)[None] for number in range(NUM_CLIPS)]

    @torch.no_grad()
    def logits(inputs):
        return model(**inputs).logits

    def two_streams(number):
        streams = (pipe.stream(each) for each in (clips[number], clips[number - 1]))
        return ["".join(pieces) for pieces in zip(*zip_longest(*streams, fillvalue=""))]

    def left_stream(number):
        stream = pipe.stream(clips[number], instruction="Name the animal.")
        first = next(stream)
        stream.close()
        return first

    def refusal(number):
        try:
            return pipe(clips[number] * 0)
        except ValueError as error:
            return str(error)

    return {
        "answer": lambda number: pipe(clips[number])["generated_text"],
        "stream": lambda number: "".join(pipe.stream(clips[number])),
        "two streams": two_streams,
        "stream that is left": left_stream,
        "logits of speech": lambda number: logits(prompts[number]),
        "logits of text": lambda number: logits({"input_ids": texts[number]}),
        "answer to text": lambda number: model.generate(texts[number], max_new_tokens=NEW_TOKENS, do_sample=False),
        "refusal": refusal,
    }


def is_same(found, expected) -> bool:
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def ask(kind: str, call, number: int, expected) -> Outcome:
    start = time.perf_counter()
    try:
        outcome = "same" if is_same(call(number), expected) else "different"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    return Outcome(kind, number, outcome, time.perf_counter() - start)


def run(pipe: BlspKdPipeline, num_threads: int, num_requests: int, seed: int = 0) -> dict:
    """Ask each question alone, then many from every thread at once, then each alone again.

    Returns:
        `dict`: `settings`, `kinds` (requests, and those that were not as alone, by kind), `wrong` (outcomes),
        `seconds`, and how much was `left` behind: marks of calls that nobody is inside of.
    """
    asked = kinds(pipe)
    questions = [(kind, number) for kind in asked for number in range(NUM_CLIPS)]
    alone = {(kind, number): asked[kind](number) for kind, number in questions}
    start = time.perf_counter()
    again = [ask(kind, asked[kind], number, alone[kind, number]) for kind, number in questions]
    alone_s = (time.perf_counter() - start) / len(questions)

    barrier, found = threading.Barrier(num_threads), []

    def work(thread: int):
        order = random.Random(f"{seed} {thread}").choices(questions, k=num_requests)
        barrier.wait()
        for kind, number in order:
            found.append(ask(kind, asked[kind], number, alone[kind, number]))

    threads = [threading.Thread(target=work, args=[thread]) for thread in range(num_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    start = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    threads_s = time.perf_counter() - start
    again += [ask(kind, asked[kind], number, alone[kind, number]) for kind, number in questions]
    gc.collect()
    by_kind = collections.Counter(outcome.kind for outcome in found)
    wrong = [outcome for outcome in [*again, *found] if outcome.outcome != "same"]
    return {
        "settings": {"threads": num_threads, "requests": num_requests, "seed": seed, "torch": torch.__version__},
        "kinds": {kind: [by_kind[kind], sum(each.kind == kind for each in wrong)] for kind in asked},
        "requests": len(found),
        "distinct_answers": len({str(answer) for answer in alone.values()}),
        "wrong": [asdict(outcome) for outcome in wrong],
        "left": sum(type(kept) is plora_layers.Call for kept in gc.get_objects()),
        "seconds": {"threads": threads_s, "each_alone": alone_s},
    }


def report(result: dict) -> str:
    lines = ["| request | from threads | not as alone |", "|---|---|---|"]
    lines += [f"| {kind} | {num_asked} | {num_wrong} |" for kind, (num_asked, num_wrong) in result["kinds"].items()]
    seconds = result["seconds"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['requests']} requests from {result['settings']['threads']} threads in {seconds['threads']:.0f} s "
            f"({1000 * seconds['threads'] / result['requests']:.0f} ms each; {1000 * seconds['each_alone']:.0f} ms "
            f"alone), {result['distinct_answers']} different answers; wrong: {len(result['wrong'])}; left behind: "
            f"{result['left']}.",
        ]
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with partial LoRA; omitted: a small random one")
    parser.add_argument("--threads", type=int, default=NUM_THREADS)
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="of each thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds: does it run?")
    parser.add_argument("--output", type=Path, help="folder for threads.json")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.short:
        args.threads, args.requests = SHORT["threads"], SHORT["requests"]
    torch.set_num_threads(1)
    result = run(build_pipeline(args.model), args.threads, args.requests, args.seed)
    print(report(result))
    for outcome in result["wrong"][:10]:
        print(f"{outcome['kind']} {outcome['number']}: {outcome['outcome']}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "threads.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["wrong"] or result["left"]))


if __name__ == "__main__":
    main()
