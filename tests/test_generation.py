"""Generation from audio prompts: the slicing idiom, batching, strategies, streamers, and the base LLM without audio."""

import pytest
import torch
from transformers import LogitsProcessor, TextStreamer
from transformers.generation.streamers import BaseStreamer

from tests.helpers.generation import ADAPTERS, AUDIO, GREEDY, expand, expanded_mask, literal_greedy, process
from tests.helpers.models import FAMILIES, VOCAB_SIZE, base_llm, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts

pytestmark = pytest.mark.numerical


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


@pytest.mark.parametrize("adapter", ADAPTERS)
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
    base = base_llm(model)
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


def test_an_unknown_argument_is_an_error(processor):
    """A misspelt audio argument was silently ignored by other models."""
    model = make_model()
    with pytest.raises(ValueError, match="input_feature"):
        model.generate(**spoken_prompts(processor), input_feature=torch.randn(1, 80, 50))


# -- what logits processors see ---------------------------------------------------------------------------------------


class PromptRecorder(LogitsProcessor):
    def __init__(self):
        self.prompts = []

    def __call__(self, input_ids, scores):
        self.prompts.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("audio_token_id", [300, 17])
def test_logits_processors_see_one_id_per_position(audio_token_id, processor):
    model = make_model()
    model.config.audio_token_id = audio_token_id  # outside the LLM's vocabulary, and inside it
    inputs = spoken_prompts(processor)
    inputs["input_ids"][inputs["input_ids"] == 300] = audio_token_id
    prompt = expand(model, inputs)
    recorder = PromptRecorder()
    output = model.generate(**inputs, **GREEDY, logits_processor=[recorder])
    width = prompt.input_ids.shape[1]
    assert [seen.shape[1] for seen in recorder.prompts] == list(range(width, width + 6))
    seen = recorder.prompts[0]
    assert torch.equal(seen[~prompt.is_speech], prompt.input_ids[~prompt.is_speech])
    assert not torch.isin(seen[prompt.is_speech], torch.tensor([0, 2])).any()
    assert (seen[prompt.is_speech] < 300).all()  # processors look scores up by it
    assert torch.equal(recorder.prompts[-1][:, width:], output[:, -6:-1])


@pytest.mark.parametrize("text", [{"bos_token_id": 2}, {"bos_token_id": None, "pad_token_id": 2}], ids=str)
def test_speech_never_looks_like_the_end_of_a_turn(text, processor):
    """GPT-2 starts and ends with the same token: repetition penalties then kept audio prompts from ending."""
    model = make_model(text=text)
    inputs = spoken_prompts(processor, durations_s=(0.9,), instruction="repeat")
    recorder = PromptRecorder()
    model.generate(**inputs, **GREEDY, logits_processor=[recorder])
    prompt = expand(model, inputs)
    assert not (recorder.prompts[0][prompt.is_speech] == 2).any()


def test_forced_counts_and_repeated_placeholders(processor):
    model = make_model(plora=True)
    inputs = dict(spoken_prompts(processor))
    counts = torch.tensor([3, 9])
    recorder = PromptRecorder()
    forced = model.generate(**inputs, **GREEDY, num_speech_tokens=counts, logits_processor=[recorder])
    assert torch.equal(forced[:, :-6], inputs["input_ids"])
    assert recorder.prompts[0].shape[1] == inputs["input_ids"].shape[1] - 1 + 9
    rows = [
        ids[mask.bool()].repeat_interleave(torch.where(ids[mask.bool()] == 300, count, 1))
        for ids, mask, count in zip(inputs["input_ids"], inputs["attention_mask"], counts)
    ]
    width = max(len(row) for row in rows)
    inputs["input_ids"] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    inputs["attention_mask"] = (torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])).long()
    repeated = model.generate(**inputs, **GREEDY, num_speech_tokens=counts)
    assert torch.equal(repeated[:, :width], inputs["input_ids"])
    assert torch.equal(repeated[:, width:], forced[:, -6:])


# -- embeddings, padding, several audios, the context -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_embeddings_of_text_are_those_after_its_ids(family, text_prompt):
    model = make_model(family, plora=True)
    embeds = model.get_input_embeddings()(text_prompt["input_ids"])
    logits = model(inputs_embeds=embeds, attention_mask=text_prompt["attention_mask"]).logits
    assert torch.equal(logits, model(**text_prompt).logits)


def test_generation_after_embeddings_of_text_is_that_after_its_ids(text_prompt):
    model = make_model(plora=True)
    embeds = model.get_input_embeddings()(text_prompt["input_ids"])
    tokens = model.generate(inputs_embeds=embeds, attention_mask=text_prompt["attention_mask"], **GREEDY)
    assert torch.equal(tokens, model.generate(**text_prompt, **GREEDY)[:, 7:])


