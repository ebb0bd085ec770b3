"""Measure what keeping the teacher's k most likely tokens costs and saves.

    python -m examples.experiments.measure_kept_teacher --model outputs/default --manifest train.jsonl --k 8 32 128

For each k: the share of response and input KL that is lost in the tail, megabytes per hour of speech, and the time of a
training step (forward and backward) in relation to one in which the teacher reads. The rows need responses.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.manifests import read_manifest
from processing.training_rows.clips import duration_s
from processing.training_rows.kept_teacher import KeepOptions, TeacherOnDisk, keep_teacher

KLS = ("response_kl", "input_kl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BLSP-KD model")
    parser.add_argument("--manifest", required=True, help="JSONL manifest with responses")
    parser.add_argument(
        "--allow_outside_paths", action="store_true", help="let audio paths leave the manifest's folder"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help="kept tokens")
    parser.add_argument("--num_rows", type=int, default=256, help="rows to measure on")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a step")
    parser.add_argument("--results", help="JSON file for the results")
    options = parser.parse_args()
    processor = BlspKdProcessor.from_pretrained(options.model)
    model = BlspKdForCausalLM.from_pretrained(options.model, device_map="auto", dtype=fast_dtype()).upcast_trained()
    rows = read_manifest(options.manifest, options.allow_outside_paths)[: options.num_rows]
    results = measure(model, BlspKdDataCollator(processor), rows, options.k, options.batch_size)
    print(table(results))
    if options.results:
        Path(options.results).write_text(json.dumps(results, indent=2) + "\n")


def measure(model: BlspKdForCausalLM, collator: BlspKdDataCollator, rows: list[dict], ks: list[int], batch_size: int):
    """Return the measurements of each k, and how many rows and hours they rest on."""
    hours = sum(row.get("duration") or duration_s(row) for row in rows) / 3600
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    full, full_s = _sums_and_seconds(model, [collator(batch) for batch in batches])
    results: dict = {"rows": len(rows), "hours": hours, "step_s": full_s, "k": {}}
    for k in ks:
        with tempfile.TemporaryDirectory() as folder:
            temperature = model.config.distillation["temperature"]
            keep = KeepOptions(teacher=model.name_or_path, k=k, temperature=temperature)
            keep_teacher(rows, model.language_model.eval(), collator, folder, keep)
            teacher = TeacherOnDisk(folder)
            kept_rows = [[{**row, "kept_teacher": teacher(row)} for row in batch] for batch in batches]
            kept, kept_s = _sums_and_seconds(model, [collator(batch) for batch in kept_rows])
            num_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        results["k"][k] = {
            **{f"{name}_lost": 1 - kept[name] / full[name] for name in KLS if name in full},
            "megabytes_per_hour": num_bytes / 1e6 / hours,
            "relative_step_time": kept_s / full_s,
        }
    return results


def _sums_and_seconds(model: BlspKdForCausalLM, batches: list[dict]) -> tuple[dict[str, float], float]:
    """Return the sums of the KLs without dropout, and the median seconds of a training step."""
    sums: dict[str, float] = {}
    seconds = []
    for batch in batches:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        with torch.no_grad():
            for name, (total, _) in model.eval()(**batch).loss_parts.items():
                sums[name] = sums.get(name, 0.0) + float(total)
        model.train()
        start = time.perf_counter()
        model(**batch).loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return {name: total for name, total in sums.items() if name in KLS}, median(seconds)


def table(results: dict) -> str:
    lines = ["| k | response KL lost | input KL lost | MB per hour | time of a step |", "|--:|--:|--:|--:|--:|"]
    for k, of_k in results["k"].items():
        lost = [f"{of_k[f'{name}_lost']:.2%}" if f"{name}_lost" in of_k else "" for name in KLS]
        cells = [str(k), *lost, f"{of_k['megabytes_per_hour']:.1f}", f"{of_k['relative_step_time']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{results['rows']} rows, {results['hours']:.3f} h of speech."])


if __name__ == "__main__":
    main()
