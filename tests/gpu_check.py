"""Checks on a machine with a GPU what the tests check on a CPU, within eight minutes, and writes one report.

    python -m tests.gpu_check --output report.md                        # on the GPU
    python -m tests.gpu_check --output report.md --device cpu --small   # do all parts run? Sizes mean nothing

Each part is a process of its own, with a time limit; one that fails or hangs leaves the others as they are. Nothing is
downloaded: the recipe's model has its true size and random weights. Exit status 1 if a part failed.
Leaves out: several GPUs, and training that is worth something.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples/recipes/whisper_small_qwen2.5_1.5b.yaml"
CLIPS = ROOT / "examples/tiny_world/clips"
NUM_STEPS = 10
# Seconds that each part may take; eight minutes in all.
BUDGETS_S = {"tests": 110, "benchmarks": 80, "recipe": 150, "attention": 40, "compile": 60, "fsdp2": 40}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check.md"), help="the report, Markdown")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, so that it runs on a CPU")
    parser.add_argument("--only", default=",".join(BUDGETS_S), help="parts, with commas between")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the time limits, for a busy machine")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](torch.device(options.device), options.small)
        return
    names = options.only.split(",")
    if unknown := set(names) - set(BUDGETS_S):
        parser.error(f"--only takes {', '.join(BUDGETS_S)}, not {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no CUDA GPU here. --device cpu --small shows whether all parts run.")

    sections, failed = [], []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        problem, seconds, text = run_part(name, options)
        failed += [name] if problem else []
        print(f"{name}: {problem or 'passed'} ({seconds:.0f} s)", flush=True)
        sections.append((name, problem, seconds, text))
        # After each part, so that a run that is stopped keeps the others.
        options.output.write_text(report(describe_machine(options), sections))
    print(f"Written to {options.output}")
    raise SystemExit(int(bool(failed)))


def run_part(name: str, options) -> tuple[str | None, float, str]:
    """Run one part in its own process. Returns what went wrong or None, seconds, and what it printed."""
    arguments = ["-m", "tests.gpu_check", "--part", name, "--device", options.device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    limit_s, start = options.patience * BUDGETS_S[name], time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, *(["--small"] if options.small else [])],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with all that it starts, which ends with it
        )
        try:
            status = process.wait(limit_s)
            problem = f"failed with exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            problem = f"not finished within {limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    return problem, time.monotonic() - start, text


def report(machine: list[str], sections: list[tuple]) -> str:
    lines = ["# GPU check", "", *machine, "", "| part | result | seconds | limit |", "|---|---|---|---|"]
    for name, problem, seconds, _ in sections:
        lines.append(f"| {name} | {problem or 'passed'} | {seconds:.0f} | {BUDGETS_S[name]} |")
    for name, problem, _, text in sections:
        shown = [line for line in text.splitlines() if problem or line.startswith("RESULT ")]
        lines += ["", f"## {name}", "", "```", *(line.removeprefix("RESULT ") for line in shown[-80:]), "```"]
    return "\n".join(lines) + "\n"


def describe_machine(options) -> list[str]:
    lines = [f"- torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        lines.append(f"- {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        lines.append("- CPU" + (", small sizes: shows that all parts run, and nothing else" if options.small else ""))
    return lines


def tell(text: str):
    """Print a line for the report."""
    print(f"RESULT {text}", flush=True)


def run(arguments: list[str], **environment):
    """Run Python on `arguments`, and end like it if it fails. The report gets the last line that it prints."""
    process = subprocess.run([sys.executable, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    text = process.stdout.decode(errors="replace")
    print(text)
    if process.returncode:
        raise SystemExit(process.returncode)
    tell(text.strip().splitlines()[-1])


# -- the parts --------------------------------------------------------------------------------------------------------


def check_tests(device, small: bool):
    """The core laws, with the CPU as reference."""
    chosen = ["-k", "cif"] if small else []
    arguments = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests/on_device.py"), *chosen]
    run(arguments, BLSP_KD_TEST_DEVICE="cuda" if device.type == "cuda" else "standin")


def check_benchmarks(device, small: bool):
    """The benchmarks' small form: on a GPU with CUDA events, in bfloat16."""
    names = "cif,linear_kl" if small else "cif,linear_kl,plora,encoder,training_step"
    with tempfile.TemporaryDirectory() as folder:
        run(["-m", "tests.benchmarks", "--small", "--only", names, "--output", folder])
        for line in Path(folder, "benchmarks.md").read_text().splitlines():
            tell(line)


