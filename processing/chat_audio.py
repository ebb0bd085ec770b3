"""Read the audio blocks of a chat, in this project's form and in those of other frameworks.

Our form is `{"type": "audio", "audio": clip}`, or a more specific key for the clip. OpenAI's `input_audio`, vLLM's
`audio_url`, and the keys that Qwen2-Audio, Gemma and LangChain use in a block of type "audio" are also read. The caller
decides whether a file or an address in a block may be opened, because this depends on who wrote the chat.
"""

from .audio_loading import knows_rate

# The type of a block, and the key of its clip. "audio" holds a clip of any kind.
AUDIO_TYPES = ("audio", "audio_url", "input_audio")
# One dict may hold several of these, as those of `datasets` do.
FILE_KEYS = ("array", "raw", "bytes", "base64", "path")
AUDIO_KEYS = ("audio", *FILE_KEYS, "url", "data", "audio_url", "input_audio")


def read_block(block: dict) -> tuple[dict, object]:
    """Separate a block from its clip.

    Args:
        block (`dict`): of any type. A block without a type is an audio block if it has one of `AUDIO_TYPES` as key.

    Returns:
        `tuple[dict, Any]`: for an audio block, `{"type": "audio"}` and the clip as in [`load_audio`] or as
        `{"url": ...}`. The clip of a bare `{"type": "audio"}`, which is only a placeholder, is None. Other blocks are
        returned unchanged, with None.

    Raises:
        ValueError: an audio block holds several clips, or none in a known form.
    """
    kind = block.get("type")
    if kind not in AUDIO_TYPES and (kind is not None or all(block.get(key) is None for key in AUDIO_TYPES)):
        return block, None
    given = {key: block[key] for key in AUDIO_KEYS if block.get(key) is not None}
    if not given and all(value is None for key, value in block.items() if key != "type") and kind == "audio":
        return {"type": "audio"}, None
    if len(given) > 1 and not set(given) <= set(FILE_KEYS):
        raise ValueError(f"The audio block {block!r:.200} holds audio under {list(given)}. Leave one of them.")
    clip = _clip_of(given)
    if clip is None:
        raise ValueError(
            f"The audio block {block!r:.200} holds no audio. Write {{'type': 'audio', 'audio': clip}}, or give one of "
            f"{[*FILE_KEYS, 'url']}."
        )
    rate = block.get("sampling_rate")
    if rate is not None and not knows_rate(clip):
        clip = {**clip, "sampling_rate": rate} if isinstance(clip, dict) else (clip, rate)
    return {"type": "audio"}, clip


def _clip_of(given: dict):
    """Return the clip under a block's audio keys, or None if it has no known form."""
    if given.keys() <= set(FILE_KEYS):
        return given or None
    [(key, value)] = given.items()
    if key == "input_audio":  # {"data": base64, "format": ...}
        data = value.get("data") if isinstance(value, dict) else None
        return None if data is None else {"base64": data}
    if key in ("audio_url", "url"):  # the address, or {"url": address}
        url = value.get("url") if key == "audio_url" and isinstance(value, dict) else value
        return None if url is None else {"url": url}
    if key == "data":
        return {"base64": value} if isinstance(value, str) else value
    return value
