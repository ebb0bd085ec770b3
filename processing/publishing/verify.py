"""Check that a published folder gives the checkpoint's answers in another environment.

That environment is a process without this project's packages (`elsewhere.py`), offline, whose Hub cache has nothing but
this model (and, if it is thin, its base models). Leaves out: the real Hub, and real Inference Endpoints.
"""

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.devices import fast_dtype
from processing import BlspKdProcessor
from processing.audio_decoding import audio_info

from .elsewhere import OPTIONS, generate, prompt

ELSEWHERE = Path(__file__).with_name("elsewhere.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVER_TIMEOUT_S = 300
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def as_hub_cache(folder: Path, hf_home: Path, repo_id: str, commit: str = COMMIT):
    """Lay a folder out as the Hub client would after a download: blobs, and a snapshot of links to them."""
    repository = Path(hf_home) / "hub" / repo_folder_name(repo_id=repo_id, repo_type="model")
    snapshot = repository / "snapshots" / commit
    for made in (repository / "refs", repository / "blobs", snapshot):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for index, path in enumerate(sorted(path for path in Path(folder).rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{index:040x}", snapshot / path.relative_to(folder)
        blob.symlink_to(path.absolute())  # a model may be large
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def run_script(
    script: Path,
    *arguments,
    folder: Path,
    flags: list[str] | tuple[str, ...] = ("-I",),
    timeout_s: float | None = None,
    **environment,
) -> str:
    """Run a script in a fresh interpreter that sees none of this one's settings, and return what it prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, *flags, str(script), *map(str, arguments)],
        **_process_options(folder, environment),
        capture_output=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _process_options(folder, environment) -> dict:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    threads = str(torch.get_num_threads())  # another number would sum in another order
    environment = {**kept, "HOME": str(folder), "OMP_NUM_THREADS": threads, **environment}
    return {"cwd": folder, "text": True, "env": environment}


@contextmanager
def elsewhere(folder: Path, repo_id: str, local: dict[str, str] | None = None) -> Iterator[dict]:
    """Emulate a Hub cache with the model in it, and yield the options of [`run_script`] for it.

    The cache also has the base models of a thin checkpoint, linked from `local` or from this machine's Hub cache.

    Args:
        local: see [`local_folders`].
    """
    with tempfile.TemporaryDirectory() as made:
        hf_home = Path(made, "hf_home")
        as_hub_cache(folder, hf_home, repo_id)
        backbones = _backbones(folder)
        for name, revision in {
            each["name_or_path"]: each.get("revision", COMMIT) for each in backbones.values()
        }.items():
            if local is not None and name in local:
                as_hub_cache(Path(local[name]), hf_home, name, commit=revision)
                continue
            repository = repo_folder_name(repo_id=name, repo_type="model")
            (hf_home / "hub" / repository).symlink_to(Path(constants.HF_HUB_CACHE, repository).absolute())
        yield {
            "folder": made,
            "HF_HOME": str(hf_home),
            "HF_MODULES_CACHE": str(hf_home / "modules"),
            "HF_HUB_OFFLINE": "1",
        }


def measure_memory(folder: Path, repo_id: str, sample: dict, local: dict[str, str] | None = None) -> dict | None:
    """Return the peak memory of answering a sample of the card elsewhere, and its seconds; see [`make_card`].

    Args:
        sample: `audio` (relative to `folder`) and `instruction`.
        local: see [`elsewhere`].
    """
    clip = Path(folder, sample["audio"])
    with elsewhere(folder, repo_id, local) as options:
        memory = json.loads(run_script(ELSEWHERE, "memory", repo_id, clip, sample["instruction"], **options))
    return memory and {**memory, "clip_s": audio_info(clip).duration_s}


def verify(
    folder: Path,
    repo_id: str,
    model: BlspKdForCausalLM,
    processor: BlspKdProcessor,
    clip: str | Path,
    local: dict[str, str] | None = None,
) -> list[tuple[str, bool, str]]:
    """Compare a published folder with the model in this process, on one clip.

    Args:
        model, processor: the checkpoint that was published.
        clip (`str` or `os.PathLike`): an audio file, to be transcribed.
        local: see [`elsewhere`].

    Returns:
        (what was checked, whether it is right, what came) of each check.
    """
    clip, instruction = str(Path(clip).absolute()), processor.transcription_instruction
    inputs = prompt(processor, clip, instruction)
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = {"inputs": inputs, "logits": logits, "answer": generate(model, processor, inputs).strip()}
    fast = fast_dtype()
    if fast != "auto" and {str(weight.dtype) for weight in model.parameters()} != {f"torch.{fast}"}:
        expected["handler's answer"] = generate(_load(folder, fast, local or {}), processor, inputs).strip()

    with elsewhere(folder, repo_id, local) as options:
        run_script(ELSEWHERE, "answer", repo_id, clip, instruction, Path(options["folder"], "results.pt"), **options)
        results = torch.load(Path(options["folder"], "results.pt"))
        if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("fastapi"):
            results["answers"]["transformers serve"] = ask_server(repo_id, clip, instruction, options)

    return compare(results, expected)


def compare(results: dict, expected: dict) -> list[tuple[str, bool, str]]:
    """Compare what came elsewhere (the file of `elsewhere.py`) with inputs, logits and answer here; see [`verify`].

    The handler's answer may have its own expectation, because it chooses a fast dtype.
    """
    inputs, answers = expected["inputs"], results["answers"]
    of_handler = expected.get("handler's answer", expected["answer"])
    right = {name: of_handler if name.startswith("handler.py") else expected["answer"] for name in answers}
    same_inputs = set(results["inputs"]) == set(inputs) and all(
        torch.equal(results["inputs"][name], values) for name, values in inputs.items()
    )
    checks = [
        ("network is left alone", not results["attempts"], ", ".join(results["attempts"]) or "no attempt"),
        ("AutoProcessor: inputs", same_inputs, "equal" if same_inputs else "differ"),
        *((f"{name}: logits", *_equal(values, expected["logits"])) for name, values in results["logits"].items()),
        *((name, text.strip() == right[name], repr(text.strip())) for name, text in answers.items()),
    ]
    if "transformers serve" not in answers:
        checks.append(("transformers serve", True, "not checked: needs the extra transformers[serving]"))
    return checks


def ask_server(repo_id: str, clip: str | Path, instruction: str, options: dict) -> str:
    """Return the answer of `transformers serve` to a chat completion with the clip in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in options.items() if name != "folder"}
    audio = {"data": base64.b64encode(Path(clip).read_bytes()).decode(), "format": Path(clip).suffix.lstrip(".")}
    content = [{"type": "text", "text": instruction}, {"type": "input_audio", "input_audio": audio}]
    question = {"model": repo_id, "messages": [{"role": "user", "content": content}], "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps({**question, "max_tokens": OPTIONS["max_new_tokens"]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with open(Path(options["folder"], "server.log"), "w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-I", str(ELSEWHERE), "serve", repo_id, str(port)],
            **_process_options(options["folder"], environment),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health")
            with LOOPBACK.open(request, timeout=SERVER_TIMEOUT_S) as response:
                return json.load(response)["choices"][0]["message"]["content"]
        except (OSError, RuntimeError) as error:
            log.seek(0)
            last_line = (log.read().splitlines() or [""])[-1]
            return f"no answer: {error}: {last_line}"
        finally:
            server.kill()
            server.wait()


def _wait_for(server, url: str):
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return LOOPBACK.open(url).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def _load(folder: Path, dtype: torch.dtype | str, local: dict[str, str]) -> BlspKdForCausalLM:
    """Load what was published in another dtype. Of a thin one, the base models' own weights are converted."""
    named = {part: each["name_or_path"] for part, each in _backbones(folder).items()}
    places = {part: local[name] for part, name in named.items() if name in local}
    given: dict[str, Any] = {"backbones": places} if places else {}
    return BlspKdForCausalLM.from_pretrained(folder, dtype=dtype, **given)


def _backbones(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads(Path(folder, "config.json").read_text()).get("backbones") or {}


def _equal(values: torch.Tensor, expected: torch.Tensor) -> tuple[bool, str]:
    if values.shape != expected.shape:
        return False, f"shape {tuple(values.shape)}, expected {tuple(expected.shape)}"
    is_equal = torch.equal(values, expected)
    return is_equal, "equal" if is_equal else f"differ by up to {(values - expected).abs().max().item():.2e}"