def check_recipe(device, small: bool):
    """Steps of the first recipe: its model in its size, its batches, its optimiser."""
    from transformers import AutoConfig

    from examples.estimate import CONFIGS
    from modeling_blsp_kd import BlspKdConfig, BlspKdTrainer
    from modeling_blsp_kd.training.estimate import Assumptions, build_model, make_batch, model_config, read_recipe
    from modeling_blsp_kd.training.options import Arguments

    recipe, estimate = read_recipe(RECIPE)
    config, clip_s = model_config(recipe, CONFIGS), estimate["clip_s"]
    accumulation = recipe["gradient_accumulation_steps"]
    if small:
        from tests.helpers.models import speech_config, text_config

        config = BlspKdConfig(
            speech_config=speech_config().to_dict(),
            text_config=AutoConfig.for_model(**text_config("qwen2").to_dict()).to_dict(),
            adapter=recipe["adapter"],
            plora=recipe["plora"],
            freeze_speech_encoder=recipe["freeze_speech_encoder"],
            audio_token_id=300,
        )
        clip_s, accumulation = 2, 2
    torch.manual_seed(0)
    with device:
        model = build_model(config, getattr(torch, recipe["dtype"]), recipe.get("activation_checkpointing", False))
    frozen = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    frozen = dict(list(frozen.items())[:: max(1, len(frozen) // 5)])
    batch = make_batch(config, recipe["per_device_train_batch_size"], clip_s, Assumptions())
    batch["input_features"].normal_(generator=torch.Generator().manual_seed(0))
    names = [name for name in recipe if name in Arguments.__dataclass_fields__]
    with tempfile.TemporaryDirectory() as folder:
        args = Arguments(
            **{name: recipe[name] for name in names if name not in ("output_dir", "save_steps", "warmup_steps")}
            | {
                "output_dir": folder,
                "max_steps": NUM_STEPS,
                "warmup_steps": 0,
                "logging_steps": 1,
                "gradient_accumulation_steps": accumulation,
                "save_strategy": "no",
                "dataloader_num_workers": 0,
                "train_sampling_strategy": "sequential",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": device.type == "cpu",
                "bf16": recipe["bf16"],
            }
        )
        trainer = BlspKdTrainer(
            model,
            args,
            data_collator=lambda rows: batch,
            train_dataset=list(range(args.per_device_train_batch_size * accumulation * NUM_STEPS)),
            encoder_learning_rate=recipe["encoder_learning_rate"],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    num_parameters = sum(value.numel() for value in model.parameters())
    tell(f"{num_parameters / 1e6:.1f} M parameters, {accumulation} batches of {len(batch['num_speech_tokens'])} a step")
    tell(f"loss {', '.join(f'{loss:.3f}' for loss in losses)}")
    tell(f"{seconds / NUM_STEPS:.2f} s a step")
    if device.type == "cuda":
        tell(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if len(losses) != NUM_STEPS or not all(loss == loss and loss < float("inf") for loss in losses):
        raise SystemExit(f"Expected {NUM_STEPS} finite losses, got {losses}.")
    if losses[-1] >= losses[0]:
        raise SystemExit(f"The same batch {NUM_STEPS} times, but its loss did not fall: {losses}.")
    if moved := [name for name, value in frozen.items() if not torch.equal(model.get_parameter(name), value)]:
        raise SystemExit(f"Frozen weights moved: {moved}.")


def _small_model(device, dtype, **options):
    """A model and a prompt with audio, and one without."""
    from tests.helpers.models import make_model

    model = make_model("qwen2", plora=True, text={"hidden_size": 64, "num_attention_heads": 4}, **options)
    inputs = {
        "input_ids": torch.tensor([[1, 5, 300, 9, 12]], device=device),
        "attention_mask": torch.ones(1, 5, dtype=torch.long, device=device),
        "input_features": torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(0)).to(device, dtype),
        "input_features_mask": torch.ones(1, 200, dtype=torch.long, device=device),
        "num_speech_tokens": torch.tensor([7], device=device),
    }
    return model.to(device, dtype), inputs


@torch.no_grad()
def check_attention(device, small: bool):
    """Logits with each kind of attention beside the eager one, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Heads of 16 channels at least, as flash attention wants them.
    speech = {"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    adapter = {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1, "num_attention_heads": 4}
    model, inputs = _small_model(device, dtype, speech=speech, adapter=adapter)
    failed, expected = [], None
    for kind in ("eager", "sdpa", "flash_attention_2"):
        if kind == "flash_attention_2" and (device.type == "cpu" or find_spec("flash_attn") is None):
            tell(f"{kind}: not run, since {'this is a CPU' if device.type == 'cpu' else 'flash_attn is not installed'}")
            continue
        model.set_attn_implementation(kind)
        logits = model(**inputs).logits.float()
        expected = logits if expected is None else expected
        difference = float((logits - expected).abs().max() / expected.abs().max())
        tell(f"{kind}: largest difference to eager {difference:.1e} of the largest logit")
        if not difference <= (5e-2 if dtype == torch.bfloat16 else 1e-4):
            failed.append(kind)
    if failed:
        raise SystemExit(f"Too far from eager attention: {failed}.")


@torch.no_grad()
def check_compile(device, small: bool):
    """A compiled model beside itself, on text and on a prompt in which speech has its positions, as in `generate`."""
    model, _ = _small_model(device, torch.float32)
    text = {"input_ids": torch.tensor([[1, 5, 9, 12]], device=device)}
    is_speech = torch.tensor([[False, True, True, False]], device=device)
    speech = {**text, "is_speech": is_speech, "speech_embeds": torch.randn(1, 4, 64, device=device)}
    expected = [model(**given, use_cache=False).logits for given in (speech, text)]
    compiled = torch.compile(model, backend="aot_eager" if small else "inductor")
    for name, given, logits in zip(("speech", "text"), (speech, text), expected):
        start = time.perf_counter()
        difference = float((compiled(**given, use_cache=False).logits - logits).abs().max() / logits.abs().max())
        tell(f"{name}: largest difference {difference:.1e} of the largest logit, {time.perf_counter() - start:.1f} s")
        if not difference <= 1e-3:
            raise SystemExit(f"Compiled, a prompt with {name} gives other logits.")


def check_fsdp2(device, small: bool):
    """`examples/train.py` as `accelerate launch` starts it with FSDP2, in one process, on the bundled clips."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        rows = [json.loads(line) for line in (CLIPS / "metadata.jsonl").read_text().splitlines()]
        rows = [{**row, "audio": str(CLIPS / row["file_name"]), "response": row["answer"]} for row in rows]
        manifest = Path(folder, "clips.jsonl")
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "train_manifest": manifest,
            "allow_outside_paths": "true",
            "output_dir": Path(folder, "model"),
            "max_steps": 2 if small else NUM_STEPS,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2 if small else 16,
            "dataloader_num_workers": 0,
        }
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "examples/accelerate/fsdp2.yaml")]
        launcher += ["--num_processes", "1", "--num_machines", "1", "--main_process_port", "0"]
        script = [str(ROOT / "examples/train.py")]
        if device.type == "cpu":
            launcher += ["--mixed_precision", "no"]
            # Which tells accelerate that CPUs are accelerators.
            script = [str(ROOT / "tests/reliability/equivalence_worker.py"), "train.py"]
        run([*launcher, *script, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])

        from modeling_blsp_kd import BlspKdForCausalLM

        model = BlspKdForCausalLM.from_pretrained(Path(folder, "model"))
        tell(f"saved and loaded: {sum(value.numel() for value in model.parameters())} parameters")


PARTS = {
    "tests": check_tests,
    "benchmarks": check_benchmarks,
    "recipe": check_recipe,
    "attention": check_attention,
    "compile": check_compile,
    "fsdp2": check_fsdp2,
}

if __name__ == "__main__":
    main()
