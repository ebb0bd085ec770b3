"""The options of a streaming model: chunk, left context and look-ahead, in milliseconds.

Follows U2++ (arXiv 2106.05642): one model serves several latencies, because the chunk is drawn anew for each batch of
its training. Leaves out: what is computed with them (`blockwise_attention.py`, `adapters.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from .adapter_options import AdapterOptions, CFormerOptions
from .blockwise_attention import Blocks
from .config_options import Options, is_count, is_positive_count, read_switch, require
from .encoder_families import ENCODER_FAMILIES, frame_duration_s


@dataclass(frozen=True)
class StreamingOptions(Options):
    """Options of `streaming={...}`; times in milliseconds, whole numbers of encoder frames.

    Args:
        chunk_ms (`int`, *optional*): the speech that is encoded at once. None: full context; such a model cannot
            listen, but all else is as in training.
        left_context_ms (`int`, *optional*): speech before its chunk that a frame attends to. None: all since the start
            of the clip, or of its window of 30 s.
        look_ahead_ms (`int`): speech after its chunk that a frame of the encoder attends to, less than a chunk.
        training_chunk_ms (`list[int | None]`): in training, `chunk_ms` is drawn from these for each batch.
    """

    where: ClassVar[str] = "streaming"

    chunk_ms: int | None = 640
    left_context_ms: int | None = None
    look_ahead_ms: int = 0
    training_chunk_ms: Sequence[int | None] = field(default_factory=lambda: [320, 640, 1280, None])

    def __post_init__(self):
        self.check(is_positive_count, "must be None or an integer of at least 1", "chunk_ms", or_none=True)
        for name, or_none in (("left_context_ms", True), ("look_ahead_ms", False)):
            self.check(lambda value: is_count(value, 0), "must be an integer of at least 0", name, or_none=or_none)
        self.check(
            lambda given: isinstance(given, (list, tuple)) and all(each is None or is_count(each, 1) for each in given),
            "must be a list of integers of at least 1, and of None for full context",
            "training_chunk_ms",
        )
        require(len(self.training_chunk_ms) > 0, "streaming option training_chunk_ms must not be empty", [])
        object.__setattr__(self, "training_chunk_ms", list(self.training_chunk_ms))  # as it comes out of a file
        shortest = min((chunk for chunk in (self.chunk_ms, *self.training_chunk_ms) if chunk), default=None)
        require(
            shortest is None or self.look_ahead_ms < shortest,
            f"streaming option look_ahead_ms must be below the shortest chunk, {shortest}",
            self.look_ahead_ms,
        )

    def check_model(self, speech_config: Any, adapter: AdapterOptions, speech_padding: str):
        """Check that a model of these parts can be causal.

        Raises:
            ValueError: it cannot, or a time is not a whole number of its frames.
        """
        if reason := ENCODER_FAMILIES[speech_config.model_type].why_not_causal:
            raise ValueError(
                f"streaming needs an encoder that can be limited to the past, and {speech_config.model_type!r} cannot: "
                f"{reason}. Use an encoder of the Whisper family, or leave out streaming."
            )
        if not isinstance(adapter, CFormerOptions) or adapter.attention_window is not None:
            given = getattr(adapter, "attention_window", None)
            given = repr(adapter.type) if given is None else f"attention_window={given}"
            raise ValueError(
                f"streaming needs adapter='cformer' without attention_window, whose stretches look ahead further in "
                f"each layer, but got {given}. left_context_ms limits the cost of its layers instead."
            )
        if speech_padding != "do_not_pad":
            raise ValueError(
                f"streaming needs speech_padding='do_not_pad', got {speech_padding!r}: silence after the clip would be "
                "its future."
            )
        step_ms = 1000 * frame_duration_s(speech_config) * adapter.frame_stride
        for name in ("chunk_ms", "left_context_ms", "look_ahead_ms", "training_chunk_ms"):
            given = getattr(self, name)
            for time_ms in given if isinstance(given, list) else [given]:
                if time_ms and time_ms % step_ms:
                    raise ValueError(
                        f"streaming option {name} must be a multiple of {step_ms:g} ms, a frame of this encoder times "
                        f"the adapter's frame_stride, got {time_ms}."
                    )

    def drawn(self) -> Self:
        """Return options with a chunk for one batch of training, drawn with torch's global generator."""
        index = int(torch.randint(len(self.training_chunk_ms), ()))
        return self.at_chunk(self.training_chunk_ms[index])

    def at_chunk(self, chunk_ms: int | None) -> Self:
        return type(self)(chunk_ms, self.left_context_ms, self.look_ahead_ms, self.training_chunk_ms)

    def blocks(self, frame_duration_s: float) -> Blocks | None:
        """Return the blocks of encoder frames of `frame_duration_s` seconds each; None with full context."""
        if self.chunk_ms is None:
            return None
        frame_ms = 1000 * frame_duration_s
        left_context = None if self.left_context_ms is None else round(self.left_context_ms / frame_ms)
        return Blocks(round(self.chunk_ms / frame_ms), left_context, round(self.look_ahead_ms / frame_ms))


def causal_form(options: StreamingOptions | None, frame_duration_s: float, is_training: bool) -> dict[str, Any]:
    """Return what the adapter is told in one call: `is_causal` and `blocks`, or nothing if the model does not stream.

    Args:
        options ([`StreamingOptions`], *optional*): of the model.
        is_training (`bool`): draw the chunk.
    """
    if options is None:
        return {}
    options = options.drawn() if is_training else options
    return {"is_causal": True, "blocks": options.blocks(frame_duration_s)}


def read_streaming(given: Any) -> StreamingOptions | None:
    """Return the options of a streaming model that are given as True, False (or None), or a dict; None if it is off.

    Raises:
        ValueError: it is none of these, or an option is unknown or means nothing.
    """
    given = read_switch(given, "streaming")
    return None if given is None else StreamingOptions.read(given)
