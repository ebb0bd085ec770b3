"""Talking with the demo page: its functions, and the whole of it in headless Chromium, whose microphone plays a file.

`test_app.py` has the rest of the page, and says what the browser needs.
"""

import numpy as np
import pytest
import soundfile

pytest.importorskip("gradio", reason="the page needs the extra 'demo'")

from processing.demo.listener import Listener
from processing.demo.page import build_page, launch, read_clips
from processing.demo.talk import SAY_SOMETHING, Talker
from tests.reliability.listening import TINY_WORLD, load
from tests.test_app import CLIPS, launch_browser

RATE = 16_000


@pytest.fixture(scope="module")
def streaming():
    """The shipped model as a streaming one, which it was not trained to be, and its processor."""
    return load(TINY_WORLD / "model")


def said(folder, name="bottles", silence_s=2.0):
    """Files of a third of a second each, as a browser sends them: a clip and silence after it."""
    samples, _ = soundfile.read(CLIPS / f"{name}.flac", dtype="int16")
    samples = np.concatenate([samples, np.zeros(int(silence_s * RATE), np.int16)])
    for number, piece in enumerate(np.array_split(samples, len(samples) * 3 // RATE)):
        path = folder / f"{number:03}.wav"
        soundfile.write(path, piece, RATE)
        yield str(path)


def test_what_was_understood_is_shown_before_the_end_and_then_answered(streaming, tmp_path):
    model, processor = streaming
    talker, talk, shown = Talker(model, processor, max_new_tokens=6), None, []
    for path in said(tmp_path):
        talk, num_ended, so_far, problem = talker.push(path, "Repeat the words.", talk)
        assert problem == ""
        shown.append(so_far)
        if num_ended:
            break
    assert num_ended == 1 and SAY_SOMETHING in shown[0]
    assert sum("the LLM expects" in each for each in shown) > 3
    # What comes until the answer starts does not end the turn again.
    assert talker.push(path, "Repeat the words.", talk)[1] == 1
    *_, (answer, problem) = talker.answer(talk)
    assert problem == "" and talk.session.messages[-1]["content"].strip() == answer.strip()
    assert list(talker.answer(talk)) == [] or talk.session.num_speech_tokens > 0


def test_a_broken_piece_is_told_without_its_folder(streaming, tmp_path):
    broken = tmp_path / "piece.wav"
    broken.write_bytes(b"RIFF")
    talk, _, _, problem = Talker(*streaming).push(str(broken), None, None)
    assert talk is None and 'role="alert"' in problem and str(tmp_path) not in problem


@pytest.mark.long
def test_a_visitor_sees_what_is_understood_while_speaking_and_is_answered_after_stopping(streaming, tmp_path):
    """Chromium plays a file as the microphone, once."""
    samples, _ = soundfile.read(CLIPS / "bottles.flac", dtype="float32")
    silence = np.zeros(RATE, np.float32)
    soundfile.write(tmp_path / "microphone.wav", np.concatenate([silence, samples, *[silence] * 20]), RATE, "PCM_16")
    page = build_page(Listener(*streaming, max_new_tokens=6), read_clips(CLIPS))
    _, url, _ = launch(page, CLIPS, prevent_thread_lock=True, quiet=True)
    try:
        with launch_browser(f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}%noloop") as browser:
            tab = browser.new_page()
            tab.set_default_timeout(120_000)
            tab.goto(url)
            tab.get_by_role("button", name="Record", exact=True).first.click()
            tab.locator(".understood", has_text="the LLM expects").wait_for()
            answer = tab.get_by_label("Answer").first
            assert answer.input_value() == "", "it is understood before it is answered"
            tab.wait_for_function("field => field.value != ''", arg=answer.element_handle())
            tab.get_by_role("button", name="Stop", exact=True).first.click()
    finally:
        page.close(verbose=False)
