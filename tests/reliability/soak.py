"""Asks the endpoint handler and `generate` at random for an hour: memory stays flat, and a probe's answers the same.

    python -m tests.reliability.soak                                      # an hour with outputs/default
    python -m tests.reliability.soak --model FOLDER --minutes 10
    python -m tests.reliability.soak --model FOLDER --short               # seconds: does it run?

The model is published to a temporary folder with the code of this repository and loaded as an endpoint does.
Leaves out: requests at the same time, which a handler does not get.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import collections
import ctypes
import importlib.util
import io
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.pipeline_blsp_kd import BlspKdPipeline
from processing.publishing.handler import EndpointHandler
from tests.helpers.audio_files import encode
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.spoken_cases import BAD_FILES, base64_of

# How much the memory may grow from the end of the warm-up to the end, by a straight line through what was measured.
MAX_GROWTH_BYTES = 64 * 2**20
WARM_UP = 0.25  # of the requests, since these and not the time fill caches
NEW_TOKENS = (1, 32)
# What the tiny world's LLM has a tokenizer for, and what it does not.
INSTRUCTIONS = (
    "Repeat the words.",
    "Name the animal.",
    "Wiederhole die Wörter, bitte.",
    "Repite las palabras: ¿qué se dijo?",
    "请重复这些话。",
    "كرر الكلمات",
    "Повтори слова 🦁",
    "x" * 300,
)
CONTEXT = "the LLM's context holds"
BAD_PARAMETERS = ({"beam_size": 2}, {"max_new_tokens": -1}, {"temperature": "nan"}, [1], {"instruction": ["a"]})
BAD_INPUTS = (None, 7, [], {}, "not base64!", "/etc/passwd", {"audio": {"path": "a.wav"}}, [{"role": "user"}])
FORMATS = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"))


@dataclass
class Request:
    """One call, and what it may end in.

    Args:
        refusal: pattern of the messages of errors that may answer it; None: it must be answered.
        may_answer: False: it must be refused.
    """

    kind: str
    call: callable
    refusal: str | None = None
    may_answer: bool = True


class Requests:
    """Endless random requests; the same seed gives the same ones."""

    def __init__(self, handler, clips: list[np.ndarray], seed: int, max_duration_s: float):
        self.handler, self.clips, self.max_duration_s = handler, clips, max_duration_s
        self.random, self.generator = random.Random(seed), np.random.default_rng(seed)
        self.kinds = (self.transcription, self.answer, self.chat, self.batch, self.text_batch, self.silence, self.bad)

    def draw(self) -> Request:
        return self.random.choices(self.kinds, weights=(4, 4, 2, 4, 1, 1, 4))[0]()

    # -- the endpoint -------------------------------------------------------------------------------------------------

    def transcription(self):
        parameters, duration_s = self._parameters(), self._duration_s()
        if self.random.random() < 0.3:
            parameters["return_timestamps"] = self.random.choice(["word", "token"])
        if self.random.random() < 0.3:
            parameters["chunk_length_s"] = self.random.uniform(2.0, 20.0)
        return self._asked("transcription", self._file(duration_s), parameters)

    def answer(self):
        inputs = {"audio": base64_of(self._file(self._duration_s())), "instruction": self._instruction()}
        return self._asked("answer", inputs, self._parameters())

    def chat(self):
        messages = []
        for _ in range(self.random.randint(1, 3)):
            audio = {"type": "audio", "audio": base64_of(self._file(self._duration_s() / 3))}
            messages.append({"role": "user", "content": [{"type": "text", "text": self._instruction()}, audio]})
            messages.append({"role": "assistant", "content": "the lion ran"})
        return self._asked("chat", messages[:-1], self._parameters())

    def silence(self):
        contents = encode(np.zeros(int(self._duration_s() * SAMPLING_RATE), np.float32), subtype="PCM_16")
        return self._asked("silence", contents, {}, "is silent", may_answer=False)

    def bad(self):
        draw = self.random.random()
        if draw < 0.4:
            contents, message = self.random.choice(list(BAD_FILES.values()))
            return self._asked("bad file", contents, {}, message, may_answer=False)
        if draw < 0.6:
            return self._asked("bad input", self.random.choice(BAD_INPUTS), {}, ".", may_answer=False)
        if draw < 0.8:
            contents, parameters = encode(clip(0.5)), self.random.choice(BAD_PARAMETERS)
            return self._asked("bad parameters", contents, parameters, ".", may_answer=False)
        contents = bytearray(self._file(min(self._duration_s(), 5.0)))
        for _ in range(20):
            contents[self.random.randrange(len(contents))] = self.random.randrange(256)
        return self._asked("damaged file", bytes(contents), {"max_new_tokens": 8}, ".")

    def _asked(self, kind, inputs, parameters, refusal=CONTEXT, may_answer=True):
        data = {"inputs": inputs, "parameters": parameters}
        return Request(f"endpoint: {kind}", lambda: self.handler(data), refusal, may_answer)

    # -- generate -----------------------------------------------------------------------------------------------------

    def batch(self):
        size = self.random.randint(1, 6)
        waveforms = [self._waveform(self._duration_s() / size) for _ in range(size)]
        instructions = [self._instruction() for _ in waveforms]
        options = self._parameters()
        return Request("generate: batch", lambda: generate(self.handler, waveforms, instructions, options), CONTEXT)

    def text_batch(self):
        instructions, options = [self._instruction() for _ in range(self.random.randint(1, 6))], self._parameters()
        return Request(
            "generate: batch without audio", lambda: generate(self.handler, [], instructions, options), CONTEXT
        )

    # -- what they are made of ----------------------------------------------------------------------------------------

    def _duration_s(self) -> float:
        """0.1 s to the longest; half of them are short."""
        return 0.1 * (self.max_duration_s / 0.1) ** self.random.random()

    def _waveform(self, duration_s: float) -> np.ndarray:
        num_samples = max(int(duration_s * SAMPLING_RATE), SAMPLING_RATE // 10)
        if self.random.random() < 0.25:
            loudness = 10 ** self.random.uniform(-3, -0.5)
            return (loudness * self.generator.standard_normal(num_samples)).clip(-1, 1).astype(np.float32)
        parts, missing = [], num_samples
        while missing > 0:
            parts.append(self.random.choice(self.clips)[:missing])
            missing -= len(parts[-1])
        # The first sample of a clip is silence, and a tenth of a second of it would be refused.
        return np.concatenate(parts) + 1e-3 * self.generator.standard_normal(num_samples).astype(np.float32)

    def _file(self, duration_s: float) -> bytes:
        waveform, rate = self._waveform(duration_s), self.random.choice([8_000, 16_000, 44_100])
        format, subtype = self.random.choice(FORMATS)
        waveform = soxr.resample(waveform, SAMPLING_RATE, rate).clip(-1, 1)
        channels, file = np.stack([waveform] * self.random.choice([1, 1, 2]), axis=1), io.BytesIO()
        # libsndfile's Vorbis encoder overruns the stack with long clips given at once.
        with soundfile.SoundFile(file, "w", rate, channels.shape[1], subtype, format=format) as opened:
            for start in range(0, len(channels), rate):
                opened.write(channels[start : start + rate])
        return file.getvalue()

    def _instruction(self) -> str:
        return self.random.choice(INSTRUCTIONS)

    def _parameters(self) -> dict:
        parameters = {"max_new_tokens": self.random.randint(*NEW_TOKENS)}
        if self.random.random() < 0.3:
            parameters |= {"do_sample": True, "temperature": self.random.uniform(0.2, 2.0), "top_k": 20}
        elif self.random.random() < 0.2:
            parameters["num_beams"] = self.random.randint(2, 4)
        return parameters


def generate(handler, waveforms, instructions, options) -> list[str]:
    """Answers of `generate` to a batch, one prompt for each instruction, with a clip each or none at all."""
    processor, model = handler.answers.processor, handler.answers.model
    chats = []
    for index, instruction in enumerate(instructions):
        blocks = [{"type": "text", "text": instruction}]
        if waveforms:
            blocks.append({"type": "audio", "audio": waveforms[index]})
        chats.append([{"role": "user", "content": blocks}])
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"sampling_rate": SAMPLING_RATE},
    )
    sequences = model.generate(**inputs, **options)
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def publish(model: Path, folder: Path) -> Path:
    """The model as it lies on the Hub, with the code of this repository."""
    pipe = BlspKdPipeline(
        model=BlspKdForCausalLM.from_pretrained(model), processor=BlspKdProcessor.from_pretrained(model)
    )
    pipe.save_pretrained(folder)
    return folder


def read_clips(folder: Path) -> list[np.ndarray]:
    """Up to 200 clips of 16 kHz, or sweeping tones where there are none."""
    files = sorted(folder.glob("*.flac"))[:200]
    return [soundfile.read(file, dtype="float32")[0] for file in files] or [clip(2.0, seed=seed) for seed in range(20)]


def run(requests: Requests, probe, minutes: float, probe_every: int, each_probe) -> dict:
    """Ask until the time is over; `each_probe` is called with what is known so far."""
    start = time.monotonic()
    counts = collections.defaultdict(collections.Counter)
    errors, unexpected, drifts, memory = collections.Counter(), [], [], []
    expected, num_requests, num_probes = probe(), 0, 0
    while (elapsed_s := time.monotonic() - start) < 60 * minutes or num_probes < 2:
        request = requests.draw()
        outcome, error, wrong = ask(request)
        counts[request.kind][outcome] += 1
        if error:
            errors[error] += 1
        if wrong:
            unexpected.append({"request": num_requests, "kind": request.kind, "what": wrong})
        num_requests += 1
        if num_requests % probe_every == 0:
            num_probes += 1
            answers = probe()
            if answers != expected:
                drifts.append({"request": num_requests, "expected": expected, "got": answers})
            memory.append((round(elapsed_s, 1), num_requests, resident_bytes(), allocated_bytes()))
            found = {
                "minutes": elapsed_s / 60,
                "requests": num_requests,
                "outcomes": counts,
                "errors": dict(errors.most_common()),
                "unexpected": unexpected,
                "probes": num_probes,
                "drifts": drifts,
                "memory": memory_facts(memory),
            }
            each_probe(found)
    return found


def ask(request: Request) -> tuple[str, str | None, str | None]:
    """Return the end of a request, its error (kind and message without figures), and what was wrong with that."""
    try:
        request.call()
    except (ValueError, TypeError) as error:
        short = f"{type(error).__name__}: {re.sub(r'[0-9.]+', 'N', str(error))[:90]}"
        is_allowed = request.refusal is not None and re.search(request.refusal, str(error))
        return "refused", short, None if is_allowed else f"refused: {error!r:.300}"
    except Exception as error:  # whatever it is, the soak goes on and tells it
        return "failed", f"{type(error).__name__}: {str(error)[:90]}", f"failed: {error!r:.300}"
    return "answered", None, None if request.may_answer else "answered"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated_bytes() -> int:
    """Return the bytes that were allocated and not freed.

    Beyond them, files are resident, and freed pages that the C library keeps.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def memory_facts(points: list[tuple[float, int, int, int]]) -> dict:
    """Describe memory after the warm-up: points are (seconds, requests, resident bytes, allocated bytes)."""
    warm_up = WARM_UP * points[-1][1]
    _, requests, resident, allocated = zip(*(point for point in points if point[1] >= warm_up))
    held = [point[2] for point in points]
    return {
        "points": points,
        "warm_up_requests": warm_up,
        "after_warm_up_bytes": resident[0],
        "end_bytes": held[-1],
        "peak_bytes": max(held),
        "growth_bytes": growth(requests, resident),
        "allocated_growth_bytes": growth(requests, allocated),
        "bound_bytes": MAX_GROWTH_BYTES,
    }


