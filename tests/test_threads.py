"""Calls in many threads, inside each other and interleaved: each gives bit for bit what it gives alone."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch

from modeling_blsp_kd import plora_layers
from processing.pipeline_blsp_kd import BlspKdPipeline
from tests.helpers.models import make_model
from tests.helpers.prompts import clip, spoken_prompts
from tests.reliability import threads


def prompt(seed=0, length=9):
    """Embeddings of two prompts, and a place for speech in each that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    is_speech = torch.zeros(2, length, dtype=torch.bool)
    is_speech[0, 1 + seed % 3 : 5] = is_speech[1, 2 : 4 + seed % 4] = True
    return torch.randn(2, length, 32, generator=generator), is_speech


@torch.no_grad()
def logits(model, embeds, is_speech=None):
    return model(inputs_embeds=embeds, is_speech=is_speech, use_cache=False).logits


def within_a_call(model, then):
    """Have `then` called once when the next call of a model is halfway through its layers."""
    layer = model.language_model.base_model.layers[1]

    def run(*_):
        hook.remove()
        then()

    hook = layer.register_forward_pre_hook(run)


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def nothing_is_left(model):
    embeds, is_speech = prompt()
    is_kept = any(type(kept) is plora_layers.Call for kept in gc.get_objects())
    return model.plora.is_speech is None and not is_kept


def test_a_text_call_beside_an_audio_call_is_the_base_llm():
    """The mask was kept on the model: text that was read while another thread was inside an audio call got LoRA."""
    model = make_model(plora=True)
    embeds, is_speech = prompt()
    text, audio = logits(model, embeds), logits(model, embeds, is_speech)
    assert (text - audio).abs().max() > 1
    found = []
    within_a_call(model, lambda: found.append(in_another_thread(lambda: logits(model, embeds))))
    assert torch.equal(logits(model, embeds, is_speech), audio) and torch.equal(found[0], text)
    bare = []  # also of the LLM alone, which sets nothing
    within_a_call(
        model, lambda: bare.append(in_another_thread(lambda: model.language_model(inputs_embeds=embeds).logits))
    )
    logits(model, embeds, is_speech)
    assert torch.equal(bare[0], text)
    assert nothing_is_left(model)


def test_calls_inside_a_call_are_independent():
    model, other = make_model(plora=True), make_model(plora=True, seed=3)
    cases = [(model, None), (model, 1), (other, None), (other, 1), (model, 2)]

    def run(of, seed):
        embeds, is_speech = prompt(seed or 0)
        return logits(of, embeds, None if seed is None else is_speech)

    alone = [run(*case) for case in cases]
    for outer, expected in zip(cases, alone):
        found = []
        within_a_call(outer[0], lambda: found.extend(run(*case) for case in cases))  # noqa: B023 (called at once)
        assert torch.equal(run(*outer), expected)
        assert all(map(torch.equal, found, alone))
    assert nothing_is_left(model) and nothing_is_left(other)


def test_a_text_call_inside_a_block_reads_no_speech():
    """A text call left the mask that it found, instead of saying that it has no speech."""
    model = make_model(plora=True)
    embeds, is_speech = prompt()
    expected = logits(model, embeds)
    with model.plora.at(is_speech):
        assert torch.equal(logits(model, embeds), expected)
        assert model.plora.is_speech is is_speech


@pytest.mark.parametrize("order", ["inner first", "outer first", "another thread"])
def test_blocks_may_end_in_any_order(order):
    """Begin A, begin B, end A, end B left the mask of A for good: B put back what it had found."""
    model = make_model(plora=True)
    embeds, is_speech = prompt()
    first, second = model.plora.at(is_speech), model.plora.at(~is_speech)
    first.__enter__()
    second.__enter__()
    if order == "inner first":
        second.__exit__(None, None, None)
        assert model.plora.is_speech is is_speech
        first.__exit__(None, None, None)
    elif order == "outer first":
        first.__exit__(None, None, None)
        assert torch.equal(model.plora.is_speech, ~is_speech)
        second.__exit__(None, None, None)
    else:
        in_another_thread(lambda: first.__exit__(None, None, None))
        in_another_thread(lambda: second.__exit__(None, None, None))
    assert model.plora.is_speech is None
    expected = logits(model, embeds)
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, expected)


def test_an_exception_anywhere_leaves_nothing():
    model = make_model(plora=True)
    embeds, is_speech = prompt()
    text = logits(model, embeds)
    linears = [module for module in model.language_model.modules() if isinstance(module, torch.nn.Linear)]

    def fail(*_):
        raise KeyboardInterrupt

    for linear in linears:
        hook = linear.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            logits(model, embeds, is_speech)
        hook.remove()
        assert model.plora.is_speech is None
        assert torch.equal(model.language_model(inputs_embeds=embeds).logits, text)
    assert nothing_is_left(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_inside_another_call_sees_its_own_mask(use_reentrant):
    model, other = make_model(plora={"lora_dropout": 0.0}).train(), make_model(plora=True, seed=3)

    def forward(seed):
        embeds, is_speech = prompt(seed)
        return model(inputs_embeds=embeds.requires_grad_(), is_speech=is_speech, use_cache=False).logits

    def gradients(output):
        model.zero_grad()
        output.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.plora.parameters]

    expected = gradients(forward(1))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    output, (_, is_speech) = forward(1), prompt(2)
    with other.plora.at(is_speech), model.plora.at(is_speech):
        assert all(map(torch.equal, gradients(output), expected))
    output = forward(1)
    assert all(map(torch.equal, in_another_thread(lambda: gradients(output)), expected))


