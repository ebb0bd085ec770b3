"""Compare the front and vLLM with `transformers serve` under load: requests per second, and time to the first token.

    python -m tests.benchmarks.serving                               # makes vLLM's environment on first use, 3.5 GB
    taskset -c 1 python -m tests.benchmarks.serving --repeats 3      # servers and clients on one core
    python -m tests.benchmarks.serving --engine stand-in --small     # seconds: does it run?

All servers listen on loopback in the same run and take turns. The clock favours the front, which is three processes, if
the machine has other work; the CPU time of the servers hardly depends on it and is told, too. All get the very same
requests, each with a clip of its own and a streamed greedy answer in float32. Clients ask their next question when they
have the answer to the last. Leaves out: bounds and faults (`tests/reliability/serving.py`).
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import asyncio
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import usable_cores
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from processing import BlspKdProcessor
from processing.serving.engine_files import write_engine_files
from tests.helpers.engine_requests import TINY_WORLD, chats_of_all_kinds, input_audio, tiny_world
from tests.helpers.real_engine import PACKAGES, RealEngine, make_environment
from tests.helpers.servers import Server, start_front, start_stand_in, start_transformers_serve

from .report import machine

FRONT, PEER = "front and vLLM", "transformers serve"
CLIENTS = (1, 8, 32)
MAX_TOKENS = 24
# Encoder as in Whisper tiny, LLM as in SmolLM2-135M. The context is shorter, so that vLLM needs less memory.
ENCODER = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
LLM_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Of a random encoder, so that it fires about three tokens per second, as English has them.
ALPHA_SHIFT = -2.6


@dataclass
class Answer:
    """What became of a request: seconds until the first text and until the end, the text, or why there is none."""

    first_s: float
    all_s: float
    text: str
    error: str | None = None


# -- models -----------------------------------------------------------------------------------------------------------


def random_model(folder: Path) -> tuple[BlspKdForCausalLM, BlspKdProcessor]:
    """Return a model of random weights with an LLM of 135 M, and a processor; their backbones are written to a folder.

    Its tokenizer is the tiny world's, with words that are never read but may be answered.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_WORLD / "llm")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    vocab.update({f"Ġw{index}": index for index in range(len(vocab), LLM_135M["vocab_size"])})
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(parts))
    wide = PreTrainedTokenizerFast.from_pretrained(
        folder / "tokenizer", eos_token="<|end|>", pad_token="<|pad|>", chat_template=tokenizer.chat_template
    )
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**LLM_135M))
    llm.save_pretrained(folder / "llm")
    wide.save_pretrained(folder / "llm")
    TrueLengthWhisperEncoder(WhisperConfig(**ENCODER)).save_pretrained(folder / "speech")
    WhisperFeatureExtractor().save_pretrained(folder / "speech")
    processor = BlspKdProcessor.from_backbones(folder / "speech", folder / "llm")
    model = BlspKdForCausalLM.from_backbones(
        folder / "speech", folder / "llm", audio_token_id=processor.audio_token_id
    ).eval()
    model.adapter.shift_alpha_logits(ALPHA_SHIFT)
    return model, processor


def make_models(folder: Path, names: list[str]) -> Iterator[tuple[str, Path, list[str]]]:
    """Yield the name of each LLM, the folder that its model is saved in, and the command of its engine."""
    for name in names:
        model, processor = tiny_world() if name == "tiny" else random_model(folder / "backbones")
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        yield name, folder / name, write_engine_files(model, processor, folder / f"{name} engine")


# -- load -------------------------------------------------------------------------------------------------------------


def requests_of(number: int, seed: int) -> list[list[dict]]:
    """Return so many chats of one clip each, about 1 to 3 s of it."""
    return [input_audio(chat) for kind, chat in chats_of_all_kinds(5 * number, seed) if kind == "one clip"]


