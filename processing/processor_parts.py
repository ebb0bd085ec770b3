"""The parts of `BlspKdProcessor`: feature extractor, tokenizer and chat template, joined, loaded and saved.

Also the tokenizer that threads share, and the arguments of a call. Leaves out: prompts and clips
(`processing_blsp_kd.py`).
"""

import numbers
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import BatchEncoding

from .chat_templates import warn_of_thoughts, with_audio_blocks
from .speech_features import with_log_mel_max

AUDIO_TOKEN = "<|audio|>"
TRANSCRIPTION_INSTRUCTION = "Repeat the words."

# Tokenizers store the padding and truncation of a call, so two threads must not use one at the same time.
_tokenizing = threading.Lock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # Without this, a process forked during a call, such as a worker of a DataLoader, would wait forever for a lock of a
    # thread that it does not have.
    os.register_at_fork(
        before=_tokenizing.acquire, after_in_parent=_tokenizing.release, after_in_child=_tokenizing.release
    )


def tokenize_alone(tokenizer: PreTrainedTokenizerBase, texts: str | list[str], **kwargs) -> BatchEncoding:
    """Call a tokenizer while no other thread does."""
    with _tokenizing:
        return tokenizer(texts, **kwargs)


class PretrainedProcessor(ProcessorMixin):
    """The base of [`BlspKdProcessor`], which joins, loads and saves its parts."""

    @classmethod
    def from_backbones(
        cls,
        speech_model: str | os.PathLike,
        text_model: str | os.PathLike,
        audio_token: str = AUDIO_TOKEN,
        transcription_instruction: str = TRANSCRIPTION_INSTRUCTION,
        chat_template_kwargs: dict | None = None,
        global_log_mel_max: float | None = None,
        **kwargs,
    ) -> Self:
        """Join the feature extractor of a speech model with the tokenizer and chat template of an LLM.

        Args:
            speech_model, text_model (`str` or `os.PathLike`): Hub ids or folders.
            audio_token (`str`): added to the tokenizer if missing. The LLM's embeddings are not resized, because the
                placeholder is never embedded.
            transcription_instruction (`str`), chat_template_kwargs (`dict`): see [`BlspKdProcessor`].
            global_log_mel_max (`float`, *optional*): a fixed maximum (log10 of power) to take the floor of Whisper's
                log-mel from, which a streaming model needs: 1.5, as Voxtral Realtime has. Omitted: that of each clip.
            kwargs: passed to both `from_pretrained` calls (so not `revision`, because the repositories differ).

        Raises:
            ValueError: the chat template drops the placeholder, or does not use an option.
        """
        feature_extractor = AutoFeatureExtractor.from_pretrained(speech_model, **kwargs)
        if global_log_mel_max is not None:
            feature_extractor = with_log_mel_max(feature_extractor, global_log_mel_max)
        tokenizer = AutoTokenizer.from_pretrained(text_model, **kwargs)
        if audio_token not in tokenizer.get_vocab():
            added = {"additional_special_tokens": [audio_token]}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
        if tokenizer.pad_token is None:
            # Padding is masked, so any token works.
            tokenizer.pad_token = tokenizer.eos_token
        chat_template, default, options = with_audio_blocks(tokenizer, audio_token, chat_template_kwargs)
        processor = cls(feature_extractor, tokenizer, chat_template, audio_token, transcription_instruction, options)
        warn_of_thoughts(default, processor)
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        """Load a processor; see `ProcessorMixin.from_pretrained` for all arguments.

        Raises:
            OSError: a file is missing.
            ValueError: a file is broken, or holds what the processor cannot work with.
        """
        with errors_that_name_the_files(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        if hasattr(self.tokenizer, "legacy"):
            # transformers does not save `legacy` with a Llama tokenizer, which would then give other ids.
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        saved = super().save_pretrained(*args, **kwargs)
        # transformers sets `auto_map` on the processor when it saves its code; saving must not change the processor.
        self.__dict__.pop("auto_map", None)
        return saved


@contextmanager
def errors_that_name_the_files(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Convert errors that other libraries raise for broken files to a ValueError that says where to look."""
    try:
        yield
    except (OSError, ImportError):  # these name the file, or the library that is missing
        raise
    except Exception as error:
        *_, (where, _) = traceback.walk_tb(error.__traceback__)
        if where.f_globals.get("__package__") == __package__:  # raised by us, of an option: it says what to do
            raise
        raise ValueError(
            f"The tokenizer or feature extractor of {name_or_path} cannot be read (tokenizer_config.json, "
            "tokenizer.json, processor_config.json or preprocessor_config.json): "
            f"{type(error).__name__}: {str(error)[:500]}. Copy the files again from where they came, or save the "
            "processor anew (save_pretrained)."
        ) from error


def check_transcription_instruction(instruction: Any, audio_token: str):
    """Check the instruction that asks for a transcript.

    Raises:
        ValueError: it is no text, or has a place for an audio.
    """
    if not isinstance(instruction, str) or not instruction.strip() or audio_token in instruction:
        raise ValueError(
            "transcription_instruction must be a non-empty string without the audio placeholder "
            f"{audio_token!r}, got {instruction!r}."
        )


def as_clips(audio: Any) -> list:
    """Return one clip or a list of clips as a list; a flat list of numbers is one clip."""
    if isinstance(audio, list) and not (audio and isinstance(audio[0], numbers.Number)):
        return audio
    return [audio]


def check_arguments(kwargs: dict):
    """Refuse keyword arguments of a processor's call that transformers would drop.

    Raises:
        ValueError: transformers defines no such argument for text and audio, flat or in a group.
    """
    known = {
        "common_kwargs",
        "return_tensors",
        *TextKwargs.__annotations__,
        *AudioKwargs.__annotations__,
        *ProcessingKwargs.__annotations__,
    }
    # apply_chat_template passes images=None and videos=None.
    unknown = sorted(name for name in set(kwargs) - known if kwargs[name] is not None)
    if unknown:
        raise ValueError(
            f"Unknown argument(s) {unknown} of BlspKdProcessor. It takes 'text', 'audio' (one clip or a list), "
            "'sampling_rate' and the options of tokenizers, such as 'padding'."
        )


def options_of_call(tokenizer: PreTrainedTokenizerBase, given: dict) -> tuple[dict, int | None]:
    """Return the tokenizer's options in a processor's call, and the sampling rate of its clips.

    As in all processors, an option is given by itself or in the group of its kind (`text_kwargs`, `audio_kwargs`), and
    takes the place of one for all kinds (`common_kwargs`), of the tokenizer's own, and of the defaults.

    Raises:
        ValueError: an option is given by itself and in a group.
    """
    common, text, audio = (given.get(group) or {} for group in ("common_kwargs", "text_kwargs", "audio_kwargs"))
    twice = sorted(set(given) & (set(text) | set(audio)))
    if twice:
        raise ValueError(f"{twice} given twice, by name and in text_kwargs or audio_kwargs. Give each once.")
    # Without the tokenizer's own padding side (often right), which would override ours: generation needs left.
    own = {
        name: getattr(tokenizer, name, value)
        for name, value in tokenizer.init_kwargs.items()
        if name in TextKwargs.__annotations__ and name != "padding_side"
    }
    by_name = {name: value for name, value in given.items() if name in TextKwargs.__annotations__}
    options = {"padding": True, "padding_side": "left", **own, "return_tensors": "pt", **common, **text, **by_name}
    return options, {**common, **audio, **given}.get("sampling_rate")
