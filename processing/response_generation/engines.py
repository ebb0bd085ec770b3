"""Engines that answer prompts: the LLM in transformers, or in vLLM.

Both get the same prompts, as token ids, and the same seeds. With sampling every row draws its own random numbers, so an
answer depends on the other rows of the batch only through rounding. Of the LLM's own generation settings, transformers
keeps those that also hold for greedy search (a repetition penalty, for example), and vLLM only the ends of answers.
"""

import importlib.util
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from modeling_blsp_kd.devices import float64_device
from processing.processing_blsp_kd import BlspKdProcessor

from .options import AnswerOptions


class Answer(NamedTuple):
    text: str
    is_finished: bool  # False: it was cut at `max_new_tokens`


class TransformersEngine:
    """Answers through transformers' `generate`.

    Args:
        model, dtype: for `AutoModelForCausalLM.from_pretrained`.
        processor: the [`BlspKdProcessor`] that made the prompts.
        device: where the LLM goes.
        batch_size: prompts per call of `generate`.
        max_new_tokens: longest answer.
        temperature: 0 for the most probable token each time.
        top_p: sample from the most probable tokens that have this probability together.
    """

    def __init__(
        self,
        model: str,
        processor: BlspKdProcessor,
        device: torch.device | str,
        dtype: str,
        batch_size: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        self.processor, self.batch_size, self.max_new_tokens = processor, batch_size, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        end = self.model.generation_config.eos_token_id
        self.end_ids = torch.tensor([end] if isinstance(end, int) else end or [], device=device)

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], seeds: list[int]) -> list[Answer]:
        """Return the answers to prompts (token ids), in their order; `seeds` has one number per prompt."""
        answers: list[Answer | None] = [None] * len(prompts)
        # Prompts of similar length go together, which saves padding. The sort is stable, so batches are reproducible.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, answer in zip(
                batch, self._answer([prompts[index] for index in batch], [seeds[index] for index in batch])
            ):
                answers[index] = answer
        return cast(list[Answer], answers)

    def _answer(self, prompts, seeds) -> list[Answer]:
        inputs = self.processor.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt", return_attention_mask=True
        ).to(self.model.device)
        processors = LogitsProcessorList()
        if self.temperature > 0:
            processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
            processors.append(RowSampler(seeds))
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            logits_processor=processors,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        is_finished = torch.isin(new_tokens, self.end_ids).any(dim=1).tolist()
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [Answer(text.strip(), finished) for text, finished in zip(texts, is_finished)]


class RowSampler(LogitsProcessor):
    """Draw each row's next token with that row's own random numbers: number t of its seed decides token t.

    `generate` has one stream of random numbers for the whole batch. This processor inverts each row's cumulative
    distribution at one uniform number, and leaves only that token possible, so that greedy search takes it.

    Args:
        seeds: one per row.
    """

    def __init__(self, seeds: list[int]):
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in self.streams])
        exact = float64_device(scores.device)
        cumulative = scores.to(exact).double().softmax(-1).cumsum(-1)
        # The first token whose cumulative probability exceeds the number; it has a probability above 0 itself.
        chosen = torch.searchsorted(cumulative, uniform.to(exact)[:, None] * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0.0)


class VllmEngine:
    """Answers through vLLM, which makes its own batches.

    Args:
        num_gpus: GPUs that vLLM splits the LLM over.
        max_prompt_tokens: longest prompt, because vLLM reserves memory for it.
        further: arguments of `vllm.LLM`.
        model, dtype, max_new_tokens, temperature, top_p: see [`TransformersEngine`].

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        num_gpus: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        further: dict | None = None,
    ):
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("--engine vllm needs vLLM, which is not installed. Install it, or leave --engine out.")
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            model=model,
            dtype=dtype,
            tensor_parallel_size=num_gpus,
            max_model_len=max_prompt_tokens + max_new_tokens,
            **(further or {}),
        )
        self.sampling_params = SamplingParams
        self.options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}

    def answer(self, prompts: list[list[int]], seeds: list[int]) -> list[Answer]:
        """Return the answers to prompts (token ids), in their order; `seeds` has one number per prompt."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [self.sampling_params(seed=seed, **self.options) for seed in seeds],
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [Answer(answer.text.strip(), answer.finish_reason == "stop") for answer in answers]


def make_engine(
    options: AnswerOptions, processor: BlspKdProcessor, device: torch.device | str, max_prompt_tokens: int
) -> TransformersEngine | VllmEngine:
    """Load the LLM into the engine that `options` name."""
    common: dict[str, Any] = {
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    if options.engine == "vllm":
        common |= {"num_gpus": options.num_gpus, "max_prompt_tokens": max_prompt_tokens}
        return VllmEngine(options.text_model, further=options.read_vllm_options(), **common)
    return TransformersEngine(options.text_model, processor, device, batch_size=options.batch_size, **common)
