"""`BlspKdProcessor`: convert text with audio placeholders, and audio clips, to the inputs of `BlspKdForCausalLM`.

Combines a feature extractor, a tokenizer and the LLM's chat template, as in transformers' audio LLMs. Unlike them it
keeps one placeholder per audio, because the model predicts how many positions an audio takes. `data_collator.py` makes
training batches.
"""

import numbers
import os
import re
import threading
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import logging

from .audio_loading import knows_rate, load_audio
from .chat_audio import read_block
from .chat_templates import PLAIN_TEMPLATE, check_options, content_prefix, knows, warn_of_thoughts
from .pipeline_blsp_kd import BlspKdPipeline  # noqa: F401 (the files that this one imports are saved with a processor)

logger = logging.get_logger(__name__)

AUDIO_TOKEN = "<|audio|>"
TRANSCRIPTION_INSTRUCTION = "Repeat the words."
# Longer clips are encoded window by window. Their features are also computed by window, because feature extractors
# normalise over a clip.
WINDOW_S = 30
ANALYSIS_WINDOW_S = 0.025
LOST_IN_TEMPLATE = (
    "If a chat template made the text, it has to write the content of each message once and as it is: look at what it "
    "makes of the chat (tokenize=False), and set another one (processor.chat_template) if it leaves something out."
)
NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s]")
# Tokenizers store the padding and truncation of a call, so two threads must not use one at the same time.
_tokenizing = threading.Lock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # Without this, a process forked during a call, such as a worker of a DataLoader, would wait forever for a lock of a
    # thread that it does not have.
    os.register_at_fork(
        before=_tokenizing.acquire, after_in_parent=_tokenizing.release, after_in_child=_tokenizing.release
    )


class BlspKdProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left"},
        "common_kwargs": {"return_tensors": "pt"},
    }


