"""A realtime session before the real vLLM: its answer, and what of the turn is in the prefix cache when one stops.

Opt-in, as `test_real_engine.py`. Leaves out: what holds before the stand-in, too (`tests/test_realtime.py`).
"""

import base64
import copy
import re

import httpx
import numpy as np
import openai
import pytest
import soundfile

from modeling_blsp_kd.training.building import LOG_MEL_MAX
from processing.speech_features import with_log_mel_max
from tests.helpers.engine_requests import TINY_WORLD
from tests.helpers.servers import start_front

pytestmark = pytest.mark.vllm
RATE, BLOCK, MAX_TOKENS = 16_000, 32, 8  # the engine has blocks of 32 positions


@pytest.fixture(scope="module", params=["llm", "speech"])
def served(request, models, engine, tmp_path_factory):
    """A front whose model streams, which the tiny world's was not trained to do, and a session in this process."""
    model, processor = (copy.deepcopy(part) for part in models[request.param])
    model.config.streaming = {"chunk_ms": 640}
    processor.feature_extractor = with_log_mel_max(processor.feature_extractor, LOG_MEL_MAX)
    folder = tmp_path_factory.mktemp("realtime")
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    options = ("--dtype", "float32", "--read_ahead_tokens", 4, "--engine_timeout_s", 1800)
    front = start_front(folder / "model", engine, folder / "log", *options)
    try:
        front.wait_until_ready()
        yield front, processor.listen(model, instruction="Repeat the words.", sampling_rate=RATE)
    finally:
        front.stop()


def cached_positions(engine) -> int:
    """How many positions vLLM has found in its prefix cache since it started."""
    metrics = httpx.get(f"{engine.url}/metrics", timeout=60).text
    return sum(int(float(value)) for value in re.findall(r"vllm:prefix_cache_hits_total{.*} (\S+)", metrics))


def test_the_turn_is_in_the_cache_when_it_ends_and_the_answer_is_that_of_a_session(served, engine):
    front, session = served
    names = ("bottles", "digits", "sheep", "soup") * 2
    samples = np.concatenate([soundfile.read(TINY_WORLD / f"clips/{name}.flac", dtype="int16")[0] for name in names])
    heard = session.push(samples)
    expected = "".join(session.answer(do_sample=False, max_new_tokens=MAX_TOKENS))
    assert len(heard.speech_tokens) > 2 * BLOCK
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", timeout=1800, max_retries=0) as client:
        with client.realtime.connect(model=client.models.list().data[0].id) as connection:
            connection.session.update(
                session={
                    "type": "realtime",
                    "audio": {"input": {"format": {"type": "audio/pcm", "rate": RATE}}},
                    "temperature": 0,
                    "max_output_tokens": MAX_TOKENS,
                }
            )
            content = [{"type": "input_text", "text": "Repeat the words."}]
            connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
            for start in range(0, len(samples), RATE):
                piece = base64.b64encode(samples[start : start + RATE].tobytes()).decode()
                connection.input_audio_buffer.append(audio=piece)
            connection.input_audio_buffer.commit()
            while (event := connection.recv()).type != "input_audio_buffer.committed":
                assert event.type != "error", event
            before = cached_positions(engine)
            connection.response.create()
            while (event := connection.recv()).type != "response.done":
                assert event.type != "error", event
    assert event.response.output[0].content[0].text == expected
    # All blocks but the open one, and one more that the engine may not have reached when the turn ended.
    read, cached = event.response.usage.input_tokens, cached_positions(engine) - before
    assert read > 2 * BLOCK and cached >= (read - BLOCK) // BLOCK * BLOCK, (read, cached)
