"""The parts of a processor: its feature extractor, its tokenizer that threads share, and the arguments of a call."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, TextKwargs
from transformers.tokenization_utils_base import BatchEncoding

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


def parts_of_backbones(
    speech_model: str | os.PathLike, text_model: str | os.PathLike, audio_token: str, **kwargs
) -> tuple[FeatureExtractionMixin, PreTrainedTokenizerBase]:
    """Load feature extractor and tokenizer, and complete the tokenizer; see [`~BlspKdProcessor.from_backbones`]."""
    feature_extractor = AutoFeatureExtractor.from_pretrained(speech_model, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(text_model, **kwargs)
    if audio_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        # Padding is masked, so any token works.
        tokenizer.pad_token = tokenizer.eos_token
    return feature_extractor, tokenizer


@contextmanager
def errors_that_name_the_files(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Convert errors that other libraries raise for broken files to a ValueError that says where to look."""
    try:
        yield
    except (OSError, ImportError):  # these name the file, or the library that is missing
        raise
    except Exception as error:
        raise ValueError(
            f"The tokenizer or feature extractor of {name_or_path} cannot be read (tokenizer_config.json, "
            "tokenizer.json, processor_config.json or preprocessor_config.json): "
            f"{type(error).__name__}: {str(error)[:500]}. Copy the files again from where they came, or save the "
            "processor anew (save_pretrained)."
        ) from error


class BlspKdProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # not seen to be a TypedDict
    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left"},
        "common_kwargs": {"return_tensors": "pt"},
    }


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
