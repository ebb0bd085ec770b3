"""The settings of the front, and the options of its command line, which are the same."""

import argparse
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl

from processing.publishing.handler import MAX_AUDIO_BYTES, MAX_DURATION_S

POSITIVE = Annotated[float, Field(gt=0)]
COUNT = Annotated[int, Field(ge=1)]
# Without the slash, "https://host" would also allow "https://host.elsewhere.org".
URL_PREFIX = Annotated[str, Field(pattern=r"^https?://[^/]+/")]


class Settings(BaseModel):
    """Each field is an option of the command line, described by its `description`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: HttpUrl = Field(description="address of the engine's OpenAI API, such as http://localhost:8000/v1")
    engine_model: str | None = Field(None, description="name of the LLM there; omitted, the only one")
    engine_adapter: str | None = Field(None, description="name of the partial LoRA there; omitted, the only LoRA")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="port to listen on")
    served_name: str | None = Field(None, description="name of the model for clients; omitted, MODEL")
    dtype: str | None = Field(None, description="of encoder and adapter; omitted, float32 on a CPU, else as stored")
    device: str | None = Field(None, description="of encoder and adapter; omitted, the accelerator, if there is one")
    speech_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the vectors sent to the engine, which casts them to its own; 16 bits halve them"
    )
    max_frames: COUNT = Field(6000, description="encoder frames in a batch, padding included (6000: two minutes)")
    max_waiting: COUNT = Field(64, description="clips that may wait to be encoded; beyond, status 429")
    max_requests: COUNT = Field(256, description="requests that may be answered at once; beyond, status 429")
    cache_bytes: Annotated[int, Field(ge=0)] = Field(2**28, description="memory for encoded clips")
    num_decoders: COUNT = Field(2, description="threads that decode audio")
    max_audio_bytes: COUNT = Field(MAX_AUDIO_BYTES, description="of all audio files of a request")
    max_duration_s: POSITIVE = Field(MAX_DURATION_S, description="of all clips of a request")
    max_text_chars: COUNT = Field(1_000_000, description="of a request, besides its audio")
    chunk_length_s: POSITIVE | None = Field(None, description="cut recordings that are to be transcribed, see docs")
    allowed_url_prefixes: tuple[URL_PREFIX, ...] = Field(
        (), description="fetch audio from addresses that begin with one, such as https://host/path/"
    )
    encoder_timeout_s: POSITIVE = Field(60.0, description="until a request's clips are encoded")
    engine_timeout_s: POSITIVE = Field(300.0, description="of silence of the engine")
    engine_wait_s: POSITIVE = Field(600.0, description="until the engine answers at the start")
    max_sessions: COUNT = Field(16, description="realtime sessions that may be open; beyond, status 429")
    max_session_s: POSITIVE = Field(3600.0, description="of a realtime session")
    session_idle_s: POSITIVE = Field(60.0, description="of silence of a realtime client")
    read_ahead_tokens: COUNT = Field(
        16, description="new speech tokens after which the engine reads on while one speaks (a block of its cache)"
    )
    shutdown_s: POSITIVE = Field(30.0, description="for running requests after SIGTERM")
    api_key: str | None = Field(
        default_factory=lambda: os.environ.get("BLSP_KD_API_KEY"),
        description="that clients must send; omitted, the environment's BLSP_KD_API_KEY, or none",
    )
    engine_api_key: str | None = Field(
        default_factory=lambda: os.environ.get("BLSP_KD_ENGINE_API_KEY"),
        description="for the engine; omitted, the environment's BLSP_KD_ENGINE_API_KEY, or none",
    )


def add_options(parser: argparse.ArgumentParser):
    """Add each setting to a parser; those that are not given are left out of its result."""
    for name, field in Settings.model_fields.items():
        options: dict[str, Any] = {"required": True} if field.is_required() else {"default": argparse.SUPPRESS}
        if name == "allowed_url_prefixes":
            options["nargs"] = "+"
        default = "" if field.default in (None, ()) or field.is_required() else f" (default: {field.default})"
        default = default if field.default_factory is None else ""
        parser.add_argument(f"--{name}", help=f"{field.description}{default}", **options)