@pytest.mark.parametrize("plora", [False, True])
@torch.no_grad()
def test_audio_beside_embedded_prompts(plora, processor):
    """Embeddings beside audio were dropped without a word."""
    model = make_model(plora=plora, text={"vocab_size": VOCAB_SIZE + 8})  # with an embedding for the placeholder
    inputs = spoken_prompts(processor)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    alone = {name: value for name, value in inputs.items() if name != "input_ids"}
    expected = model(**inputs).logits
    for given in ({"input_ids": inputs["input_ids"]}, {}):
        torch.testing.assert_close(model(**alone, **given, inputs_embeds=embeds).logits, expected)
    assert not torch.allclose(model(**inputs, inputs_embeds=2 * embeds).logits, expected)  # they are what is read

    told = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, inputs_embeds=embeds, **GREEDY), told)
    answers = model.generate(**alone, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(answers, told[:, inputs["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="pass input_ids.*the placeholder 300 has no embedding"):
        make_model()(**alone, inputs_embeds=embeds)


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_either_padding_gives_the_same_logits_with_and_without_audio(adapter, processor):
    model = make_model(adapter=adapter, plora=True)
    texts = [f"repeat {AUDIO}", "the red cat ran", f"{AUDIO}and the words{AUDIO}", "cat"]
    clips = [[clip(0.4, 0)], [], [clip(1.5, 1), clip(0.8, 2)], []]
    logits, masks = {}, {}
    for side in ("left", "right"):
        flat = [waveform for row in clips for waveform in row]
        inputs = processor(texts, flat, sampling_rate=SAMPLING_RATE, padding_side=side)
        logits[side], masks[side] = model(**inputs).logits, expanded_mask(model, inputs).bool()
    for row in range(4):
        expected = model(**process(processor, texts[row : row + 1], clips[row : row + 1])).logits[0]
        for side in logits:
            valid = logits[side][row, masks[side][row]]
            torch.testing.assert_close(valid, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_chats_of_several_audios_in_a_batch_equal_single(adapter, processor):
    model = make_model(adapter=adapter, plora=True)

    def chat(durations_s):
        turns = []
        for index, duration_s in enumerate(durations_s):
            blocks = [{"type": "text", "text": "repeat"}]
            if duration_s:
                blocks += [{"type": "audio", "audio": clip(duration_s, index)}] * (1 + index % 2)
            turns += [{"role": "user", "content": blocks}, {"role": "assistant", "content": "the cat"}]
        return turns[:-1]

    def tokenized(chats):
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        return processor.apply_chat_template(chats, **options, processor_kwargs={"sampling_rate": SAMPLING_RATE})

    chats = [chat([0.4, 0.9, 0.6]), chat([None]), chat([0.3, None, 0.5]), chat([1.3])]
    together = model.generate(**tokenized(chats), **GREEDY)
    for row, single in enumerate(chats):
        assert torch.equal(model.generate(**tokenized([single]), **GREEDY)[0, -6:], together[row, -6:])


@pytest.mark.parametrize("too_many", [False, True])
def test_the_context_is_counted_in_the_llms_positions(too_many, processor):
    """The prompt as written may fit while the one with all its speech tokens does not."""
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    num_written = inputs["input_ids"].shape[1]
    counts = torch.tensor([20])
    num_positions = num_written - 1 + 20
    model = make_model(text={"max_position_embeddings": num_positions - too_many})
    message = rf"takes {num_positions} positions \(20 of them speech\), but the LLM's context holds"
    with pytest.raises(ValueError, match=rf"{message} {num_positions - too_many}, the answer included"):
        model.generate(**inputs, num_speech_tokens=counts)  # no room for an answer
    if too_many:
        with pytest.raises(ValueError, match=rf"{message} {num_positions - 1}"):
            model(**inputs, num_speech_tokens=counts)
    else:
        assert model(**inputs, num_speech_tokens=counts).logits.shape[1] == num_positions


def test_the_context_counts_what_the_cache_holds(processor):
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    counts, num_written = torch.tensor([20]), inputs["input_ids"].shape[1]
    num_positions = num_written - 1 + 20
    model = make_model(text={"max_position_embeddings": 2 * num_positions - 1})
    cache = model(**inputs, num_speech_tokens=counts).past_key_values
    mask = torch.ones(1, num_positions + num_written, dtype=torch.long)
    message = rf"takes {2 * num_positions} positions .* context holds {2 * num_positions - 1}"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**{**inputs, "attention_mask": mask}, num_speech_tokens=counts, past_key_values=cache)