class BlspKdProcessor(ProcessorMixin):
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

    valid_processor_kwargs = BlspKdProcessorKwargs

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        audio_token=AUDIO_TOKEN,
        transcription_instruction=TRANSCRIPTION_INSTRUCTION,
        chat_template_kwargs=None,
    ):
        if not isinstance(audio_token, str) or audio_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer does not know the audio token {audio_token!r}. Build the processor with "
                "BlspKdProcessor.from_backbones, which adds it."
            )
        is_text = isinstance(transcription_instruction, str) and transcription_instruction.strip()
        if not is_text or audio_token in transcription_instruction:
            raise ValueError(
                "transcription_instruction must be a non-empty string without the audio placeholder "
                f"{audio_token!r}, got {transcription_instruction!r}."
            )
        self.transcription_instruction = transcription_instruction
        self.chat_template_kwargs = check_options(chat_template_kwargs, chat_template)
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_backbones(
        cls,
        speech_model,
        text_model,
        audio_token: str = AUDIO_TOKEN,
        transcription_instruction: str = TRANSCRIPTION_INSTRUCTION,
        chat_template_kwargs: dict | None = None,
        **kwargs,
    ) -> "BlspKdProcessor":
        """Join the feature extractor of a speech model with the tokenizer and chat template of an LLM.

        Args:
            speech_model, text_model (`str` or `os.PathLike`): Hub ids or folders.
            audio_token (`str`): added to the tokenizer if missing. The LLM's embeddings are not resized, because the
                placeholder is never embedded.
            transcription_instruction (`str`), chat_template_kwargs (`dict`): see [`BlspKdProcessor`].
            kwargs: passed to both `from_pretrained` calls (so not `revision`, because the repositories differ).

        Raises:
            ValueError: the chat template drops the placeholder, or does not use an option.
        """
        feature_extractor = AutoFeatureExtractor.from_pretrained(speech_model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(text_model, **kwargs)
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [audio_token]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            # Padding is masked, so any token works.
            tokenizer.pad_token = tokenizer.eos_token
        own = tokenizer.chat_template or PLAIN_TEMPLATE
        options = check_options(chat_template_kwargs, own)
        default = own.get("default", next(iter(own.values()))) if isinstance(own, dict) else own  # several, by name
        prefix = content_prefix(default, tokenizer, audio_token, options)
        chat_template = {name: prefix + each for name, each in own.items()} if isinstance(own, dict) else prefix + own
        processor = cls(feature_extractor, tokenizer, chat_template, audio_token, transcription_instruction, options)
        warn_of_thoughts(default, processor)
        return processor

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        with _explained(pretrained_model_name_or_path):
            return super().get_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        with _explained(pretrained_model_name_or_path):
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "input_features", "input_features_mask"]

    def __call__(self, text=None, audio=None, **kwargs: Unpack[BlspKdProcessorKwargs]) -> BatchFeature:
        """Prepare prompts and their audio.

        Args:
            text (`str` or `list[str]`): prompts, with `audio_token` once for every audio.
            audio (*optional*): one clip or a list of clips in reading order, each as in [`load_audio`].
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
        if text is None:
            raise ValueError(f"BlspKdProcessor needs text: a prompt with {self.audio_token!r} once for every audio.")
        # apply_chat_template passes images=None and videos=None.
        unknown = sorted(name for name in set(kwargs) - _known_arguments() if kwargs[name] is not None)
        if unknown:
            raise ValueError(
                f"Unknown argument(s) {unknown} of BlspKdProcessor. It takes 'text', 'audio' (one clip or a list), "
                "'sampling_rate' and the options of tokenizers, such as 'padding'."
            )
        # Without the tokenizer's own padding side (often right), which would override ours: generation needs left.
        own = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        merged = self._merge_kwargs(BlspKdProcessorKwargs, tokenizer_init_kwargs=own, **kwargs)
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        sampling_rate = merged["audio_kwargs"].get("sampling_rate")

        prompts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"Expected text as a string or a list of strings, got {type(text)}. Pass clips as audio=.")
        self.check_unicode(prompts)
        num_placeholders = [prompt.count(self.audio_token) for prompt in prompts]
        clips = [] if audio is None else _as_clips(audio)
        if sum(num_placeholders) != len(clips):
            raise ValueError(
                f"The text holds {sum(num_placeholders)} {self.audio_token!r} placeholder(s) (per prompt: "
                f"{num_placeholders}), but {len(clips)} audio(s) were given. Write it exactly once for every audio. "
                f"{LOST_IN_TEMPLATE}"
            )
        data = dict(self.tokenize(prompts, **text_kwargs))
        num_kept = sum(list(ids).count(self.audio_token_id) for ids in data["input_ids"])
        if num_kept != len(clips):
            raise ValueError(
                f"Truncation would drop {len(clips) - num_kept} of {len(clips)} audio placeholder(s). Raise "
                "max_length, or shorten the text."
            )
        if clips:
            data |= self.extract_features(clips, sampling_rate)
        return BatchFeature(data, tensor_type=return_tensors)

    def tokenize(self, texts, **kwargs):
        """Call the tokenizer in a way that is safe for several threads."""
        with _tokenizing:
            return self.tokenizer(texts, **kwargs)

    @staticmethod
    def check_unicode(texts: list[str]):
        """Refuse texts that are not valid Unicode.

        Raises:
            ValueError: a text holds half of a surrogate pair, as JSON may; tokenizers do not accept such strings.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The text {text!r:.80} is no Unicode: character {error.start} is half of a surrogate pair. Decode "
                    "what it came from with errors='replace', or leave that character out."
                ) from error

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
        rate = self.feature_extractor.sampling_rate
        if sampling_rate is None and any(not knows_rate(clip) for clip in clips):
            logger.warning_once(
                f"Audio arrays came without a sampling_rate and are taken as {rate} Hz. Pass sampling_rate=... (or "
                "(array, rate) pairs) to be sure."
            )
        features = []
        for index, clip in enumerate(clips):
            try:
                waveform = load_audio(clip, rate, sampling_rate)
            except (FileNotFoundError, TypeError, ValueError) as error:
                raise type(error)(f"Audio {index} of the batch: {error}") from error
            if len(waveform) < ANALYSIS_WINDOW_S * rate:
                raise ValueError(
                    f"Audio {index} of the batch is too short: {len(waveform) / rate:.4f} s, expected at least one "
                    f"analysis window of {ANALYSIS_WINDOW_S:.3f} s."
                )
            features.append(self._features_of(waveform))
        return self.pad_features(features)

    def _features_of(self, waveform: np.ndarray) -> np.ndarray:
        """Compute one clip's features, without padding."""
        rate = self.feature_extractor.sampling_rate
        name = self.feature_extractor.model_input_names[0]
        by_window = []
        for window in np.split(waveform, range(WINDOW_S * rate, len(waveform), WINDOW_S * rate)):
            # The rest of a long clip may be shorter than a frame needs; the frames of some encoders need two windows.
            shortest = 2 * int(ANALYSIS_WINDOW_S * rate) if by_window or self._time_axis == 0 else 0
            window = np.pad(window, (0, max(0, shortest - len(window))))
            made = self.feature_extractor(
                window, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="np"
            )
            values = np.asarray(made[name])[0]
            if "attention_mask" in made and self._time_axis == 0:
                values = values[: int(np.asarray(made["attention_mask"])[0].sum())]
            by_window.append(values)
        return np.concatenate(by_window, axis=self._time_axis)

    @property
    def _time_axis(self) -> int:
        """Return the time axis of one clip's features: the last for log-mel, the first for waveforms and frames."""
        return 1 if isinstance(self.feature_extractor, WhisperFeatureExtractor) else 0

    def pad_features(self, features: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Zero-pad the features of clips to the longest, and return them as [`~BlspKdProcessor.extract_features`]."""
        time_axis = self._time_axis
        lengths = [clip.shape[time_axis] for clip in features]
        mask = np.zeros((len(features), max(lengths)), dtype=np.int64)
        padded = []
        for index, (clip, length) in enumerate(zip(features, lengths)):
            mask[index, :length] = 1
            widths = [(0, 0)] * clip.ndim
            widths[time_axis] = (0, max(lengths) - length)
            padded.append(np.pad(clip, widths))
        return {"input_features": np.stack(padded).astype(np.float32), "input_features_mask": mask}

    def apply_chat_template(self, conversation, chat_template=None, *args, **kwargs):
        """Render chats, and tokenise them if asked, as in all processors of transformers.

        The processor's `chat_template_kwargs` apply unless the call overrides them.

        Raises:
            ValueError: the template does not write the placeholder once for each audio.
        """
        own = self.chat_template
        template = own.get(chat_template or "default", chat_template) if isinstance(own, dict) else chat_template or own
        options = {name: value for name, value in self.chat_template_kwargs.items() if knows(template or "", name)}
        rendered = super().apply_chat_template(conversation, chat_template, *args, **{**options, **kwargs})
        prompts = [rendered] if isinstance(rendered, str) else rendered
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], str):  # otherwise `__call__` has counted
            for chat, prompt in zip([conversation] if isinstance(rendered, str) else conversation, prompts):
                expected, written = _num_placeholders(chat, self.audio_token), prompt.count(self.audio_token)
                if written != expected:
                    raise ValueError(
                        f"The chat has {expected} audio(s), but its text holds {written} {self.audio_token!r} "
                        f"placeholder(s). {LOST_IN_TEMPLATE}"
                    )
        return rendered

    def word_timestamps(self, token_ids, token_timestamps) -> list[dict]:
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
        token_ids, token_timestamps = torch.as_tensor(token_ids).cpu(), torch.as_tensor(token_timestamps).cpu()
        if token_ids.ndim != 1 or token_timestamps.shape != (len(token_ids), 2):
            raise ValueError(
                "word_timestamps takes one row: token_ids of shape (L,) and token_timestamps of shape (L, 2), but got "
                f"{tuple(token_ids.shape)} and {tuple(token_timestamps.shape)}."
            )
        added = self.tokenizer.added_tokens_decoder.items()
        special = [token_id for token_id, token in added if token.special]  # what decoding skips
        is_said = ~token_timestamps.isnan().any(1) & ~torch.isin(token_ids, torch.tensor(special))
        token_timestamps = token_timestamps[is_said].tolist()
        pieces = self._decode_in_pieces(token_ids[is_said].tolist())
        ends = np.cumsum([len(text) for text, _ in pieces])
        words = []
        for word in re.finditer(r"\s*\S+", "".join(text for text, _ in pieces)):
            first, last = np.searchsorted(ends, [word.start(), word.end() - 1], side="right")
            times = token_timestamps[pieces[first][1].start : pieces[last][1].stop]
            words.append({"text": word.group(), "timestamp": (times[0][0], times[-1][1])})
        return words

    def _decode_in_pieces(self, token_ids: list[int]) -> list[tuple[str, slice]]:
        """Decode tokens one by one, or several together if they share a character; return pairs of text and slice."""

        def decode(ids):
            return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        pieces, context, start = [], 0, 0
        for stop in range(1, len(token_ids) + 1):
            # Some tokenizers drop the white space before the first token, so each is decoded after the one before.
            before, text = decode(token_ids[context:start]), decode(token_ids[context:stop])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(token_ids):
                continue
            pieces.append((text[len(before) :], slice(start, stop)))
            context, start = start, stop
        return pieces

    def save_pretrained(self, *args, **kwargs):
        if hasattr(self.tokenizer, "legacy"):
            # transformers does not save `legacy` with a Llama tokenizer, which would then give other ids.
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        saved = super().save_pretrained(*args, **kwargs)
        # transformers sets `auto_map` on the processor when it saves its code; saving must not change the processor.
        vars(self).pop("auto_map", None)
        return saved

    def _prepare_processor_kwargs(self, *args, **kwargs):
        # The template writes all special tokens, as in the tokenizer's own `apply_chat_template` and in training.
        return {"add_special_tokens": False, **super()._prepare_processor_kwargs(*args, **kwargs)}

    def _resolve_audio_loading_params(self, processor_kwargs):
        # transformers would fill in the feature extractor's rate, and `__call__` could not warn that none was given.
        audio_kwargs = processor_kwargs.get("audio_kwargs", {})
        return {"sampling_rate": processor_kwargs.get("sampling_rate", audio_kwargs.get("sampling_rate"))}

    def _normalize_conversations(self, conversation):
        # transformers does not check the form of a chat, which often comes from outside.
        is_batch = (
            isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        )
        for chat in conversation if is_batch else [conversation]:
            _check_chat(chat)
        conversations, is_batched = super()._normalize_conversations(conversation)
        for messages in conversations:
            for message in messages:
                if isinstance(message.get("content"), (list, tuple)):
                    message["content"] = [_with_clip(*read_block(block)) for block in message["content"]]
        return conversations, is_batched

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        # `apply_chat_template` collects the media here. Ours leaves loading to `__call__`, which takes more kinds of
        # audio and checks them.
        audio = [
            _without_names(block["audio"])
            for conversation in conversations
            for message in conversation
            if not isinstance(message.get("content") or "", str)
            for block in message["content"]
            if block.get("type") == "audio" and block.get("audio") is not None
        ]
        return [], [], audio, {}


@contextmanager
def _explained(name_or_path):
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


def _check_chat(chat):
    """Check the form of a chat.

    Raises:
        ValueError: the chat is not a list of messages whose content is a text or a list of blocks.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"A chat is a list of at least one message, but got {chat!r:.80}.")
    for message in chat:
        if not isinstance(message, dict):
            raise ValueError(f"A message of a chat is a dict with 'role' and 'content', but got {message!r:.80}.")
        content = message.get("content")
        is_blocks = isinstance(content, (list, tuple)) and all(isinstance(block, dict) for block in content)
        if not (content is None or isinstance(content, str) or is_blocks):
            raise ValueError(
                "The content of a message is a text or a list of blocks such as {'type': 'text', 'text': '...'}, but "
                f"got {content!r:.80}."
            )
        for block in content if is_blocks else ():
            if block.get("type") == "text" and not isinstance(block.get("text"), str):
                raise ValueError(f"A block of type 'text' needs a 'text' that is a string, but got {block!r:.80}.")


