"""What clients may send over a WebSocket: events of OpenAI's realtime protocol, and the fields that are served of them.

A field that is not served is refused, so that no client waits for what never comes. Leaves out: what is done about them
(`session.py`), and what is sent to clients.
"""

import base64
import binascii
import copy
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from processing.end_of_speech import EndOfSpeech

from ..errors import BadRequest
from ..protocol import object_of, validated

SAMPLING_RATE = 24_000  # of OpenAI's protocol, unless a session says otherwise


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PcmFormat(_Fields):
    """16-bit samples of one channel, little-endian."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Annotated[int, Field(ge=8000, le=48_000)] = SAMPLING_RATE


class TurnDetection(_Fields):
    """The rule for the end of a turn, by loudness and CIF's weights."""

    type: Literal["server_vad"]
    silence_duration_ms: Annotated[int, Field(ge=100, le=10_000)] = EndOfSpeech.silence_ms
    create_response: StrictBool = True
    interrupt_response: StrictBool = True


class Transcription(_Fields):
    """A transcript of each turn, by the model itself."""

    model: str | None = None


class AudioInput(_Fields):
    format: PcmFormat = PcmFormat()
    turn_detection: TurnDetection | None = None
    transcription: Transcription | None = None
    noise_reduction: None = None


class Audio(_Fields):
    input: AudioInput = AudioInput()


class ResponseOptions(_Fields):
    """How an answer is generated; None of a response: as the session says."""

    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] | None = None
    output_modalities: list[Literal["text"]] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None


class SessionOptions(ResponseOptions):
    type: Literal["realtime"] = "realtime"
    model: str | None = None
    audio: Audio = Audio()

    def updated(self, fields: dict) -> "SessionOptions":
        """Return the session with other values of these fields.

        Raises:
            BadRequest: a field is unknown or wrong.
        """
        return validated(SessionOptions, _merged(self.model_dump(), fields))

    @property
    def rule(self) -> EndOfSpeech | None:
        detection = self.audio.input.turn_detection
        return None if detection is None else EndOfSpeech(silence_ms=detection.silence_duration_ms)


def _merged(old: dict, new: dict) -> dict:
    merged = copy.deepcopy(old)
    for name, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


class Text(_Fields):
    type: Literal["input_text", "output_text", "text"]
    text: str


class Item(_Fields):
    """A message of text. Speech comes through the audio buffer."""

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Text], Field(min_length=1)]
    id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


class _Event(_Fields):
    type: str
    event_id: Annotated[str, Field(max_length=512)] | None = None


class SessionUpdate(_Event):
    session: dict[str, Any]


class Append(_Event):
    audio: str

    def samples(self) -> np.ndarray:
        """Return the samples, int16.

        Raises:
            BadRequest: they are not whole.
        """
        try:
            contents = base64.b64decode(self.audio, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"audio is no base64: {error}.", "audio") from error
        if len(contents) % 2:
            raise BadRequest(f"audio has {len(contents)} bytes, but 16-bit samples have two each.", "audio")
        return np.frombuffer(contents, "<i2").astype(np.int16)


class ItemCreate(_Event):
    item: Item
    previous_item_id: None = None


class ItemDelete(_Event):
    item_id: str


class ResponseCreate(_Event):
    response: ResponseOptions = ResponseOptions()


class ResponseCancel(_Event):
    response_id: str | None = None


EVENTS: dict[str, type[_Event]] = {
    "session.update": SessionUpdate,
    "input_audio_buffer.append": Append,
    "input_audio_buffer.commit": _Event,
    "input_audio_buffer.clear": _Event,
    "conversation.item.create": ItemCreate,
    "conversation.item.delete": ItemDelete,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}


def read_event(text: str | None) -> _Event:
    """Return the event that a message holds.

    Raises:
        BadRequest: it is no event, or not one that is served.
    """
    if text is None:
        raise BadRequest("An event is a text, got a binary message. Send audio in input_audio_buffer.append.")
    fields = object_of(text.encode(errors="replace"))
    kind = fields.get("type")
    if kind not in EVENTS:
        raise BadRequest(f"Unknown type of event: {kind!r:.100}. Known: {', '.join(EVENTS)}.", "type")
    return validated(EVENTS[kind], fields)
