"""Encode the clips that wait together, in a thread of its own, and remember the results.

A batch begins with the clip that waits longest and takes the waiting ones of the nearest lengths, up to a budget of
encoder frames, padding included. Leaves out: reading audio (`speech_parts.py`), and the model (`model_without_llm.py`).
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.encoder_families import steps_per_frame, window_of
from modeling_blsp_kd.token_times import text_token_times
from processing import BlspKdProcessor

from .clip_cache import ClipCache, EncodedClip
from .errors import BadRequest, Busy, ServerError
from .metrics import Metrics

# How long one clip is taken to need before any was encoded, for Retry-After.
FIRST_GUESS_S = 0.5


@dataclass(eq=False)
class _Waiting:
    """A clip that waits: its features, as the processor makes them, and how many encoder frames it has."""

    features: np.ndarray
    num_frames: int
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Work:
    """A clip that is being encoded, and for how many calls."""

    task: asyncio.Task
    num_calls: int = 0


class ClipEncoder:
    """Encoder and adapter of one model, for coroutines.

    Args:
        model ([`BlspKdForCausalLM`]): of [`load_without_llm`].
        processor ([`BlspKdProcessor`]).
        metrics ([`Metrics`]).
        max_frames (`int`): the budget of a batch; a longer clip is encoded alone.
        max_waiting (`int`): clips that may wait, those being decoded included.
        cache_bytes (`int`): see [`ClipCache`].
        num_decoders (`int`): threads that decode audio and compute features.
    """

    def __init__(
        self,
        model: BlspKdForCausalLM,
        processor: BlspKdProcessor,
        metrics: Metrics,
        max_frames: int = 6000,
        max_waiting: int = 64,
        cache_bytes: int = 2**28,
        num_decoders: int = 2,
    ):
        self.model, self.processor, self.metrics = model, processor, metrics
        self.max_frames, self.max_waiting = max_frames, max_waiting
        self.cache = ClipCache(cache_bytes)
        self._time_axis = window_of(model.config.speech_config)[1]
        # Touched by the event loop alone: places that are taken, and clips in work by their hashes.
        self._num_held, self._in_work = 0, dict[str, _Work]()
        self._seconds_per_clip = FIRST_GUESS_S
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decoder")
        self._thread = threading.Thread(target=self._encode_until_closed, name="encoder", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Return whether clips are encoded."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def tells_times(self) -> bool:
        """Return whether clips come with the times of their tokens."""
        return self.model.adapter.one_to_one

    @property
    def eos_and_pad(self) -> set[int]:
        """Token ids that end an answer, or fill it up, and so are never said."""
        config = self.model.generation_config
        given = [each for each in (config.eos_token_id, config.pad_token_id) if each is not None]
        return {token_id for each in given for token_id in torch.as_tensor(each).flatten().tolist()}

    # -- in the event loop --------------------------------------------------------------------------------------------

    @contextmanager
    def reserve(self, keys: list[str]) -> Iterator[None]:
        """Hold a place to wait in for each clip that is new, by the hashes of the clips.

        Raises:
            Busy: fewer places are free.
            BadRequest: there are not so many at all.
        """
        num_new = sum(self.cache.get(key) is None for key in set(keys))
        if num_new > self.max_waiting:
            raise BadRequest(f"A request may have {self.max_waiting} new clips, but this one has {num_new}.")
        if self._num_held + num_new > self.max_waiting:
            raise Busy("Too many clips wait to be encoded.", self._seconds_per_clip * self._num_held)
        self._hold(num_new)
        try:
            yield
        finally:
            self._hold(-num_new)

    def _hold(self, num_clips: int):
        self._num_held += num_clips
        self.metrics.waiting_clips.set(self._num_held)

    async def encode(self, key: str, read_features: Callable[[], np.ndarray]) -> EncodedClip:
        """Return an encoded clip. Calls for the same clip at the same time share the work.

        If all of them are cancelled, the clip is not encoded any more, unless it already is.

        Args:
            key (`str`): hash of the clip's contents.
            read_features (`Callable`): returns its features; called in a thread, only if the clip is new.

        Raises:
            Exception: of any kind, raised by `read_features`, or by the model.
            ServerError: the encoder is closed.
        """
        cached, work = self.cache.get(key), self._in_work.get(key)
        result = "hit" if cached is not None else "miss" if work is None else "shared"
        self.metrics.cache_lookups.labels(result).inc()
        if cached is not None:
            return cached
        if work is None:
            work = self._in_work[key] = _Work(asyncio.ensure_future(self._encode_new(key, read_features)))
        work.num_calls += 1
        try:
            # Shielded, because the cancellation of one call is not that of the others.
            return await asyncio.shield(work.task)
        finally:
            work.num_calls -= 1
            if work.num_calls == 0:
                work.task.cancel()  # which does nothing if it is done
                del self._in_work[key]

    async def _encode_new(self, key: str, read_features: Callable[[], np.ndarray]) -> EncodedClip:
        features = await asyncio.get_running_loop().run_in_executor(self._decoders, read_features)
        num_frames = math.ceil(features.shape[self._time_axis - 1] / steps_per_frame(self.model.config.speech_config))
        waiting = _Waiting(features, num_frames)
        with self._changed:
            if self._is_closed:
                raise ServerError("The server is shutting down.")
            self._waiting.append(waiting)
            self._changed.notify()
        encoded = await asyncio.wrap_future(waiting.future)
        self.cache.put(key, encoded)
        return encoded

    def word_times(self, token_ids: list[int], clip: EncodedClip) -> torch.Tensor:
        """Return start and end of each token of an answer that repeats a clip: (L, 2), NaN where nothing is said."""
        answer = torch.tensor(token_ids, dtype=torch.long)
        times = torch.full((len(answer), 2), torch.nan)
        is_said = ~torch.isin(answer, torch.tensor(sorted(self.eos_and_pad), dtype=torch.long))
        if bool(is_said.any()):
            embeddings = self.model.get_input_embeddings()
            said = embeddings(answer[is_said].to(embeddings.weight.device)).cpu()
            times[is_said] = text_token_times(said, clip.speech_tokens, clip.token_times)
        return times

    def close(self):
        """Encode what waits, and end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._decoders.shutdown()

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _encode_until_closed(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                batch = self._take_batch()
            batch = [clip for clip in batch if clip.future.set_running_or_notify_cancel()]
            if batch:
                self._encode(batch)

    def _take_batch(self) -> list[_Waiting]:
        """Remove from what waits the first clip, and those nearest to it in length that the budget admits."""
        first = self._waiting[0]
        nearest = sorted(self._waiting, key=lambda clip: (clip is not first, abs(clip.num_frames - first.num_frames)))
        batch: list[_Waiting] = []
        for clip in nearest:
            longest = max(each.num_frames for each in [*batch, clip])
            if batch and longest * (len(batch) + 1) > self.max_frames:
                break
            batch.append(clip)
        self._waiting = [clip for clip in self._waiting if clip not in batch]
        return batch

    def _encode(self, batch: list[_Waiting]):
        begin = time.monotonic()
        for clip in batch:
            self.metrics.encoder_wait_s.observe(begin - clip.since)
        try:
            encoded = self._forward([clip.features for clip in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:  # it may be the fault of one
                for clip in batch:
                    self._encode([clip])
            return
        elapsed_s = time.monotonic() - begin
        self._seconds_per_clip += 0.1 * (elapsed_s / len(batch) - self._seconds_per_clip)
        self.metrics.encoder_s.observe(elapsed_s)
        self.metrics.batch_size.observe(len(batch))
        for clip, result in zip(batch, encoded):
            clip.future.set_result(result)

    @torch.inference_mode()
    def _forward(self, features: list[np.ndarray]) -> list[EncodedClip]:
        inputs = {name: torch.from_numpy(each) for name, each in self.processor.pad_features(features).items()}
        inputs = {name: each.to(self.model.device) for name, each in inputs.items()}
        audio = self.model.get_audio_features(**inputs, output_token_times=self.tells_times)
        encoded = []
        for row, count in enumerate(audio.num_speech_tokens.tolist()):
            times = None if audio.token_times is None else audio.token_times[row, :count].cpu().clone()
            encoded.append(EncodedClip(audio.pooler_output[row, :count].cpu().clone(), times))
        return encoded
