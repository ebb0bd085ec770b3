"""Tell what the libraries below torch compute with under given environment variables.

A setting that a library ignores on this CPU would prove nothing, so `python -m tests.portability` looks first. Every
look is a process of its own, because the libraries read their settings once. MKL and oneDNN name the instructions that
they use only in their logs; what else a setting changes is seen in the bits of results.
"""

import hashlib
import json
import os
import re
import subprocess
import sys

import torch
from torch.nn import functional


def look(environment: dict[str, str]) -> dict[str, str]:
    """Return what each library says that it uses, and a digest of results.

    Raises:
        RuntimeError: this CPU stopped the process, because it lacks the instructions, or something else went wrong.
    """
    process = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | environment | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"A small computation ended with status {process.returncode}. {process.stderr}")
    *log, facts = process.stdout.splitlines()

    def logged(pattern):
        found = re.search(pattern, "\n".join(log))
        return found[1].strip() if found else "not used"

    return json.loads(facts) | {
        "other rounding": environment.get("BLSP_KD_TEST_ROUNDING", ""),  # comes with `conftest.py`, not with a library
        "MKL": logged(r"MKL_VERBOSE oneMKL.*? architecture (.+?),? Lnx"),
        "MKL_CBWR": logged(r" CNR:(\S+)"),
        "oneDNN": logged(r"onednn_verbose.*,cpu,isa:(.+)"),
    }


def results() -> list[torch.Tensor]:
    """Compute with every kind of kernel that the tests use: products, convolutions, attention, FFT, sums, functions."""
    torch.manual_seed(0)
    made = [torch.stft(torch.randn(16_000), 400, 160, window=torch.hann_window(400), return_complex=True)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        # Widths that fill vectors, widths that do not, and sizes that threads share.
        for rows, width, columns in ((7, 6, 11), (64, 32, 48), (301, 257, 130)):
            x, weight = torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)
            made += [
                functional.linear(x, weight),
                functional.linear(x[:1], weight),
                torch.bmm(x[None], weight.mT[None]),
            ]
        x = torch.randn(3, 80, 100).to(dtype)
        made += [
            functional.conv1d(x, torch.randn(64, 80, 3).to(dtype)),
            functional.conv1d(x, torch.randn(80, 1, 7).to(dtype), groups=80),
            functional.scaled_dot_product_attention(*[x.view(3, 4, 20, 100)] * 3),
            functional.layer_norm(x, (100,)),
            *(function(x) for function in (torch.exp, torch.tanh, functional.gelu, functional.silu)),
            *(function(x, -1) for function in (torch.softmax, torch.logsumexp, torch.sum, torch.cumsum)),
            torch.randn(400, 300).to(dtype).sum(),
        ]
    return made


def main():
    digest = hashlib.sha256()
    for tensor in results():
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    facts = {
        "threads": str(torch.get_num_threads()),
        "ATen": torch.backends.cpu.get_cpu_capability(),
        "results": digest.hexdigest()[:8],
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
