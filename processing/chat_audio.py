"""Check chats, and separate their clips from their audio blocks.

Our form of an audio block is `{"type": "audio", "audio": clip}`, or a more specific key for the clip. OpenAI's
`input_audio`, vLLM's `audio_url`, and the keys that Qwen2-Audio, Gemma and LangChain use in a block of type "audio" are
also read. The caller decides whether a file or an address in a block may be opened: it depends on who wrote the chat.
"""

import re
from typing import Any

from .audio_loading import knows_rate

# The type of a block, and the key of its clip. "audio" holds a clip of any kind.
AUDIO_TYPES = ("audio", "audio_url", "input_audio")
# One dict may hold several of these, as those of `datasets` do.
FILE_KEYS = ("array", "raw", "bytes", "base64", "path")
AUDIO_KEYS = ("audio", *FILE_KEYS, "url", "data", "audio_url", "input_audio")
LOST_IN_TEMPLATE = (
    "If a chat template made the text, it has to write the content of each message once and as it is: look at what it "
    "makes of the chat (tokenize=False), and set another one (processor.chat_template) if it leaves something out."
)
NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s]")


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


def separate_clips(conversation: Any) -> tuple[list, list]:
    """Return a chat, or a list of chats, without its clips, and the clips in reading order.

    A placeholder without a clip, `{"type": "audio"}`, stays and adds none.

    Raises:
        ValueError: a chat is not a list of messages whose content is a text or a list of blocks, or an audio block has
            no known form.
    """
    is_batch = isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
    separated, clips = [], []
    for chat in conversation if is_batch else [conversation]:
        _check_chat(chat)
        messages = []
        for message in chat:
            if isinstance(message.get("content"), (list, tuple)):
                read = [read_block(block) for block in message["content"]]
                clips += [clip for _, clip in read if clip is not None]
                # transformers requires a type, of which our templates say whether they know it.
                message = {**message, "content": [{"type": "", **block} for block, _ in read]}
            messages.append(message)
        separated.append(messages)
    return separated if is_batch else separated[0], clips


def _check_chat(chat):
    """Check the form of a chat, which transformers does not, and which often comes from outside.

    Raises:
        ValueError: the chat is not a list of messages whose content is a text or a list of blocks.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"A chat is a list of at least one message, but got {chat!r:.80}.")
    for message in chat:
        if not isinstance(message, dict):
            raise ValueError(f"A message of a chat is a dict with 'role' and 'content', but got {message!r:.80}.")
        content = message.get("content")
        blocks = content if isinstance(content, (list, tuple)) else []
        is_known = content is None or isinstance(content, (str, list, tuple))
        if not is_known or not all(isinstance(block, dict) for block in blocks):
            raise ValueError(
                "The content of a message is a text or a list of blocks such as {'type': 'text', 'text': '...'}, but "
                f"got {content!r:.80}."
            )
        for block in blocks:
            if block.get("type") == "text" and not isinstance(block.get("text"), str):
                raise ValueError(f"A block of type 'text' needs a 'text' that is a string, but got {block!r:.80}.")


def check_placeholders(conversation: list, rendered: Any, audio_token: str):
    """Check that rendered chats hold one placeholder per audio, besides those that their texts already held.

    Args:
        conversation: a chat or a list of chats, from [`separate_clips`].
        rendered: the result of `apply_chat_template`; token ids, of which the processor counts the placeholders, pass.

    Raises:
        ValueError: the template wrote more or fewer placeholders.
    """
    prompts = [rendered] if isinstance(rendered, str) else rendered
    if not isinstance(prompts, list) or not prompts or not isinstance(prompts[0], str):
        return
    for chat, prompt in zip([conversation] if isinstance(rendered, str) else conversation, prompts):
        expected, written = _num_placeholders(chat, audio_token), prompt.count(audio_token)
        if written != expected:
            raise ValueError(
                f"The chat has {expected} audio(s), but its text holds {written} {audio_token!r} placeholder(s). "
                f"{LOST_IN_TEMPLATE}"
            )


def check_one_per_clip(prompts: list[str], audio_token: str, num_clips: int):
    """Check that prompts hold one placeholder per clip.

    Raises:
        ValueError: there are more or fewer.
    """
    num_written = [prompt.count(audio_token) for prompt in prompts]
    if sum(num_written) != num_clips:
        raise ValueError(
            f"The text holds {sum(num_written)} {audio_token!r} placeholder(s) (per prompt: {num_written}), but "
            f"{num_clips} audio(s) were given. Write it exactly once for every audio. {LOST_IN_TEMPLATE}"
        )


def check_none_truncated(token_ids: list, audio_token_id: int, num_clips: int):
    """Check that tokenised prompts still hold one placeholder per clip.

    Raises:
        ValueError: the tokenizer cut some off.
    """
    num_kept = sum(list(ids).count(audio_token_id) for ids in token_ids)
    if num_kept != num_clips:
        raise ValueError(
            f"Truncation would drop {num_clips - num_kept} of {num_clips} audio placeholder(s). Raise max_length, or "
            "shorten the text."
        )


def _num_placeholders(chat: list[dict], audio_token: str) -> int:
    contents = [message.get("content") or "" for message in chat]
    texts = [content for content in contents if isinstance(content, str)]
    blocks = [block for content in contents if not isinstance(content, str) for block in content]
    texts += [block.get("text") or "" for block in blocks]
    return sum(text.count(audio_token) for text in texts) + sum(block.get("type") == "audio" for block in blocks)


def without_names(clip: Any) -> Any:
    """Return the clip of an audio block, and ensure that its `url` is a data URL or base64.

    Servers forward whatever their clients write as `url`, so it must not name a file of this machine or an address that
    this machine can reach.

    Raises:
        ValueError: the `url` is neither.
    """
    url = clip.get("url") if isinstance(clip, dict) else None
    if url is None or (isinstance(url, str) and url.startswith("data:")):
        return clip if url is None else url
    if not isinstance(url, str) or NOT_BASE64.search(url):
        raise ValueError(
            "The 'url' of an audio block must be a string of base64, bare or after 'data:audio/wav;base64,', but is "
            f"{repr(url)[:60]}. Give a file as 'path'; what lies at an address has to be downloaded first."
        )
    return {"base64": url}


def check_unicode(texts: list[str]):
    """Refuse texts that are not valid Unicode.

    Raises:
        ValueError: a text holds half of a surrogate pair, as JSON may; tokenizers do not accept such strings.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text {text!r:.80} is no Unicode: character {error.start} is half of a surrogate pair. Decode "
                "what it came from with errors='replace', or leave that character out."
            ) from error
