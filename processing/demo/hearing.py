"""Inspect how a model understands a clip: where each speech token ends, and what the LLM predicts after it.

Follows arXiv 2405.19041: a speech token is correct if the LLM predicts the same next tokens after it as after the
transcript's token. The KL divergence between the two predictions measures this token by token.

    hear(model, processor, "clip.wav", transcript="the red cat ran to the sea").describe()

`picture.py` draws the result. Shapes: M mel bins, F spectrogram columns, T encoder frames, U speech tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.frozen import frozen
from processing.audio_loading import load_audio
from processing.data_collator import continue_ids
from processing.processing_blsp_kd import BlspKdProcessor
from processing.spoken_inputs import user_turn

NUM_MEL_BINS = 80
SPECTROGRAM_STEP_S = 0.010
SPECTROGRAM_WINDOW_S = 0.025
DYNAMIC_RANGE_DB = 70.0


@dataclass
class Hearing:
    """The result of [`hear`]: how a model understood one clip.

    Args:
        spectrogram (`np.ndarray` of shape (M, F)): log-mel of the waveform at the speech encoder's rate, dB below the
            loudest point of the clip, one column per 10 ms. It is for display and does not depend on the encoder's
            features.
        duration_s (`float`): of the clip, seconds.
        frame_duration_s (`float`): of an encoder frame, seconds.
        alphas (`np.ndarray` of shape (T,), *optional*): unscaled CIF weights (CFormer only).
        token_ends_s (`np.ndarray` of shape (U,), *optional*): where each speech token ends, seconds from the start of
            the clip: CIF's firing places (CFormer only).
        num_predicted_tokens (`int`): how many tokens the model predicts for the clip; U, unless a transcript set U.
        predictions (`list[list[tuple[str, float]]]`): for each of the U tokens, the LLM's most likely next tokens as
            text, with their probabilities (at temperature 1), the most likely first. Those after the last token are
            predictions of the text that follows the clip in the prompt.
        transcript_tokens (`list[str]`, *optional*): text of the transcript's U tokens.
        kl_to_text (`np.ndarray` of shape (U,), *optional*): KL(text prompt || speech prompt) of the next-token
            distributions after each token, nats, at the temperature of the training loss. Their mean is the clip's
            `input_kl`.
    """

    spectrogram: np.ndarray
    duration_s: float
    frame_duration_s: float
    alphas: np.ndarray | None
    token_ends_s: np.ndarray | None
    num_predicted_tokens: int
    predictions: list[list[tuple[str, float]]]
    transcript_tokens: list[str] | None = None
    kl_to_text: np.ndarray | None = None

    def summary(self) -> str:
        """Summarise the duration of the clip and its number of speech tokens in one sentence."""
        num_tokens = len(self.predictions)
        text = f"{self.duration_s:.2f} s of audio heard as {num_tokens} speech token{'s' * (num_tokens != 1)}"
        if self.transcript_tokens is None:
            return text + "."
        if self.num_predicted_tokens == num_tokens:
            return text + ", as many as the transcript has."
        return text + f", the transcript's number; without it the model makes {self.num_predicted_tokens}."

    def describe(self, max_tokens: int = 40) -> str:
        """Describe the plot in words, for users who cannot see it."""
        lines = [self.summary()]
        for index, predictions in enumerate(self.predictions[:max_tokens]):
            heard = "" if self.transcript_tokens is None else f" ({self.transcript_tokens[index].strip()})"
            when = "" if self.token_ends_s is None else f" at {self.token_ends_s[index]:.2f} s"
            expected = ", ".join(f"{text.strip()} {percent(probability)}" for text, probability in predictions)
            kl = "" if self.kl_to_text is None else f"; KL to the text prompt {self.kl_to_text[index]:.2f} nats"
            lines.append(f"After token {index + 1}{heard}{when} the LLM expects: {expected}{kl}.")
        if len(self.predictions) > max_tokens:
            lines.append(f"{len(self.predictions) - max_tokens} more tokens are left out.")
        return " ".join(lines)


def hear(
    model: BlspKdForCausalLM,
    processor: BlspKdProcessor,
    audio: Any,
    instruction: str | None = None,
    transcript: str | None = None,
    top_k: int = 4,
) -> Hearing:
    """Run a model on one clip, and return what the LLM predicts after each speech token.

    The model and its mode stay unchanged.

    Args:
        model ([`BlspKdForCausalLM`]), processor ([`BlspKdProcessor`]).
        audio: one clip as in [`load_audio`]; a bare array must have the feature extractor's rate.
        instruction (`str`, *optional*): comes before the clip in the prompt, as in training.
        transcript (`str`, *optional*): the text of the clip. If given, CIF fires once per token of it, as in training,
            so that each speech token can be compared with a text token.
        top_k (`int`): number of predictions per token.

    Raises:
        FileNotFoundError, TypeError: see [`load_audio`].
        ValueError: the clip is unusable (see [`load_audio`]), the transcript is empty, or a transcript is given for an
            adapter with a fixed rate, whose tokens do not correspond to text tokens.
    """
    rate = processor.feature_extractor.sampling_rate
    waveform = load_audio(audio, rate)
    chat = user_turn(instruction, {"type": "audio", "audio": (waveform, rate)})
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    inputs = inputs.to(model.device)
    input_ids = inputs["input_ids"][0]
    place = int((input_ids == processor.audio_token_id).nonzero())
    num_speech_tokens = kl_to_text = None
    transcript_ids = input_ids[:0]
    if transcript is not None:
        before, _ = processor.apply_chat_template(chat, add_generation_prompt=True).split(processor.audio_token)
        [continued] = continue_ids(processor, [before], [input_ids[:place].tolist()], [transcript.strip()])
        transcript_ids = input_ids.new_tensor(continued)
        num_speech_tokens = input_ids.new_tensor([len(transcript_ids)])
        if len(transcript_ids) == 0:
            raise ValueError(f"The transcript {transcript!r} has no tokens. Give what is said, or leave it out.")

    with frozen(model):
        audio_features = {name: inputs[name] for name in ("input_features", "input_features_mask")}
        heard = model.get_audio_features(**audio_features)
        num_predicted_tokens = int(heard.num_speech_tokens)
        if transcript is not None and heard.alphas is None:
            raise ValueError(
                "This model's adapter makes a fixed number of tokens per second, none of which stands for a token of "
                "the transcript. Leave the transcript out."
            )
        if transcript is not None:
            heard = model.get_audio_features(**audio_features, num_speech_tokens=num_speech_tokens)
        positions = torch.arange(place, place + int(heard.num_speech_tokens), device=model.device)
        output = model(**inputs, num_speech_tokens=num_speech_tokens, logits_to_keep=positions, use_cache=False)
        logits = output.logits[0]
        if transcript is not None:
            text_ids = torch.cat([input_ids[:place], transcript_ids, input_ids[place + 1 :]])[None]
            text_logits = model(input_ids=text_ids, logits_to_keep=positions, use_cache=False).logits[0]
            kl_to_text = _kl(text_logits, logits, model.config.distillation["temperature"]).cpu().numpy()

    likeliest = logits.float().softmax(-1).topk(top_k)
    decode = processor.tokenizer.decode
    has_alphas = heard.alphas is not None
    return Hearing(
        spectrogram=_log_mel(waveform, rate),
        duration_s=len(waveform) / rate,
        frame_duration_s=model.frame_duration_s,
        alphas=heard.alphas[0].float().cpu().numpy() if has_alphas else None,
        token_ends_s=heard.firing_places[0].float().cpu().numpy() * model.frame_duration_s if has_alphas else None,
        num_predicted_tokens=num_predicted_tokens,
        predictions=[
            [(decode([token_id]), probability) for token_id, probability in zip(ids, probabilities)]
            for ids, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist())
        ],
        transcript_tokens=None if transcript is None else [decode([token_id]) for token_id in transcript_ids.tolist()],
        kl_to_text=kl_to_text,
    )


def percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.005 else "<1%"


def _kl(teacher_logits, student_logits, temperature: float) -> torch.Tensor:
    """Compute KL(teacher || student) of each row, (N, V) and (N, V) -> (N,) float32; their mean is `linear_kl`."""
    teacher, student = (
        torch.log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher_logits, student_logits)
    )
    return nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def _log_mel(waveform: np.ndarray, rate: int) -> np.ndarray:
    window = int(SPECTROGRAM_WINDOW_S * rate)
    fft_length = 2 ** math.ceil(math.log2(window))
    return spectrogram(
        waveform,
        window_function(window, "hann"),
        frame_length=window,
        hop_length=int(SPECTROGRAM_STEP_S * rate),
        fft_length=fft_length,
        power=2.0,
        mel_filters=mel_filter_bank(fft_length // 2 + 1, NUM_MEL_BINS, 0.0, rate / 2, rate),
        mel_floor=1e-10,
        log_mel="dB",
        db_range=DYNAMIC_RANGE_DB,
    )
