"""Time and memory of functions that do the same work.

Repeats are interleaved, so that whatever else the machine does meets all of them alike, and ratios are taken within a
repeat. Leaves out: what is measured (one file per part) and how it is shown (`report.py`).
"""

import importlib
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

OURS = "BLSP-KD"
MAX_CASE_S = 120  # all repeats of one case together, as far as two repeats allow


@dataclass
class Case:
    """Functions that do the same work at one size.

    Args:
        name (`str`): the work and its size.
        candidates (`dict[str, Callable]`): by name; [`OURS`] is what the others are compared with.
        memory_unit (`tuple[str, int]`): name and bytes of what peak memory is reported in.
        repeats (`int`): how often each is timed; less often where that would take minutes, but twice at least.
        sweep (`tuple[str, float]`, *optional*): for scaling plots, which size this case is one point of.
        missing (`dict[str, str]`): peers that cannot run here, and why.
    """

    name: str
    candidates: dict[str, Callable]
    memory_unit: tuple[str, int]
    repeats: int = 7
    sweep: tuple[str, float] | None = None
    missing: dict[str, str] = field(default_factory=dict)


def peer(module: str, name: str):
    """`(module.name, None)`, or `(None, why not)` for an optional peer that is not installed or needs a GPU."""
    try:
        return getattr(importlib.import_module(module), name), None
    except Exception as error:  # whatever a peer does at import must not end the run
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def measure(case: Case, device: torch.device, clock: str, min_block_s: float) -> dict:
    """Run one case.

    Args:
        clock (`str`): `"wall"`, or `"cpu"`: time on the processor, which other programs disturb less.
        min_block_s (`float`): calls are timed in blocks of at least this long.

    Returns:
        `dict`: per candidate its times in seconds per call, their ratios to ours, and its peak memory in bytes.
    """
    calls, memory, round_s = {}, {}, 0.0
    for name, function in case.candidates.items():
        start = time.perf_counter()
        memory[name] = peak_bytes(function, device)  # a first call, with whatever is only done once
        call_s = time.perf_counter() - start
        if call_s < 1:
            call_s = _time(function, 1, device, clock)
        calls[name] = max(1, round(min_block_s / call_s))
        round_s += calls[name] * call_s
    repeats = min(case.repeats, max(2, round(MAX_CASE_S / round_s)))
    times = {name: [] for name in case.candidates}
    for _ in range(repeats):
        for name, function in case.candidates.items():
            times[name].append(_time(function, calls[name], device, clock))
    return {
        name: {
            "times_s": times[name],
            "median_s": statistics.median(times[name]),
            "ratios": [time / ours for time, ours in zip(times[name], times[OURS])],
            "peak_bytes": memory[name],
        }
        for name in case.candidates
    }


def _time(function, num_calls: int, device: torch.device, clock: str) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(num_calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / num_calls
    now = time.perf_counter if clock == "wall" else _processor_time
    start = now()
    for _ in range(num_calls):
        function()
    return (now() - start) / num_calls


def _processor_time() -> float:
    """Seconds that this process and its finished children have spent on the processor."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_bytes(function, device: torch.device) -> int:
    """Most bytes that live tensors hold at one time, beyond those from before the call. Result included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # Every allocation and release in order stands in the exported trace alone.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
