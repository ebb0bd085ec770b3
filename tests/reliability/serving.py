"""Tries a front at its bounds, and kills its engine and itself under load: no request is lost, no answer is wrong.

    python -m tests.reliability.serving                        # with vLLM, in an environment that it makes (3.5 GB)
    python -m tests.reliability.serving --engine stand-in      # a minute or two

Clients ask with clips of the tiny world, streamed and not, and compare what they get with `generate`. Each trial ends
with all questions once more, when all servers run again. Leaves out: speed (`tests/benchmarks/serving.py`).
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import asyncio
import collections
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch

from processing.serving.engine_files import write_engine_files
from tests.helpers.engine_requests import chats_of_all_kinds, input_audio, prompt_and_answer, tiny_world
from tests.helpers.real_engine import RealEngine, make_environment
from tests.helpers.servers import END_TIMEOUT_S, Server, start_front, start_stand_in

NAME = "tiny"
CROWD, BOUNDS = 200, ("--max_requests", 32, "--max_waiting", 8)
MAX_TOKENS = 24
# Longer than any answer takes, also on a busy core. What takes longer hangs.
HANG_S = 180.0
# What a client does before it asks again if it got none.
PAUSE_S = 0.2
ANSWERED, REFUSED, ERROR, WRONG, HUNG = "answered", "refused", "error", "wrong", "hung"


@dataclass
class Question:
    """A chat in OpenAI's form, and what `generate` answers."""

    messages: list[dict]
    answer: str


@dataclass
class Outcome:
    """What a request ended in. Times are of `time.monotonic`; `first` is that of the first text, if there was any."""

    kind: str
    begin: float
    end: float = 0.0
    first: float | None = None
    detail: str = ""


def make_questions(model, processor, number: int) -> list[Question]:
    """Return so many questions of all kinds, most with clips of their own."""
    chats = [chat for _, chat in chats_of_all_kinds(number)]
    answers = [prompt_and_answer(model, processor, chat, MAX_TOKENS)[1] for chat in chats]
    return [
        Question(input_audio(chat), processor.decode(answer, skip_special_tokens=True))
        for chat, answer in zip(chats, answers)
    ]


def connect(front: Server) -> httpx.AsyncClient:
    """Return a client with a connection for each request: one that a server closes while it is reused is no fault."""
    limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
    return httpx.AsyncClient(base_url=front.url, timeout=HANG_S, limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, question: Question, is_streamed: bool) -> Outcome:
    """Ask a question, and judge the answer."""
    body = {"model": NAME, "messages": question.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    outcome, pieces = Outcome(ERROR, time.monotonic()), []
    try:
        async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": is_streamed}) as response:
            if response.status_code != 200:
                error = json.loads(await response.aread())["error"]
                is_refused = response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                outcome.kind = REFUSED if is_refused else ERROR
                outcome.detail = f"status {response.status_code}: {error['message']}"
                return outcome
            if not is_streamed:
                choice = json.loads(await response.aread())["choices"][0]
                pieces.append(choice["message"]["content"])
            else:
                is_done = False
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and not (is_done := line == "data: [DONE]"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            outcome.detail = event["error"]["message"]
                            return outcome
                        pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
                        if outcome.first is None and any(pieces):
                            outcome.first = time.monotonic()
                if not is_done:
                    outcome.kind, outcome.detail = WRONG, "a stream ended without an error and without [DONE]"
                    return outcome
        is_right = "".join(pieces) == question.answer
        outcome.kind = ANSWERED if is_right else WRONG
        outcome.detail = "" if is_right else f"{''.join(pieces)!r} instead of {question.answer!r}"
    except httpx.TimeoutException as error:
        outcome.kind, outcome.detail = HUNG, repr(error)
    except httpx.HTTPError as error:
        outcome.detail = repr(error)
    finally:
        outcome.end = time.monotonic()
    return outcome


class Load:
    """Clients of a front that ask one question after the other until the block ends."""

    def __init__(self, front: Server, questions: list[Question], num_clients: int):
        self.front, self.questions, self.num_clients = front, questions, num_clients
        self.outcomes: list[Outcome] = []
        self.is_over = False

    async def __aenter__(self):
        self.client = connect(self.front)
        self.clients = [asyncio.ensure_future(self._ask_on(number)) for number in range(self.num_clients)]
        return self

    async def __aexit__(self, *_):
        self.is_over = True
        await asyncio.gather(*self.clients)
        await self.client.aclose()

    async def _ask_on(self, number: int):
        while not self.is_over:
            question = self.questions[number % len(self.questions)]
            outcome = await ask(self.client, question, is_streamed=bool(number % 2))
            self.outcomes.append(outcome)
            number += self.num_clients + 1
            if outcome.kind != ANSWERED:
                await asyncio.sleep(PAUSE_S)

    async def until(self, kind: str, count: int, since: float = 0.0):
        """Wait until so many requests that began after a time have ended in a way.

        Raises:
            TimeoutError: they have not.
        """
        async with asyncio.timeout(HANG_S):
            while sum(each.kind == kind and each.begin >= since for each in self.outcomes) < count:
                await asyncio.sleep(0.02)


# -- the trials -------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The servers, the questions, and what starts another front."""

    engine: Server
    front: Server
    questions: list[Question]
    start_front: Callable[..., Server]


async def ask_all(front: Server, questions: list[Question]) -> list[str]:
    """Ask all questions, and return what went wrong."""
    async with connect(front) as client:
        outcomes = [await ask(client, question, bool(index % 2)) for index, question in enumerate(questions)]
    return [f"after recovery: {each.kind}, {each.detail}" for each in outcomes if each.kind != ANSWERED]


def never(outcomes: list[Outcome], *kinds: str) -> list[str]:
    """Return in words the outcomes that must not be."""
    return [f"{each.kind}: {each.detail}" for each in outcomes if each.kind in kinds]


async def crowd(world: World) -> tuple[list[Outcome], list[str]]:
    """200 clients at once at a front of small bounds: each is answered or refused, and the front counts the same."""
    front = world.start_front("small bounds", *BOUNDS)
    try:
        await asyncio.to_thread(front.wait_until_ready, "/ready")
        async with connect(front) as client:
            asked = [(world.questions[index % len(world.questions)], bool(index % 2)) for index in range(CROWD)]
            outcomes = await asyncio.gather(*(ask(client, *each) for each in asked))
            metrics = (await client.get("/metrics")).text
        wrong = never(outcomes, ERROR, WRONG, HUNG)
        counts = collections.Counter(each.kind for each in outcomes)
        for kind, status in ((ANSWERED, 200), (REFUSED, 429)):
            pattern = rf'^blsp_kd_requests_total{{[^}}]*status="{status}"}} (\S+)$'
            counted = sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE))
            if counted != counts[kind]:
                wrong.append(f"clients saw {counts[kind]} requests {kind}, but the front counted {counted:g}")
            if not counts[kind]:
                wrong.append(f"no request was {kind}, so the bounds were not tried")
        for name in ("requests_running", "waiting_clips"):
            if f"blsp_kd_{name} 0.0" not in metrics:
                wrong.append(f"{name} is not 0 at the end")
        return outcomes, wrong + await ask_all(front, world.questions)
    finally:
        front.kill()


