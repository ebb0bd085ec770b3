"""Ask about an audio file with llama.cpp as the LLM, in one process: the encoder and the adapter are torch's.

    python examples/infer_llama_cpp.py --model outputs/mine --llm mine.gguf --lora speech.gguf --audio question.wav

docs/llama_cpp.md shows how to write the GGUF files. Needs llama-cpp-python. Leaves out: sampling, and several requests
at once, for which docs/serving.md has vLLM.
"""

import argparse
import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterator

import numpy as np
import torch

from modeling_blsp_kd.devices import usable_cores
from processing import BlspKdProcessor
from processing.serving.model_without_llm import load_without_llm
from processing.spoken_inputs import user_turn

NUM_POSITIONS = 2048  # of prompt and answer


class LlamaCpp:
    """An LLM that reads token ids, and vectors in the place of some, which alone go through its LoRA.

    Args:
        llm, lora (`str`): GGUF files; lora may be None.
        num_threads (`int`).
    """

    def __init__(self, llm: str, lora: str | None, num_threads: int):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(llm), llama_cpp.llama_model_default_params())
        self.lora = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(lora)) if lora and self.model else None
        for path, loaded in ((llm, self.model), (lora, self.lora)):
            if path and not loaded:
                raise ValueError(f"llama.cpp cannot load {path}; its own message stands above.")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = NUM_POSITIONS
        settings.n_threads = settings.n_threads_batch = num_threads
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32  # the default, 16 bits, may change a token
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.position = 0

    def forget(self):
        """Make the next position the first."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def read(self, ids_or_vectors: list[int] | torch.Tensor):
        """Read token ids, or vectors (U, D), at the next positions.

        Raises:
            ValueError: they do not fit.
        """
        num_new, is_speech = len(ids_or_vectors), isinstance(ids_or_vectors, torch.Tensor)
        if self.position + num_new > NUM_POSITIONS:
            raise ValueError(f"Prompt and answer need more than {NUM_POSITIONS} positions. Take a shorter clip.")
        loras = (self.api.llama_adapter_lora_p_ctypes * 1)(self.lora)
        num_loras = int(is_speech and self.lora is not None)
        self.api.llama_set_adapters_lora(self.context, loras, num_loras, (ctypes.c_float * 1)(1.0))
        batch = self.api.llama_batch_init(num_new, self.width if is_speech else 0, 1)
        batch.n_tokens = num_new
        for index in range(num_new):
            batch.pos[index], batch.logits[index] = self.position + index, index == num_new - 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if isinstance(ids_or_vectors, torch.Tensor):
            rows = np.ascontiguousarray(ids_or_vectors.float().cpu().numpy())
            ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        else:
            for index, token in enumerate(ids_or_vectors):
                batch.token[index] = token
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if status != 0:
            raise ValueError(f"llama_decode failed with status {status} on {num_new} positions.")
        self.position += num_new

    def next_token(self, never: int) -> int:
        """Return the likeliest next token, but not `never`."""
        logits = self.api.llama_get_logits_ith(self.context, -1)
        logits = np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).copy()
        if never < self.vocab_size:
            logits[never] = -np.inf
        return int(logits.argmax())


def answer(llm: LlamaCpp, model, processor, conversation: list[dict], max_new_tokens: int) -> Iterator[int]:
    """Yield the token ids of a greedy answer; `model` is of [`load_without_llm`]."""
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    placeholder, ids = processor.audio_token_id, inputs.pop("input_ids")[0].tolist()
    clips = iter(())
    if "input_features" in inputs:
        with torch.inference_mode():
            audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], return_dict=True)
        clips = (row[:count] for row, count in zip(audio.pooler_output, audio.num_speech_tokens.tolist()))
    llm.forget()
    start = 0
    for place in [index for index, token in enumerate(ids) if token == placeholder] + [len(ids)]:
        if place > start:
            llm.read(ids[start:place])
        if place < len(ids):
            llm.read(next(clips))
        start = place + 1
    ends = torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist()
    for _ in range(max_new_tokens):
        token = llm.next_token(never=placeholder)
        yield token
        if token in ends:
            return
        llm.read([token])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--llm", required=True, help="GGUF file of its LLM")
    parser.add_argument("--lora", help="GGUF file of its partial LoRA, if it has one")
    parser.add_argument("--audio", required=True, help="audio file, of any format in docs/audio_inputs.md")
    parser.add_argument("--instruction", default="Repeat the words.", help="what to do with what is said")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of llama.cpp")
    options = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        parser.error("llama.cpp is missing. Install it: pip install llama-cpp-python")
    for name in ("llm", "lora", "audio"):
        path = getattr(options, name)
        if path is not None and not os.path.isfile(path):
            parser.error(f"--{name} {path} is no file.")

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model, has_plora = load_without_llm(options.model, torch.float32)
    if has_plora != (options.lora is not None):
        parser.error(f"--lora is {'missing' if has_plora else 'of no use'}: see partial LoRA in docs/llama_cpp.md.")
    llm = LlamaCpp(options.llm, options.lora, options.threads)
    width = model.config.get_text_config().hidden_size
    if llm.width != width:
        parser.error(f"--llm has embeddings of width {llm.width}, but the model's LLM has {width}: it is another LLM.")
    processor = BlspKdProcessor.from_pretrained(options.model)
    conversation = user_turn(options.instruction, {"type": "audio", "path": options.audio})
    ids = list(answer(llm, model, processor, conversation, options.max_new_tokens))
    print(processor.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    main()
