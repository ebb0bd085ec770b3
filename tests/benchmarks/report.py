"""Writes what was measured: JSON with every number, a Markdown table, and plots of cost against size.

Leaves out: the measuring (`measure.py`).
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
from datetime import date
from pathlib import Path

import torch

from .measure import OURS

PACKAGES = ("torch", "transformers", "peft", "numpy", "torch-cif", "trl", "liger-kernel")


def machine(device: torch.device, dtype: torch.dtype, clock: str) -> dict:
    """Return where and with what the figures were taken."""
    installed = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "clock": clock if device.type == "cpu" else "cuda events",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
        "load_average_before": os.getloadavg()[0],
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(folder: Path, where: dict, results: list[dict]) -> str:
    """Writes `benchmarks.json`, `benchmarks.md` and, with matplotlib, `scaling.png`. Returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    slopes = _slopes(results)
    data = {"machine": where, "results": results, "slopes": slopes}
    (folder / "benchmarks.json").write_text(json.dumps(data, indent=1))
    text = _markdown(where, results, slopes)
    (folder / "benchmarks.md").write_text(text)
    if slopes and importlib.util.find_spec("matplotlib"):
        _plot(folder / "scaling.png", slopes)
    return text


def _slopes(results) -> list[dict]:
    """Time of ours against each size that was swept, and the slope of its logarithm: 1 is proportional."""
    sweeps = {}
    for result in results:
        if result["sweep"]:
            size, value = result["sweep"]
            point = (value, result["candidates"][OURS]["median_s"])
            sweeps.setdefault((result["benchmark"], size), []).append(point)
    return [
        {"benchmark": benchmark, "size": size, "points": points, "slope": _slope(points)}
        for (benchmark, size), points in sweeps.items()
        if len(points) > 1
    ]


def _slope(points) -> float:
    sizes, times = ([math.log(value) for value in values] for values in zip(*points))
    return statistics.linear_regression(sizes, times).slope


def _markdown(where, results, slopes) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    pages = "huge pages, " if where["huge_pages"] else ""
    lines = [
        f"{where['date']}, {where['processor']} ({where['cores']} cores), device {where['device']}, {where['dtype']}, "
        f"{where['threads']} thread(s), {pages}{where['clock']} time, Python {where['python']}, {versions}. "
        f"Load average {where['load_average_before']:.1f} before and {where['load_average_after']:.1f} after.",
        "",
        f"One table per part. {OURS}: milliseconds; others: their time over that of {OURS} in the same repeat. Medians "
        "over interleaved repeats, spread in brackets; after the comma, peak memory.",
    ]
    for benchmark in dict.fromkeys(result["benchmark"] for result in results):
        lines += _table(benchmark, [r for r in results if r["benchmark"] == benchmark and not r["sweep"]])
    if slopes:
        lines += ["", "### Scaling", "", "| | against | slope |", "|---|---|---|"]
        lines += [f"| {each['benchmark']} | {each['size']} | {each['slope']:.2f} |" for each in slopes]
    return "\n".join(lines) + "\n"


def _table(benchmark: str, results: list[dict]) -> list[str]:
    """A row for each case, a column for each candidate."""
    units = {result["memory_unit"][0] for result in results}
    names = list(dict.fromkeys(name for result in results for name in result["candidates"]))
    missing = {name: reason for result in results for name, reason in result["missing"].items()}
    lines = ["", f"### {benchmark} (memory: {', '.join(sorted(units))})", ""]
    lines += [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        cells = [_cell(name, result) for name in names]
        lines.append(f"| {result['case']} | {' | '.join(cells)} |")
    return lines + [f"\nNot run: {name} ({reason})." for name, reason in missing.items()]


def _cell(name: str, result: dict) -> str:
    if name not in result["candidates"]:
        return ""
    measured = result["candidates"][name]
    values = [1000 * time for time in measured["times_s"]] if name == OURS else measured["ratios"]
    return f"{_spread(values)}, {measured['peak_bytes'] / result['memory_unit'][1]:.2f}"


def _spread(values) -> str:
    return f"{_number(statistics.median(values))} [{_number(min(values))}-{_number(max(values))}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plot(path: Path, slopes):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(3.2 * len(slopes), 3), layout="constrained")
    for axis, each in zip(figure.subplots(1, len(slopes), squeeze=False)[0], slopes):
        sizes, times = zip(*each["points"])
        axis.loglog(sizes, [1000 * time for time in times], "o-")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_minor_formatter(NullFormatter())
        axis.set(xlabel=each["size"], ylabel="ms", title=f"{each['benchmark']}: slope {each['slope']:.2f}")
    figure.savefig(path, dpi=100)