async def ask(client: httpx.AsyncClient, server: Server, model: str, messages: list[dict]) -> Answer:
    """Ask for a streamed answer."""
    body = {"model": model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": MAX_TOKENS}
    begin, first_s, pieces = time.perf_counter(), None, []
    try:
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(0.0, 0.0, "", f"status {response.status_code}: {text[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Answer(0.0, 0.0, "", str(event["error"])[:300])
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece and first_s is None:
                    first_s = time.perf_counter() - begin
                pieces.append(piece)
    except httpx.HTTPError as error:
        return Answer(0.0, 0.0, "", repr(error))
    all_s = time.perf_counter() - begin
    return Answer(all_s if first_s is None else first_s, all_s, "".join(pieces))


async def load(server: Server, model: str, chats: list[list[dict]], num_clients: int) -> tuple[float, list[Answer]]:
    """Let so many clients ask for answers to all chats, and return the seconds that it took, and the answers."""
    waiting, answers = iter(enumerate(chats)), [None] * len(chats)
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(timeout=1200, limits=limits, trust_env=False) as client:

        async def ask_on():
            for index, messages in waiting:
                answers[index] = await ask(client, server, model, messages)

        begin = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(num_clients)))
        return time.perf_counter() - begin, answers


def cpu_seconds(servers: list[Server]) -> float:
    """Return the CPU time that servers and their child processes have taken."""
    roots = [psutil.Process(server.process.pid) for server in servers]
    processes = [each for root in roots for each in (root, *root.children(recursive=True))]
    return sum(times.user + times.system for times in (each.cpu_times() for each in processes))


@dataclass
class Contestant:
    """What clients ask, by which name of a model, and all that works for it."""

    server: Server
    model: str
    parts: list[Server]

    def run(self, chats: list[list[dict]], num_clients: int) -> dict:
        before_s = cpu_seconds(self.parts)
        seconds, answers = asyncio.run(load(self.server, self.model, chats, num_clients))
        cpu_s = cpu_seconds(self.parts) - before_s
        return {"seconds": seconds, "cpu_seconds": cpu_s, "answers": [asdict(each) for each in answers]}


def measure(
    contestants: dict[str, Contestant], clients: list[int], repeats: int, per_client: int
) -> Iterator[list[dict]]:
    """Yield, as it grows, what each number of clients measured; who is first changes from repeat to repeat."""
    rounds = {number: {name: [] for name in contestants} for number in clients}
    for contestant in contestants.values():  # what only the first requests take is not counted
        contestant.run(requests_of(2, seed=10_000), 2)
    for repeat in range(repeats):
        for number in clients:
            chats = requests_of(max(8, per_client * number), seed=100 * repeat + number)
            for name in list(contestants)[:: -1 if repeat % 2 else 1]:
                result = contestants[name].run(chats, number)
                rates = f"{len(chats) / result['seconds']:.2f}/s, {len(chats) / result['cpu_seconds']:.2f}/s of CPU"
                print(f"repeat {repeat}, {number} clients, {name}: {rates}", flush=True)
                rounds[number][name].append(result)
            yield [{"clients": each, "servers": by_name} for each, by_name in rounds.items() if all(by_name.values())]


# -- what is written --------------------------------------------------------------------------------------------------


def summary(result: dict) -> dict:
    """Return the figures of a result, by server."""
    figures = {}
    for name, rounds in result["servers"].items():
        answers = [answer for each in rounds for answer in each["answers"]]
        first_s = [answer["first_s"] for answer in answers if answer["error"] is None]
        figures[name] = {
            "requests_per_s": [len(each["answers"]) / each["seconds"] for each in rounds],
            "requests_per_cpu_s": [len(each["answers"]) / each["cpu_seconds"] for each in rounds],
            "first_s_median": float(np.percentile(first_s, 50)),
            "first_s_95": float(np.percentile(first_s, 95)),
            "num_requests": len(answers),
            "num_failed": len(answers) - len(first_s),
            "texts": [answer["text"] for answer in answers],
        }
    return figures


