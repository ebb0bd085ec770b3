"""`BlspKdProcessor`: convert text with audio placeholders, and audio clips, to the inputs of `BlspKdForCausalLM`.

Combines a feature extractor, a tokenizer and the LLM's chat template, as in transformers' audio LLMs. Unlike them it
keeps one placeholder per audio, because the model predicts how many positions an audio takes. Leaves out: joining,
loading and saving it (`processor_parts.py`), and training batches (`data_collator.py`).
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import BatchEncoding

from .chat_audio import (
    check_none_truncated,
    check_one_per_clip,
    check_placeholders,
    check_unicode,
    separate_clips,
    without_names,
)
from .chat_templates import check_options, knows
from .pipeline_blsp_kd import BlspKdPipeline  # noqa: F401 (the files that this one imports are saved with a processor)
from .processor_parts import (
    AUDIO_TOKEN,
    TRANSCRIPTION_INSTRUCTION,
    PretrainedProcessor,
    as_clips,
    check_arguments,
    check_transcription_instruction,
    options_of_call,
    tokenize_alone,
)
from .speech_features import features_of_clips, padded_features
from .speech_session import SpeechSession
from .spoken_inputs import user_turn
from .word_timestamps import words_with_times


class BlspKdProcessor(PretrainedProcessor):
    """Prepares prompts with audio.

    Args:
        feature_extractor ([`FeatureExtractionMixin`]): the speech encoder's.
        tokenizer ([`PreTrainedTokenizerBase`]): the LLM's, with `audio_token` among its special tokens.
        chat_template (`str`, *optional*): renders messages whose content is text, or a list of text and audio blocks.
        audio_token (`str`): the placeholder for one audio.
        transcription_instruction (`str`): the instruction that asks the LLM for a transcript, used by the speech
            recognition pipeline. The model should have been trained on it.
        chat_template_kwargs (`dict`, *optional*): options of the chat template, such as `{"enable_thinking": False}`.
            They are saved with the processor and apply to every prompt, in training and afterwards. Arguments of
            `apply_chat_template` override them.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractionMixin,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        audio_token: str = AUDIO_TOKEN,
        transcription_instruction: str = TRANSCRIPTION_INSTRUCTION,
        chat_template_kwargs: dict | None = None,
    ):
        if not isinstance(audio_token, str) or audio_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer does not know the audio token {audio_token!r}. Build the processor with "
                "BlspKdProcessor.from_backbones, which adds it."
            )
        check_transcription_instruction(transcription_instruction, audio_token)
        self.transcription_instruction = transcription_instruction
        self.chat_template_kwargs = check_options(chat_template_kwargs, chat_template)
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "input_features_mask"]

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        chat_audio: list | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prepare prompts and their audio.

        Args:
            text (`str` or `list[str]`): prompts, with `audio_token` once for every audio. A bare waveform, as
                speech-to-text servers pass it, is prepared by [`~BlspKdProcessor.for_transcription`].
            audio (*optional*): one clip or a list of clips in reading order, each as in [`load_audio`].
            chat_audio (*optional*): the clips of a chat's audio blocks, which `apply_chat_template` passes here.
            sampling_rate (`int`, *optional*): of clips given as bare arrays, Hz; defaults to the feature extractor's.
            kwargs: for the tokenizer, as in all processors. By default, batches are left-padded and returned as torch
                tensors.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` (B, L); with audio also `input_features` and
            `input_features_mask`, see [`~BlspKdProcessor.extract_features`].

        Raises:
            TypeError: text is not a string or a list of strings.
            ValueError: placeholders and audios do not match, or a clip is unusable (see [`load_audio`]).
        """
        is_waveform = isinstance(text, torch.Tensor) or (isinstance(text, np.ndarray) and text.dtype.kind in "fiu")
        if is_waveform and audio is None and chat_audio is None:
            return self.for_transcription(text, **kwargs)
        if text is None:
            raise ValueError(f"BlspKdProcessor needs text: a prompt with {self.audio_token!r} once for every audio.")
        check_arguments(kwargs)
        text_options, sampling_rate = options_of_call(self.tokenizer, kwargs)
        return_tensors = text_options.pop("return_tensors")

        prompts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"Expected text as a string or a list of strings, got {type(text)}. Pass clips as audio=.")
        self.check_unicode(prompts)
        clips = ([] if audio is None else as_clips(audio)) + [without_names(clip) for clip in chat_audio or []]
        check_one_per_clip(prompts, self.audio_token, len(clips))
        data = dict(self.tokenize(prompts, **text_options))
        check_none_truncated(data["input_ids"], self.audio_token_id, len(clips))
        if clips:
            data |= self.extract_features(clips, sampling_rate)
        return BatchFeature(data, tensor_type=return_tensors)

    def for_transcription(self, clip: Any, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """Prepare one clip without a prompt; `generate` then returns the transcript alone.

        Returns:
            `BatchFeature`: the clip's features, and `transcription_prompt_ids` (1, L), the prompt that asks for its
            transcript by `transcription_instruction`.
        """
        prompt = self.apply_chat_template(user_turn(self.transcription_instruction), add_generation_prompt=True)
        inputs = self(prompt, clip, add_special_tokens=False, **kwargs)
        inputs["transcription_prompt_ids"] = inputs.pop("input_ids")
        del inputs["attention_mask"]
        return inputs

    def tokenize(self, texts: str | list[str], **kwargs) -> BatchEncoding:
        """Call the tokenizer in a way that is safe for several threads."""
        return tokenize_alone(self.tokenizer, texts, **kwargs)

    check_unicode = staticmethod(check_unicode)

    def extract_features(self, clips: list, sampling_rate: int | None = None) -> dict[str, np.ndarray]:
        """Compute the features of clips, each on its true length, and zero-pad them to the longest.

        Each clip is processed alone, so its features do not depend on the batch. Each 30 s of a longer clip are also
        processed alone.

        Args:
            clips (`list`): each as in [`load_audio`].
            sampling_rate (`int`, *optional*): of bare arrays, Hz.

        Returns:
            `dict` of `input_features` float32, and `input_features_mask` (N, length) int64. The features are what the
            speech encoder takes: log-mel (N, num_mel_bins, length) for Whisper, waveforms (N, length), or filter bank
            frames (N, length, bins).
        """
        return self.pad_features(features_of_clips(self.feature_extractor, clips, sampling_rate))

    def pad_features(self, features: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Zero-pad the features of clips to the longest, and return them as [`~BlspKdProcessor.extract_features`]."""
        return padded_features(self.feature_extractor, features)

    def listen(self, model: Any, **options: Any) -> SpeechSession:
        """Begin a conversation in which `model`, a streaming one, reads speech while one speaks.

        Args:
            options: of [`SpeechSession`]: `instruction`, `messages`, `sampling_rate`, `chunk_ms`,
                `chat_template_kwargs`, `end_of_speech`.
        """
        return SpeechSession(model, self, **options)

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        *args,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> Any:
        """Render chats, and tokenise them if asked, as in all processors of transformers.

        The processor's `chat_template_kwargs` apply unless the call overrides them.

        Raises:
            ValueError: the template does not write the placeholder once for each audio.
        """
        own = self.chat_template
        template = own.get(chat_template or "default", chat_template) if isinstance(own, dict) else chat_template or own
        options = {name: value for name, value in self.chat_template_kwargs.items() if knows(template or "", name)}
        # The clips go past transformers, because `__call__` takes more kinds of audio and warns of a missing rate. The
        # template writes all special tokens, as in the tokenizer's own `apply_chat_template` and in training.
        conversation, clips = separate_clips(conversation)
        processor_kwargs = {"add_special_tokens": False, "chat_audio": clips, **(processor_kwargs or {})}
        options |= {**kwargs, "processor_kwargs": processor_kwargs}
        rendered = super().apply_chat_template(conversation, chat_template, *args, **options)
        check_placeholders(conversation, rendered, self.audio_token)
        return rendered

    def word_timestamps(self, token_ids: Any, token_timestamps: Any) -> list[dict]:
        """Return the words of one answer with their times, in the form of the `chunks` of speech recognition pipelines.

        Words begin at white space, so punctuation stays with its word. Tokens without a time (such as the prompt) and
        special tokens are left out.

        Args:
            token_ids (`torch.LongTensor` of shape (L,)): a row of the `sequences` that `generate` returns.
            token_timestamps (`torch.FloatTensor` of shape (L, 2)): the same row of its `token_timestamps`, seconds.

        Returns:
            `list[dict]`: `text` with the white space before it, and `timestamp`, (start, end) in seconds.

        Raises:
            ValueError: there is not one pair of times per token.
        """
        return words_with_times(self.tokenizer, token_ids, token_timestamps)


BlspKdProcessor.register_for_auto_class()
