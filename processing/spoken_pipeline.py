"""The common base of the pipelines of a BLSP-KD model: options, batches of prompts, generation and streams.

Follows the inputs of transformers' pipelines, and the way in which they call `generate`. `pipeline_blsp_kd.py` has the
two tasks.
"""

import copy
import os
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline, load_assistant_model

from .chat_templates import check_options
from .spoken_inputs import as_chat, as_inputs, check_text
from .text_streams import pieces_of

GENERATION_PARAMETERS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
GENERATE_ARGUMENTS = {
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
}
MAX_NEW_TOKENS = 256


class SpokenInputPipeline(ChunkPipeline):
    """Answers spoken input. A task adds how one input becomes prompts, and how their answers become a result."""

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False

    def __init__(
        self,
        model: PreTrainedModel,
        *args,
        assistant_model: PreTrainedModel | str | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        parameters = (GENERATION_PARAMETERS | {"generation_config"}) & set(kwargs)
        self.generate_options = {name: kwargs.pop(name) for name in parameters}
        super().__init__(model, *args, **kwargs)
        if self.model.config.model_type != "blsp_kd" or self.processor is None:
            raise ValueError(
                f"{type(self).__name__} needs a BLSP-KD model and its processor, got a model of type "
                f"{self.model.config.model_type!r} and {type(self.processor).__name__} as processor."
            )
        self.assistant_model, _ = load_assistant_model(self.model, assistant_model, assistant_tokenizer)

    def _sanitize_parameters(
        self,
        *,
        instruction=None,
        sampling_rate=None,
        allowed_url_prefixes=None,
        chat_template_kwargs=None,
        generate_kwargs=None,
        **generate_options,
    ):
        given = {
            "instruction": instruction,
            "sampling_rate": sampling_rate,
            "allowed_url_prefixes": allowed_url_prefixes,
            "chat_template_kwargs": chat_template_kwargs
            and check_options(chat_template_kwargs, self.processor.chat_template),
        }
        unknown = sorted(set(generate_options) - GENERATION_PARAMETERS - GENERATE_ARGUMENTS)
        if unknown:
            raise ValueError(
                f"Unknown option(s) {unknown} of {type(self).__name__}. It takes {sorted(self._own_options())}, "
                "'batch_size', 'num_workers', 'generate_kwargs' and the arguments of generate, such as "
                "'max_new_tokens'."
            )
        generate_kwargs = generate_kwargs or {}
        twice = sorted(set(generate_kwargs) & set(generate_options))
        if twice:
            raise ValueError(f"{twice} given twice, as option(s) and in generate_kwargs. Give each once.")
        if instruction is not None:
            check_text(instruction, "instruction", self.processor.audio_token)
        if getattr(self, "assistant_model", None) is not None:
            generate_options = {"assistant_model": self.assistant_model, **generate_options}
        preprocess_params = {name: value for name, value in given.items() if value is not None}
        return preprocess_params, {**generate_kwargs, **generate_options}, {}

    def _own_options(self) -> tuple[str, ...]:
        return "instruction", "sampling_rate", "allowed_url_prefixes", "chat_template_kwargs"

    def __call__(self, inputs: Any, **options) -> Any:
        """Answer one input, a list of inputs, or an iterable of inputs; see the class.

        Raises:
            ValueError, TypeError, FileNotFoundError: an input or option is unusable. If there are several inputs, the
                message names the bad one.
        """
        return super().__call__(as_inputs(inputs), **options)

    def stream(self, inputs: Any, **options) -> Iterator[str]:
        """Answer one input piece by piece.

        Generation runs in its own thread. It stops when the generator is closed or deleted. Its errors are raised here.

        Returns:
            a generator of `str`: the pieces of the text, to be joined without a separator.
        """
        # A plain call, so that the options are those of plain calls; `get_iterator` makes the stream.
        return super().__call__(_Streamed(as_chat(as_inputs(inputs))), **options)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator:
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], _Streamed):
            self._check_streamable(preprocess_params, forward_params)
            [prompt] = self.preprocess(inputs[0].inputs, **preprocess_params)
            return iter([pieces_of(self.forward, prompt, forward_params, self.processor.tokenizer)])
        # transformers' own method would pad features as if they were text, and would not say which input is bad.
        prompts = _Prompts(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(prompts, batch_size=None, num_workers=min(num_workers, 1), collate_fn=_unchanged)
        return self._results_of(loader, batch_size, forward_params, postprocess_params)

    def _results_of(self, loader: DataLoader, batch_size: int, forward_params: dict, postprocess_params: dict):
        numbered, answers = iter(loader), []
        while batch := list(islice(numbered, batch_size)):
            outputs = self.forward([prompt for prompt, _ in batch], **forward_params)
            for output, (_, is_last) in zip(outputs, batch):
                answers.append(output)
                if is_last:
                    yield self.postprocess(answers, **postprocess_params)
                    answers = []

    def _check_streamable(self, preprocess_params: dict, forward_params: dict):
        if forward_params.get("streamer") is not None:
            raise ValueError("stream makes a streamer of its own. Call the pipeline itself to use another one.")

    def _forward(self, prompts: list[dict], **generate_kwargs) -> list[dict]:
        """Answer B prompts; each answer is a dict of `tokens` (L,) and, if requested, their `times` (L, 2)."""
        inputs = self.processor.tokenize(
            [prompt["text"] for prompt in prompts],
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the template wrote them
            return_tensors="pt",
        )
        features = self.processor.pad_features([clip for prompt in prompts for clip in prompt["features"]])
        inputs.update({name: torch.from_numpy(values) for name, values in features.items()})
        options = self._generate_options(generate_kwargs)
        output = self.model.generate(**inputs.to(self.device), **options)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        answers = [{"tokens": row[num_prompt_tokens:]} for row in sequences]
        if generate_kwargs.get("return_timestamps"):
            answers = [
                {**answer, "times": times[num_prompt_tokens:]}
                for answer, times in zip(answers, output.token_timestamps)
            ]
        return answers

    def _generate_options(self, given: dict) -> dict:
        """Return the arguments of `generate`, in the order of precedence of transformers' own pipelines.

        The call's options come before the pipeline's, which a `generation_config` of the call replaces altogether.

        Raises:
            ValueError: more than one answer per prompt is asked for.
        """
        if "generation_config" not in given:
            given = {**self.generate_options, **given}
        config = given.get("generation_config")
        in_effect = {
            **self.model.generation_config.to_diff_dict(),
            **({} if config is None else config.to_diff_dict()),
            **given,
        }
        if in_effect.get("num_return_sequences", 1) not in (1, None):
            raise ValueError("A pipeline gives one answer to each input: num_return_sequences must be 1.")
        if "max_new_tokens" in in_effect or "max_length" in in_effect:
            return given
        if config is None:
            return {**given, "max_new_tokens": MAX_NEW_TOKENS}
        # `generate` deprecates parameters beside a `generation_config`.
        config = copy.deepcopy(config)
        config.update(max_new_tokens=MAX_NEW_TOKENS)
        return {**given, "generation_config": config}

    def _decode(self, tokens) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save model and processor with their code. transformers' own method would not save the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class _Streamed:
    """Marks one input whose answer is asked for in pieces."""

    def __init__(self, inputs):
        self.inputs = inputs


class _Prompts(IterableDataset):
    """The prompts of all inputs in order, each with a flag that marks the last one of its input."""

    def __init__(self, inputs, preprocess, params: dict):
        self.inputs, self.preprocess, self.params = inputs, preprocess, params

    def __iter__(self):
        is_sized = isinstance(self.inputs, Sized)
        # By index, because torch's map-style datasets need not be iterable.
        items = (self.inputs[index] for index in range(len(self.inputs))) if is_sized else self.inputs
        names_inputs = not is_sized or len(self.inputs) > 1
        for index, item in enumerate(items):
            held = None
            try:
                for prompt in self.preprocess(as_chat(item), **self.params):
                    if held is not None:
                        yield held, False
                    held = prompt
            except (FileNotFoundError, TypeError, ValueError) as error:
                if not names_inputs:
                    raise
                raise type(error)(f"Input {index}: {error}") from error
            yield held, True


def _unchanged(item):
    # The default `collate_fn` would convert numpy arrays to tensors.
    return item
