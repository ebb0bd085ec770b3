"""Importing the package beside a speech LLM of transformers itself, and loading a large checkpoint.

Imports run in processes of their own, so their memory is not seen here. Memory of loading is what is allocated: weights
that are mapped from their file take none, a second copy of them would take one. Leaves out: fetching from the Hub.
"""

import subprocess
import sys
import tempfile

from transformers import AutoModelForCausalLM, Qwen2Config, WhisperConfig
from transformers.utils import logging

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.backbones import load_audio_tower
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder

from .measure import OURS, Case

IMPORTS = {
    OURS: "import modeling_blsp_kd.modeling_blsp_kd",
    f"{OURS}, with processor and pipelines": "import modeling_blsp_kd.modeling_blsp_kd, processing",
    "Qwen2-Audio": "import transformers.models.qwen2_audio.modeling_qwen2_audio",
    "Qwen2-Audio, with processor and pipelines": "import transformers.models.qwen2_audio.modeling_qwen2_audio, "
    "transformers.models.qwen2_audio.processing_qwen2_audio, transformers.pipelines",
    "torch": "import torch",
}


def cases(small: bool, device, dtype):
    names = (OURS, "torch") if small else IMPORTS
    yield Case(
        name="import",
        candidates={name: lambda name=name: _run(IMPORTS[name]) for name in names},
        memory_unit=("MiB", 2**20),
        repeats=1 if small else 5,
    )
    with tempfile.TemporaryDirectory() as folder:
        yield _loading(small, folder)


def _run(code: str):
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def _loading(small: bool, folder: str) -> Case:
    """1 GiB of random weights, of which the adapter and partial LoRA are trained."""
    logging.disable_progress_bar()
    size = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
        if small
        else {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 12, "vocab_size": 50_000}
    )
    width, num_layers = (16, 1) if small else (512, 6)
    llm = AutoModelForCausalLM.from_config(
        Qwen2Config(**size, num_attention_heads=size["hidden_size"] // 16, num_key_value_heads=2)
    )
    llm.save_pretrained(f"{folder}/llm")
    encoder = TrueLengthWhisperEncoder(
        WhisperConfig(
            d_model=width, encoder_layers=num_layers, encoder_attention_heads=width // 8, encoder_ffn_dim=4 * width
        )
    )
    encoder.save_pretrained(f"{folder}/encoder")
    model = BlspKdForCausalLM.from_backbones(
        f"{folder}/encoder", f"{folder}/llm", audio_token_id=size["vocab_size"], plora=True, thin=True
    )
    model.save_pretrained(f"{folder}/thin")
    model.save_pretrained(f"{folder}/full", full=True)

    def load_backbones():
        return load_audio_tower(f"{folder}/encoder"), AutoModelForCausalLM.from_pretrained(f"{folder}/llm")

    return Case(
        name="from_pretrained",
        candidates={
            OURS: lambda: BlspKdForCausalLM.from_pretrained(f"{folder}/full"),
            f"{OURS}, thin": lambda: BlspKdForCausalLM.from_pretrained(f"{folder}/thin"),
            "encoder and LLM alone": load_backbones,
        },
        memory_unit=("weights", sum(each.numel() * each.element_size() for each in model.parameters())),
        repeats=1 if small else 5,
    )
