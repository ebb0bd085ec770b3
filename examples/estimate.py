"""Estimate what a training will cost: parameters, memory of a GPU and time, before anything is downloaded.

    python examples/estimate.py examples/recipes/whisper_small_qwen2.5_1.5b.yaml
    python examples/estimate.py examples/recipes/whisper_large_v3_llama3.1_8b.yaml --num_gpus 16 --utilisation 0.3

Runs a step of the real model (forward, backward, AdamW) on tensors that have a shape but no contents, adds up what is
alive at each moment and counts the operations. Sharding and time are arithmetic on top. `python -m
tests.benchmarks.memory_estimate` compares the memory with that of real steps. Leaves out: speech encoders other than
Whisper; time to load data, evaluate and save; what a GPU's kernels need inside.

A recipe is a YAML file of options for `examples/train.py`. Its section `estimate` holds assumptions about machines and
data, which the options of this script override. The configs of its models are looked up in `examples/recipes/configs`
first, so that no download is needed. `modeling_blsp_kd/training/estimate.py` does the same in Python.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from modeling_blsp_kd.training.estimate import GB, Assumptions, backbones, estimate, read_recipe

CONFIGS = Path(__file__).parent / "recipes" / "configs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file of options of examples/train.py")
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=field.type, help=f"instead of the recipe's, or of {field.default}")
    options = vars(parser.parse_args())
    recipe, assumed = read_recipe(options.pop("recipe"))
    assume = Assumptions(**{**assumed, **{name: value for name, value in options.items() if value is not None}})
    print_estimate(estimate(recipe, assume, CONFIGS), recipe, assume)


def print_estimate(figures: dict, recipe: dict, assume: Assumptions):
    print(f"{backbones(recipe)}\n\n{'parameters, millions':32} {'trained':>9} {'frozen':>9}")
    for part, (trained, frozen) in figures["parameters"].items():
        print(f"  {part:30} {trained / 1e6:9,.1f} {frozen / 1e6:9,.1f}")
    print(f"\n{f'memory of a GPU, clips of {assume.longest_clip_s:g} s':32} {'GB':>9}")
    for part, size in figures["memory"].items():
        print(f"  {part:30} {size / GB:9.2f}")
    total = sum(figures["memory"].values()) / GB
    verdict = "" if total <= assume.gpu_memory_gb else ": too much"
    print(f"  {'together':30} {total:9.2f} of {assume.gpu_memory_gb:g}{verdict}")
    print(f"\n{f'a batch, clips of {assume.clip_s:g} s':32} {'TFLOP':>9}")
    for part, operations in figures["operations"].items():
        print(f"  {part:30} {operations / 1e12:9.2f}")
    print(f"  {'together':30} {sum(figures['operations'].values()) / 1e12:9.2f}")
    print(
        f"\ntime, {assume.num_gpus} x {assume.peak_tflops:g} TFLOP/s at {assume.utilisation:.0%}"
        f"\n  {'a step of ' + format(figures['clips_per_step'], ',') + ' clips':30} {figures['compute_s']:9.1f} s"
        f" (network {figures['network_s']:.1f} s, beside it at best)"
        f"\n  {'clips per second':30} {figures['clips_per_s']:9.1f}"
        f"\n  {format(recipe['max_steps'], ',') + ' steps':30} {figures['hours']:9.1f} h"
        f" for {figures['speech_hours']:,.0f} h of speech"
    )


if __name__ == "__main__":
    main()
