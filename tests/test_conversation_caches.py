"""Conversations that go on from a cache, all kinds of caches, and drafts: the tokens are those without them."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from tests.helpers.generation import ADAPTERS, AUDIO, GREEDY, expanded_mask, literal_greedy, process
from tests.helpers.models import FAMILIES, VOCAB_SIZE, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts

pytestmark = pytest.mark.numerical


# -- conversations that go on from a cache ----------------------------------------------------------------------------

TURNS = [
    ([f"repeat{AUDIO}", f"the red cat{AUDIO}"], [[clip(0.6, 0)], [clip(0.5, 1)]]),
    ([f"and{AUDIO}words{AUDIO}", f"ran to {AUDIO}"], [[clip(0.9, 2), clip(0.3, 3)], [clip(0.7, 4)]]),
    (["river", "the red cat and the words"], [[], []]),
    ([f"{AUDIO}the cat", f"{AUDIO}"], [[clip(0.4, 5)], [clip(1.1, 6)]]),
]


@contextmanager
def positions_read(model):
    """Collects how many positions each call of the LLM reads."""
    widths = []

    def record(module, args, kwargs):
        values = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        widths.append(values.shape[1])

    handle = model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    yield widths
    handle.remove()


def joined(parts):
    """Whole conversations of what was said in turn: prompts and answers side by side, clips in reading order."""
    conversation = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "attention_mask")}
    num_rows = len(conversation["input_ids"])
    clips = [clips for row in range(num_rows) for part in parts for clips in part.get("clips", [[]] * num_rows)[row]]
    return conversation, clips


def without_clips(prompt):
    return {name: value for name, value in prompt.items() if name != "clips"}


class Chat:
    """A conversation of one or more rows, with what each way to go on needs."""

    def __init__(self, model, processor, rows):
        self.model, self.processor, self.rows = model, processor, rows
        self.parts, self.cache, self.cached_mask, self.last = [], None, None, None

    def prompt(self, index):
        texts, clips_of_row = (list(values[row] for row in self.rows) for values in TURNS[index])
        return {**process(self.processor, texts, clips_of_row), "clips": clips_of_row}

    def whole(self, prompt):
        conversation, clips = joined([*self.parts, prompt])
        if clips:
            features = self.processor.extract_features(clips, sampling_rate=SAMPLING_RATE)
            conversation |= {name: torch.from_numpy(values) for name, values in features.items()}
        return conversation

    def new_turn(self, prompt):
        """The last answer's end, which the cache lacks, and the new turn, under the mask of all positions."""
        new = without_clips(prompt)
        if not self.parts:
            return new
        ones = torch.ones_like(self.last)
        new["input_ids"] = torch.cat([self.last, new["input_ids"]], 1)
        new["attention_mask"] = torch.cat([self.cached_mask, ones, new["attention_mask"]], 1)
        return new

    def say(self, prompt, way):
        """One turn; returns the answer's tokens and what an uncached call makes of the same conversation."""
        inputs = self.new_turn(prompt) if way == "new turn" else self.whole(prompt)
        whole = self.whole(prompt)
        expected = self.model.generate(**whole, **GREEDY)[:, -6:]
        with positions_read(self.model) as widths:
            output = self.model.generate(**inputs, **GREEDY, past_key_values=self.cache, return_dict_in_generate=True)
        assert torch.equal(output.sequences[:, :-6], inputs["input_ids"])
        new_mask = expanded_mask(self.model, without_clips(prompt))
        ones = torch.ones(len(self.rows), 6, dtype=torch.long)
        if not self.parts:
            self.cached_mask = torch.cat([new_mask, ones[:, :5]], 1)
            assert widths[0] == new_mask.shape[1]
        else:
            self.cached_mask = torch.cat([self.cached_mask, ones[:, :1], new_mask, ones[:, :5]], 1)
            assert widths[0] == new_mask.shape[1] + 1  # and the token that ended the last answer
        assert widths[1:] == [1] * 5
        answer = output.sequences[:, -6:]
        self.cache, self.last = output.past_key_values, answer[:, -1:]
        assert self.cache.get_seq_length() == self.cached_mask.shape[1]
        self.parts += [prompt, {"input_ids": answer, "attention_mask": ones}]
        return answer, expected


