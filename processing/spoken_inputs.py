"""Convert an input of a pipeline (a clip, a clip with an instruction, or a chat) to chat messages and their clips.

Follows the inputs of transformers' pipelines and chat templates. Servers read the audio of their clients here, too,
within a budget. The processor makes features and prompts.
"""

import base64
import binascii
from collections.abc import Iterable
from numbers import Number
from typing import Any

import numpy as np
import torch
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .audio_decoding import audio_info
from .audio_loading import MAX_DURATION_S, load_audio
from .chat_audio import read_block
from .url_fetching import fetch_audio

INPUT_KEYS = ("audio", "instruction", "text", "sampling_rate")


def as_inputs(inputs: Any) -> Any:
    """Convert a caller's inputs to the form in which transformers' pipelines take one input, a list, or an iterable."""
    if inputs is None or (isinstance(inputs, (list, tuple)) and len(inputs) == 0):
        raise ValueError(f"There is nothing to hear: expected a clip, a chat, or several of them, got {inputs!r}.")
    if isinstance(inputs, list) and isinstance(inputs[0], Number):
        return np.asarray(inputs)  # the samples of one clip
    if isinstance(inputs, list) and not is_valid_message(inputs[0]):
        return [as_chat(item) for item in inputs]  # transformers only checks whether the first input is a chat
    is_one = isinstance(inputs, (str, bytes, bytearray, memoryview, dict, list, tuple, np.ndarray, torch.Tensor, Chat))
    if is_one or hasattr(inputs, "read") or not isinstance(inputs, Iterable):
        return inputs
    return (item for item in inputs)


def as_chat(inputs: Any) -> Any:
    """Convert a list of messages to transformers' `Chat`; return anything else unchanged."""
    is_chat = isinstance(inputs, (list, tuple)) and len(inputs) > 0 and is_valid_message(inputs[0])
    return Chat(inputs) if is_chat else inputs


def user_turn(instruction: str | None, content: dict | None = None) -> list[dict]:
    """Return a chat of one user turn: the instruction, if any, and then the content, a block (default: an audio)."""
    blocks = [{"type": "text", "text": instruction}] if instruction else []
    return [{"role": "user", "content": [*blocks, content or {"type": "audio"}]}]


def read_input(
    inputs: Any, instruction: str | None, sampling_rate: int | None, audio_token: str
) -> tuple[Any, str | None, int | None]:
    """Return clip, instruction and rate of an input other than a chat; its own instruction and rate take precedence.

    Raises:
        ValueError, TypeError: unknown fields, or an invalid instruction.
    """
    if not isinstance(inputs, dict) or "audio" not in inputs:
        return inputs, instruction, sampling_rate
    unknown = sorted(map(str, set(inputs) - set(INPUT_KEYS)))
    if unknown:
        raise ValueError(f"An input with 'audio' takes {list(INPUT_KEYS)}, but this one also has {unknown}.")
    own = [inputs[key] for key in ("instruction", "text") if inputs.get(key) is not None]
    if len(own) > 1:
        raise ValueError("An input has either 'instruction' or 'text', which mean the same, but this one has both.")
    if own:
        check_text(own[0], "instruction", audio_token)
    return inputs["audio"], *(own or [instruction]), inputs.get("sampling_rate", sampling_rate)


def read_chat(chat: Chat, audio_token: str) -> tuple[list[dict], list]:
    """Return a chat's messages without the clips, and the clips in reading order.

    Raises:
        ValueError, TypeError: the chat has no audio, or an invalid message or block.
    """
    messages: list[dict] = []
    clips: list = []
    for message in chat.messages:
        content = message["content"]
        if isinstance(content, str):
            check_text(content, "content of a message", audio_token, may_be_empty=True)
        elif isinstance(content, (list, tuple)):
            content = [_read_block(block, audio_token, clips) for block in content]
        else:
            raise TypeError(f"The content of a message is a string or a list of blocks, got {type(content)}.")
        messages.append({**message, "content": content})
    if not clips:
        raise ValueError(
            "The chat holds no audio. Give at least one block such as {'type': 'audio', 'path': 'clip.wav'}."
        )
    return messages, clips


