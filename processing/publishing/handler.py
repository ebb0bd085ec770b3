"""Serves a BLSP-KD model from a Hugging Face Inference Endpoint.

Follows the contract of custom handlers: `EndpointHandler(model_dir)`, called with `{"inputs": ..., "parameters": ...}`
for each request; an exception becomes an answer of status 400 with its message. Leaves out: streaming, several inputs
in one request, and anything that would make the server open a path or a URL.

What a request may hold:

- an audio file as its body (`audio/wav`, `audio/flac`, `audio/ogg`, `audio/mpeg`, `audio/webm`, `audio/m4a`), or
  `{"inputs": base64}`: gives what is said, `{"text": ...}`;
- `{"inputs": {"audio": base64, "instruction": text}}`: gives the answer, `{"generated_text": ...}`;
- `{"inputs": messages}`, a chat of `{"role": "user", "content": [{"type": "audio", "audio": base64}]}`: likewise.

A data URL may stand for base64, and OpenAI's `input_audio` for the block of a chat. `parameters`, in the JSON or in the
query string, are those of `PARAMETERS` below.
"""

import json
import os
from numbers import Real
from typing import Any

# torch and oneDNN keep 1,024 prepared convolutions each, up to 100 kB of memory for every one. Encoders that take the
# waveform meet an ever new length with every clip.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MAX_AUDIO_BYTES = 32 * 2**20
MAX_DURATION_S = 600.0
# Text of the prompt and longest answer. Audio adds some tokens a second, and MAX_DURATION_S bounds them.
MAX_TOTAL_TOKENS = 4096

# Each with its type and the smallest and largest value, or the values, that it may have.
PARAMETERS: dict[str, tuple[Any, Any, Any]] = {
    "instruction": (str, 1, 4000),  # characters
    "max_new_tokens": (int, 1, 1024),
    "do_sample": (bool, False, True),
    "temperature": (float, 0.01, 10.0),
    "top_p": (float, 0.01, 1.0),
    "top_k": (int, 1, 1000),
    "num_beams": (int, 1, 4),
    "repetition_penalty": (float, 0.1, 10.0),
    "return_timestamps": (("word", "token", True, False), None, None),
    "chunk_length_s": (float, 1.0, MAX_DURATION_S),
    "stride_length_s": (float, 0.0, MAX_DURATION_S),
    # Options of the LLM's chat template, an object; characters of its JSON.
    "chat_template_kwargs": (dict, 0, 1000),
}
OF_SAMPLING = ("temperature", "top_p", "top_k")
OF_TRANSCRIPTION = ("return_timestamps", "chunk_length_s", "stride_length_s")
# Names under which clients of the speech recognition task nest what is for `generate`.
NESTED = ("generate_kwargs", "generation_parameters")


class EndpointHandler:
    """One model, loaded once; called with one request at a time."""

    def __init__(self, path: str = ""):
        """Load the repository folder `path`: its model, its processor and its pipelines."""
        fast_dtype = get_class_from_dynamic_module("devices.fast_dtype", path)
        self.answers = pipeline("audio-text-to-text", model=path, trust_remote_code=True, dtype=fast_dtype())
        pipelines = self.answers.model.config.custom_pipelines
        transcribing = get_class_from_dynamic_module(pipelines["automatic-speech-recognition"]["impl"], path)
        # The model's own code reads audio.
        self.audio_budget = get_class_from_dynamic_module("spoken_inputs.AudioBudget", path)
        self.transcribes = transcribing(model=self.answers.model, processor=self.answers.processor)

    def __call__(self, data: dict) -> dict:
        """Answer a request.

        Returns:
            `{"text": str}`, with `"chunks"` where timestamps are asked for, or `{"generated_text": str}`.

        Raises:
            ValueError, TypeError: the request is unusable; the message says why, for the client to read.
        """
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError(
                "A request needs 'inputs': an audio file, base64 of one, an object with 'audio', or a chat."
            )
        parameters = read_parameters(data.get("parameters"))
        inputs = read_inputs(data["inputs"], self.audio_budget(MAX_AUDIO_BYTES, MAX_DURATION_S))
        if isinstance(inputs, dict) and "instruction" in inputs:
            if "instruction" in parameters:
                raise ValueError("The instruction is given twice, in 'inputs' and in 'parameters'. Give it once.")
            parameters["instruction"] = _checked("instruction", inputs.pop("instruction"))
        is_chat = isinstance(inputs, list)
        if is_chat and "instruction" in parameters:
            raise ValueError("A chat holds its instructions itself. Leave out the parameter 'instruction'.")
        self._check_length(inputs, parameters)
        if not is_chat and "instruction" not in parameters:
            return self.transcribes(inputs, **parameters)
        misplaced = sorted(set(parameters) & set(OF_TRANSCRIPTION))
        if misplaced:
            raise ValueError(f"{misplaced} are for transcription: an audio without an instruction.")
        return self.answers(inputs, **parameters)

    def _check_length(self, inputs, parameters: dict):
        options = parameters.get("chat_template_kwargs")
        texts = [parameters.get("instruction", ""), json.dumps(options) if options else ""]
        if isinstance(inputs, list):
            for message in inputs:
                content = message["content"]
                texts += [content] if isinstance(content, str) else [block.get("text", "") for block in content]
        processor, texts = self.answers.processor, [text for text in texts if text]
        processor.check_unicode(texts)
        num_text_tokens = sum(len(ids) for ids in processor.tokenize(texts)["input_ids"]) if texts else 0
        num_tokens = num_text_tokens + parameters.get("max_new_tokens", 0)
        if num_tokens > MAX_TOTAL_TOKENS:
            raise ValueError(
                f"The request takes {num_tokens} tokens (text and max_new_tokens), but at most {MAX_TOTAL_TOKENS} are "
                "served. Shorten it."
            )