def markdown(where: dict, results: list[dict]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{where['date']}, {where['processor']}, servers and clients together on {where['usable_cores']} core(s), "
        f"engine {where['engine']}, float32, Python {where['python']}, {versions}. Load average "
        f"{where['load_average_before']:.1f} before and {where['load_average_after']:.1f} after.",
        "",
        "Per second of the clock, and per second of the servers' CPU time: medians of the repeats, spread in brackets. "
        "Ratios: front over peer in the same repeat. First token: median and 95th percentile of all requests.",
        "",
        f"| LLM | clients | | {FRONT} | {PEER} | ratio |",
        "|---|--:|---|---|---|---|",
    ]
    for result in results:
        front, peer = (summary(result)[name] for name in (FRONT, PEER))
        for label, key in (("requests/s", "requests_per_s"), ("requests/s of CPU", "requests_per_cpu_s")):
            ratios = [own / other for own, other in zip(front[key], peer[key])]
            cells = [_spread(front[key]), _spread(peer[key]), _spread(ratios)]
            lines.append(f"| {result['llm']} | {result['clients']} | {label} | {' | '.join(cells)} |")
        cells = [f"{each['first_s_median']:.3g}, {each['first_s_95']:.3g}" for each in (front, peer)]
        lines.append(f"| {result['llm']} | {result['clients']} | first token, s | {' | '.join(cells)} | |")
        num_equal = sum(own == other for own, other in zip(front["texts"], peer["texts"]))
        cells = [f"{each['num_requests'] - each['num_failed']} of {each['num_requests']}" for each in (front, peer)]
        lines.append(f"| {result['llm']} | {result['clients']} | answered | {' | '.join(cells)} | {num_equal} equal |")
    failed = {
        answer["error"]
        for result in results
        for rounds in result["servers"].values()
        for each in rounds
        for answer in each["answers"]
        if answer["error"]
    }
    return "\n".join([*lines, *(f"\nFailed: {each}" for each in sorted(failed))]) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}-{max(values):.3g}]"


def write(folder: Path, where: dict, results: list[dict]) -> str:
    """Writes `serving.json` and `serving.md`. Returns the Markdown."""
    data = {"machine": where, "results": results, "summaries": [summary(each) for each in results]}
    (folder / "serving.json").write_text(json.dumps(data, indent=1))
    text = markdown(where, results)
    (folder / "serving.md").write_text(text)
    return text


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=("vllm", "stand-in"), default="vllm")
    parser.add_argument("--llms", default="tiny,135M", help="tiny, 135M, or both with a comma between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests_per_client", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="the tiny LLM and few clients; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder for the results")
    options = parser.parse_args()
    llms, clients, repeats = options.llms.split(","), list(CLIENTS), options.repeats
    if unknown := set(llms) - {"tiny", "135M"}:
        parser.error(f"--llms takes tiny and 135M, not {', '.join(sorted(unknown))}")
    if options.small:
        llms, clients, repeats = ["tiny"], [1, 2], 1
    if options.engine == "vllm":
        make_environment()

    torch.set_num_threads(1)
    where = machine(torch.device("cpu"), torch.float32, "wall")
    where["usable_cores"] = usable_cores()
    where["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "uvicorn")}
    where["engine"] = PACKAGES[0] if options.engine == "vllm" else options.engine
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as running:
        folder = Path(temporary)
        for name, model, command in make_models(folder, llms):
            logs = [options.output / f"{name} {part}.log" for part in ("engine", "front", "peer")]
            for log in logs:
                log.unlink(missing_ok=True)

            def run(server: Server, route="/health") -> Server:
                running.callback(server.kill)
                return server.wait_until_ready(route)

            running.close()  # the servers of the LLM before
            arguments = ["--model", *command[2:]]
            start_engine = RealEngine if options.engine == "vllm" else start_stand_in
            engine = run(start_engine(arguments, logs[0]))
            front = run(start_front(model, engine, logs[1], "--served_name", name, "--dtype", "float32"), "/ready")
            peer = run(start_transformers_serve(model, logs[2]))
            contestants = {
                FRONT: Contestant(front, name, [front, engine]),
                PEER: Contestant(peer, str(model), [peer]),
            }
            measured = results
            for of_llm in measure(contestants, clients, repeats, options.requests_per_client):
                measured = [*results, *({"llm": name, **each} for each in of_llm)]
                where["load_average_after"] = os.getloadavg()[0]
                text = write(options.output, where, measured)  # so that a run that is stopped keeps it
            results = measured
    print(text)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
