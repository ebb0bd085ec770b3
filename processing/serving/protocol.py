"""What requests may hold, of OpenAI's protocol and of vLLM's additions to it.

A chat's fields pass to the engine unchanged, but for those that the front itself reads or refuses. Leaves out: the
messages (`speech_parts.py`), and what the engine checks.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.datastructures import FormData, UploadFile

from .errors import BadRequest

# Fields of vLLM through which a client could change the prompt, or name what the engine reads.
REFUSED_FIELDS = (
    "chat_template",
    "documents",
    "ec_transfer_params",
    "kv_transfer_params",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "prompt_embeds",
)


class ChatRequest(BaseModel):
    """The fields of a chat that the front reads. `body` has all that came."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Any] = Field(min_length=1)
    stream: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    logit_bias: dict[str, float] | None = None
    body: dict[str, Any] = Field(exclude=True)

    @classmethod
    def read(cls, contents: bytes) -> "ChatRequest":
        """Read the body of a request.

        Raises:
            BadRequest: it is no JSON object, or a field is wrong or refused.
        """
        body = object_of(contents)
        refused = [name for name in REFUSED_FIELDS if body.get(name) is not None]
        if refused:
            raise BadRequest(f"The field {refused[0]!r} is not accepted here. Leave it out.", refused[0])
        return validated(cls, {**body, "body": body})


def object_of(contents: bytes) -> dict:
    """Return a JSON object.

    Raises:
        BadRequest: it is none.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(contents, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise BadRequest(f"The body must be a JSON object, got {type(body).__name__}.")
    return body


# Fields of a transcription that only their empty value is accepted of, which clients send, too; and why.
WITHOUT_MEANING = {
    "language": "The model is told no language.",
    "prompt": "The instruction that the model transcribes with belongs to it.",
    "stream": "Transcriptions are not streamed.",
}


class TranscriptionRequest(BaseModel):
    """The fields of a transcription."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    file: UploadFile
    model: str | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0

    @classmethod
    def read(cls, form: FormData) -> "TranscriptionRequest":
        """Read a form.

        Raises:
            BadRequest: a field is missing, wrong or unknown.
        """
        fields: dict[str, Any] = {}
        for name in form:
            values = form.getlist(name)
            if name.removesuffix("[]") == "timestamp_granularities":
                fields["timestamp_granularities"] = values
            elif len(values) > 1:
                raise BadRequest(f"The field {name!r} is given {len(values)} times. Give it once.", name)
            elif name not in WITHOUT_MEANING:
                fields[name] = values[0]
            elif values[0] not in ("", "false"):
                raise BadRequest(f"{WITHOUT_MEANING[name]} Leave out {name!r}.", name)
        request = validated(cls, fields)
        if request.timestamp_granularities and request.response_format != "verbose_json":
            raise BadRequest("timestamp_granularities needs response_format 'verbose_json'.", "timestamp_granularities")
        return request


def validated(kind: type, fields: dict) -> Any:
    """Return fields as an object of `kind`, a pydantic model.

    Raises:
        BadRequest: a field is missing, wrong or unknown.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise BadRequest(f"The field {name!r} is wrong: {first['msg']}.", name) from error
