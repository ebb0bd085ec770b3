"""Prompts of random embeddings for tests of partial LoRA, and logits with it at given positions."""

import torch


def prompt(model, seed=0, length=9):
    generator = torch.Generator().manual_seed(seed)
    width = model.config.get_text_config().hidden_size
    embeds = torch.randn(2, length, width, generator=generator).to(model.dtype)
    is_speech = torch.zeros(2, length, dtype=torch.bool)
    is_speech[0, 3:6] = is_speech[1, 2:7] = True
    return embeds, is_speech


def logits_at(model, embeds, is_speech):
    with model.plora.at(is_speech):
        return model.language_model(inputs_embeds=embeds).logits
