"""Speech recognition for cascades: by a BLSP-KD model, or by any speech recognition model of transformers.

Follows the reading that the transcript cross-entropy of `distillation_step.py` trains. Leaves out: beam search and
external language models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, pipeline

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.audio_loading import load_audio
from processing.spoken_inputs import user_turn

from .answering import answer

WHISPER_WINDOW_S = 30


@dataclass
class Recognizer:
    """A function that transcribes a list of clips (each as in `load_audio`), and the model behind it."""

    transcribe: Callable[[list], list[str]]
    model: nn.Module

    def __call__(self, clips: list) -> list[str]:
        return self.transcribe(clips)


def name_cascades(asr_models: list[str]) -> dict[str, str]:
    """Return the name of the system of each recogniser: `cascade`, or of several `cascade_NAME` by their last part.

    Raises:
        ValueError: two have the same name.
    """
    if len(asr_models) == 1:
        return {"cascade": asr_models[0]}
    names = [f"cascade_{Path(model).name}" for model in asr_models]
    if len(set(names)) < len(names):
        raise ValueError(f"The recognisers {', '.join(asr_models)} need different last parts, which name the systems.")
    return dict(zip(names, asr_models))


def load_recognizer(name: str, dtype: torch.dtype | str = "auto", language: str | None = None) -> Recognizer:
    """Return a recogniser that decodes greedily.

    Args:
        name: folder or Hub id of a BLSP-KD model, or of a model for transformers' "automatic-speech-recognition".
        dtype: of its weights, as in `from_pretrained`.
        language: what a multilingual Whisper is told to hear, such as "en"; omitted, it finds out clip by clip.
    """
    config, _ = PretrainedConfig.get_config_dict(name)
    if config.get("model_type") == BlspKdConfig.model_type:
        processor = BlspKdProcessor.from_pretrained(name)
        model = BlspKdForCausalLM.from_pretrained(name, device_map="auto", dtype=dtype).eval()
        return Recognizer(lambda clips: transcribe(model, processor, clips), model)
    recognize = pipeline("automatic-speech-recognition", model=name, device_map="auto", dtype=dtype)
    rate = recognize.feature_extractor.sampling_rate
    generate_kwargs: dict[str, Any] = {}
    if recognize.type == "seq2seq_whisper" and recognize.tokenizer.pad_token is None:
        # A pipeline asks for one before it batches. What ends a transcript may fill it up.
        recognize.tokenizer.pad_token = recognize.tokenizer.eos_token
        generate_kwargs["pad_token_id"] = recognize.tokenizer.pad_token_id

    if recognize.type.startswith("seq2seq"):
        generate_kwargs["num_beams"] = 1  # the pipeline's own default is 5
        if language and getattr(recognize.model.generation_config, "is_multilingual", False):
            generate_kwargs["language"] = language

    def run_pipeline(clips: list) -> list[str]:
        waveforms = [load_audio(clip, rate) for clip in clips]
        given = [{"raw": waveform, "sampling_rate": rate} for waveform in waveforms]
        options: dict[str, Any] = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        if recognize.type == "seq2seq_whisper":
            if max(map(len, waveforms)) > WHISPER_WINDOW_S * rate:
                options["return_timestamps"] = True  # without it Whisper stops at the end of its window
            else:
                # Whisper pads all clips to one length. Others would recognise letters in the padding of shorter clips.
                options["batch_size"] = len(given)
        return [made["text"].strip() for made in recognize(given, **options)]

    return Recognizer(run_pipeline, recognize.model)


@torch.inference_mode()
def transcribe(
    model: BlspKdForCausalLM, processor: BlspKdProcessor, clips: list, max_new_tokens: int = 256
) -> list[str]:
    """Transcribe clips with a BLSP-KD model.

    A model that was trained with transcript cross-entropy is a recogniser: the tokens are read off its speech vectors,
    with the LLM's embeddings as output matrix, and the LLM does not run. Any other is asked to repeat the words.

    Args:
        clips: each as in `load_audio`; bare arrays are of the processor's rate.
        max_new_tokens: longest transcript of a model that is asked.
    """
    if not model.config.distillation["transcript_ce"]:
        chats = [user_turn(processor.transcription_instruction, {"type": "audio", "audio": clip}) for clip in clips]
        return answer(model, processor, chats, max_new_tokens, batch_size=len(chats))
    features = processor.extract_features(clips)
    tensors = {name: torch.as_tensor(values, device=model.device) for name, values in features.items()}
    return [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in read_off(model, **tensors)]


def read_off(
    model: BlspKdForCausalLM, input_features: torch.Tensor, input_features_mask: torch.Tensor
) -> list[list[int]]:
    """Return the token ids that each clip's speech tokens stand for, with the LLM's embeddings as output matrix."""
    audio = model.get_audio_features(input_features, input_features_mask)
    embeddings = model.get_input_embeddings().weight
    token_ids = (audio.token_states.to(embeddings.dtype) @ embeddings.T).argmax(-1)
    return [ids[:count] for ids, count in zip(token_ids.tolist(), audio.num_speech_tokens.tolist())]
