"""The front: it encodes the clips of a request, and writes the request to the engine behind it.

Leaves out: HTTP (`routes.py`), batches (`clip_encoder.py`), and the engine's client (`engine.py`).
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from processing import BlspKdProcessor
from processing.audio_loading import load_audio
from processing.chat_templates import check_options

from .clip_cache import EncodedClip
from .clip_encoder import ClipEncoder
from .engine import Engine
from .engine_check import EngineFacts
from .errors import BadRequest, NotFound, TimedOut
from .metrics import Metrics
from .settings import Settings
from .speech_parts import with_speech

# `logit_bias` at which the engine generates a token only if it has no other choice.
NEVER = -100.0


@dataclass
class Front:
    """Holds what the routes share.

    Args:
        name (`str`): of the model, for clients.
        facts ([`EngineFacts`]): names of the engine's models.
    """

    name: str
    settings: Settings
    processor: BlspKdProcessor
    encoder: ClipEncoder
    engine: Engine
    facts: EngineFacts
    metrics: Metrics

    def check_model(self, name: str | None):
        """Check the name of a model that a client asks for.

        Raises:
            NotFound: it is another one than ours.
        """
        if name not in (None, self.name):
            raise NotFound(f"The model {name!r:.100} is not served here. Ask for {self.name!r}.", "model")

    def read_features(self, contents: bytes) -> np.ndarray:
        """Return the features of an audio file.

        Raises:
            BadRequest: it is unusable; the message says why.
        """
        rate = self.processor.feature_extractor.sampling_rate
        try:
            waveform = load_audio(contents, rate, max_duration_s=self.settings.max_duration_s)
            return self.processor.extract_features([(waveform, rate)])["input_features"][0]
        except (ValueError, TypeError) as error:
            raise BadRequest(str(error)) from error

    async def encode(self, clips: dict[str, bytes]) -> dict[str, EncodedClip]:
        """Return encoded audio files, by their keys; see `encode_features`."""
        readers = {key: functools.partial(self.read_features, contents) for key, contents in clips.items()}
        return await self.encode_features(readers)

    async def encode_features(self, readers: Mapping[str, Callable[[], np.ndarray]]) -> dict[str, EncodedClip]:
        """Return encoded clips, by their keys.

        Args:
            readers: see [`ClipEncoder.encode`].

        Raises:
            Busy: too many clips wait.
            TimedOut: it took too long.
            BadRequest: a clip is unusable, or there are too many.
        """
        try:
            with self.encoder.reserve(list(readers)):
                tasks = [asyncio.ensure_future(self.encoder.encode(key, read)) for key, read in readers.items()]
                try:
                    async with asyncio.timeout(self.settings.encoder_timeout_s):
                        return dict(zip(readers, await asyncio.gather(*tasks)))
                finally:
                    for task in tasks:
                        task.cancel()
        except TimeoutError as error:
            raise TimedOut(f"The audio was not encoded within {self.settings.encoder_timeout_s:g} s.") from error

    def request_to_engine(self, body: dict, messages: list[dict], clips: dict[str, EncodedClip]) -> dict:
        """Return the request to the engine that stands for a client's.

        Args:
            body: the fields of the client's request.
            messages: of [`ReadMessages`].
            clips: of the messages, by their keys.

        Raises:
            BadRequest: the chat template does not know an option, or a field is not for speech.
        """
        if clips and (body.get("echo") or body.get("prompt_logprobs") is not None):  # either would end vLLM
            raise BadRequest("'echo' and 'prompt_logprobs' are for text alone: speech has no log-probabilities.")
        # Text goes to the LLM itself, so that it shares its cache with all other users of the engine.
        is_adapted = bool(clips) and self.facts.adapter is not None
        dtype = getattr(torch, self.settings.speech_dtype)
        request = {
            **body,
            "model": self.facts.adapter if is_adapted else self.facts.base,
            "messages": with_speech(messages, clips, dtype),
        }
        try:
            given = check_options(body.get("chat_template_kwargs"), self.processor.chat_template)
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error), "chat_template_kwargs") from error
        if options := {**self.processor.chat_template_kwargs, **given}:
            request["chat_template_kwargs"] = options
        config = self.encoder.model.config
        if clips and config.audio_token_id < config.get_text_config().vocab_size:
            # As in `generate`: a placeholder in an answer would need a clip in the next turn.
            request["logit_bias"] = {**(body.get("logit_bias") or {}), str(config.audio_token_id): NEVER}
        return request
