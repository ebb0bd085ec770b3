"""Does a model that one version of the libraries saved answer the same under another?

    python -m tests.reliability.other_version OTHER_PYTHON

OTHER_PYTHON is the interpreter of an environment with this project and other versions of its libraries. Small models
are saved here and there; then both environments answer from what each of them saved, in processes that have nothing but
the code that was saved with it. Leaves out: downloads, and real backbones.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ELSEWHERE = ROOT / "processing" / "publishing" / "elsewhere.py"
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
# Between versions of transformers, masks and order of operations may differ, but not what is computed.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def save(folder: Path):
    """Save a full model, a full one with partial LoRA, and a thin one beside its backbones; and a clip to ask of."""
    import soundfile
    import torch
    from transformers import AutoModelForCausalLM, WhisperFeatureExtractor

    from modeling_blsp_kd import BlspKdForCausalLM
    from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
    from processing import BlspKdProcessor
    from tests.helpers.models import make_model, speech_config, text_config
    from tests.helpers.prompts import SAMPLING_RATE, clip, make_tokenizer

    backbones = [folder / "speech", folder / "text"]
    torch.manual_seed(1)
    TrueLengthWhisperEncoder(speech_config()).save_pretrained(backbones[0])
    WhisperFeatureExtractor().save_pretrained(backbones[0])
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(backbones[1])
    make_tokenizer().save_pretrained(backbones[1])
    processor = BlspKdProcessor.from_backbones(*backbones)
    options = {"audio_token_id": processor.audio_token_id, "plora": True, "thin": True}
    thin = BlspKdForCausalLM.from_backbones(*backbones, **options)
    for name, parameter in thin.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(std=0.3)
    models = {"full": make_model(), "partial LoRA": make_model(plora=True), "sliding windows": make_model("gemma2")}
    for name, model in {**models, "thin": thin}.items():
        model.save_pretrained(folder / "models" / name)
        processor.save_pretrained(folder / "models" / name)
    soundfile.write(folder / "clip.wav", clip(0.8), SAMPLING_RATE, subtype="FLOAT")


def answer(folder: Path, results_path: Path):
    """Ask every saved model in the ways that depend on names which transformers has changed, without this project."""
    import runpy

    attempts = runpy.run_path(str(ELSEWHERE))["leave_package_and_network"]()

    import torch
    import transformers

    results = {}
    for saved in sorted((folder / "models").iterdir()):
        processor = transformers.AutoProcessor.from_pretrained(saved, trust_remote_code=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        content = [{"type": "text", "text": "repeat the words"}, {"type": "audio", "path": str(folder / "clip.wav")}]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        question = [{"role": "user", "content": content}]
        batch = processor.apply_chat_template([question, [{"role": "user", "content": "the red cat"}]], **template)
        first = processor.apply_chat_template(question, **template)
        told = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        turn = first["input_ids"].shape[1]
        again = {
            "input_ids": torch.cat([told.sequences, first["input_ids"]], 1),
            "input_features": first["input_features"].repeat(2, 1, 1),
            "input_features_mask": first["input_features_mask"].repeat(2, 1),
        }
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        with torch.no_grad():
            logits = model(**batch).logits
        results[saved.name] = {
            "inputs": batch["input_ids"],
            "features": batch["input_features"],
            "logits": logits,
            "tokens": model.generate(**batch, **GREEDY),
            "tokens of a prompt in chunks": model.generate(**first, **GREEDY, prefill_chunk_size=4),
            "tokens of an answer": told.sequences[:, turn:],
            "tokens of a conversation": model.generate(**again, **GREEDY),
            "tokens after a cache": model.generate(**again, **GREEDY, past_key_values=told.past_key_values),
            "times": model.generate(**first, **GREEDY, return_timestamps=True).token_timestamps.nan_to_num(-1),
        }
    if attempts:
        raise RuntimeError(f"The network was asked: {attempts}")
    torch.save(results, results_path)


def differences(results: dict, expected: dict) -> list[str]:
    """Return what two environments answer differently: token ids in any way, numbers beyond rounding."""
    import torch

    found = [f"{name}: only one has it" for name in sorted(results.keys() ^ expected.keys())]
    for name in sorted(results.keys() & expected.keys()):
        for what, values in expected[name].items():
            got = results[name][what]
            if got.shape != values.shape:
                found.append(f"{name}: {what}: shape {tuple(got.shape)}, not {tuple(values.shape)}")
            elif values.dtype.is_floating_point and not torch.allclose(got, values, **TOLERANCE):
                found.append(f"{name}: {what}: differ by up to {(got - values).abs().max().item():.1e}")
            elif not values.dtype.is_floating_point and not torch.equal(got, values):
                found.append(f"{name}: {what}: {got.tolist()}, not {values.tolist()}")
    return found


def run(python, command: str, *arguments, home: Path):
    """Run a command of this file in another environment.

    Raises:
        RuntimeError: it failed.
    """
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    line = [str(python), "-m", "tests.reliability.other_version", command, *map(str, arguments)]
    done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")


def compare(pythons: list, folder: Path) -> list[str]:
    """Let each environment save models, and all of them answer; returns what differs from the first answers."""
    import torch

    found, answers = [], {}
    for saver, python in enumerate(pythons):
        saved = folder / f"saved_{saver}"
        saved.mkdir()
        run(python, "save", saved, home=folder)
        for asked, other in enumerate(pythons):
            home = folder / f"home_{saver}_{asked}"  # with modules of its own: the saved code is copied there
            home.mkdir()
            run(other, "answer", saved, home / "results.pt", home=home)
            answers[saver, asked] = torch.load(home / "results.pt")
            for line in differences(answers[saver, asked], answers[0, 0]):
                found.append(f"saved by {python}, asked in {other}: {line}")
    return found


def main():
    if sys.argv[1] in ("save", "answer"):
        return {"save": save, "answer": answer}[sys.argv[1]](*map(Path, sys.argv[2:]))
    with tempfile.TemporaryDirectory() as folder:
        found = compare([sys.executable, sys.argv[1]], Path(folder))
    sys.stdout.write("\n".join(found or ["Each environment answers the same from what either of them saved."]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
