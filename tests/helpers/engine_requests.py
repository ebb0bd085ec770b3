"""Requests of all kinds for an engine behind our encoder, and what `generate` answers to the same chats."""

import base64
import io
from pathlib import Path

import numpy as np
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.audio_loading import load_audio

TINY_WORLD = Path(__file__).parents[2] / "examples" / "tiny_world"
INSTRUCTIONS = ("Repeat the words.", "Name the person.", "How much is it?", "Give the key words in Spanish.")
TEXTS = ("victor had three bottles and sold two", "two two eight six three", "grace said the museum was really bad")
KINDS = ("text", "one clip", "several clips", "two turns", "clip first")


def tiny_world(plora: bool = False) -> tuple[BlspKdForCausalLM, BlspKdProcessor]:
    """Return the repository's model in float32, with random partial LoRA if asked, and its processor."""
    options = {"plora": {"r": 4}} if plora else {}
    model = BlspKdForCausalLM.from_pretrained(TINY_WORLD / "model", dtype=torch.float32, **options).eval()
    if plora:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.plora.parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, BlspKdProcessor.from_pretrained(TINY_WORLD / "model")


def chats_of_all_kinds(number: int, seed: int = 0) -> list[tuple[str, list[dict]]]:
    """Return so many pairs of a kind and a chat. Clips are parts of the repository's, 0.8 s and longer."""
    rng = np.random.default_rng(seed)
    recordings = [load_audio(path, 16_000) for path in sorted((TINY_WORLD / "clips").glob("*.flac"))]

    def text(choices):
        return {"type": "text", "text": choices[rng.integers(len(choices))]}

    def audio():
        recording = recordings[rng.integers(len(recordings))]
        start = rng.integers(len(recording) - 12_800)
        return {"type": "audio", "audio": (recording[start : start + rng.integers(12_800, len(recording))], 16_000)}

    def user(*content):
        return {"role": "user", "content": list(content)}

    make = {
        "text": lambda: [{"role": "user", "content": f"{text(INSTRUCTIONS)['text']}\n{text(TEXTS)['text']}"}],
        "one clip": lambda: [user(text(INSTRUCTIONS), audio())],
        "several clips": lambda: [user(text(INSTRUCTIONS), audio(), text(TEXTS), audio(), audio())],
        "two turns": lambda: [
            {"role": "system", "content": "Be brief."},
            user(text(INSTRUCTIONS), audio()),
            {"role": "assistant", "content": "victor"},
            user(text(INSTRUCTIONS), audio()),
        ],
        "clip first": lambda: [user(audio(), text(INSTRUCTIONS))],
    }
    return [(KINDS[index % len(KINDS)], make[KINDS[index % len(KINDS)]]()) for index in range(number)]


@torch.inference_mode()
def as_part(model, processor, clip) -> dict:
    """Return the content part that stands for a clip."""
    features = {name: torch.as_tensor(values) for name, values in processor.extract_features([clip]).items()}
    heard = model.get_audio_features(**features, return_dict=True)
    return embeds_part(heard.pooler_output[0, : heard.num_speech_tokens[0]])


def embeds_part(embeds: torch.Tensor) -> dict:
    file = io.BytesIO()
    torch.save(embeds.clone(), file)
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


def as_messages(model, processor, chat: list[dict]) -> list[dict]:
    """Return a chat as the engine takes it: each audio block is a part of embeddings, all else as it is."""

    def blocks(content):
        return [as_part(model, processor, each["audio"]) if each["type"] == "audio" else each for each in content]

    return [
        message if isinstance(message["content"], str) else {**message, "content": blocks(message["content"])}
        for message in chat
    ]


def input_audio(chat: list[dict]) -> list[dict]:
    """Return a chat as a client of OpenAI's protocol writes it: each clip is a WAV file in base64."""
    import soundfile

    def block(each):
        if each["type"] != "audio":
            return each
        file = io.BytesIO()
        soundfile.write(file, *each["audio"], format="WAV", subtype="FLOAT")
        return {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"},
        }

    return [
        message if isinstance(message["content"], str) else {**message, "content": list(map(block, message["content"]))}
        for message in chat
    ]


def prompt_and_answer(model, processor, chat: list[dict], max_new_tokens: int = 24) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, with a 0 for each speech token, and those of `generate`'s greedy answer."""
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    counts = iter(())
    if "input_features" in inputs:
        features = {name: inputs[name] for name in ("input_features", "input_features_mask")}
        with torch.inference_mode():
            counts = iter(model.get_audio_features(**features, return_dict=True).num_speech_tokens.tolist())
    prompt = [each for token in ids for each in ([0] * next(counts) if token == processor.audio_token_id else [token])]
    return prompt, answer[0, len(ids) :].tolist()
