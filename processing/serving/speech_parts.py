"""Read the clips of a client's messages, and put their speech vectors in their place.

A text stays a text, and each clip becomes a `prompt_embeds` part, as vLLM reads it. What clients may send is checked by
the functions that pipelines and endpoints use. Leaves out: other fields of requests (`protocol.py`).
"""

import base64
import hashlib
import io
from typing import Any, NamedTuple

import torch

from processing.chat_audio import check_unicode, read_block
from processing.spoken_inputs import AudioBudget, check_text
from processing.url_fetching import fetch_audio

from .clip_cache import EncodedClip
from .errors import ServerError
from .settings import Settings

# vLLM writes it where a part's vectors go.
PLACE_OF_VECTORS = "<prompt_embeds>"


class ReadMessages(NamedTuple):
    """Messages whose audio blocks are `{"type": "audio", "key": key}`, and the contents of audio files by key."""

    messages: list[dict]
    clips: dict[str, bytes]


def key_of(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def budget_of(settings: Settings) -> AudioBudget:
    return AudioBudget(settings.max_audio_bytes, settings.max_duration_s)


def read_messages(messages: list, settings: Settings, audio_token: str) -> ReadMessages:
    """Check messages, and separate their clips. Fetches audio from allowed URLs, so it may take a while.

    Raises:
        ValueError, TypeError: a message is unusable; the text says why, for the client to read.
    """
    if not messages:
        raise ValueError("A chat needs at least one message.")
    budget, clips, texts = budget_of(settings), dict[str, bytes](), list[str]()
    read = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"A message is an object with a 'role' and a 'content', got {message!r:.200}.")
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            blocks = [budget.read_block(_fetched(block, settings)) for block in content]
            texts += [block["text"] for block in blocks if block["type"] == "text"]
            message = {**message, "content": [_with_key(block, clips) for block in blocks]}
        elif content is not None:  # as in a turn that calls tools
            raise TypeError(f"The content of a message is a text or a list of blocks, got {content!r:.200}.")
        read.append(message)
    _check_texts(texts, settings.max_text_chars, audio_token)
    return ReadMessages(read, clips)


def _fetched(block: Any, settings: Settings) -> Any:
    """Return a block with the contents of the file in the place of its address, if addresses are allowed."""
    _, clip = read_block(block) if isinstance(block, dict) else ({}, None)
    url = clip.get("url") if isinstance(clip, dict) else None
    if settings.allowed_url_prefixes and isinstance(url, str) and url.startswith(("http://", "https://")):
        return {"type": "audio", "audio": fetch_audio(url, settings.allowed_url_prefixes)}
    return block


def _with_key(block: dict, clips: dict[str, bytes]) -> dict:
    if block["type"] == "text":
        return block
    key = key_of(block["audio"])
    clips[key] = block["audio"]
    return {"type": "audio", "key": key}


def _check_texts(texts: list[str], max_chars: int, audio_token: str):
    num_chars = sum(map(len, texts))
    if num_chars > max_chars:
        raise ValueError(f"The texts have {num_chars} characters, but at most {max_chars} are served. Shorten them.")
    check_unicode(texts)
    for text in texts:
        check_text(text, "text of a message", audio_token, may_be_empty=True)
        if PLACE_OF_VECTORS in text:
            raise ValueError(f"A text holds {PLACE_OF_VECTORS!r}, which the engine keeps for itself. Remove it.")


def with_speech(messages: list[dict], clips: dict[str, EncodedClip], dtype: torch.dtype) -> list[dict]:
    """Return messages in which a part of vectors stands in the place of each audio block.

    Args:
        messages: of [`ReadMessages`].
        clips: encoded, by key.
        dtype: of the vectors.
    """
    parts = {key: prompt_embeds(clip.speech_tokens.to(dtype)) for key, clip in clips.items()}

    def replaced(block: dict) -> dict:
        return parts[block["key"]] if block["type"] == "audio" else block

    return [
        {**message, "content": [replaced(block) for block in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def prompt_embeds(vectors: torch.Tensor) -> dict:
    """Return the part of a chat that holds vectors (U, D).

    Raises:
        ServerError: they are not finite. The engine would answer with an empty text, and perhaps others, too.
    """
    if len(vectors) == 0 or not bool(torch.isfinite(vectors).all()):
        raise ServerError(
            f"The model encodes a clip as {len(vectors)} vectors, and they are not finite numbers. Load it with "
            "--dtype float32, and send vectors with --speech_dtype float32."
        )
    buffer = io.BytesIO()
    # A copy, because torch saves all the storage that a view belongs to.
    torch.save(vectors.detach().cpu().clone().contiguous(), buffer)
    return {"type": "prompt_embeds", "data": base64.b64encode(buffer.getvalue()).decode()}
