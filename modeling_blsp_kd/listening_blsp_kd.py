"""The parts of a session that belong to the model: its speech as it goes on, and the LLM's cache of a growing prompt.

Leaves out: the session, which also needs the processor (`listen` of the processor makes it).
"""

from typing import Any

from .cached_prompt import CachedPrompt
from .speech_stream import SpeechStream


class BlspKdListeningMixin:
    """Gives [`BlspKdForCausalLM`] what it needs to listen while one speaks."""

    config: Any

    def stream_speech(self, chunk_ms: int | None = None) -> SpeechStream:
        """Return the stream of a clip that begins now.

        Args:
            chunk_ms (`int`, *optional*): the speech that is encoded at once; omitted, that of the config.

        Raises:
            ValueError: the model does not stream, or `chunk_ms` is not a whole number of frames.
        """
        return SpeechStream(self, chunk_ms)

    def cache_prompt(self) -> CachedPrompt:
        """Return an empty prompt that the LLM can read piece by piece."""
        return CachedPrompt(self)
