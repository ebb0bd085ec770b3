"""Small random models, a tokenizer built from scratch and generated audio, shared by all tests. No network."""

import os

import evaluate  # noqa: F401  (before tests put examples/ on the path, whose evaluate.py has the same name)
import numpy as np
import pytest
import torch
from portability.other_rounding import OtherRounding
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from processing import BlspKdDataCollator, BlspKdProcessor

# `python -m tests.portability` asks for more, of tests that fork no processes: those would hang with more than one.
NUM_THREADS = int(os.environ.get("BLSP_KD_TEST_THREADS", 1))
torch.set_num_threads(NUM_THREADS)
ROUNDS_OTHERWISE = "BLSP_KD_TEST_ROUNDING" in os.environ


@pytest.fixture(autouse=True)
def _as_many_threads_for_the_next_test():
    """A training run inside a test sets its own number."""
    yield
    torch.set_num_threads(NUM_THREADS)


SAMPLING_RATE = 16_000
VOCAB_SIZE = 300  # of the tokenizer, without the audio token
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL_CFORMER = {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1}


def _runs_common_tests(config) -> bool:
    return config.getoption("markexpr") == "hf_common"


def pytest_configure(config):
    if ROUNDS_OTHERWISE:
        OtherRounding().__enter__()
    if _runs_common_tests(config):
        config.pluginmanager.import_plugin("hf_common.plugin")


def pytest_ignore_collect(collection_path, config):
    # transformers' own tests need a download, so they are not even imported unless they are asked for.
    return True if "hf_common" in collection_path.parts and not _runs_common_tests(config) else None


def pytest_collection_modifyitems(items):
    for item in items if ROUNDS_OTHERWISE else ():
        if "compile" in item.name:
            item.add_marker(pytest.mark.skip(reason="torch does not compile what a dispatch mode looks into"))


def text_config(family="llama", **overrides):
    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large, so that a wrong input visibly changes the output
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt_neox":
        options["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma2"):
        options["head_dim"] = 8
    if family == "gemma2":
        options["final_logit_softcapping"] = 5.0
    return AutoConfig.for_model(family, **{**options, **overrides})


def speech_config(**overrides):
    options = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
        "init_std": 0.2,
        "vocab_size": 10,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    return WhisperConfig(**{**options, **overrides})


def make_config(family="llama", adapter=SMALL_CFORMER, speech=None, text=None, **options):
    return BlspKdConfig(
        speech_config=speech_config(**(speech or {})),
        text_config=text_config(family, **(text or {})),
        adapter=adapter,
        audio_token_id=VOCAB_SIZE,
        **options,
    )


def make_model(family="llama", seed=0, train_plora=True, **options) -> BlspKdForCausalLM:
    """A small random model in eval mode. `train_plora`: B of partial LoRA is not zero, as after training."""
    torch.manual_seed(seed)
    model = BlspKdForCausalLM(make_config(family, **options)).eval()
    # The adapter's linear layers start small; give its output the size of token embeddings.
    for parameter in model.adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if model.plora is not None and train_plora:
        for parameter in model.plora.parameters:
            parameter.data.normal_(std=0.3)
    return model


def clip(duration_s=1.0, seed=0, rate=SAMPLING_RATE) -> np.ndarray:
    """Seconds of a sweeping tone in noise, float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(duration_s * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * rng.random() + 150 * time) * time)
    return (tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the red cat ran to the river and repeat the words " * 3] * 4, trainer)
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(missing)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folders of a saved speech encoder and a saved LLM, as a user would have them."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbones")
    TrueLengthWhisperEncoder(speech_config()).save_pretrained(folder / "speech")
    WhisperFeatureExtractor().save_pretrained(folder / "speech")
    llm = AutoModelForCausalLM.from_config(text_config())
    llm.generation_config.eos_token_id = [2, 7]
    llm.generation_config.do_sample = True
    llm.generation_config.top_k = 11
    llm.save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    return folder / "speech", folder / "text"


@pytest.fixture(scope="session")
def processor(backbones) -> BlspKdProcessor:
    return BlspKdProcessor.from_backbones(*backbones)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Training rows of different lengths."""
    texts = ["the red cat", "ran to the river and back", "cat"]
    responses = ["the red cat ran", "river", "the cat and the river"]
    return [
        {
            "audio": {"array": clip(0.6 + 0.5 * index, seed=index), "sampling_rate": SAMPLING_RATE},
            "text": text,
            "instruction": "repeat the words",
            "response": response,
        }
        for index, (text, response) in enumerate(zip(texts, responses))
    ]


@pytest.fixture(scope="session")
def collator(processor) -> BlspKdDataCollator:
    return BlspKdDataCollator(processor)


def spoken_prompts(processor, durations_s=(0.5, 1.3), instruction="repeat the words", **kwargs):
    """Processed one-audio prompts."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": instruction},
                    {"type": "audio", "audio": clip(duration_s, seed=index)},
                ],
            }
        ]
        for index, duration_s in enumerate(durations_s)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"sampling_rate": SAMPLING_RATE, **kwargs},
    )