@torch.no_grad()
def test_replicas_and_copies_are_independent():
    """`forward` was an attribute of each layer, so that a replica ran the layer it was made from."""
    model = make_model(plora=True)
    embeds, is_speech = prompt()
    expected = logits(model, embeds, is_speech)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, embeds, is_speech), expected)
        with twin.plora.at(is_speech):
            assert model.plora.is_speech is None and twin.plora.layers[0].partial_lora is twin.plora
        assert [type(layer) for layer in twin.plora.layers] == [type(layer) for layer in model.plora.layers]
    layer, x = model.plora.layers[0], embeds
    replica = layer._replicate_for_data_parallel()
    replica.base_layer = torch.nn.Linear(32, layer.base_layer.out_features)
    assert torch.equal(replica(x), replica.base_layer(x)) and not torch.equal(replica(x), layer(x))


@pytest.mark.long
@pytest.mark.numerical
def test_compiled_calls_in_threads():
    """A graph masks where a plain call gathers: in float32, an old CPU's rounding was more than the tolerance."""
    model = make_model(plora=True).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    cases = [(seed, is_spoken) for seed in range(3) for is_spoken in (True, False)]

    def run(of, case):
        embeds, is_speech = prompt(case[0])
        return logits(of, embeds.double(), is_speech if case[1] else torch.zeros_like(is_speech))

    for case in cases:  # compiled once, so that threads only run
        torch.testing.assert_close(run(compiled, case), run(model, case))
    alone = [run(compiled, case) for case in cases] * 4
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda case: run(compiled, case), cases * 4), alone):
            assert torch.equal(found, expected)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pipe(processor):
    return BlspKdPipeline(make_model(plora=True), processor=processor, max_new_tokens=12, do_sample=False)


def test_interleaved_streams_give_what_each_alone_gives(pipe):
    """Two streams of one pipeline raised, or answered with each other's mask: both ran on one object."""
    clips = [clip(0.5, seed=1), clip(1.2, seed=2)]
    alone = ["".join(pipe.stream(each)) for each in clips]
    assert len(set(alone)) == 2
    for _ in range(5):
        pieces = zip_longest(*(pipe.stream(each) for each in clips), fillvalue="")
        assert ["".join(of_one) for of_one in zip(*pieces)] == alone
        for _ in zip(pipe.stream(clips[0]), pipe.stream(clips[1])):
            pass


@pytest.mark.long
def test_one_pipeline_in_eight_threads(pipe):
    clips = [clip(0.4 + 0.2 * seed, seed=seed) for seed in range(6)]
    alone = [pipe(each)["generated_text"] for each in clips]
    assert len(set(alone)) > 1

    def ask(number):
        each, is_streamed = clips[number % len(clips)], number % 2
        return "".join(pipe.stream(each)) if is_streamed else pipe(each)["generated_text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == [alone[number % len(clips)] for number in range(24)]


def test_one_processor_in_threads_with_different_padding(processor):
    """Tokenizers keep padding and truncation of a call on themselves, so threads got each other's."""
    texts = ["the red cat ran to the river " * 2, "cat"]
    options = [
        {"padding": True},
        {"padding": False, "return_tensors": None},
        {"padding": "max_length", "max_length": 60, "padding_side": "right"},
        {"truncation": True, "max_length": 6},
    ]

    def ids(number):
        return [list(map(int, row)) for row in processor(texts, **options[number % len(options)])["input_ids"]]

    alone = [ids(number) for number in range(len(options))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ids, range(400))) == [alone[number % len(options)] for number in range(400)]


def test_features_are_the_same_in_threads(processor):
    def prepare(seed):
        return spoken_prompts(processor, durations_s=(0.3 + 0.1 * (seed % 5), 0.5))

    alone = [prepare(seed) for seed in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(prepare, range(25))):
            assert all(torch.equal(values, alone[number % 5][name]) for name, values in found.items())


@pytest.fixture(scope="module")
def asked_pipe():
    return threads.build_pipeline(None)


@pytest.mark.long
def test_a_short_run_of_many_threads_finds_nothing(asked_pipe):
    """The short form of `python -m tests.reliability.threads`."""
    result = threads.run(asked_pipe, num_threads=8, num_requests=6)
    assert result["wrong"] == [] and result["left"] == 0
    assert result["requests"] == 48 and result["distinct_answers"] > 30
    assert "48 requests from 8 threads" in threads.report(result)


@pytest.mark.long
def test_a_mask_that_threads_share_would_be_found(asked_pipe, monkeypatch):
    # Without what starts threads of its own, and so would fail alone.
    asked = threads.kinds(asked_pipe)
    asked = {kind: asked[kind] for kind in ("answer", "logits of speech", "logits of text")}
    monkeypatch.setattr(threads, "kinds", lambda pipe: asked)
    monkeypatch.setattr(plora_layers, "_here", SimpleNamespace(call=None))
    result = threads.run(asked_pipe, num_threads=8, num_requests=12)
    assert {wrong["outcome"] for wrong in result["wrong"]} - {"same"}
    assert sum(num_wrong for _, num_wrong in result["kinds"].values()) == len(result["wrong"]) > 0