def _num_placeholders(chat, audio_token: str) -> int:
    """Return how many placeholders a chat's text must have: one per audio, plus those that its texts already hold."""
    contents = [message.get("content") or "" for message in chat]
    texts = [content for content in contents if isinstance(content, str)]
    blocks = [block for content in contents if not isinstance(content, str) for block in content]
    texts += [block.get("text") or "" for block in blocks]
    return sum(text.count(audio_token) for text in texts) + sum(
        read_block(block)[0].get("type") == "audio" for block in blocks
    )


def _known_arguments() -> set[str]:
    """Return all keyword arguments that transformers defines for text and audio processing, flat or in groups."""
    return {
        "common_kwargs",
        "return_tensors",
        *TextKwargs.__annotations__,
        *AudioKwargs.__annotations__,
        *ProcessingKwargs.__annotations__,
    }


def _with_clip(block: dict, clip) -> dict:
    """Return a block that [`read_block`] read, with its clip under "audio"."""
    return block if clip is None else {**block, "audio": clip}


def _without_names(clip):
    """Return the clip of an audio block, and ensure that its `url` is a data URL or base64.

    Servers forward whatever their clients write as `url`, so it must not name a file of this machine or an address that
    this machine can reach.
    """
    url = clip.get("url") if isinstance(clip, dict) else None
    if url is None or (isinstance(url, str) and url.startswith("data:")):
        return clip if url is None else url
    if not isinstance(url, str) or NOT_BASE64.search(url):
        raise ValueError(
            "The 'url' of an audio block must be a string of base64, bare or after 'data:audio/wav;base64,', but is "
            f"{repr(url)[:60]}. Give a file as 'path'; what lies at an address has to be downloaded first."
        )
    return {"base64": url}


def _as_clips(audio) -> list:
    """Return one clip or a list of clips as a list; a flat list of numbers is one clip."""
    if isinstance(audio, list) and not (audio and isinstance(audio[0], numbers.Number)):
        return audio
    return [audio]


BlspKdProcessor.register_for_auto_class()
