"""Fixtures that all tests share, and the settings of a run. What they are made of is in `helpers/`."""

import gc
import os

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, WhisperFeatureExtractor, WhisperForConditionalGeneration

from modeling_blsp_kd.speech_encoder import TrueLengthWhisperEncoder
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.publishing.verify import as_hub_cache
from tests.helpers.asr_data import write_asr, write_parquet
from tests.helpers.models import speech_config, text_config
from tests.helpers.prompts import CHAT_TEMPLATE, SAMPLING_RATE, clip, make_tokenizer
from tests.portability.other_rounding import OtherRounding

# `python -m tests.portability` asks for more, of tests that fork no processes: those would hang with more than one.
NUM_THREADS = int(os.environ.get("BLSP_KD_TEST_THREADS", 1))
torch.set_num_threads(NUM_THREADS)
ROUNDS_OTHERWISE = "BLSP_KD_TEST_ROUNDING" in os.environ


@pytest.fixture(autouse=True)
def _as_many_threads_for_the_next_test():
    """A training run inside a test sets its own number."""
    yield
    torch.set_num_threads(NUM_THREADS)


def _runs_common_tests(config) -> bool:
    return config.getoption("markexpr") == "hf_common"


def pytest_configure(config):
    if ROUNDS_OTHERWISE:
        OtherRounding().__enter__()
    if _runs_common_tests(config):
        config.pluginmanager.import_plugin("tests.hf_common.plugin")


def pytest_ignore_collect(collection_path, config):
    # Tests that need a download are not even imported unless they are asked for.
    opt_in = {"hf_common": "hf_common", "real_engine": "vllm", "test_llama_cpp.py": "llama_cpp"}
    wanted = [opt_in[part] for part in collection_path.parts if part in opt_in]
    return True if wanted and config.getoption("markexpr") not in wanted else None


def pytest_collection_finish():
    """Freeze what was imported: each training collects garbage, and would spend most of its time on looking there."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items if ROUNDS_OTHERWISE else ():
        if "compile" in item.name:
            item.add_marker(pytest.mark.skip(reason="torch does not compile what a dispatch mode looks into"))


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


@pytest.fixture
def hub_backbones(backbones, tmp_path, monkeypatch):
    """The backbones in a Hub cache, as after a download, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(4)
    WhisperForConditionalGeneration(speech_config()).save_pretrained(tmp_path / "whisper")
    as_hub_cache(tmp_path / "whisper", tmp_path / "home", "org/ears")
    as_hub_cache(backbones[1], tmp_path / "home", "org/llm")
    return "org/ears", "org/llm"


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


@pytest.fixture
def text_prompt():
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def other_processor(tmp_path, backbones):
    """Makes the processor of another LLM, by way of its folder."""

    def make(template=CHAT_TEMPLATE, tokenizer=None, **kwargs):
        tokenizer = tokenizer or make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "llm")
        return BlspKdProcessor.from_backbones(backbones[0], tmp_path / "llm", **kwargs)

    return make


@pytest.fixture
def asr(tmp_path):
    """A folder with a manifest of eight good rows."""
    return write_asr(tmp_path / "asr")


@pytest.fixture
def parquet(asr, tmp_path):
    """A folder of two parquet files, with the eight rows and two bad ones."""
    return write_parquet(asr, tmp_path / "hub")
