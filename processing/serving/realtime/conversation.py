"""The conversation of a session: its items, as the protocol shows them and as the chat that the engine reads.

Leaves out: the speech of the current turn, which is no item yet (`live_speech.py`).
"""

import uuid
from typing import Any

import torch

from processing.spoken_inputs import user_turn

from ..clip_cache import EncodedClip
from ..errors import BadRequest
from ..front import Front
from ..speech_parts import read_messages

# Key of the speech that is not committed yet.
CURRENT = "current"
# Fields of a request whose answer is streamed.
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


class Conversation:
    """Items of text and speech, the oldest first.

    Args:
        front ([`Front`]): its settings and its engine limit the conversation.
    """

    def __init__(self, front: Front):
        self.front = front
        self._items: list[dict] = []
        self._clips: dict[str, EncodedClip] = {}

    @property
    def last_id(self) -> str | None:
        return self._items[-1]["id"] if self._items else None

    def add_text(self, role: str, texts: list[str], item_id: str | None = None) -> dict:
        """Add a message, and return its item.

        Raises:
            BadRequest: there is an item of this id.
        """
        if item_id is not None and any(item["id"] == item_id for item in self._items):
            raise BadRequest(f"There is an item {item_id!r} already. Choose another id.", "item.id")
        self._items.append(
            {
                "id": item_id or new_id("item"),
                "role": role,
                "blocks": [{"type": "text", "text": text} for text in texts],
            }
        )
        return self._items[-1]

    def add_speech(self, item_id: str, speech_tokens: torch.Tensor) -> dict:
        """Add what a user has said, (U, D), under a new id, and return its item.

        Raises:
            BadRequest: the LLM's context does not hold the speech of the conversation.
        """
        num_tokens = sum(len(clip.speech_tokens) for clip in self._clips.values()) + len(speech_tokens)
        capacity = self.front.facts.max_model_len
        if capacity is not None and num_tokens >= capacity:
            raise BadRequest(
                f"The conversation's speech takes {num_tokens} positions, but the LLM's context holds {capacity}: "
                "delete items, or begin anew."
            )
        self._clips[item_id] = EncodedClip(speech_tokens, None)
        self._items.append({"id": item_id, "role": "user", "blocks": [{"type": "audio", "key": item_id}]})
        return self._items[-1]

    def delete(self, item_id: str):
        """Delete an item.

        Raises:
            BadRequest: there is none of this id.
        """
        kept = [item for item in self._items if item["id"] != item_id]
        if len(kept) == len(self._items):
            raise BadRequest(f"There is no item {item_id!r:.100}.", "item_id")
        self._items = kept
        self._clips.pop(item_id, None)

    def check_texts(self, *new: str | None):
        """Check texts as a chat's, together with those of the conversation.

        Raises:
            ValueError: they are too long, or hold what is kept for speech.
        """
        held = [block["text"] for item in self._items for block in item["blocks"] if block["type"] == "text"]
        messages = [{"role": "user", "content": text} for text in [*held, *new] if text]
        if messages:
            read_messages(messages, self.front.settings, self.front.processor.audio_token)

    def request(self, body: dict, instructions: str | None, speech_tokens: torch.Tensor | None = None) -> dict:
        """Return the request to the engine that asks for an answer to the conversation.

        Args:
            body: fields of the request.
            instructions (`str`, *optional*): become the system's message.
            speech_tokens (U, D), *optional*: of the current turn.

        Raises:
            BadRequest: there is nothing to answer.
        """
        items, clips = [*self._items], dict(self._clips)
        if speech_tokens is not None:
            items.append({"role": "user", "blocks": [{"type": "audio", "key": CURRENT}]})
            clips[CURRENT] = EncodedClip(speech_tokens, None)
        if not items:
            raise BadRequest("There is nothing to answer yet. Commit audio, or create an item.")
        messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
        for item in items:
            if item["role"] != "user":
                text = "\n".join(block["text"] for block in item["blocks"])
                messages.append({"role": item["role"], "content": text})
            elif messages and messages[-1]["role"] == "user":  # what a user says in a row is one message
                messages[-1]["content"] += item["blocks"]
            else:
                messages.append({"role": "user", "content": [*item["blocks"]]})
        return self.front.request_to_engine(body, messages, clips)

    def transcript_request(self, item_id: str) -> dict:
        """Return the request to the engine that asks for what is said in an item."""
        [turn] = user_turn(self.front.processor.transcription_instruction)
        content = [{**block, "key": item_id} if block["type"] == "audio" else block for block in turn["content"]]
        body = {**STREAMED, "temperature": 0}
        return self.front.request_to_engine(body, [{**turn, "content": content}], {item_id: self._clips[item_id]})


def shown(item: dict, is_complete: bool = True) -> dict:
    """Return an item in the form of the protocol, without audio, which is not kept."""
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    content: list[dict] = [
        {"type": kind, "text": block["text"]} if block["type"] == "text" else {"type": "input_audio"}
        for block in item["blocks"]
    ]
    about = {"id": item["id"], "object": "realtime.item", "type": "message", "role": item["role"]}
    return {**about, "status": "completed" if is_complete else "incomplete", "content": content}