@pytest.mark.parametrize("way", ["whole", "new turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_from_its_cache(family, way, processor):
    """Audio turns, a text turn, an audio turn: the tokens are those without a cache, and nothing is read twice."""
    chat = Chat(make_model(family, plora=True), processor, rows=[0])
    for index in range(4):
        answer, expected = chat.say(chat.prompt(index), way)
        assert torch.equal(answer, expected), f"turn {index}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_goes_on_from_its_cache(family, processor):
    """Rows are padded anew in every turn, so the cache has padding in its middle."""
    model = make_model(family, plora=True)
    chat = Chat(model, processor, rows=[0, 1])
    for index in range(4):
        answer, expected = chat.say(chat.prompt(index), "new turn")
        assert torch.equal(answer, expected), f"turn {index}"
    assert (chat.cached_mask[:, 0] == 0).any() and (chat.cached_mask[:, 1:].diff(dim=1) < 0).any()


@pytest.mark.parametrize("way", ["whole", "new turn"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_new_audio_after_text_goes_on_from_its_cache(adapter, way, processor):
    chat = Chat(make_model(adapter=adapter, plora=True), processor, rows=[0])
    for index in (2, 1, 3):
        answer, expected = chat.say(chat.prompt(index), way)
        assert torch.equal(answer, expected), f"turn {index}"


def test_whole_conversations_of_a_batch_go_on_when_their_padding_stayed(processor):
    """Two rows whose later turns are equally long: each has the padding that it has in the cache."""
    model = make_model(plora=True)
    first = process(processor, [f"repeat{AUDIO}", f"the red cat{AUDIO}"], [[clip(0.6, 0)], [clip(0.9, 1)]])
    first["num_speech_tokens"] = torch.tensor([3, 5])
    told = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    new = process(processor, [f"and{AUDIO}"] * 2, [[clip(0.5, 2)], [clip(0.8, 3)]])
    clips = [clip(0.6, 0), clip(0.5, 2), clip(0.9, 1), clip(0.8, 3)]
    features = processor.extract_features(clips, sampling_rate=SAMPLING_RATE)
    whole = {
        "input_ids": torch.cat([told.sequences, new["input_ids"]], 1),
        "attention_mask": torch.cat([first["attention_mask"], torch.ones(2, 6).long(), new["attention_mask"]], 1),
        "num_speech_tokens": torch.tensor([3, 4, 5, 4]),
        **{name: torch.from_numpy(values) for name, values in features.items()},
    }
    assert expanded_mask(model, first)[0, 0] == 0  # there is padding
    expected = model.generate(**whole, **GREEDY)
    assert torch.equal(model.generate(**whole, **GREEDY, past_key_values=told.past_key_values), expected)


def test_a_batch_does_not_go_on_from_a_cache_that_was_padded_otherwise(processor):
    """The whole conversations of a batch are padded anew; where that moves a row, its cache no longer fits."""
    model = make_model(plora=True)
    lengths = {"first": (2.0, 0.3), "second": (0.3, 2.0)}
    of_turn = {name: [[clip(duration, 7)] for duration in durations] for name, durations in lengths.items()}
    first = process(processor, [AUDIO] * 2, of_turn["first"])
    told = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    clips = [of_turn[name][row][0] for row in range(2) for name in lengths]
    new = process(processor, [f"and{AUDIO}"] * 2, of_turn["second"])
    features = processor.extract_features(clips, sampling_rate=SAMPLING_RATE)
    whole = {
        "input_ids": torch.cat([told.sequences, new["input_ids"]], 1),
        "attention_mask": torch.ones(2, told.sequences.shape[1] + new["input_ids"].shape[1], dtype=torch.long),
        **{name: torch.from_numpy(values) for name, values in features.items()},
    }
    with pytest.raises(ValueError, match="padded otherwise than past_key_values were"):
        model.generate(**whole, **GREEDY, past_key_values=told.past_key_values)


@pytest.mark.parametrize("way", ["model", "argument", "list", "config"])
def test_the_mask_of_the_cache_lets_a_batch_go_on(way, processor):
    """A row that ended early leaves padding in the cache, which its next turn must not read."""
    model = make_model(plora=True)
    clips_of_turn = [[[clip(0.6, 0)], [clip(1.4, 1)]], [[clip(0.9, 2)], [clip(0.3, 3)]]]
    first, second = (process(processor, [f"red{AUDIO}", f"the cat{AUDIO}"], clips) for clips in clips_of_turn)
    probe = model.generate(**first, **GREEDY)[:, first["input_ids"].shape[1] :]
    # The end of turn is what the first row says early and the second never.
    end = next(int(token) for token in probe[0, :4] if token not in probe[1])
    options = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}
    if way == "model":
        model.generation_config.eos_token_id = end
    elif way == "config":
        options = {"generation_config": GenerationConfig(**options, eos_token_id=[2, end], pad_token_id=0)}
    else:
        options["eos_token_id"] = [2, end] if way == "list" else end
    told = model.generate(**first, **options)
    answers = told.sequences[:, first["input_ids"].shape[1] :]
    assert (answers[0] == 0).any()  # padding
    cached = told.past_key_values.attention_mask
    assert cached.shape == (2, told.past_key_values.get_seq_length()) and cached[0, -1] == 0
    turn = {
        **second,
        "input_ids": torch.cat([answers[:, -1:], second["input_ids"]], 1),
        "attention_mask": torch.cat([cached, (answers[:, -1:] != 0).long(), second["attention_mask"]], 1),
    }
    output = model.generate(**turn, past_key_values=told.past_key_values, **options)
    together = output.sequences[:, turn["input_ids"].shape[1] :]

    for row in range(2):
        said = answers[row][answers[row] != 0]
        ids = [first["input_ids"][row][first["attention_mask"][row] == 1], said]
        ids += [second["input_ids"][row][second["attention_mask"][row] == 1]]
        clips = [clips_of_turn[index][row][0] for index in range(2)]
        features = processor.extract_features(clips, sampling_rate=SAMPLING_RATE)
        alone = {"input_ids": torch.cat(ids)[None], **{name: torch.from_numpy(x) for name, x in features.items()}}
        expected = model.generate(**alone, **options).sequences[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(expected)], expected)


def test_the_mask_of_the_cache_after_a_string_that_stops(processor):
    model = make_model(plora=True)
    inputs = spoken_prompts(processor)
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "tokenizer": processor.tokenizer}
    texts = processor.batch_decode(model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :])
    stop = next(letter for letter in texts[0][:12] if letter.isalpha() and letter not in texts[1])
    told = model.generate(**inputs, **options, stop_strings=[stop], return_dict_in_generate=True)
    answers = told.sequences[:, inputs["input_ids"].shape[1] :]
    num_said = (answers[0] != 0).nonzero().max() + 1
    expected = torch.ones(2, 23, dtype=torch.long)
    expected[0, num_said:] = 0
    assert num_said < 23 and torch.equal(told.past_key_values.attention_mask[:, -23:], expected)


