"""Turns and blocks of chats, and what a processor makes of them."""

import torch

from .prompts import SAMPLING_RATE


def user(*content):
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def text_block(text):
    return {"type": "text", "text": text}


def tokenized(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"sampling_rate": SAMPLING_RATE, **kwargs},
    )


def assert_same(first, second):
    assert sorted(first) == sorted(second)
    for name, values in first.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(second[name])), name