def errors_outside(outcomes: list[Outcome], killed: float, back: float, name: str) -> list[str]:
    """Describe the errors of requests that ended before a server was killed, or began after it was back."""
    return [
        f"an error of a request while the {name} was there: {each.detail}"
        for each in outcomes
        if each.kind == ERROR and (each.end < killed or each.begin > back)
    ]


async def engine_killed(world: World) -> tuple[list[Outcome], list[str]]:
    """The engine is killed and started again: errors in between, never a wrong answer, and right ones afterwards."""
    async with Load(world.front, world.questions, num_clients=8) as load:
        await load.until(ANSWERED, 8)
        killed = time.monotonic()
        world.engine.kill()
        await load.until(ERROR, 8)
        world.engine.start()
        await asyncio.to_thread(world.engine.wait_until_ready)
        back = time.monotonic()
        await load.until(ANSWERED, 16, since=back)
    outcomes = load.outcomes
    wrong = never(outcomes, WRONG, HUNG, REFUSED)
    wrong += errors_outside(outcomes, killed, back, "engine")
    return outcomes, wrong + await ask_all(world.front, world.questions)


async def front_drained(world: World) -> tuple[list[Outcome], list[str]]:
    """The front gets SIGTERM: it finishes the answers that it has begun, refuses new ones, and ends."""
    async with Load(world.front, world.questions, num_clients=8) as load:
        await load.until(ANSWERED, 8)
        ended = time.monotonic()
        world.front.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(world.front.process.wait, END_TIMEOUT_S)
        await load.until(ERROR, 8)
    outcomes = load.outcomes
    wrong = never(outcomes, WRONG, HUNG, REFUSED)
    wrong += [
        f"an answer was begun and not finished: {each.detail}"
        for each in outcomes
        if each.kind == ERROR and each.first is not None
    ]
    if not any(each.kind == ANSWERED and each.begin < ended < each.end for each in outcomes):
        wrong.append("no answer was in work when the signal came, so that finishing it was not tried")
    if status not in (0, -signal.SIGTERM):
        wrong.append(f"the front ended with status {status}")
    world.front.start()
    await asyncio.to_thread(world.front.wait_until_ready, "/ready")
    return outcomes, wrong + await ask_all(world.front, world.questions)


