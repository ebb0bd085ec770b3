"""Compare the memory of a training step that `examples/estimate.py` predicts with what the step takes.

    python -m tests.benchmarks.memory_estimate [--small]

Measured are the weights before a step and the most that live tensors hold beyond them during it; on a GPU it is what
the allocator counts. Leaves out: sharding, and what CUDA itself holds.
"""

# ruff: noqa: T201 (a command talks to the terminal)
import argparse

import torch
from transformers import LlamaConfig, Qwen2Config, WhisperConfig

from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.training.estimate import Assumptions, build_model, make_batch
from modeling_blsp_kd.training.step_cost import peak_memory, training_step, without_contents

from .measure import peak_bytes

ASSUME = Assumptions(prompt_tokens=12, response_tokens=20)
# Layers and widths of encoder and LLM, vocabulary, clips and their seconds.
SIZES = {
    "tiny": (1, 32, 1, 48, 300, 3, 2.0),
    "flat": (2, 16, 2, 32, 4_000, 2, 1.0),
    "small": (2, 128, 4, 256, 8_000, 4, 6.0),
    "wide LLM": (2, 64, 6, 512, 32_000, 4, 4.0),
    "long clips": (4, 192, 2, 128, 2_000, 4, 20.0),
}
FROZEN, WITH_LORA = {"freeze_speech_encoder": True}, {"freeze_speech_encoder": False, "plora": True}
# What is trained; checkpointing, bfloat16 (frozen weights, and autocast), accumulation.
CASES = {
    "adapter": (FROZEN, False, False, False),
    "adapter, checkpointing": (FROZEN, True, False, False),
    "adapter and encoder": ({"freeze_speech_encoder": False}, False, False, False),
    "adapter and partial LoRA": ({**FROZEN, "plora": True}, False, False, False),
    "all": (WITH_LORA, False, False, False),
    "all, checkpointing": (WITH_LORA, True, False, False),
    "all, accumulation": (WITH_LORA, False, False, True),
    "all, bfloat16": (WITH_LORA, False, True, False),
    "all, bfloat16, checkpointing": (WITH_LORA, True, True, True),
    "subsampler": ({**FROZEN, "adapter": "subsampler"}, False, False, False),
}


def make_config(size: str, options: dict) -> BlspKdConfig:
    encoder_layers, encoder_width, llm_layers, llm_width, vocab_size, _, _ = SIZES[size]
    speech_config = WhisperConfig(
        d_model=encoder_width,
        encoder_layers=encoder_layers,
        encoder_attention_heads=4,
        encoder_ffn_dim=4 * encoder_width,
        vocab_size=60_000,
    )
    text_class = LlamaConfig if size == "wide LLM" else Qwen2Config
    text_config = text_class(
        hidden_size=llm_width,
        intermediate_size=3 * llm_width,
        num_hidden_layers=llm_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
    )
    return BlspKdConfig(
        speech_config=speech_config.to_dict(),
        text_config=text_config.to_dict(),
        audio_token_id=vocab_size,
        **options,
    )


def compare(size: str, case: str, device: torch.device) -> tuple[int, int]:
    """Estimated and measured bytes of one step."""
    options, checkpoints, bf16, accumulates = CASES[case]
    config, dtype = make_config(size, options), torch.bfloat16 if bf16 else torch.float32
    batch = make_batch(config, *SIZES[size][-2:], ASSUME)

    def build():
        return build_model(config, dtype, checkpoints)

    weightless, on_gpu = without_contents(build), device.type == "cuda"
    estimated = peak_memory(weightless, batch, bf16, accumulates, on_gpu).peak
    batch = {name: values.to(device) for name, values in batch.items()}
    model = build().to(device)
    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())
    beyond = peak_bytes(lambda: training_step(model, batch, bf16, accumulates), device)
    return estimated, weights + beyond


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest size only")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = ["tiny"] if parser.parse_args().small else SIZES
    print(
        f"| size | trained | estimated MB | measured MB ({device.type}) | estimated / measured |\n|---|---|--:|--:|--:|"
    )
    for size in sizes:
        for case in CASES:
            estimated, measured = compare(size, case, device)
            print(f"| {size} | {case} | {estimated / 1e6:.2f} | {measured / 1e6:.2f} | {estimated / measured:.3f} |")


if __name__ == "__main__":
    main()
