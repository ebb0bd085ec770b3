"""Greedy generation by its definition, prompts of several rows, and how prompts look expanded."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from .prompts import SAMPLING_RATE

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
ADAPTERS = ["cformer", {"type": "subsampler", "bottleneck_dim": 8}]
AUDIO = "<|audio|>"


def expand(model, inputs):
    """Replace each placeholder by the speech tokens of its clip, token by token.

    Returns:
        `input_ids`, `attention_mask` and `is_speech` of shape (B, L), and `embeds` of shape (B, L, D).
    """
    clips = {name: inputs.get(name) for name in ("input_features", "input_features_mask", "num_speech_tokens")}
    audio = model.get_audio_features(**clips)
    spoken = (vectors[:count] for vectors, count in zip(audio.pooler_output, audio.num_speech_tokens.tolist()))
    mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
    embed = model.get_input_embeddings()
    padding = (0, 0, False, embed(torch.tensor(0)))
    rows = []
    for ids, attended in zip(inputs["input_ids"].tolist(), mask.tolist()):
        rows.append([])
        for token, is_token in zip(ids, attended):
            if is_token and token == model.config.audio_token_id:
                rows[-1] += [(0, 1, True, vector) for vector in next(spoken)]
            elif is_token:
                rows[-1].append((token, 1, False, embed(torch.tensor(token))))
    width = max(map(len, rows))
    is_left_padded = bool(mask[:, -1].all())
    for row in rows:
        place = 0 if is_left_padded else len(row)
        row[place:place] = [padding] * (width - len(row))
    ids, mask, is_speech = (torch.tensor([[each[place] for each in row] for row in rows]) for place in range(3))
    embeds = torch.stack([torch.stack([vector for *_, vector in row]) for row in rows])
    return SimpleNamespace(input_ids=ids, attention_mask=mask, is_speech=is_speech, embeds=embeds)


def partial_lora_at(model, is_speech):
    return nullcontext() if model.plora is None else model.plora.at(is_speech)


def literal_greedy(model, inputs, num_tokens):
    """One prompt, no cache, no `generate`: the arg max of a fresh forward pass per token."""
    prompt = expand(model, inputs)
    embeds, is_speech = prompt.embeds, prompt.is_speech
    tokens = []
    for _ in range(num_tokens):
        with partial_lora_at(model, is_speech):
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        logits[2] = -torch.inf  # min_new_tokens: no end of turn
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
        is_speech = torch.nn.functional.pad(is_speech, (0, 1), value=False)
    return tokens


def process(processor, texts, clips_of_row):
    clips = [waveform for clips in clips_of_row for waveform in clips]
    return dict(processor(texts, clips or None, sampling_rate=SAMPLING_RATE))


def expanded_mask(model, inputs):
    """Return the mask of a cache of these prompts: 1 at tokens and speech tokens, 0 at padding."""
    if "input_features" not in inputs:
        return inputs["attention_mask"]
    return expand(model, inputs).attention_mask
