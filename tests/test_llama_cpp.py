"""llama.cpp behind our encoder and adapter answers as `generate` does, with partial LoRA and without.

Opt-in (`BLSP_KD_LLAMA_CPP=llama.cpp pytest -m llama_cpp -n 0`): needs llama-cpp-python, and a folder with llama.cpp's
sources, whose converters write the GGUF files; these need sentencepiece. Leaves out: 16 and fewer bits.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.infer_llama_cpp import LlamaCpp, answer
from processing.serving.model_without_llm import load_without_llm
from tests.helpers.engine_requests import TINY_WORLD, chats_of_all_kinds, prompt_and_answer, tiny_world

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
SOURCES = os.environ.get("BLSP_KD_LLAMA_CPP")
if SOURCES is None:
    pytest.skip("needs BLSP_KD_LLAMA_CPP, a folder with llama.cpp's sources", allow_module_level=True)

pytestmark = pytest.mark.llama_cpp
ROOT = Path(__file__).parents[1]
NUM_CHATS, MAX_NEW_TOKENS = 40, 24
# The converters know the tokenizers of published LLMs by a hash, and refuse the tiny world's. What they write of it is
# not used: token ids come from our processor.
CONVERT = """
import runpy, sys
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a model with partial LoRA and of its GGUF files, the model, and its processor."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    model, processor = tiny_world(plora=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.plora.save_pretrained(folder / "speech")
    # The model's own, because its weights are rounded, and the LLM's own tokenizer, because the converter allows for no
    # token beyond the vocabulary, as the placeholder of audio is.
    llm = folder / "llm"
    tiny_world()[0].language_model.save_pretrained(llm)
    AutoTokenizer.from_pretrained(TINY_WORLD / "llm").save_pretrained(llm)
    searched = (SOURCES, f"{SOURCES}/gguf-py", os.environ.get("PYTHONPATH", ""))
    for script, *arguments in (
        ("convert_hf_to_gguf.py", llm, "--outfile", folder / "llm.gguf"),
        ("convert_lora_to_gguf.py", folder / "speech", "--base", llm, "--outfile", folder / "speech.gguf"),
    ):
        command = [sys.executable, "-c", CONVERT, f"{SOURCES}/{script}", *arguments, "--outtype", "f32"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(searched)})
    return folder, model, processor


@pytest.mark.parametrize("plora", [False, True])
def test_the_same_tokens_in_chats_of_all_kinds(world, plora):
    folder, _, processor = world
    model, _ = tiny_world(plora=plora)
    encoder, _ = load_without_llm(folder / "model")
    llm = LlamaCpp(str(folder / "llm.gguf"), str(folder / "speech.gguf") if plora else None, num_threads=1)
    chats, wrong = chats_of_all_kinds(NUM_CHATS), []
    for index, (kind, chat) in enumerate(chats):
        expected = prompt_and_answer(model, processor, chat, MAX_NEW_TOKENS)[1]
        got = list(answer(llm, encoder, processor, chat, MAX_NEW_TOKENS))
        if got != expected:
            wrong.append((index, kind, got, expected))
    assert wrong == []


def test_partial_lora_changes_answers_at_all(world):
    """Guards the comparison above."""
    _, model, processor = world
    without, _ = tiny_world()
    chats = [chat for kind, chat in chats_of_all_kinds(NUM_CHATS) if kind != "text"]
    differ = [prompt_and_answer(each, processor, chat)[1] for chat in chats for each in (model, without)]
    assert sum(own != other for own, other in zip(differ[::2], differ[1::2])) > 5


def test_the_script_prints_the_answer(world):
    folder, model, processor = world
    script = [sys.executable, ROOT / "examples/infer_llama_cpp.py", "--model", folder / "model"]
    script += ["--llm", folder / "llm.gguf", "--audio", TINY_WORLD / "clips/bottles.flac", "--threads", "1"]
    told = subprocess.run([*script, "--lora", folder / "speech.gguf"], check=True, capture_output=True, text=True)
    audio = {"type": "audio", "path": str(TINY_WORLD / "clips/bottles.flac")}
    chat = [{"role": "user", "content": [{"type": "text", "text": "Repeat the words."}, audio]}]
    ids = prompt_and_answer(model, processor, chat, 64)[1]
    assert told.stdout.strip() == processor.decode(ids, skip_special_tokens=True)
    refused = subprocess.run(script, capture_output=True, text=True)
    assert refused.returncode == 2 and "--lora is missing" in refused.stderr
