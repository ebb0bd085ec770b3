"""vLLM's plugin for partial LoRA, on stand-ins for the classes that it changes, and the files that it needs.

`tests/real_engine/` tries both in vLLM itself.
"""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from processing.serving.engine_files import _remove_token, write_engine_files
from processing.serving.vllm_plugin import (
    MARK,
    _at_embedded_positions,
    _checking,
    _with_room_for_runs,
    is_partial,
    register,
)
from tests.helpers.models import base_llm, make_model

PLUGIN = Path(__file__).parent.parent / "processing" / "serving" / "vllm_plugin" / "__init__.py"


@pytest.fixture
def folders(tmp_path):
    """An adapter that is marked as partial, and one that is not."""
    for name in ("partial", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "partial" / MARK).write_text("{}")
    return str(tmp_path / "partial"), str(tmp_path / "plain")


def stock(batch, num_scheduled, num_sampled):
    """What vLLM does: a request's LoRA acts at all of its positions."""
    of_request = batch.request_lora_mapping
    return tuple(of_request.repeat(num_sampled)), tuple(of_request.repeat(num_scheduled)), {"requests"}


def random_batch(rng, folders, num_requests=6, max_length=40):
    """Requests in any state: prompts read in chunks, answers under way, both kinds of LoRA, and none."""
    prompts = rng.integers(1, max_length // 2, num_requests)
    computed = rng.integers(0, max_length // 2 + 5, num_requests)
    return SimpleNamespace(
        request_lora_mapping=rng.integers(0, 3, num_requests),
        lora_id_to_lora_request={number: SimpleNamespace(lora_path=path) for number, path in zip((1, 2), folders)},
        num_prompt_tokens=prompts,
        num_computed_tokens_cpu=computed,
        # Behind the prompts the array holds what earlier requests left there.
        is_token_ids=rng.random((num_requests, max_length)) < 0.5,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_partial_lora_acts_where_the_prompt_gave_embeddings_and_nowhere_else(folders, seed):
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, folders)
    num_scheduled, num_sampled = rng.integers(1, 10, 6), np.ones(6, dtype=int)
    expected = []
    for row, number in enumerate(batch.request_lora_mapping):
        for position in range(
            batch.num_computed_tokens_cpu[row], batch.num_computed_tokens_cpu[row] + num_scheduled[row]
        ):
            is_embedded = position < batch.num_prompt_tokens[row] and not batch.is_token_ids[row, position]
            expected.append(number if number != 1 or is_embedded else 0)
    of_samples, of_positions, requests = _at_embedded_positions(stock)(batch, num_scheduled, num_sampled)
    assert of_positions == tuple(expected) and requests == {"requests"}
    assert of_samples == tuple(0 if number == 1 else number for number in batch.request_lora_mapping)


def test_without_a_partial_lora_nothing_changes(folders):
    rng = np.random.default_rng(0)
    batch = random_batch(rng, (folders[1], folders[1]))
    steps = (rng.integers(1, 10, 6), np.ones(6, dtype=int))
    assert _at_embedded_positions(stock)(batch, *steps) == stock(batch, *steps)


def load(folder, is_cpu=True, is_second=False, max_loras=2, loaded=()):
    manager = SimpleNamespace(
        is_for_second_runner=is_second,
        lora_config=SimpleNamespace(max_loras=max_loras),
        list_adapters=lambda: set(loaded),
        has_partial_lora=False,
    )
    platform = SimpleNamespace(is_cpu=lambda: is_cpu, device_name="cpu" if is_cpu else "cuda")
    request = SimpleNamespace(lora_path=folder, lora_name="speech", lora_int_id=1)
    return _checking(lambda self, request: "added", platform)(manager, request)


def test_it_is_refused_where_it_was_not_tried(folders):
    partial, plain = folders
    assert is_partial(partial) and not is_partial(plain)
    assert load(partial) == load(plain, is_cpu=False, is_second=True, max_loras=1) == "added"
    assert load(partial, loaded=(1, 2)) == "added"  # before
    with pytest.raises(NotImplementedError, match="'speech' is a partial LoRA.* not tried on cuda with model runner 1"):
        load(partial, is_cpu=False)
    with pytest.raises(NotImplementedError, match="not tried on cpu with model runner 2"):
        load(partial, is_second=True)
    with pytest.raises(ValueError, match=r"1 LoRA\(s\) need --max-loras 2, but it is 1"):
        load(partial, max_loras=1)
    with pytest.raises(ValueError, match=r"3 LoRA\(s\) need --max-loras 4, but it is 3"):
        load(partial, max_loras=3, loaded=(2, 3))


def test_a_version_of_vllm_that_is_built_otherwise_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    with pytest.raises(ImportError, match="blsp_kd_vllm does not know this version of vLLM .* tried with 0.32.0"):
        register()


def test_the_kernels_have_room_for_a_run_per_position():
    seen = []
    _with_room_for_runs(lambda self, *sizes, **kwargs: seen.append(sizes))(None, 100, 8, "cpu")
    assert seen == [(100, 100, "cpu")]


def test_it_imports_nothing_of_this_project_and_vllm_only_when_called():
    """vLLM's environment has an older transformers, with which `processing` cannot be imported."""
    tree = ast.parse(PLUGIN.read_text())
    top = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert top == {"functools", "pathlib", "typing", "numpy"}


# -- the engine's files -----------------------------------------------------------------------------------------------


def test_the_files_hold_the_template_the_lora_and_the_llm_without_it(processor, tmp_path):
    model = make_model(plora={"r": 4})
    expected, lora = base_llm(model).state_dict(), {**model.plora.named_parameters}
    command = write_engine_files(model, processor, tmp_path / "engine")
    folder = tmp_path / "engine"
    assert command[:3] == ["vllm", "serve", str(folder / "llm")]
    assert command[3:] == [
        *("--served-model-name", "llm", "--enable-prompt-embeds"),
        *("--chat-template", str(folder / "chat_template.jinja")),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", f"speech={folder / 'speech'}"),
    ]
    assert (folder / "chat_template.jinja").read_text() == processor.chat_template
    assert is_partial(str(folder / "speech"))
    assert json.loads((folder / "speech/adapter_config.json").read_text())["r"] == 4
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    assert all(torch.equal(values, expected[name]) for name, values in llm.state_dict().items())
    # Without the placeholder, which is none of the LLM's tokens.
    vocab = processor.tokenizer.get_vocab()
    assert vocab.pop(processor.audio_token) == len(vocab) == model.config.get_text_config().vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    assert tokenizer.get_vocab() == vocab
    assert tokenizer("<|user|> the red cat")["input_ids"] == processor.tokenizer("<|user|> the red cat")["input_ids"]
    other = make_model(plora={"r": 4}, seed=1)
    other.plora.load_pretrained(folder / "speech")
    assert all(torch.equal(values, lora[name]) for name, values in other.plora.named_parameters.items())


def test_an_llm_of_the_hub_is_named_instead_of_written(processor, tmp_path):
    command = write_engine_files(make_model(), processor, tmp_path, "org/llm")
    assert command[2] == "org/llm" and "--enable-lora" not in command
    assert [path.name for path in tmp_path.iterdir()] == ["chat_template.jinja"]


def test_a_rank_that_vllm_does_not_take_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="up to rank 512, but this model's partial LoRA has rank 600"):
        write_engine_files(make_model(plora={"r": 600}), processor, tmp_path)


@pytest.mark.parametrize("of_config", [{}, {"extra_special_tokens": {"image_token": "<image>"}}])
def test_the_placeholder_leaves_and_other_tokens_stay(tmp_path, of_config):
    tokens = [{"id": 7, "content": "<|audio|>"}, {"id": 8, "content": "<image>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(of_config))
    _remove_token("<|audio|>", tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"added_tokens": tokens[1:]}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == of_config