def test_the_mask_of_the_cache_after_text(processor):
    model = make_model(plora=True)
    batch = process(processor, ["the red cat", "cat"], [[], []])
    told = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    expected = torch.cat([batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    assert torch.equal(told.past_key_values.attention_mask, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_text_goes_through_a_static_cache(family, text_prompt):
    """LLMs with several kinds of layers are given several masks, which were taken for one."""
    model = make_model(family, plora=True)
    expected = model.generate(**text_prompt, **GREEDY)
    assert torch.equal(model.generate(**text_prompt, **GREEDY, cache_implementation="static"), expected)


def test_a_placeholder_is_never_an_answer(processor):
    """A model wrote its own placeholder, and the conversation could not go on."""
    model = make_model(text={"vocab_size": VOCAB_SIZE + 8})
    told = model.generate(**spoken_prompts(processor), **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert all((scores[:, VOCAB_SIZE] == -torch.inf).all() for scores in told.scores)


@torch.no_grad()
def test_the_placeholder_is_suppressed_beside_what_a_caller_suppresses(processor):
    """In the call, in its config, and in the model's; a call's own list replaces the model's, as in text."""
    model = make_model(text={"vocab_size": VOCAB_SIZE + 8})
    model.generation_config.suppress_tokens = [3]
    inputs = spoken_prompts(processor)
    options = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True}
    config = GenerationConfig(**options, suppress_tokens=[5])
    for given, expected in [
        (options, {3}),
        ({**options, "suppress_tokens": [5]}, {5}),
        ({**options, "suppress_tokens": None}, set()),
        ({"generation_config": config}, {5}),
        ({"generation_config": GenerationConfig(**options)}, {3}),
    ]:
        for scores in model.generate(**inputs, **given).scores:
            assert {*(scores == -torch.inf).nonzero()[:, 1].tolist()} == {*expected, VOCAB_SIZE}, given
    assert (config.suppress_tokens, model.generation_config.suppress_tokens) == ([5], [3])


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_position_ids_follow_the_expansion(adapter, processor):
    """Positions as they are counted anyway change nothing; shifted by a constant, nothing for rotary positions."""
    model = make_model(adapter=adapter, plora=True)
    texts = [f"repeat {AUDIO}the red cat{AUDIO}", f"{AUDIO}cat"]
    inputs = process(processor, texts, [[clip(0.4, 0), clip(0.9, 1)], [clip(1.5, 2)]])
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**inputs).logits
    mask = expanded_mask(model, inputs).bool()
    assert torch.equal(model(**inputs, position_ids=positions).logits, expected)
    shifted = model(**inputs, position_ids=positions + 7).logits
    torch.testing.assert_close(shifted[mask], expected[mask], rtol=1e-4, atol=1e-4)
    spread = model(**inputs, position_ids=positions * 2).logits
    assert not torch.allclose(spread[mask], expected[mask], atol=1e-2)
    told = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, position_ids=positions), told)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_after_a_cache_gives_the_logits_without_one(family, processor):
    model = make_model(family, plora=True)
    first, second = (process(processor, *TURNS[index]) for index in (0, 1))
    told = model(**first, use_cache=True)
    cached = expanded_mask(model, first)
    mask = torch.cat([cached, second["attention_mask"]], 1)
    logits = model(**{**second, "attention_mask": mask}, past_key_values=told.past_key_values).logits
    assert logits.shape[1] == expanded_mask(model, second).shape[1]
    for row in range(2):
        parts = [Chat(model, processor, [row]).prompt(index) for index in (0, 1)]
        conversation, clips = joined(parts)
        features = processor.extract_features(clips, sampling_rate=SAMPLING_RATE)
        conversation |= {name: torch.from_numpy(values) for name, values in features.items()}
        expected = model(**conversation).logits[0]
        num_new = expanded_mask(model, without_clips(parts[1])).shape[1]
        torch.testing.assert_close(logits[row, -num_new:], expected[-num_new:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_single_row_after_a_cache_needs_no_mask_in_forward(processor):
    model = make_model(plora=True)
    first, second = (Chat(model, processor, [1]).prompt(index) for index in (0, 1))
    del first["clips"], second["clips"]
    cache = model(**first, use_cache=True).past_key_values
    num_past = cache.get_seq_length()
    mask = torch.ones(1, num_past + second["input_ids"].shape[1], dtype=torch.long)
    with_mask = model(**{**second, "attention_mask": mask}, past_key_values=copy.deepcopy(cache)).logits
    del second["attention_mask"]
    assert torch.equal(model(**second, past_key_values=cache).logits, with_mask)


def test_a_cache_longer_than_the_conversation_is_an_error(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.5,))
    cache = model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values
    num_positions = expanded_mask(model, inputs).shape[1]
    message = f"hold {num_positions + 5} positions, but the whole conversation only takes {num_positions}. Pass all"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, past_key_values=cache)


