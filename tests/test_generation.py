"""Generation from audio prompts: the slicing idiom, batching, strategies, streamers, and the base LLM without audio."""

import pytest
import torch
from conftest import FAMILIES, clip, make_model, spoken_prompts
from transformers import AutoModelForCausalLM, TextStreamer
from transformers.generation.streamers import BaseStreamer

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def literal_greedy(model, inputs, num_tokens):
    """One prompt, no cache, no `generate`: the arg max of a fresh forward pass per token."""
    prompt, _ = model._hear_prompt(
        inputs["input_ids"], None, None, inputs["input_features"], inputs["input_features_mask"], None
    )
    embeds = model._embed(prompt.input_ids, prompt.is_speech, prompt.speech_embeds)
    is_speech = prompt.is_speech
    tokens = []
    for _ in range(num_tokens):
        with model._partial_lora_at(is_speech):
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        logits[2] = -torch.inf  # min_new_tokens: no end of turn
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
        is_speech = torch.nn.functional.pad(is_speech, (0, 1), value=False)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_generation_equals_uncached_and_a_literal_loop(family, processor):
    model = make_model(family, plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    prompt_length = inputs["input_ids"].shape[1]
    cached = model.generate(**inputs, **GREEDY)
    assert torch.equal(cached[:, :prompt_length], inputs["input_ids"])
    assert cached[0, prompt_length:].tolist() == literal_greedy(model, inputs, 6)
    if family not in ("gemma2", "mistral"):  # transformers refuses use_cache=False for sliding windows
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), cached)


@pytest.mark.parametrize("adapter", ["cformer", {"type": "subsampler", "bottleneck_dim": 8}])
def test_batch_equals_single_for_mixed_lengths_and_without_audio(adapter, processor):
    model = make_model(adapter=adapter, plora=True)
    audio = [clip(0.4, seed=0), clip(2.1, seed=1), clip(0.8, seed=2)]
    prompts = ["repeat<|audio|>", "the cat ran", "<|audio|>and the words<|audio|>"]
    kwargs = {"sampling_rate": 16_000}
    batch = processor(text=prompts, audio=audio, **kwargs)
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, clips in enumerate([audio[:1], None, audio[1:]]):
        alone = processor(text=prompts[row], audio=clips, **kwargs)
        expected = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row], expected), prompts[row]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_give_the_base_llms_output(family):
    model = make_model(family, plora=True)
    base = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    state = model.language_model.state_dict().items()
    base.load_state_dict({name.replace(".base_layer", ""): value for name, value in state if "lora_" not in name})
    base.generation_config = model.generation_config
    torch.manual_seed(0)
    prompt = {"input_ids": torch.randint(3, 200, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    prompt["attention_mask"][0, :3] = 0
    for options in (GREEDY, {**GREEDY, "num_beams": 3}, {"do_sample": True, "max_new_tokens": 6}):
        torch.manual_seed(5)
        expected = base.generate(**prompt, **options)
        torch.manual_seed(5)
        assert torch.equal(model.generate(**prompt, **options), expected)


@pytest.mark.parametrize(
    "options, num_rows",
    [
        ({"num_beams": 3}, 2),
        ({"num_beams": 4, "num_return_sequences": 2}, 4),
        ({"do_sample": True, "num_return_sequences": 3}, 6),
        ({"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, 2),
    ],
)
def test_other_strategies_keep_the_slicing_idiom(options, num_rows, processor):
    model = make_model(plora=True)
    inputs = spoken_prompts(processor)
    output = model.generate(**inputs, max_new_tokens=5, **options)
    prompt_length = inputs["input_ids"].shape[1]
    assert output.shape[0] == num_rows and prompt_length < output.shape[1] <= prompt_length + 5
    expected = inputs["input_ids"].repeat_interleave(num_rows // 2, dim=0)
    assert torch.equal(output[:, :prompt_length], expected)


def test_repetition_penalty_does_not_punish_the_end_of_the_turn(processor):
    """Speech positions looked like padding to logits processors, and padding is often the end of turn."""
    model = make_model(text={"pad_token_id": 2})
    inputs = spoken_prompts(processor, durations_s=(0.9,), instruction="repeat")
    inputs["input_ids"][inputs["input_ids"] == 2] = 3
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options).scores[0][0]
    punished = model.generate(**inputs, **options, repetition_penalty=3.0).scores[0][0]
    assert punished[2] == plain[2] and not torch.equal(punished, plain)


def test_beam_search_of_a_batch_equals_single(processor):
    """Audio tensors of several rows got out of order when beams were expanded."""
    model = make_model(plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.5, 0.5))
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(**inputs, **options)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(model.generate(**alone, **options)[0], together[row])


def test_sampling_follows_the_models_distribution(processor):
    model = make_model(plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    probabilities = torch.softmax(model(**inputs).logits[0, -1], -1).detach()
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=2000, renormalize_logits=True
    )
    drawn = torch.bincount(output[:, -1], minlength=len(probabilities)) / 2000
    assert 0.5 * (drawn - probabilities).abs().sum() < 0.15


def test_dict_output_holds_the_callers_prompt_and_the_scores(processor):
    model = make_model()
    inputs = spoken_prompts(processor)
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, model.generate(**inputs, **GREEDY))
    chosen = torch.stack([score.argmax(-1) for score in output.scores], dim=1)
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], chosen)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_sees_the_callers_prompt_then_each_new_token(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    streamer = Recorder()
    output = model.generate(**inputs, **GREEDY, streamer=streamer)
    prompt, *new_tokens = streamer.values
    assert torch.equal(prompt, inputs["input_ids"]) and streamer.ended
    assert torch.equal(torch.cat(new_tokens), output[0, inputs["input_ids"].shape[1] :])


def test_text_streamer_prints_what_decoding_gives(processor, capsys):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    output = model.generate(**inputs, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == text.strip()


def test_prompts_longer_than_the_context_are_an_error(processor):
    model = make_model(text={"max_position_embeddings": 32})
    inputs = spoken_prompts(processor, durations_s=(0.9,), instruction="the red cat ran " * 8)
    with pytest.raises(ValueError, match=r"takes \d+ positions \(\d+ of them speech\).*context holds 32"):
        model.generate(**inputs)


def test_audio_without_a_prompt_is_an_error(processor):
    model = make_model()
    with pytest.raises(ValueError, match="Audio needs a prompt"):
        model.generate(input_features=torch.randn(1, 80, 50))
    with pytest.raises(ValueError, match="got floats"):
        model.generate(torch.randn(1, 80, 50))


def test_audio_after_a_cache_is_an_error(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    cache = model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="after a key-value cache is not supported"):
        model.generate(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="after a key-value cache is not supported"):
        model(**inputs, past_key_values=cache)


def test_an_unknown_argument_is_an_error(processor):
    """A misspelt audio argument was silently ignored by other models."""
    model = make_model()
    with pytest.raises(ValueError, match="input_feature"):
        model.generate(**spoken_prompts(processor), input_feature=torch.randn(1, 80, 50))
