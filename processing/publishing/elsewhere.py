"""Load and run a published model as on a machine without this project; `verify.py` starts this file as a process.

    python -I elsewhere.py answer MODEL CLIP INSTRUCTION RESULTS
    python -I elsewhere.py memory MODEL CLIP INSTRUCTION
    python -I elsewhere.py serve MODEL PORT

It cannot import this project's packages and reaches no network, and is given a Hub cache that holds just the model.
Leaves out: comparing, which is `verify.py`'s work. Imports nothing of this project, not even its neighbours.
"""

import base64
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PACKAGES = ("modeling_blsp_kd", "processing")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM")
OPTIONS = {"max_new_tokens": 32, "do_sample": False}


def leave_package_and_network() -> list[str]:
    """Make this project's packages unknown and every connection an error.

    Returns:
        list to which each attempt to leave this machine is appended.

    Raises:
        RuntimeError: a package can be imported all the same.
    """
    attempts = []

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in PACKAGES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def watch(event, args):
        if event not in ("socket.connect", "socket.getaddrinfo"):
            return
        host = args[0] if event == "socket.getaddrinfo" else args[1][0] if isinstance(args[1], tuple) else args[1]
        if host not in LOOPBACK:
            attempts.append(f"{event} {host}")
            raise OSError("there is no network here")

    sys.meta_path.insert(0, NotInstalled())
    sys.addaudithook(watch)
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} can be imported, so nothing that follows would prove anything.")
    return attempts


def main():
    command, source, *arguments = sys.argv[1:]
    attempts = leave_package_and_network()
    if command == "serve":
        serve(source, arguments[0])
    elif command == "memory":
        sys.stdout.write(json.dumps(memory(source, *arguments)))
    else:
        clip, instruction, results_path = arguments
        answer(source, clip, instruction, results_path, attempts)


def answer(source: str, clip: str, instruction: str, results_path: str, attempts: list):
    """Ask in every way that the model card names, and leave inputs, logits and answers in a file.

    Args:
        instruction: the processor's for transcription, which speech recognition takes by itself.
    """
    import torch
    import transformers

    remote = {"trust_remote_code": True}
    processor = transformers.AutoProcessor.from_pretrained(source, **remote)
    inputs = prompt(processor, clip, instruction)
    results = {"inputs": dict(inputs), "logits": {}, "answers": {}}

    def auto_model(name):
        model = getattr(transformers, name).from_pretrained(source, **remote)
        with torch.no_grad():
            results["logits"][name] = model(**inputs).logits
        return generate(model, processor, inputs)

    def ask():
        pipeline = transformers.pipeline("audio-text-to-text", model=source, **remote)
        return pipeline(clip, instruction=instruction, **OPTIONS)["generated_text"]

    def transcribe():
        pipeline = transformers.pipeline("automatic-speech-recognition", model=source, **remote)
        return pipeline(clip, **OPTIONS)["text"]

    def chat():
        pipeline = transformers.pipeline("any-to-any", model=source, **remote)
        answered = pipeline(text=conversation(clip, instruction), return_full_text=False, generate_kwargs=OPTIONS)
        return answered[0]["generated_text"]

    def send_file():
        return endpoint(source)({"inputs": Path(clip).read_bytes(), "parameters": OPTIONS})["text"]

    def send_base64():
        encoded = base64.b64encode(Path(clip).read_bytes()).decode()
        body = {"inputs": encoded, "parameters": {"instruction": instruction, **OPTIONS}}
        return endpoint(source)(body)["generated_text"]

    ways: dict[str, Callable[[], str]] = {
        f"{name} + AutoProcessor": partial(auto_model, name) for name in MODEL_CLASSES
    }
    ways |= {
        'pipeline("audio-text-to-text")': ask,
        'pipeline("automatic-speech-recognition")': transcribe,
        'pipeline("any-to-any")': chat,
        "handler.py, a file": send_file,
        "handler.py, base64 with an instruction": send_base64,
    }
    for name, way in ways.items():
        try:
            results["answers"][name] = way()
        except Exception as error:  # of any kind, because one failure must not hide the other results
            results["answers"][name] = f"{type(error).__name__}: {error}"
    torch.save({**results, "attempts": attempts}, results_path)


def endpoint(source: str) -> Any:
    """Load the handler as the toolkit of Inference Endpoints does, by file."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source))
    return runpy.run_path(str(folder / "handler.py"))["EndpointHandler"](str(folder))


def memory(source: str, clip: str, instruction: str) -> dict | None:
    """Measure resident memory (10^6 bytes): before loading, with all libraries and code imported, and at the peak of
    loading and answering. Return None where Linux does not report it."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    status = Path("/proc/self/status")
    get_class_from_dynamic_module("modeling_blsp_kd.BlspKdForCausalLM", source)
    get_class_from_dynamic_module("processing_blsp_kd.BlspKdProcessor", source)
    before = resident_mb(status, "VmRSS")
    processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    generate(model, processor, prompt(processor, clip, instruction))
    peak = resident_mb(status, "VmHWM")
    return (
        None
        if peak is None
        else {"dtype": str(model.dtype).removeprefix("torch."), "peak_mb": peak, "before_mb": before}
    )


def resident_mb(status: Path, name: str) -> float | None:
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:")), None)


def serve(source: str, port: str):
    from transformers.cli.transformers import app

    app(["serve", source, "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port])


def conversation(clip: str, instruction: str) -> list[dict]:
    content = [{"type": "text", "text": instruction}, {"type": "audio", "path": clip}]
    return [{"role": "user", "content": content}]


def prompt(processor: Any, clip: str, instruction: str) -> Any:
    return processor.apply_chat_template(
        conversation(clip, instruction), add_generation_prompt=True, tokenize=True, return_dict=True
    )


def generate(model: Any, processor: Any, inputs: Any) -> str:
    output = model.generate(**inputs, **OPTIONS)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