def read_parameters(parameters: Any) -> dict:
    """Check the parameters of a request. Query strings give numbers and truth values as text, too."""
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise TypeError(f"'parameters' must be an object, got {type(parameters).__name__}.")
    flat = {name: value for name, value in parameters.items() if name not in NESTED}
    for name in NESTED:
        nested = parameters.get(name) or {}
        if not isinstance(nested, dict):
            raise TypeError(f"The parameter {name!r} must be an object, got {type(nested).__name__}.")
        twice = sorted(set(nested) & set(flat))
        if twice:
            raise ValueError(f"{twice} given twice, within {name!r} and beside it. Give each once.")
        flat.update(nested)
    unknown = sorted(map(str, set(flat) - set(PARAMETERS)))
    if unknown:
        raise ValueError(f"Unknown parameter(s) {unknown}. Known are {list(PARAMETERS)}.")
    read = {name: _checked(name, value) for name, value in flat.items() if value is not None}
    if not read.get("do_sample"):
        useless = sorted(set(read) & set(OF_SAMPLING))
        if useless:
            raise ValueError(f"{useless} are for sampling. Add 'do_sample': true, or leave them out.")
    return read


def _checked(name: str, value):
    """Return the value of a parameter, checked for its type and bounds."""
    kind, smallest, largest = PARAMETERS[name]
    if kind in (bool, int, float) or isinstance(kind, tuple):
        value = _from_query(value)
    if kind is dict and isinstance(value, str):
        value = _of_json(name, value)
    if isinstance(kind, tuple):
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in kind):
            raise ValueError(f"The parameter {name!r} must be one of {list(kind)}, got {value!r:.100}.")
        return value
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"The parameter {name!r} must be of type {kind.__name__}, got {value!r:.100}.")
    size = len(value.strip()) if kind is str else len(json.dumps(value)) if kind is dict else value
    if not smallest <= size <= largest:  # so that NaN is out of bounds
        unit = " characters" if kind in (str, dict) else ""
        raise ValueError(f"The parameter {name!r} must be within {smallest} and {largest}{unit}, got {value!r:.100}.")
    return value


def _of_json(name: str, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The parameter {name!r} must be a JSON object, got {text!r:.100}: {error}.") from error


def _from_query(value):
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def read_inputs(inputs: Any, budget: Any) -> Any:
    """Return an audio, `{"audio", "instruction"}`, or a chat, with the contents of audio files in the place of base64.

    Args:
        inputs: of the request.
        budget: the `AudioBudget` of `spoken_inputs.py` that the request has.
    """
    if isinstance(inputs, (bytes, bytearray, str)):
        return {"audio": budget.read(inputs)}
    if isinstance(inputs, dict):
        unknown = sorted(map(str, set(inputs) - {"audio", "instruction", "text"}))
        if unknown or inputs.get("audio") is None:
            raise ValueError(
                f"'inputs' needs 'audio', and may have 'instruction' (or 'text'), but has {sorted(map(str, inputs))}."
            )
        if inputs.get("instruction") is not None and inputs.get("text") is not None:
            raise ValueError("'inputs' has both 'instruction' and 'text', which mean the same. Give one of them.")
        instruction = inputs.get("text") if inputs.get("instruction") is None else inputs["instruction"]
        audio = {"audio": budget.read(inputs["audio"])}
        return audio if instruction is None else {**audio, "instruction": instruction}
    if isinstance(inputs, list) and inputs and all(isinstance(item, dict) and "role" in item for item in inputs):
        return [_read_message(message, budget) for message in inputs]
    raise ValueError(
        "'inputs' must be an audio file, base64 of one, an object with 'audio', or a chat (a list of messages with "
        f"'role' and 'content'), got {type(inputs).__name__}. One request takes one input."
    )


def _read_message(message: dict, budget) -> dict:
    unknown = sorted(map(str, set(message) - {"role", "content"}))
    content = message.get("content")
    if unknown or not isinstance(message["role"], str) or not isinstance(content, (str, list)):
        raise ValueError(f"A message has a 'role' and a 'content' (text or a list of blocks), got {message!r:.200}.")
    if isinstance(content, list):
        content = [budget.read_block(block) for block in content]
    return {"role": message["role"], "content": content}
