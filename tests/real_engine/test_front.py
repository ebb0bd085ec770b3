"""The front before the real vLLM: what clients get is what `generate` answers, with partial LoRA and without.

Opt-in, as `test_real_engine.py`. Leaves out: load and faults.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import soundfile

from processing.audio_loading import load_audio
from tests.helpers.engine_answers import CALLS, SAMPLES, STRUCTURED, is_same, told, told_in_pieces, who_is_told
from tests.helpers.engine_requests import TINY_WORLD, as_messages, chats_of_all_kinds, input_audio, prompt_and_answer
from tests.helpers.servers import ROOT, start_front
from tests.real_engine.test_real_engine import MAX_NEW_TOKENS, NUM_REQUESTS, chat, in_pieces

pytestmark = pytest.mark.vllm
SENTENCES = {"bottles": "victor had three bottles and sold two", "digits": "four three nine nine two zero"}


def start(model, processor, engine, folder):
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return start_front(folder / "model", engine, folder / "log", "--dtype", "float32", "--encoder_timeout_s", 600)


@pytest.fixture(scope="module", params=["llm", "speech"])
def served(request, models, engine, tmp_path_factory):
    """A front, its client, and the model and processor that it serves."""
    folder = tmp_path_factory.mktemp("front")
    front = start(*models[request.param], engine, folder)
    try:
        front.wait_until_ready()
        with httpx.Client(base_url=front.url, timeout=600) as client:
            yield front, client, *models[request.param]
    finally:
        front.stop()


def test_two_hundred_requests_of_all_kinds_are_answered_as_generate_does(served):
    """A hundred with partial LoRA and a hundred without; half are streamed, and up to sixteen run at the same time."""
    _, client, model, processor = served
    name = client.get("/v1/models").json()["data"][0]["id"]
    chats = chats_of_all_kinds(NUM_REQUESTS // 2, seed=1)

    def ask(index):
        messages = input_audio(chats[index][1])
        if index % 2:
            pieces = in_pieces(client, messages, model=name)
            return sum((piece["choices"][0].get("token_ids") or [] for piece in pieces), [])
        return chat(client, messages, model=name).json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(chats))))
    expected = [prompt_and_answer(model, processor, each, MAX_NEW_TOKENS)[1] for _, each in chats]
    assert [(index, kind) for index, (kind, _) in enumerate(chats) if answers[index] != expected[index]] == []


CONSTRAINED = {**STRUCTURED, **CALLS, "a pattern": {"structured_outputs": {"regex": "(grace|victor|adam)"}}}
FIELDS = {
    **CONSTRAINED,
    "samples": {**SAMPLES, "logprobs": True, "top_logprobs": 2},
    "an end and log-probs": {"stop": ["c", "three"], "logprobs": True, "top_logprobs": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 8},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_act_as_in_a_request_with_the_vectors_themselves(served, real, kind):
    """The answer is that of the engine to the prompt that the front makes, at once and in pieces."""
    _, client, model, processor = served
    name = client.get("/v1/models").json()["data"][0]["id"]
    clip = {"type": "audio", "audio": (load_audio(TINY_WORLD / "clips/bottles.flac", 16_000), 16_000)}
    instruction = {"type": "text", "text": "Name the person." if kind in CONSTRAINED else "Repeat the words."}
    # Samples are of a short prompt, because vLLM on CPUs ends if it reads a request with a seed in chunks.
    messages = [{"role": "user", "content": [clip] if kind == "samples" else [instruction, clip]}]
    options = {"max_tokens": 24, **FIELDS[kind]}
    direct = {"model": "llm" if model.plora is None else "speech", **options}
    expected = told(chat(real, as_messages(model, processor, messages), **direct).json())
    answer = told(chat(client, input_audio(messages), model=name, **options).json())
    options["stream_options"] = {"include_usage": True}
    pieces = told_in_pieces(in_pieces(client, input_audio(messages), model=name, **options))
    assert is_same(answer, expected) and is_same(pieces, expected), (answer, pieces, expected)
    choices = answer["choices"]
    if kind in CONSTRAINED:
        assert who_is_told(answer) and choices[0]["finish_reason"] != "length"
        assert bool(choices[0]["calls"]) == (kind in CALLS)
    if kind == "samples":
        assert len(choices) == 3 and len({choice["content"] for choice in choices}) > 1
    if kind == "an end and log-probs":
        assert "c" not in choices[0]["content"] and answer["logprobs"]


def test_evaluation_scores_the_same_answers(served, tmp_path):
    """`evaluate.py --engine_url` beside the same command with the model in its own process."""
    front, _, model, processor = served
    rows = []
    for name, text in SENTENCES.items():
        soundfile.write(tmp_path / f"{name}.wav", *soundfile.read(TINY_WORLD / f"clips/{name}.flac"))
        rows.append(
            {"id": name, "audio": f"{name}.wav", "text": text, "instruction": "Repeat the words.", "answer": text}
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = [sys.executable, ROOT / "examples/evaluate.py", "--model", tmp_path / "model", "--dtype", "float32"]
    command += ["--manifest", tmp_path / "rows.jsonl", "--tasks", "answers,transcripts", "--num_resamples", "20"]
    for output, options in {"here": (), "there": ("--engine_url", f"{front.url}/v1")}.items():
        subprocess.run([*command, "--output", tmp_path / output, *options], check=True, cwd=ROOT)
    here, there = (json.loads((tmp_path / name / "results.json").read_text())["systems"] for name in ("here", "there"))
    assert here == there
    assert here["text"]["answers"]["exact_match"]["value"] > 0.4