def growth(requests, held) -> float:
    """From the first to the last, by a straight line through all."""
    slope = statistics.linear_regression(requests, held).slope if len(held) > 1 else 0.0
    return slope * (requests[-1] - requests[0])


def verdict(found: dict) -> list[str]:
    """Return what is wrong, in words; nothing if the soak was survived."""
    wrong = []
    if found["unexpected"]:
        wrong.append(f"{len(found['unexpected'])} requests ended unexpectedly")
    if found["drifts"]:
        wrong.append(f"{len(found['drifts'])} probes were answered differently")
    if found["memory"]["growth_bytes"] > MAX_GROWTH_BYTES:
        wrong.append(f"memory grew by {found['memory']['growth_bytes'] / 2**20:.0f} MiB")
    return wrong


def write(folder: Path, found: dict) -> str:
    """Writes `soak.json`, `soak.md` and, with matplotlib, `soak.png`. Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    memory, wrong = found["memory"], verdict(found)
    (folder / "soak.json").write_text(json.dumps({**found, "wrong": wrong}, indent=1))
    mib = {name: value / 2**20 for name, value in memory.items() if name.endswith("_bytes")}
    lines = [
        f"{found['requests']} requests in {found['minutes']:.1f} minutes, {len(found['unexpected'])} ended badly.",
        f"Probe asked {found['probes']} times, {len(found['drifts'])} answers differ from the first.",
        f"Resident memory: {mib['after_warm_up_bytes']:.0f} MiB after {memory['warm_up_requests']:.0f} requests, "
        f"{mib['end_bytes']:.0f} at the end, {mib['peak_bytes']:.0f} at most.",
        f"Growth by a straight line: {mib['growth_bytes']:+.1f} MiB (at most {mib['bound_bytes']:.0f}); of what is "
        f"allocated {mib['allocated_growth_bytes']:+.1f} MiB.",
        "",
        "| request | answered | refused | failed |",
        "|---|---|---|---|",
    ]
    for kind, counts in sorted(found["outcomes"].items()):
        lines.append(f"| {kind} | {counts['answered']} | {counts['refused']} | {counts['failed']} |")
    lines += ["", f"{'Not survived: ' + '; '.join(wrong) if wrong else 'Survived'}."]
    lines += [f"- request {each['request']}, {each['kind']}: {each['what']}" for each in found["unexpected"][:20]]
    text = "\n".join(lines) + "\n"
    (folder / "soak.md").write_text(text)
    if importlib.util.find_spec("matplotlib"):
        plot(folder / "soak.png", memory)
    return text


def plot(path: Path, memory: dict):
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    _, requests, *held = zip(*memory["points"])
    for name, series in zip(("resident", "allocated"), held):
        axes.plot(requests, [each / 2**20 for each in series], linewidth=1, label=name)
    axes.axvline(memory["warm_up_requests"], color="grey", linewidth=0.8, linestyle="--", label="end of warm-up")
    axes.set(xlabel="requests", ylabel="memory, MiB", ylim=(0, 1.1 * memory["peak_bytes"] / 2**20))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("outputs/default"), help="folder of a BLSP-KD model")
    parser.add_argument(
        "--clips", type=Path, default=Path("outputs/tiny_world_speech"), help="folder of flac clips; else tones"
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--short", action="store_true", help="a few seconds and short clips, which says little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/reliability"), help="folder for the results")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model} holds no model. Train one with: python examples/train.py")
    minutes, probe_every, max_duration_s = (0.05, 10, 4.0) if options.short else (options.minutes, 25, 60.0)

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        handler = EndpointHandler(str(publish(options.model, Path(folder) / "published")))
        clips = read_clips(options.clips)
        requests = Requests(handler, clips, options.seed, max_duration_s)
        contents, pair = encode(clips[0]), [clips[0], clips[-1][: SAMPLING_RATE // 2]]

        def probe():
            return [
                handler({"inputs": contents, "parameters": {"return_timestamps": "word", "max_new_tokens": 16}}),
                handler({"inputs": {"audio": base64_of(contents), "instruction": INSTRUCTIONS[1]}}),
                generate(handler, pair, list(INSTRUCTIONS[:2]), {"max_new_tokens": 16}),
            ]

        seen = {"text": "", "written_s": 0.0}

        def each_probe(found):
            seconds = 60 * found["minutes"]
            if seconds - seen["written_s"] >= 60 or not seen["text"]:
                seen["written_s"], seen["text"] = seconds, write(options.output, found)
                print(" ".join(seen["text"].splitlines()[:4]), flush=True)

        found = run(requests, probe, minutes, probe_every, each_probe)
    print(write(options.output, found))
    print(f"Written to {options.output}")
    sys.exit(1 if verdict(found) else 0)


if __name__ == "__main__":
    main()
