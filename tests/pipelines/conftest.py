"""Both pipelines around one small model, and the answers that `generate` gives directly."""

import pytest

from processing import BlspKdPipeline, BlspKdSpeechRecognitionPipeline
from tests.helpers.audio_files import encode
from tests.helpers.prompts import clip
from tests.helpers.spoken_cases import INSTRUCTION, make_readable_model
from tests.pipelines.cases import DURATIONS_S, SHORT, TASKS, direct


@pytest.fixture(scope="module")
def model(processor):
    return make_readable_model(processor)


@pytest.fixture(scope="module")
def answers(model, processor):
    return BlspKdPipeline(model=model, processor=processor, task=TASKS[0], instruction=INSTRUCTION, **SHORT)


@pytest.fixture(scope="module")
def recognizes(model, processor):
    return BlspKdSpeechRecognitionPipeline(
        model=model, processor=processor, task=TASKS[1], instruction=INSTRUCTION, **SHORT
    )


@pytest.fixture(scope="module")
def both(answers, recognizes):
    return answers, recognizes


@pytest.fixture(scope="module")
def expected(model, processor):
    """Answers to the clips of `DURATIONS_S`; they differ, so that a mix-up shows."""
    texts = [direct(model, processor, clip(duration_s))[0] for duration_s in DURATIONS_S]
    assert len(set(texts)) == len(texts)
    return texts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    path.write_bytes(encode(clip(DURATIONS_S[0])))
    return path
