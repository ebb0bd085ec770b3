"""Keep encoded clips, by the hash of their contents, up to a number of bytes.

The least recently used clips go first.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch


class EncodedClip(NamedTuple):
    """Holds what the LLM reads of a clip: U speech tokens of its width D, on the CPU.

    Args:
        speech_tokens (`torch.FloatTensor` of shape (U, D)).
        token_times (`torch.FloatTensor` of shape (U, 2), *optional*): start and end of each, in seconds from the start
            of the clip; None from an adapter that does not tell.
    """

    speech_tokens: torch.Tensor
    token_times: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        tensors = [tensor for tensor in self if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)


class ClipCache:
    """A bounded cache; safe for threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._clips: OrderedDict[str, EncodedClip] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def get(self, key: str) -> EncodedClip | None:
        """Return the clip of a key, which is then the last to go, or None."""
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
            return self._clips.get(key)

    def put(self, key: str, clip: EncodedClip):
        """Keep a clip, unless it alone exceeds the bound, and drop the least recently used ones beyond it."""
        with self._lock:
            if clip.num_bytes > self.max_bytes or key in self._clips:
                return
            self._clips[key] = clip
            self.num_bytes += clip.num_bytes
            while self.num_bytes > self.max_bytes:
                _, dropped = self._clips.popitem(last=False)
                self.num_bytes -= dropped.num_bytes
