"""A plugin for vLLM: partial LoRA, that is, a LoRA that acts only at positions that a request gives as embeddings.

vLLM loads it by the entry point `vllm.general_plugins` in each of its processes. It is installed as a top-level
package, `blsp_kd_vllm`, because `processing` needs a newer transformers than vLLM allows. So it imports nothing of this
project, and vLLM only when vLLM calls it. Leaves out: the front (`processing/serving/`) and the adapter's files
(`engine_files.py`).
"""

from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np

# This file beside an adapter's weights says that the adapter is a partial LoRA. Others act as vLLM has them act.
MARK = "partial_lora.json"


def register() -> None:
    """Make vLLM apply marked adapters at embedded positions only, and refuse them where this was not tried.

    Raises:
        ImportError: this version of vLLM has its classes elsewhere.
    """
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
        from vllm.platforms import current_platform
        from vllm.v1.worker.gpu_input_batch import InputBatch
    except ImportError as error:
        raise ImportError(
            f"The plugin blsp_kd_vllm does not know this version of vLLM ({error}). It was tried with 0.32.0. To do "
            "without partial LoRA, uninstall blsp-kd from vLLM's environment."
        ) from error
    if getattr(InputBatch, "has_partial_lora", False):
        return
    InputBatch.has_partial_lora = True
    InputBatch.make_lora_inputs = _at_embedded_positions(InputBatch.make_lora_inputs)
    PunicaWrapperCPU.__init__ = _with_room_for_runs(PunicaWrapperCPU.__init__)
    LRUCacheWorkerLoRAManager.__init__ = _knowing_its_runner(LRUCacheWorkerLoRAManager.__init__)
    LRUCacheWorkerLoRAManager.add_adapter = _checking(LRUCacheWorkerLoRAManager.add_adapter, current_platform)


@lru_cache
def is_partial(folder: str) -> bool:
    """Return whether the adapter in this folder is marked as a partial LoRA."""
    return (Path(folder) / MARK).exists()


def _at_embedded_positions(make_lora_inputs: Any) -> Any:
    """Wrap the method that says for each position of a step which LoRA acts there (0: none)."""

    @wraps(make_lora_inputs)
    def wrapped(batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> tuple:
        of_samples, of_positions, requests = make_lora_inputs(batch, num_scheduled_tokens, num_sampled_tokens)
        partial = {number for number, of in batch.lora_id_to_lora_request.items() if is_partial(of.lora_path)}
        if not partial:
            return of_samples, of_positions, requests
        of_positions, start = np.array(of_positions), 0
        for row, num_positions in enumerate(map(int, num_scheduled_tokens)):
            if int(batch.request_lora_mapping[row]) in partial:
                first = int(batch.num_computed_tokens_cpu[row])
                # Behind the prompt all positions are tokens, whatever the array says: it may lag behind by a step.
                num_of_prompt = min(max(int(batch.num_prompt_tokens[row]) - first, 0), num_positions)
                is_embedded: np.ndarray = np.zeros(num_positions, dtype=bool)
                is_embedded[:num_of_prompt] = ~batch.is_token_ids[row, first : first + num_of_prompt]
                of_positions[start : start + num_positions][~is_embedded] = 0
            start += num_positions
        # A partial LoRA has no part in the output head.
        of_samples = tuple(0 if int(number) in partial else number for number in of_samples)
        return of_samples, tuple(of_positions.tolist()), requests

    return wrapped


def _with_room_for_runs(init: Any) -> Any:
    """Wrap the constructor of the CPU's LoRA kernels, whose buffers hold one run of positions per request.

    A prompt has a run per clip and per text between clips. There are never more runs than positions.
    """

    @wraps(init)
    def wrapped(self: Any, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        init(self, max_num_batched_tokens, max(max_batches, max_num_batched_tokens), device, **kwargs)

    return wrapped


def _knowing_its_runner(init: Any) -> Any:
    @wraps(init)
    def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.is_for_second_runner = vllm_config.use_v2_model_runner
        init(self, vllm_config, *args, **kwargs)

    return wrapped


def _checking(add_adapter: Any, platform: Any) -> Any:
    """Wrap the method that loads an adapter, unless it is loaded.

    Raises:
        NotImplementedError: a partial LoRA on an accelerator, or with the second model runner.
        ValueError: no slot for LoRAs stays free.
    """

    @wraps(add_adapter)
    def wrapped(self: Any, lora_request: Any) -> bool:
        if lora_request.lora_int_id in self.list_adapters():
            return add_adapter(self, lora_request)
        if is_partial(lora_request.lora_path) and (not platform.is_cpu() or self.is_for_second_runner):
            raise NotImplementedError(
                f"The adapter {lora_request.lora_name!r} is a partial LoRA. It is written for vLLM's first model "
                f"runner on CPUs, and was not tried on {platform.device_name} with model runner "
                f"{2 if self.is_for_second_runner else 1}. Serve the model with `transformers serve`, or train it "
                "without partial LoRA."
            )
        adapters, num_slots = {*self.list_adapters(), lora_request.lora_int_id}, self.lora_config.max_loras
        is_used = is_partial(lora_request.lora_path) or getattr(self, "has_partial_lora", False)
        if is_used and len(adapters) >= num_slots:
            raise ValueError(
                f"{len(adapters)} LoRA(s) need --max-loras {len(adapters) + 1}, but it is {num_slots}. On a CPU, vLLM "
                "adds the LoRA of the last slot at positions that have none, so that slot has to stay empty."
            )
        self.has_partial_lora = is_used
        return add_adapter(self, lora_request)

    return wrapped
