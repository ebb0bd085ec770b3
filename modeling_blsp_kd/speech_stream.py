"""Speech that goes on: log-mel in, speech tokens out, equal to those of the whole clip under the same blocks.

Runs the encoder, CIF and the adapter's layers block by block. What a block needs of those before it is kept: mel
frames for the convolutions, keys and values of the left context, CIF's open token. Leaves out: the mask that gives the
same for whole clips (`blockwise_attention.py`), features of samples, and the LLM.

Shapes: T frames, U speech tokens, H encoder width, D LLM width; everything of one clip.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from .blockwise_attention import Blocks
from .cif_streaming import CifStreamState, flush_stream, stream_integrate_and_fire
from .encoder_families import window_of
from .expected_embeddings import llm_vectors
from .versions import CACHE_NAME

# Keys and values of a layer, (1, heads, length, width) each.
Context = tuple[torch.Tensor, torch.Tensor]


class _LayerCache:
    """Stands where an attention layer takes a key-value cache; gives it the context, and keeps the context of the next.

    Args:
        context (`Context`, *optional*): of the blocks before.
        num_frames (`int`): frames of this block. What the layer sees after them, it sees ahead.
        length (`int`, *optional*): of the left context; None: all.
    """

    def __init__(self, context: Context | None, num_frames: int, length: int | None):
        self.context, self.num_frames, self.length = context, num_frames, length
        self.kept: Context

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> Context:
        num_ahead = keys.shape[2] - self.num_frames
        if self.context is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.context, (keys, values)))
        stop = keys.shape[2] - num_ahead
        start = 0 if self.length is None else max(0, stop - self.length)
        self.kept = (keys[:, :, start:stop].clone(), values[:, :, start:stop].clone())
        return keys, values


def _run_block(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    contexts: tuple[Context, ...],
    num_frames: int,
    left_context: int | None,
) -> tuple[torch.Tensor, tuple[Context, ...]]:
    """Run layers on a block and what it sees ahead, (1, T, H); return its frames and the contexts of the next block."""
    kept = []
    for index, layer in enumerate(layers):
        cache = _LayerCache(contexts[index] if contexts else None, num_frames, left_context)
        hidden_states = layer(hidden_states, None, **{CACHE_NAME: cache})
        kept.append(cache.kept)
    return hidden_states[:, :num_frames], tuple(kept)


@dataclass(frozen=True)
class StreamedSpeech:
    """Holds what a stretch of speech gave.

    Args:
        speech_tokens (`torch.FloatTensor` of shape (U, D)): tokens that it completed.
        firing_places (`torch.FloatTensor` of shape (U,)): in encoder frames from the start of the clip.
        alphas (`torch.FloatTensor` of shape (T,)): weights of the frames that it completed.
    """

    speech_tokens: torch.Tensor
    firing_places: torch.Tensor
    alphas: torch.Tensor

    def __add__(self, later: "StreamedSpeech") -> "StreamedSpeech":
        names = [each.name for each in fields(self)]
        return StreamedSpeech(*(torch.cat([getattr(self, name), getattr(later, name)]) for name in names))


@dataclass(frozen=True)
class _State:
    """Holds what is kept between blocks; never changed, so that a block that fails leaves it as it was.

    Args:
        mel (bins, length): from mel frame `mel_start` of the window on.
        num_frames: encoder frames of the window so far.
        encoder, before_cif, after_cif: the layers' contexts.
        cif: the open token.
        num_tokens: of the clip so far.
    """

    mel: torch.Tensor
    mel_start: int = 0
    num_frames: int = 0
    encoder: tuple[Context, ...] = ()
    before_cif: tuple[Context, ...] = ()
    after_cif: tuple[Context, ...] = ()
    cif: CifStreamState | None = None
    num_tokens: int = 0


class SpeechStream:
    """One clip that is still spoken.

    Args:
        model ([`BlspKdForCausalLM`]): a streaming one, in eval mode.
        chunk_ms (`int`, *optional*): overrides that of the config.

    Raises:
        ValueError: the model does not stream.
    """

    def __init__(self, model: Any, chunk_ms: int | None = None):
        options = model.config.streaming_options
        if options is None:
            raise ValueError(
                "This model reads whole clips: what it makes of their beginning depends on their end. Train one with "
                "config.streaming (docs/streaming.md) to listen to speech that goes on."
            )
        if model.training:
            raise ValueError("The model is in training mode, in which layers drop at random. Call model.eval() first.")
        if chunk_ms is not None:
            options = options.at_chunk(chunk_ms)
            options.check_model(model.config.speech_config, model.config.adapter_options, model.config.speech_padding)
        self._model, self._encoder, self._adapter = model, model.audio_tower, model.adapter
        self._window = window_of(model.config.speech_config)[0]
        self._frames_per_window = self._window // 2
        # With full context all of a window is one block.
        self._blocks = options.blocks(model.frame_duration_s) or Blocks(self._frames_per_window)
        num_bins = model.config.speech_config.num_mel_bins
        self._state = _State(torch.zeros(num_bins, 0, device=model.device))

    @property
    def num_wanted(self) -> int:
        """Return how many more mel frames complete the next block. They belong to the same window of 30 s."""
        state = self._begun(self._state)
        stop = min(self._stop_of_block(state) + self._blocks.look_ahead, self._frames_per_window)
        return min(2 * stop + 1, self._window) - state.mel_start - state.mel.shape[1]

    @property
    def nothing(self) -> StreamedSpeech:
        """Return speech of no length."""
        weight = self._adapter.output_proj.weight
        none = weight.new_zeros(0, dtype=torch.float32)
        return StreamedSpeech(weight.new_zeros(0, weight.shape[0]), none, none)

    @torch.no_grad()
    def push(self, mel: torch.Tensor) -> StreamedSpeech:
        """Read the next mel frames, (bins, length), and encode the blocks that they complete."""
        self._state, speech = self._read(self._state, mel, is_end=False)
        return speech

    @torch.no_grad()
    def finish(self, mel: torch.Tensor) -> StreamedSpeech:
        """Return what the clip gives beyond all before, if these are its last mel frames, (bins, length).

        The stream itself is not changed: more may still be pushed.
        """
        state, speech = self._read(self._state, mel, is_end=True)
        if state.cif is None:
            return speech
        tokens, places = flush_stream(state.cif, must_fire=state.num_tokens == 0)
        _, vectors = self._finish_tokens(tokens.to(speech.speech_tokens.dtype), state.after_cif)
        return speech + StreamedSpeech(vectors, places, speech.alphas[:0])

    def _begun(self, state: _State) -> _State:
        """Return the state in which the next block is run: a new window begins where one is complete."""
        if state.num_frames < self._frames_per_window:
            return state
        return replace(state, mel_start=0, num_frames=0, encoder=(), before_cif=(), after_cif=())

    def _stop_of_block(self, state: _State) -> int:
        return min(state.num_frames + self._blocks.chunk, self._frames_per_window)

    def _read(self, state: _State, mel: torch.Tensor, is_end: bool) -> tuple[_State, StreamedSpeech]:
        state = replace(state, mel=torch.cat([state.mel, mel.to(state.mel)], dim=1))
        speech = self.nothing
        while state.mel.shape[1] > 0:
            begun = self._begun(state)
            num_mel = begun.mel_start + begun.mel.shape[1]
            is_closed = num_mel >= self._window or is_end  # no more mel frames come in this window
            num_mel = min(num_mel, self._window)
            num_frames = (num_mel + 1) // 2 if is_closed else self._frames_per_window
            stop = min(self._stop_of_block(begun), num_frames)
            seen = min(stop + self._blocks.look_ahead, num_frames)
            mel_stop = min(2 * seen + 1, num_mel if is_closed else self._window)
            if stop <= begun.num_frames or mel_stop > num_mel:
                break
            state, of_block = self._run(begun, stop, seen, mel_stop)
            speech += of_block
        return state, speech

    def _run(self, state: _State, stop: int, seen: int, mel_stop: int) -> tuple[_State, StreamedSpeech]:
        """Encode the next frames of the window up to `stop`, which see those up to `seen`, and mel up to `mel_stop`."""
        encoder, start, num_frames = self._encoder, state.num_frames, stop - state.num_frames
        mel = state.mel[None, :, : mel_stop - state.mel_start]
        # The first mel frames are those of the frame before, which the convolutions cannot complete here.
        hidden_states = encoder.convolve(mel, torch.ones_like(mel[:, 0], dtype=torch.bool))
        hidden_states = hidden_states[:, 1 if start else 0 :][:, : seen - start]
        hidden_states = hidden_states + encoder.positions(start, seen, hidden_states.device)
        left_context = self._blocks.left_context
        frames, of_encoder = _run_block(encoder.layers, hidden_states, state.encoder, num_frames, left_context)
        frames = encoder.layer_norm(frames).to(self._adapter.output_proj.weight.dtype)
        frames, before_cif = self._weigh(frames, state.before_cif)
        alphas = torch.sigmoid(frames[0, :, -1].float())
        tokens, places, cif = stream_integrate_and_fire(frames[0], alphas, state.cif)
        after_cif, vectors = self._finish_tokens(tokens, state.after_cif)
        # What the convolutions of the next frames need; of a complete window nothing.
        kept_from = self._window if stop == self._frames_per_window else 2 * stop - 2
        state = _State(
            mel=state.mel[:, kept_from - state.mel_start :].clone(),
            mel_start=kept_from,
            num_frames=stop,
            encoder=of_encoder,
            before_cif=before_cif,
            after_cif=after_cif,
            cif=cif,
            num_tokens=state.num_tokens + len(tokens),
        )
        return state, StreamedSpeech(vectors, places, alphas)

    def _weigh(self, frames, contexts) -> tuple[torch.Tensor, tuple[Context, ...]]:
        """Run the layers before CIF on the frames of a block, (1, T, H)."""
        layers, stacking = self._adapter.pre_layers, self._adapter.frame_stacking
        blocks = self._blocks.joined(1 if stacking is None else stacking.stride)
        if stacking is None:
            return _run_block(layers, frames, contexts, frames.shape[1], blocks.left_context)
        joined, _ = stacking.join(frames, torch.ones_like(frames[..., 0], dtype=torch.bool))
        joined, contexts = _run_block(layers, joined, contexts, joined.shape[1], blocks.left_context)
        return stacking.split(joined, frames), contexts

    def _finish_tokens(self, tokens, contexts) -> tuple[tuple[Context, ...], torch.Tensor]:
        """Run the layers after CIF on tokens (U, H), each of which sees those before it, and return vectors (U, D)."""
        adapter = self._adapter
        hidden_states = adapter.cif_proj(tokens[None, :, :-1])
        finished = [hidden_states[:, :0]]
        for index in range(len(tokens)):
            token = hidden_states[:, index : index + 1]
            token, contexts = _run_block(adapter.post_layers, token, contexts, 1, None)
            finished.append(token)
        return contexts, llm_vectors(self._model, adapter.output_proj(torch.cat(finished, dim=1))[0])