def test_a_mask_that_does_not_fit_cache_and_turn_is_an_error(processor):
    model = make_model()
    inputs = dict(spoken_prompts(processor, durations_s=(0.5, 0.9)))
    cache = model(**inputs, use_cache=True).past_key_values
    num_past, num_new = cache.get_seq_length(), inputs["input_ids"].shape[1]
    message = rf"mask of {num_past} cached and {num_new} new positions, of shape \(2, {num_past + num_new}\), but"
    for width in (num_past, num_past + num_new + 1, num_new - 1):
        wrong = {**inputs, "attention_mask": torch.ones(2, width, dtype=torch.long)}
        for call in (model.generate, model):
            with pytest.raises(ValueError, match=rf"{message} got \(2, {width}\)"):
                call(**wrong, past_key_values=cache)
    with pytest.raises(ValueError, match=rf"{message} got \(2, {num_new}\)"):
        model(**inputs, past_key_values=cache)
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match=rf"{message} got None"):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == num_past  # nothing was read


@pytest.mark.parametrize("extra", [-2, 2])
def test_a_mask_that_does_not_fit_the_prompt_is_an_error(extra, processor):
    """A wider mask was taken for that of a cache though there was none; a narrower one was a bare RuntimeError."""
    model = make_model()
    inputs = dict(spoken_prompts(processor, durations_s=(0.5,)))
    inputs["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + extra, dtype=torch.long)
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="attention_mask"):
            call(**inputs)