def _read_block(block, audio_token: str, clips: list) -> dict:
    """Return a block without its clip, and append the clip to `clips`."""
    read, clip = read_block(block) if isinstance(block, dict) else ({}, None)
    if read.get("type") == "text":
        check_text(read.get("text"), "text of a block", audio_token, may_be_empty=True)
    elif read.get("type") != "audio":
        raise ValueError(
            f"A block of a message is a dict of type 'text', 'audio', 'audio_url' or 'input_audio', got {block!r:.200}."
        )
    elif clip is None:
        raise ValueError(f"The audio block {block!r:.200} holds no audio. Write {{'type': 'audio', 'audio': clip}}.")
    else:
        clips.append(clip)
    return read


def check_text(text: Any, name: str, audio_token: str, may_be_empty: bool = False):
    """Raise an error unless `text` is a string without the placeholder, which would require another clip."""
    if not isinstance(text, str):
        raise TypeError(f"The {name} must be a string, got {type(text)}.")
    if not text.strip() and not may_be_empty:
        raise ValueError(f"The {name} is empty. Leave it out instead.")
    if audio_token in text:
        raise ValueError(f"The {name} holds the audio placeholder {audio_token!r}. Remove it: the pipeline places it.")


def load_clip(
    clip: Any,
    sampling_rate: int,
    source_rate: int | None = None,
    allowed_url_prefixes: list[str] | tuple[str, ...] = (),
    max_duration_s: float = MAX_DURATION_S,
) -> np.ndarray:
    """Load a clip with [`load_audio`], or from an allowed URL given as `str` or under a dict's `"url"`."""
    url = clip.get("url") if isinstance(clip, dict) else clip
    if isinstance(url, str):
        clip = fetch_audio(url, allowed_url_prefixes) if "://" in url else url
    return load_audio(clip, sampling_rate, source_rate, max_duration_s)


class AudioBudget:
    """The audio that a request to a server may still send, and its reader, which opens no path and no URL.

    Args:
        max_bytes (`int`): of all its audio files.
        max_duration_s (`float`): of all its clips.
    """

    def __init__(self, max_bytes: int, max_duration_s: float):
        self.max_bytes, self.max_duration_s = max_bytes, max_duration_s
        self.num_bytes, self.duration_s = 0, 0.0

    def read_block(self, block: Any) -> dict:
        """Return a block of a chat, of type "text" or "audio", with the contents of the file in the place of base64.

        Raises:
            ValueError, TypeError: the block is of another type, or its audio is no file or base64 of one, or too much.
        """
        read, clip = read_block(block) if isinstance(block, dict) else ({}, None)
        if read.get("type") == "text" and isinstance(read.get("text"), str):
            return {"type": "text", "text": read["text"]}
        if read.get("type") != "audio":
            raise ValueError(
                f"A block of a message is {{'type': 'text', 'text': ...}} or {{'type': 'audio', 'audio': base64}}, "
                f"got {block!r:.200}."
            )
        values = list(clip.values()) if isinstance(clip, dict) else [clip]
        if len(values) != 1 or values[0] is None:
            raise ValueError(f"An audio block needs one 'audio', base64 of a file, but has {sorted(map(str, block))}.")
        return {"type": "audio", "audio": self.read(values[0])}

    def read(self, audio: Any) -> bytes:
        """Return the contents of an audio file, sent as they are or as base64.

        A string is never taken for a path or a URL: that would open the server's files and network to its clients.
        """
        if isinstance(audio, str):
            self._spend_bytes(3 * len(audio) // 4)
            contents = _of_base64(audio)
        elif isinstance(audio, (bytes, bytearray)):
            self._spend_bytes(len(audio))
            contents = bytes(audio)
        else:
            raise TypeError(f"Audio must be a file's contents or base64 of them, got {type(audio).__name__}.")
        try:
            self.duration_s += audio_info(contents).duration_s
        except ValueError:
            return contents  # the pipeline says what is wrong with it
        if self.duration_s > self.max_duration_s:
            raise ValueError(
                f"The audio lasts {self.duration_s:.1f} s, but at most {self.max_duration_s:g} s are served. Split it."
            )
        return contents

    def _spend_bytes(self, num_bytes: int):
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise ValueError(
                f"The audio takes more than {self.max_bytes} bytes, which is the limit. Compress or split it."
            )


def _of_base64(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"The audio {text[:40]!r} ({len(text)} characters) is not valid base64: {error}. Paths and URLs are not "
            "opened: send the file itself."
        ) from error
