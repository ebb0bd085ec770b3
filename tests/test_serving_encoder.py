"""The encoder of serving: loading, batches, the queue, the cache, and what is refused; and the check of an engine."""

import asyncio
import os
import threading

import pytest
import torch
from transformers import AutoTokenizer

if not os.environ.get("CI"):
    pytest.importorskip("prometheus_client", reason="needs the extra `serving`")

import httpx

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.encoder_families import steps_per_frame
from processing.serving.clip_cache import ClipCache, EncodedClip
from processing.serving.clip_encoder import ClipEncoder
from processing.serving.engine import Engine
from processing.serving.engine_check import EngineFacts, MisfitError, check_engine
from processing.serving.errors import BadRequest, Busy, EngineUnreachable, ServerError
from processing.serving.metrics import Metrics
from processing.serving.model_without_llm import load_without_llm
from processing.serving.speech_parts import with_speech
from processing.serving.subtitles import as_srt, as_vtt, segments_of
from tests.helpers.engine_requests import TINY_WORLD, tiny_world
from tests.helpers.fronts import ENGINE_URL, run
from tests.helpers.models import SMALL_CFORMER, base_llm, make_model, make_thin_model
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.stand_in_engine import stand_in_engine

# -- the model --------------------------------------------------------------------------------------------------------


def encoded_by(model, processor, duration_s=1.3):
    inputs = {
        name: torch.from_numpy(values)
        for name, values in processor.extract_features([(clip(duration_s), SAMPLING_RATE)]).items()
    }
    with torch.inference_mode():
        return model.get_audio_features(**inputs, output_token_times=True)


def assert_encodes_the_same(folder, model, processor, **options):
    loaded, _ = load_without_llm(folder, **options)
    of_loaded, of_model = encoded_by(loaded, processor), encoded_by(model, processor)
    for name in ("pooler_output", "token_times", "num_speech_tokens"):
        assert torch.equal(of_loaded[name], of_model[name]), name
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    names = [name for name, _ in loaded.language_model.named_parameters()]
    assert not any("layers" in name or "head" in name for name in names) and len(names) <= 3, names
    return loaded