# -- caches and drafts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_cache_gives_the_same_tokens(options, processor):
    model = make_model(plora=True)
    inputs = spoken_prompts(processor)
    assert torch.equal(model.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows_shorter_than_the_prompt(family, options, processor):
    model = make_model(family, plora=True, text={"sliding_window": 8})
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    assert expanded_mask(model, inputs).shape[1] > 16
    output = model.generate(**inputs, **GREEDY, **options)
    assert output[0, -6:].tolist() == literal_greedy(model, inputs, 6)
    wide = make_model(family, plora=True, text={"sliding_window": 200})
    assert not torch.equal(wide(**inputs).logits, model(**inputs).logits)  # the window does cut something off


@pytest.mark.parametrize("way", ["whole", "new turn"])
@pytest.mark.parametrize("cache", ["sliding", "static"])
def test_other_caches_go_on_too(cache, way, processor):
    family, text = ("mistral", {"sliding_window": 8}) if cache == "sliding" else ("llama", {})
    chat = Chat(make_model(family, plora=True, text=text), processor, rows=[0])
    if cache == "static":
        chat.cache = StaticCache(config=chat.model.config.get_text_config(), max_cache_len=250)
    for index in range(4):
        answer, expected = chat.say(chat.prompt(index), way)
        assert torch.equal(answer, expected), f"turn {index}"


@pytest.mark.parametrize("draft", ["prompt lookup", "same model", "other weights"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_drafts_change_no_token(adapter, draft, processor):
    model = make_model(adapter=adapter, plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "same model": {"assistant_model": model},
        "other weights": {"assistant_model": make_model(adapter=adapter, plora=True, seed=3)},
    }[draft]
    expected = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12})
    assert torch.equal(model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12}, **options), expected)


def test_an_assistant_of_the_same_weights_hears_the_same_audio(processor):
    """All its drafts are taken; one that does not hear the speech would draft other tokens."""
    model = make_model(plora=True)
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    with positions_read(model) as widths:
        model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12, assistant_model=assistant)
    assert len(widths) == 2  # 5 drafts and one more token, twice
