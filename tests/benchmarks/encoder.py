"""The speech encoder on the true length of clips beside clips padded to 30 s, and batches grouped by length beside not.

The encoder is a Whisper with random weights. Leaves out: what padding does to results (`tests/test_speech_encoder.py`).
"""

import torch
from transformers import WhisperConfig

from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder

from .measure import OURS, Case

MEL_FRAMES_PER_S = 100
WINDOW_S = 30
BATCH_SIZE = 4


def cases(small: bool, device, dtype):
    width, num_layers, heads = (16, 1, 2) if small else (384, 4, 6)  # of tiny, as are the others' proportions
    config = WhisperConfig(
        d_model=width, encoder_layers=num_layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width
    )
    encoder = TrueLengthWhisperEncoder(config).to(device, dtype).eval()
    for duration_s in (3,) if small else (3, 10, 30):
        yield _case(
            f"a clip of {duration_s} s",
            {
                OURS: _encodes(encoder, [[duration_s]]),
                "padded to 30 s": _encodes(encoder, [[duration_s]], WINDOW_S),
            },
        )
    durations_s = [1 + 14 * (5 * index % 16) / 15 for index in range(16)]  # 1 to 15 s, shuffled
    by_length = sorted(durations_s)
    yield _case(
        f"16 clips of 1 to 15 s in batches of {BATCH_SIZE}",
        {
            OURS: _encodes(encoder, _batches(by_length)),
            "not grouped by length": _encodes(encoder, _batches(durations_s)),
            "padded to 30 s": _encodes(encoder, _batches(by_length), WINDOW_S),
        },
    )
    for duration_s in (1, 2) if small else (2, 4, 8, 16, 30):
        yield _case(f"{duration_s} s", {OURS: _encodes(encoder, [[duration_s]])}, ("seconds", duration_s))


def _batches(durations_s) -> list[list[float]]:
    return [durations_s[start : start + BATCH_SIZE] for start in range(0, len(durations_s), BATCH_SIZE)]


def _encodes(encoder, batches, padded_to_s: float = 0.0):
    """Encodes clips of these durations, batch by batch, each batch padded to its longest clip or further."""
    inputs = []
    for durations_s in batches:
        lengths = torch.tensor([round(duration_s * MEL_FRAMES_PER_S) for duration_s in durations_s])
        length = max(int(lengths.max()), round(padded_to_s * MEL_FRAMES_PER_S))
        features = torch.randn(len(lengths), 80, length, device=encoder.device, dtype=encoder.dtype)
        # Whisper as pretrained hears its padding.
        heard = torch.full_like(lengths, length) if padded_to_s else lengths
        inputs.append((features, (torch.arange(length) < heard[:, None]).to(encoder.device)))

    @torch.no_grad()
    def encode():
        for features, mask in inputs:
            encoder(features, mask)

    return encode


def _case(name: str, candidates: dict, sweep=None) -> Case:
    return Case(name=name, candidates=candidates, memory_unit=("MiB", 2**20), sweep=sweep)
