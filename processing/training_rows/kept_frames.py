"""Frames of a frozen speech encoder, made once per clip and kept on disk between runs.

For experiments that train an adapter on the same clips again and again. Leaves out: other encoders than Whisper, and
anything that changes a clip anew in each epoch.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from modeling_blsp_kd.speech_encoder import SpeechEncoderOutput, TrueLengthWhisperEncoder


class KeptFrames:
    """Replaces the forward of an encoder, and encodes each clip only once.

    Args:
        audio_tower ([`TrueLengthWhisperEncoder`]): frozen.
        path: safetensors file of what is kept, float16; read if it exists. Another encoder finds nothing in it.

    Raises:
        ValueError: the encoder is another one, or is trained.
    """

    def __init__(self, audio_tower: TrueLengthWhisperEncoder, path: str | Path):
        if not isinstance(audio_tower, TrueLengthWhisperEncoder):
            raise ValueError(f"--kept_frames is for Whisper's encoder, got {type(audio_tower).__name__}. Leave it out.")
        if any(parameter.requires_grad for parameter in audio_tower.parameters()):
            raise ValueError("--kept_frames needs an encoder that stays as it is: add --freeze_speech_encoder true.")
        self.path, self.encode = Path(path), audio_tower.forward
        self.frames = load_file(self.path) if self.path.exists() else {}
        identity = hashlib.blake2b(str(audio_tower.pad_to_window).encode())
        for weights in audio_tower.state_dict().values():
            identity.update(weights.float().cpu().numpy().tobytes())
        self.identity = identity.digest()
        audio_tower.forward = self

    def __call__(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor, return_dict: bool = True
    ) -> SpeechEncoderOutput:
        lengths = input_features_mask.sum(1).tolist()
        keys = [self._key(clip[:, :length]) for clip, length in zip(input_features, lengths)]
        # A clip of several questions is in the batch several times.
        if new := {key: index for index, key in enumerate(keys) if key not in self.frames}:
            indices = list(new.values())
            encoded = self.encode(input_features[indices], input_features_mask[indices], return_dict=True)
            for key, frames, mask in zip(new, encoded.last_hidden_state, encoded.frame_mask):
                self.frames[key] = frames[mask].to("cpu", torch.float16)
        frame_mask = input_features_mask[:, ::2].bool()
        frames = pad_sequence([self.frames[key] for key in keys], batch_first=True)
        # A batch may be padded beyond its longest clip, where rows were cut off it.
        frames = pad(frames, (0, 0, 0, frame_mask.shape[1] - frames.shape[1])).to(input_features.device)
        return SpeechEncoderOutput(last_hidden_state=frames.float(), frame_mask=frame_mask)

    def _key(self, log_mel) -> str:
        return hashlib.blake2b(log_mel.cpu().numpy().tobytes(), key=self.identity, digest_size=16).hexdigest()

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}.unfinished")  # several runs may share the file
        save_file(self.frames, unfinished)
        os.replace(unfinished, self.path)