async def front_killed(world: World) -> tuple[list[Outcome], list[str]]:
    """The front is killed: its clients get errors at once, and right answers when it runs again."""
    async with Load(world.front, world.questions, num_clients=8) as load:
        await load.until(ANSWERED, 8)
        killed = time.monotonic()
        world.front.kill()
        await load.until(ERROR, 8)
        seen = time.monotonic()
        world.front.start()
        await asyncio.to_thread(world.front.wait_until_ready, "/ready")
        back = time.monotonic()
        await load.until(ANSWERED, 16, since=back)
    outcomes = load.outcomes
    wrong = never(outcomes, WRONG, HUNG, REFUSED)
    wrong += errors_outside(outcomes, killed, back, "front")
    if any(each.begin < killed and each.end > seen for each in outcomes):
        wrong.append("a request of before the kill did not end until long after it")
    return outcomes, wrong + await ask_all(world.front, world.questions)


TRIALS = {each.__name__: each for each in (crowd, engine_killed, front_drained, front_killed)}


# -- what is written --------------------------------------------------------------------------------------------------


def finding(trial: str, outcomes: list[Outcome], wrong: list[str]) -> dict:
    """Return the figures of a trial, for JSON."""
    counts = collections.Counter(each.kind for each in outcomes)
    durations = [each.end - each.begin for each in outcomes]
    return {
        "trial": trial,
        "requests": len(outcomes),
        "counts": {kind: counts[kind] for kind in (ANSWERED, REFUSED, ERROR, WRONG, HUNG)},
        "longest_s": max(durations, default=0.0),
        "errors": dict(collections.Counter(each.detail for each in outcomes if each.kind == ERROR)),
        "wrong": wrong,
        "outcomes": [asdict(each) for each in outcomes],
    }


def markdown(findings: list[dict]) -> str:
    kinds = (ANSWERED, REFUSED, ERROR, WRONG, HUNG)
    lines = [f"| trial | requests | {' | '.join(kinds)} | longest, s | |", "|---" * (len(kinds) + 4) + "|"]
    for each in findings:
        cells = [each["trial"].replace("_", " "), each["requests"], *(each["counts"][kind] for kind in kinds)]
        cells += [f"{each['longest_s']:.1f}", f"{len(each['wrong'])} faults" if each["wrong"] else "survived"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"- {each['trial']}: {what}" for each in findings for what in each["wrong"][:20]]
    return "\n".join(lines) + "\n"


def write(folder: Path, findings: list[dict]) -> str:
    """Writes `serving.json` and `serving.md`. Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serving.json").write_text(json.dumps(findings, indent=1))
    text = markdown(findings)
    (folder / "serving.md").write_text(text)
    return text


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=("vllm", "stand-in"), default="vllm")
    parser.add_argument("--trials", default=",".join(TRIALS), help="names, with commas between")
    parser.add_argument("--questions", type=int, default=40, help="different ones")
    parser.add_argument("--output", type=Path, default=Path("outputs/reliability"), help="folder for the results")
    options = parser.parse_args()
    names = options.trials.split(",")
    if unknown := set(names) - set(TRIALS):
        parser.error(f"--trials takes {', '.join(TRIALS)}, not {', '.join(sorted(unknown))}")
    if options.engine == "vllm":
        make_environment()

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    findings, text = [], ""
    with tempfile.TemporaryDirectory() as temporary:
        model, processor = tiny_world()
        model.save_pretrained(Path(temporary) / "model")
        processor.save_pretrained(Path(temporary) / "model")
        questions = make_questions(model, processor, options.questions)
        arguments = ["--model", *write_engine_files(model, processor, Path(temporary) / "engine")[2:]]
        if options.engine == "vllm":
            engine = RealEngine(arguments, options.output / "serving_engine.log")
        else:
            engine = start_stand_in([*arguments, "--seconds-per-token", 0.02], options.output / "serving_engine.log")
        fronts = []

        def another_front(name: str, *bounds) -> Server:
            log = options.output / f"serving_front_{name.replace(' ', '_')}.log"
            bounds = ("--served_name", NAME, "--dtype", "float32", "--shutdown_s", END_TIMEOUT_S - 10, *bounds)
            fronts.append(start_front(Path(temporary) / "model", engine, log, *bounds))
            return fronts[-1]

        try:
            engine.wait_until_ready()
            front = another_front("usual bounds").wait_until_ready("/ready")
            for name in names:
                outcomes, wrong = asyncio.run(TRIALS[name](World(engine, front, questions, another_front)))
                findings.append(finding(name, outcomes, wrong))
                text = write(options.output, findings)  # after each trial, so that a run that is stopped keeps it
                print(text.splitlines()[1 + len(findings)], flush=True)
        finally:
            for server in (*fronts, engine):
                server.kill()
    print(f"\n{text}\nWritten to {options.output}")
    sys.exit(1 if any(each["wrong"] for each in findings) else 0)


if __name__ == "__main__":
    main()
