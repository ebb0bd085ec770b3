"""Greedy generation by its definition, prompts of several rows, and how prompts look expanded."""

import torch

from .prompts import SAMPLING_RATE

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
ADAPTERS = ["cformer", {"type": "subsampler", "bottleneck_dim": 8}]
AUDIO = "<|audio|>"


def hear(model, inputs):
    """The expanded prompts."""
    prompt = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "labels")}
    clips = {name: inputs.get(name) for name in ("input_features", "input_features_mask", "num_speech_tokens")}
    return model._expand_prompt(model._prompt(0, **prompt), **clips)[0]


def literal_greedy(model, inputs, num_tokens):
    """One prompt, no cache, no `generate`: the arg max of a fresh forward pass per token."""
    prompt = hear(model, {**inputs, "attention_mask": None})
    embeds = model._embed(prompt.input_ids, prompt.is_speech, prompt.speech_embeds)
    is_speech = prompt.is_speech
    tokens = []
    for _ in range(num_tokens):
        with model._partial_lora_at(is_speech):
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
    """What a cache of these prompts holds: 1 at tokens and speech tokens, 0 at padding."""
    if "input_features" not in inputs:
        return inputs["attention_mask"]
    return hear(model, inputs).attention_mask