@pytest.mark.parametrize("output", ["projection", "expected_embedding"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_checkpoint_without_its_llm_encodes_as_the_model(family, output, processor, tmp_path):
    model = make_model(family, plora=True, adapter={**SMALL_CFORMER, "output": output})
    model.save_pretrained(tmp_path)
    assert_encodes_the_same(tmp_path, model, processor)
    assert load_without_llm(tmp_path)[1]


@pytest.mark.parametrize("plora", [False, True])
def test_a_thin_checkpoint_without_its_llm_encodes_as_the_model(plora, backbones, processor, tmp_path):
    make_thin_model(backbones, plora=plora).save_pretrained(tmp_path)
    model = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert_encodes_the_same(tmp_path, model, processor)
    assert load_without_llm(tmp_path)[1] is plora


def test_a_dtype_of_choice(processor, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = BlspKdForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = assert_encodes_the_same(tmp_path, model, processor, dtype="float32")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert load_without_llm(tmp_path)[0].dtype == torch.bfloat16


# -- batches ----------------------------------------------------------------------------------------------------------


class Held:
    """An encoder whose first batch waits until it is let go, and the number of frames of the clips in each batch."""

    def __init__(self, processor, **options):
        self.batches, self.let_go, self.has_begun = [], threading.Event(), threading.Event()
        self.encoder = ClipEncoder(make_model(), processor, Metrics(), **options)
        self.processor, forward = processor, self.encoder._forward

        def held(features):
            self.batches.append(
                [each.shape[-1] // steps_per_frame(self.encoder.model.config.speech_config) for each in features]
            )
            self.has_begun.set()
            assert self.let_go.wait(30)
            return forward(features)

        self.encoder._forward = held

    def features(self, seconds, seed=0):
        return self.processor.extract_features([(clip(seconds, seed), SAMPLING_RATE)])["input_features"][0]

    def encode(self, seconds, seed=0) -> asyncio.Task:
        features = self.features(seconds, seed)
        return asyncio.ensure_future(self.encoder.encode(f"{seconds} {seed}", lambda: features))

    async def waiting(self, count):
        while len(self.encoder._waiting) < count:
            await asyncio.sleep(0.01)

    async def cancelled(self, count):
        while sum(clip.future.cancelled() for clip in self.encoder._waiting) < count:
            await asyncio.sleep(0.01)

    async def begun(self):
        await asyncio.to_thread(self.has_begun.wait, 30)


@pytest.fixture
def held(processor):
    made = []

    def make(**options):
        made.append(Held(processor, **options))
        return made[-1]

    yield make
    for each in made:
        each.let_go.set()
        each.encoder.close()


@pytest.mark.numerical
def test_clips_that_wait_are_encoded_together_by_length_up_to_a_budget(held):
    """The first that waits decides, and a batch takes the nearest lengths; a clip beyond the budget goes alone."""
    here = held(max_frames=150)

    async def law():
        first = here.encode(0.3)
        await here.begun()
        tasks = []
        for count, seconds in enumerate([1.0, 4.0, 0.5, 0.9, 1.1, 0.55], 1):
            tasks.append(here.encode(seconds))
            await here.waiting(count)
        here.let_go.set()
        encoded = await asyncio.gather(first, *tasks)
        assert here.batches == [[15], [50, 45], [200], [25, 27], [55]]
        for clip_of, seconds in zip(encoded, [0.3, 1.0, 4.0, 0.5, 0.9, 1.1, 0.55]):
            alone = encoded_by(here.encoder.model, here.processor, seconds)
            torch.testing.assert_close(clip_of.speech_tokens, alone.pooler_output[0])
            torch.testing.assert_close(clip_of.token_times, alone.token_times[0])

    run(law())


def test_a_clip_that_nobody_waits_for_is_not_encoded(held):
    here = held()

    async def law():
        first = here.encode(0.3)
        await here.begun()
        left, kept = here.encode(0.5), here.encode(0.7)
        await here.waiting(2)
        left.cancel()
        await here.cancelled(1)
        here.let_go.set()
        await asyncio.gather(first, kept)
        assert here.batches == [[15], [35]]

    run(law())


def test_a_clip_that_two_requests_bring_at_the_same_time_is_encoded_once(held):
    """A follow-up question, or the same recording from many clients, was decoded and encoded once for each."""
    here = held()

    async def law():
        first = here.encode(0.3)
        await here.begun()
        leaves, stays = here.encode(0.5), here.encode(0.5)
        await here.waiting(1)
        leaves.cancel()  # that began the work
        await asyncio.sleep(0)
        comes = here.encode(0.5)
        here.let_go.set()
        [_, kept, joined] = await asyncio.gather(first, stays, comes)
        assert leaves.cancelled() and joined is kept and here.batches == [[15], [25]]
        alone = encoded_by(here.encoder.model, here.processor, 0.5)
        torch.testing.assert_close(kept.speech_tokens, alone.pooler_output[0])
        lookups = here.encoder.metrics.registry.get_sample_value
        assert [lookups("blsp_kd_cache_lookups_total", {"result": each}) for each in ("miss", "shared")] == [2, 2]

    run(law())


@pytest.mark.parametrize("num_calls", [1, 2])
def test_a_clip_that_all_have_left_may_come_again(num_calls, held):
    here = held()

    async def law():
        first = here.encode(0.3)
        await here.begun()
        calls = [here.encode(0.5) for _ in range(num_calls)]
        await here.waiting(1)
        for call in calls:
            call.cancel()
        await here.cancelled(1)
        again = here.encode(0.5)
        await here.waiting(2)
        here.let_go.set()
        await asyncio.gather(first, again)
        assert here.batches == [[15], [25]] and not here.encoder._in_work

    run(law())


def test_a_clip_that_fails_fails_for_all_who_wait_for_it_and_is_tried_again(held):
    here = held()
    here.let_go.set()

    def broken():
        raise ValueError("cannot be decoded")

    async def law():
        calls = [here.encoder.encode("key", broken) for _ in range(2)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(error) for error in errors] == ["cannot be decoded"] * 2
        features = here.features(0.5)
        assert len((await here.encoder.encode("key", lambda: features)).speech_tokens) > 0

    run(law())


def test_beyond_the_places_clips_are_refused(held):
    here = held(max_waiting=3)

    async def law():
        with here.encoder.reserve(["a", "b"]), pytest.raises(Busy, match="Try again later") as busy:
            with here.encoder.reserve(["c", "d"]):
                pass
        assert int(busy.value.response().headers["Retry-After"]) >= 1
        with here.encoder.reserve(["c", "d", "d", "e"]):
            pass
        with (
            pytest.raises(BadRequest, match="may have 3 new clips, but this one has 4"),
            here.encoder.reserve([*"abcd"]),
        ):
            pass
        here.let_go.set()
        await here.encode(0.3)
        with here.encoder.reserve(["0.3 0", *"abc"]):  # the first is remembered
            pass

    run(law())


def test_one_clip_that_fails_takes_no_other_with_it(held):
    here = held()
    forward = here.encoder._forward

    def failing(features):
        if 70 in [each.shape[-1] for each in features]:
            raise RuntimeError("out of memory")
        return forward(features)

    here.encoder._forward = failing

    async def law():
        first = here.encode(0.3)
        await here.begun()
        tasks = [here.encode(seconds) for seconds in (0.5, 0.7, 0.9)]
        await here.waiting(3)
        here.let_go.set()
        good, broken, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert isinstance(good, EncodedClip) and isinstance(also_good, EncodedClip)
        assert isinstance(broken, RuntimeError)

    run(law())


@pytest.mark.parametrize("dtype, vectors", [("float32", [[float("nan"), 1]]), ("float16", [[1e6, 1]]), ("float32", [])])
def test_vectors_that_are_not_finite_do_not_reach_the_engine(dtype, vectors):
    """The engine answers them with an empty text, and the next request that gets their memory, too."""
    clips = {"a": EncodedClip(torch.tensor(vectors).reshape(-1, 2), None)}
    messages = [{"role": "user", "content": [{"type": "audio", "key": "a"}]}]
    with pytest.raises(ServerError, match="not finite numbers"):
        with_speech(messages, clips, getattr(torch, dtype))


def test_closing_encodes_what_waits(held):
    here = held()

    async def law():
        first = here.encode(0.3)
        await here.begun()
        second = here.encode(0.5)
        await here.waiting(1)
        here.let_go.set()
        await asyncio.to_thread(here.encoder.close)
        assert all(isinstance(each, EncodedClip) for each in await asyncio.gather(first, second))
        assert not here.encoder.is_open

    run(law())


def test_the_cache_forgets_what_was_not_used_for_longest():
    def clip_of(num_rows):
        return EncodedClip(torch.zeros(num_rows, 25), None)

    cache = ClipCache(max_bytes=1000)
    for name in "abc":
        cache.put(name, clip_of(4 if name == "c" else 3))
    assert (len(cache), cache.num_bytes) == (3, 1000)
    cache.get("a")
    cache.put("d", clip_of(1))
    assert [cache.get(name) is None for name in "abcd"] == [False, True, False, False]
    cache.put("e", clip_of(11))
    assert cache.get("e") is None and len(cache) == 3


# -- subtitles --------------------------------------------------------------------------------------------------------


def test_segments_end_at_sentences_at_pauses_and_before_they_are_too_long():
    words = [
        ("One", 0.0),
        (" two.", 0.3),
        (" Three", 0.6),
        (" four", 2.0),
        *((" five", 2.3 + 0.3 * n) for n in range(40)),
    ]
    segments = segments_of([{"text": text, "timestamp": (start, start + 0.3)} for text, start in words])
    assert [segment.text for segment in segments[:2]] == ["One two.", "Three"]
    assert " ".join(segment.text for segment in segments) == "".join(text for text, _ in words)
    assert all(len(segment.text) <= 84 and segment.end - segment.start <= 7.0 for segment in segments)
    assert len(segments) == 5


def test_the_forms_of_subtitles():
    segments = segments_of([{"text": "a < b", "timestamp": (3599.9996, 3661.5)}])
    assert as_srt(segments) == "1\n01:00:00,000 --> 01:01:01,500\na < b\n"
    assert as_vtt(segments) == "WEBVTT\n\n01:00:00.000 --> 01:01:01.500\na &lt; b\n"
    assert (as_srt([]), as_vtt([])) == ("", "WEBVTT\n")


# -- the check of an engine -------------------------------------------------------------------------------------------


async def app_without_models(scope, receive, send):
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def check(model, processor, app, has_plora=False, **options):
    async def law():
        engine = Engine(ENGINE_URL, Metrics(), transport=httpx.ASGITransport(app))
        try:
            return await check_engine(engine, model, processor, has_plora, **options)
        finally:
            await engine.close()

    return run(law())


@pytest.fixture(scope="module")
def world():
    return tiny_world()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_WORLD / "llm")


def test_an_engine_that_fits(world, tokenizer):
    model, processor = world
    app = stand_in_engine(model.language_model, tokenizer, processor.chat_template)
    assert check(model, processor, app) == EngineFacts("llm", None, 512)
    assert check(model, processor, app, base="llm") == EngineFacts("llm", None, 512)
    with pytest.raises(MisfitError, match=r"must be chosen with --engine_model, among \['llm'\], got 'other'"):
        check(model, processor, app, base="other")
    with pytest.raises(MisfitError, match="has partial LoRA, but the engine offers no LoRA"):
        check(model, processor, app, has_plora=True)


def test_engines_that_do_not_fit(world, tokenizer, processor):
    model, own = world
    llm, template = model.language_model, own.chat_template
    torch.manual_seed(0)
    other_llm = type(llm)(llm.config).eval()
    in_parts = "".join(
        ["{% for message in messages %}<|{{ message.role }}|>\n", "{% for part in message.content %}{{ part.text }}"]
    )
    in_parts += "{% endfor %}<|end|>\n{% endfor %}<|assistant|>\n"
    of_other_roles = template.replace("'<|' + message['role']", "'<|' + 'assistant'")
    narrow = make_model()
    for app, message in [
        (stand_in_engine(llm, tokenizer, template, prompt_embeds=False), "You must set `--enable-prompt-embeds`"),
        (stand_in_engine(llm, tokenizer, in_parts), "reads other tokens than the model: .* from position"),
        (stand_in_engine(llm, tokenizer, of_other_roles), r"tokens than the model: (\d+) instead of \1, which differ"),
        (stand_in_engine(llm, own.tokenizer, template), "beyond its LLM's 384: it gives vectors the id 385"),
        (stand_in_engine(other_llm, tokenizer, template), "does not read vectors as it reads the text|Is it the LLM"),
        (stand_in_engine(base_llm(narrow), processor.tokenizer, template), "does not match the model's hidden_size 32"),
    ]:
        with pytest.raises(MisfitError, match=message):
            check(model, own, app)
    with pytest.raises(EngineUnreachable, match="answers with status 404"):
        check(model, own, app_without_models)


def test_partial_lora_needs_the_plugin(tokenizer, tmp_path):
    model, processor = tiny_world(plora=True)
    model.plora.save_pretrained(tmp_path)
    options = {"adapters": {"speech": tmp_path}}
    llm = base_llm(model)
    app = stand_in_engine(llm, tokenizer, processor.chat_template, **options)
    assert check(model, processor, app, has_plora=True) == EngineFacts("llm", "speech", 512)
    stock = stand_in_engine(llm, tokenizer, processor.chat_template, has_plugin=False, **options)
    with pytest.raises(MisfitError, match="applies 'speech' to text, too, but partial LoRA is for speech alone"):
        check(model, processor, stock, has_plora=True)
