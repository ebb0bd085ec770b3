"""Feeds broken audio, manifests, chats, configs and checkpoints to what reads them: a result or a clear error.

    python -m tests.reliability.fuzz                                  # 5,000 audio files and some 2,500 others
    python -m tests.reliability.fuzz --short                          # seconds: does it run?
    python -m tests.reliability.fuzz --only "audio: wav" --case 17    # one case again, with its traceback

Cases run in a forked process with a limit of time and of memory, and a new one takes over when that dies. Leaves out:
code in a repository that the user chose to trust.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import json
import linecache
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from .fuzz_kinds import Kind, Material, WrongResultError, kinds

# What one case may take on top of what the process held before. Ten minutes of audio, the longest that is read, take
# 37 MiB at 16 kHz, twice while they are joined.
MAX_MEMORY_BYTES = 256 * 2**20
# Where the system ends it, so that no case can harm the machine.
MAX_ADDRESS_SPACE_BYTES = 2 * 2**30
MAX_SECONDS = 20.0
ALLOWED_ERRORS = (ValueError, TypeError, OSError, jinja2.TemplateError, StrictDataclassError)
# Subclasses of the above that Python raises by itself, and that tell nothing to a user.
RAW_ERRORS = (UnicodeError, json.JSONDecodeError)
FAILURES = ("raw error", "wrong result", "memory", "crash", "hang")


@dataclass
class Outcome:
    """Return the end of a case: "result", "clear error", or one of `FAILURES`."""

    kind: str
    case: int
    outcome: str
    message: str = ""
    where: str = ""
    peak_bytes: int = 0
    seconds: float = 0.0


def generator(kind: Kind, seed: int, case: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(kind.name.encode()), case])


def try_case(kind: Kind, seed: int, case: int, scratch: Path) -> Outcome:
    shutil.rmtree(scratch, ignore_errors=True)
    made = kind.make(generator(kind, seed, case))
    outcome, message, where = "result", "", ""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of memory
    before, start = memory("VmRSS"), time.monotonic()
    try:
        kind.use(made)
    except WrongResultError as error:
        outcome, message, where = "wrong result", str(error), place(error)
    except Exception as error:
        outcome = "clear error" if is_clear(error) else "raw error"
        message, where = f"{type(error).__name__}: {str(error)[:300]}", place(error)
    peak = max(0, memory("VmHWM") - before)
    if peak > MAX_MEMORY_BYTES:
        outcome, message = "memory", f"{peak / 2**20:.0f} MiB; {outcome} {message}"
    return Outcome(kind.name, case, outcome, message, where, peak, time.monotonic() - start)


def memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def is_clear(error: Exception) -> bool:
    """Return whether somebody wrote this error for this case: for bad input, with a message, and by a `raise`."""
    if not isinstance(error, ALLOWED_ERRORS) or isinstance(error, RAW_ERRORS) or not str(error).strip():
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True  # the system's own, which names the file and what is wrong with it
    return any(line.startswith("raise ") for line in statement(traceback.extract_tb(error.__traceback__)[-1]))


def statement(frame: traceback.FrameSummary) -> list[str]:
    """The lines of the statement that raised."""
    return [linecache.getline(frame.filename, number).strip() for number in range(frame.lineno, frame.end_lineno + 1)]


def place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


# -- processes --------------------------------------------------------------------------------------------------------


def work(kind: Kind, seed: int, cases: range, scratch: Path, connection):
    """In a process of its own: say each case before it is tried, and how it ended after."""
    limit = memory("VmSize") + MAX_ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as silence:  # decoders complain there
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    for case in cases:
        connection.send(try_case(kind, seed, case, scratch))
    connection.close()
    os._exit(0)  # no clean-up of what was forked along


def run(kind: Kind, seed: int, num_cases: int, scratch: Path) -> list[Outcome]:
    """All cases of a kind. A process that dies or hangs is a failure of its case, and the next one goes on."""
    context, outcomes = multiprocessing.get_context("fork"), []
    while len(outcomes) < num_cases:
        ours, theirs = context.Pipe(duplex=False)
        cases = range(len(outcomes), num_cases)
        process = context.Process(target=work, args=(kind, seed, cases, scratch, theirs))
        process.start()
        theirs.close()
        while len(outcomes) < num_cases:
            failure = None
            try:
                if ours.poll(MAX_SECONDS):
                    outcomes.append(ours.recv())
                    continue
                failure = ("hang", f"no end after {MAX_SECONDS:.0f} s")
            except (EOFError, OSError):
                process.join()
                failure = ("crash", death(process.exitcode))
            outcomes.append(Outcome(kind.name, len(outcomes), *failure))
            break
        process.kill()
        process.join()
        ours.close()
    return outcomes


def death(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"


# -- report -----------------------------------------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> list[dict]:
    rows = []
    for name in dict.fromkeys(each.kind for each in outcomes):
        own = [each for each in outcomes if each.kind == name]
        counts = {
            outcome: sum(each.outcome == outcome for each in own) for outcome in ("result", "clear error", *FAILURES)
        }
        rows.append(
            {
                "kind": name,
                "cases": len(own),
                **counts,
                "peak_bytes": max(each.peak_bytes for each in own),
                "slowest_s": max(each.seconds for each in own),
            }
        )
    return rows


def write(folder: Path, seed: int, outcomes: list[Outcome]) -> str:
    """Writes `fuzz.json` and `fuzz.md`. Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, failures = summary(outcomes), [each for each in outcomes if each.outcome in FAILURES]
    data = {
        "seed": seed,
        "max_memory_bytes": MAX_MEMORY_BYTES,
        "max_seconds": MAX_SECONDS,
        "kinds": rows,
        "failures": [asdict(each) for each in failures],
    }
    (folder / "fuzz.json").write_text(json.dumps(data, indent=1))
    columns = ("cases", "result", "clear error", *FAILURES)
    lines = [
        f"Seed {seed}. A case may take {MAX_MEMORY_BYTES / 2**20:.0f} MiB and {MAX_SECONDS:.0f} s.",
        "",
        f"| kind | {' | '.join(columns)} | peak MiB | slowest s |",
        "|---" * (len(columns) + 3) + "|",
    ]
    total = {
        "kind": "all",
        **{column: sum(row[column] for row in rows) for column in columns},
        **{name: max(row[name] for row in rows) for name in ("peak_bytes", "slowest_s")},
    }
    for row in [*rows, total]:
        counts = " | ".join(str(row[column]) for column in columns)
        lines.append(f"| {row['kind']} | {counts} | {row['peak_bytes'] / 2**20:.0f} | {row['slowest_s']:.1f} |")
    if failures:
        lines.append("")
    for each in failures[:50]:
        lines.append(f"- {each.kind}, case {each.case}: {each.outcome}. {each.message} ({each.where})")
    text = "\n".join(lines) + "\n"
    (folder / "fuzz.md").write_text(text)
    return text


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5_000, help="of audio files; half as many others come with them")
    parser.add_argument("--short", action="store_true", help="200 audio files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind, as the table names it")
    parser.add_argument("--case", type=int, help="with --only: this case alone, in this process")
    parser.add_argument("--output", type=Path, default=Path("outputs/reliability"), help="folder for the results")
    options = parser.parse_args()
    if options.case is not None and options.only is None:
        parser.error("--case needs --only: cases are numbered within their kind.")

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder))
        chosen = kinds(material)
        if options.only is not None:
            chosen = [kind for kind in chosen if kind.name == options.only]
            if not chosen:
                parser.error(f"--only takes one of {[kind.name for kind in kinds(material)]}, not {options.only!r}.")
        if options.case is not None:
            print(try_case(chosen[0], options.seed, options.case, material.scratch))
            shutil.rmtree(material.scratch, ignore_errors=True)
            chosen[0].use(chosen[0].make(generator(chosen[0], options.seed, options.case)))
            return
        outcomes = []
        for kind in chosen:
            num_cases = round(kind.share * (200 if options.short else options.cases))
            print(f"{kind.name}: {num_cases} cases", flush=True)
            outcomes += run(kind, options.seed, num_cases, material.scratch)
            text = write(options.output, options.seed, outcomes)
    print(text)
    print(f"Written to {options.output}")
    sys.exit(1 if any(each.outcome in FAILURES for each in outcomes) else 0)


if __name__ == "__main__":
    main()
