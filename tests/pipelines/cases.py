"""Clips, chats and models that say a given text, for all tests of pipelines."""

import itertools

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.helpers.audio_files import encode
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.spoken_cases import INSTRUCTION, base64_of

TASKS = ("audio-text-to-text", "automatic-speech-recognition")
SHORT = {"max_new_tokens": 5}
DURATIONS_S = (0.5, 1.3, 0.9, 2.1)
WAVEFORM = clip(DURATIONS_S[0])
CONTENTS = encode(WAVEFORM)
DATA_URL = f"data:audio/wav;base64,{base64_of(CONTENTS)}"


def clips_of_all_durations() -> list[tuple]:
    return [(clip(duration_s), SAMPLING_RATE) for duration_s in DURATIONS_S]


def text_of(result: dict) -> str:
    [text] = result.values()
    return text


def direct(model, processor, waveform, instruction=INSTRUCTION, **options):
    """The answer of the model itself, and the output of `generate`."""
    content = [{"type": "text", "text": instruction}] if instruction else []
    content.append({"type": "audio", "audio": (waveform, SAMPLING_RATE)})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = model.generate(**inputs, **{**SHORT, **options})
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), output


def chat(*blocks, instruction=INSTRUCTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": instruction}, *blocks]}]


class Says(LogitsProcessor):
    """Makes the model say given tokens in turn, and tells at which of them it is."""

    def __init__(self, processor, text):
        self.tokens = itertools.cycle(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.num_said = 0

    def __call__(self, input_ids, scores):
        self.num_said += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0.0
        return forced


def saying(processor, text=" the red cat ran", number=8):
    says = Says(processor, text)
    return says, {"logits_processor": LogitsProcessorList([says]), "max_new_tokens": number}
