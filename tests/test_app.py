"""The demo page (processing/demo): its functions, and the whole of it in headless Chromium.

The browser tests need Chromium on the PATH (Debian: apt-get install chromium) and playwright. Without them they are
skipped, unless the environment variable CI is set: then they fail.
"""

import contextlib
import html
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import RepoCard

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.demo.listener import Listener
from processing.publishing.space import write_space
from tests.helpers.prompts import clip

gradio = pytest.importorskip("gradio", reason="the page needs the extra 'demo'")
demo = pytest.importorskip("processing.demo.page")

TINY_WORLD = Path(__file__).parent.parent / "examples" / "tiny_world"
CLIPS = TINY_WORLD / "clips"
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 12, 16
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def listener():
    """The tiny world's LLM with untrained ears, which answers something of more than one word."""
    processor = BlspKdProcessor.from_backbones(TINY_WORLD / "speech_encoder", TINY_WORLD / "llm")
    torch.manual_seed(0)
    model = BlspKdForCausalLM.from_backbones(
        TINY_WORLD / "speech_encoder",
        TINY_WORLD / "llm",
        audio_token_id=processor.audio_token_id,
        adapter={"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1, "num_attention_heads": 4},
    )
    model.generation_config.min_new_tokens = MIN_NEW_TOKENS
    return Listener(model, processor, max_new_tokens=MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def clips():
    return demo.read_clips(CLIPS)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Files that cannot be answered, and what the page says about each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken.wav").write_bytes(b"RIFF nothing of the kind")
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "long.ogg", clip(61.0, rate=8000), 8000)
    soundfile.write(folder / "short.wav", clip(0.01), 16_000)
    return {
        folder / "broken.wav": "broken.wav cannot be decoded",
        folder / "silent.wav": "silent.wav is silent",
        folder / "long.ogg": "long.ogg lasts 61.00 s, but a clip may last at most 60 s",
        folder / "short.wav": "too short",
    }


# -- the functions ----------------------------------------------------------------------------------------------------


def test_clips_are_small_and_said_with_questions_and_answers(clips):
    files = {row["file_name"]: Path(row["file_name"]).stat().st_size for row in clips}
    assert 3 <= len(files) <= 4 and max(files.values()) < 60_000
    for row in clips:
        assert row["text"] and row["instruction"] and row["answer"]
        assert 1 < soundfile.info(row["file_name"]).duration < 4


def test_answer_grows_and_equals_that_of_generate(listener, clips):
    row = clips[0]
    *growing, (answer, picture, problem) = listener.respond(row["file_name"], row["instruction"], row["text"])
    assert problem == "" and len({partial for partial, _, _ in growing}) > 3
    for (earlier, _, _), (later, _, _) in zip(growing, growing[1:]):
        assert later.startswith(earlier)
    inputs = listener.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": row["instruction"]}, {"type": "audio", "path": row["file_name"]}],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    output = listener.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    assert answer == listener.processor.decode(new_tokens, skip_special_tokens=True)
    (alt,) = re.findall('alt="([^"]*)"', picture)
    assert "After token 1 (the)" in html.unescape(alt) and "KL to the text prompt" in alt
    assert picture.count("data:image/png;base64,") == 2


def test_bad_files_are_named_without_their_folder(listener, bad_files):
    for path, message in bad_files.items():
        *_, (answer, picture, problem) = listener.respond(str(path), "Repeat the words.", "")
        assert answer == picture == ""
        assert message in html.unescape(problem) and 'role="alert"' in problem and str(path.parent) not in problem
    *_, (_, _, problem) = listener.respond(None, None, None)
    assert "There is no audio yet" in problem


@pytest.mark.long
def test_an_error_while_generating_is_shown_and_the_next_clip_is_answered(listener, clips):
    path = clips[0]["file_name"]
    *_, (_, _, problem) = listener.respond(path, "Repeat the words. " * 500, None)
    assert "Shorten the audio or the text" in problem
    *_, (answer, picture, problem) = listener.respond(path, None, None)
    assert answer and picture and not problem


def test_instructions_on_offer_are_those_of_the_clips(listener, clips):
    page = demo.build_page(listener, clips)
    (dropdown,) = [block for block in page.blocks.values() if isinstance(block, gradio.Dropdown)]
    assert {value for _, value in dropdown.choices} == {row["instruction"] for row in clips}
    assert dropdown.allow_custom_value
    assert demo.build_page(listener, []), "a page without clips"


@pytest.mark.long
def test_a_space_starts_from_its_folder_alone(listener, tmp_path, monkeypatch):
    listener.model.save_pretrained(tmp_path / "model")
    listener.processor.save_pretrained(tmp_path / "model")
    write_space(tmp_path / "space", str(tmp_path / "model"), CLIPS)
    metadata = RepoCard.load(tmp_path / "space" / "README.md").data.to_dict()
    assert metadata["sdk"] == "gradio" and (tmp_path / "space" / metadata["app_file"]).is_file()
    assert re.fullmatch(r"(?:[\w-]+==[\d.]+\n)+", (tmp_path / "space" / "requirements.txt").read_text())
    with pytest.raises(FileExistsError, match="space is not empty"):
        write_space(tmp_path / "space", "owner/name", CLIPS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MODEL_ID")}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w+") as log:
        space = subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 120
            page = None
            while page is None and space.poll() is None and time.monotonic() < deadline:
                try:
                    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read()
                except OSError:
                    time.sleep(0.2)
        finally:
            space.terminate()
            space.wait(30)
        log.seek(0)
        assert page is not None and b"An LLM with ears" in page, log.read()[-3000:]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(listener, clips):
    """The page, served. Its LLM takes a moment per token, so that the answer is seen to grow."""
    hook = listener.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    page = demo.build_page(listener, clips)
    _, url, _ = demo.launch(page, CLIPS, prevent_thread_lock=True, quiet=True)
    yield url
    page.close(verbose=False)
    hook.remove()


@contextlib.contextmanager
def launch_browser(*options):
    """Start Chromium with a microphone that beeps (unless an option says otherwise), and no question about its use."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        missing = f"The browser tests need playwright and one of {', '.join(names)} on the PATH."
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        arguments = ["--no-sandbox", *microphone, *options]
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with launch_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser, url):
    """Opens the page at a size, and afterwards makes sure that nothing was asked of any other server."""
    contexts, strangers = [], []

    def open_page(viewport=None):
        contexts.append(browser.new_context(viewport=viewport or {"width": 1280, "height": 900}))
        contexts[-1].set_default_timeout(60_000)
        page = contexts[-1].new_page()
        page.on("request", lambda sent: strangers.append(sent.url) if not _is_local(sent.url, url) else None)
        page.goto(url)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert strangers == []


def _is_local(asked, url):
    return asked.startswith((url, "data:", "blob:"))


def choose(page, row):
    page.get_by_role("button", name=row["text"]).click()
    page.get_by_label("Play", exact=True).wait_for()


def ask(page):
    page.get_by_role("button", name="Ask", exact=True).click()


def picture(page):
    return page.locator(".picture img")


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.long
def test_uploaded_clip_is_answered_as_it_comes_with_a_picture(open_page, clips):
    page = open_page()
    row = clips[-1]
    page.locator("input[type=file]").set_input_files(row["file_name"])
    page.get_by_label("Play", exact=True).wait_for()
    page.get_by_label("Transcript").fill(row["text"])
    page.evaluate(
        """() => {
            window.seen = new Set();
            const find = () => [...document.querySelectorAll('label')].find(label => label.innerText == 'Answer');
            setInterval(() => window.seen.add(find().querySelector('textarea').value), 5);
        }"""
    )
    ask(page)
    picture(page).wait_for()
    answer = page.get_by_label("Answer").input_value()
    seen = page.evaluate("[...window.seen]")
    assert answer and len(seen) > 4, seen
    assert all(answer.startswith(partial) for partial in seen)
    alt = picture(page).get_attribute("alt")
    assert "heard as 6 speech tokens" in alt and "After token 6 (zero)" in alt and "nats" in alt
    assert picture(page).evaluate("image => image.complete && image.naturalWidth > 1000")


@pytest.mark.long
def test_broken_file_is_a_message_and_the_page_still_answers(open_page, bad_files, clips, tmp_path):
    too_large = tmp_path / "large.wav"
    too_large.write_bytes(bytes(21 << 20))
    page = open_page()
    broken, message = next(iter(bad_files.items()))
    ask(page)
    page.get_by_role("alert").get_by_text("There is no audio yet").wait_for()
    page.locator("input[type=file]").set_input_files(str(broken))
    page.get_by_label("Clear").wait_for()
    ask(page)
    page.get_by_role("alert").get_by_text(message).wait_for()
    assert picture(page).count() == 0
    page.get_by_label("Clear").click()
    page.locator("input[type=file]").set_input_files(str(too_large))
    page.get_by_text("exceed the maximum allowed size of 20.0 Mb").wait_for()
    choose(page, clips[0])
    ask(page)
    picture(page).wait_for()
    assert page.get_by_label("Answer").input_value() and page.get_by_role("alert").count() == 0


@pytest.mark.long
def test_phone_has_no_horizontal_scroll_and_a_picture_of_its_own(open_page, clips):
    page = open_page(PHONE)
    assert fits(page)
    choose(page, clips[0])
    assert fits(page)
    ask(page)
    picture(page).wait_for()
    assert fits(page)
    size = picture(page).evaluate("image => [image.naturalWidth, image.clientWidth, image.naturalHeight]")
    assert size[0] == 720 and 350 < size[1] <= 390 and size[2] > 1000, "the narrow picture, in bands"


@pytest.mark.long
def test_keyboard_alone_is_enough(open_page):
    page = open_page()

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            name_here = page.evaluate(
                "() => (document.activeElement.innerText || document.activeElement.ariaLabel || '').trim()"
            )
            if name in name_here:
                return
        raise AssertionError(f"Tab does not reach {name!r}")

    tab_to("tom said the soup")
    page.keyboard.press("Enter")
    page.get_by_label("Play", exact=True).wait_for()
    tab_to("Instruction")
    page.keyboard.press("Control+A")
    page.keyboard.type("Say it again.")
    page.keyboard.press("Enter")
    assert page.get_by_label("Instruction").input_value() == "Say it again."
    tab_to("Ask")
    page.keyboard.press("Space")
    picture(page).wait_for()
    assert page.get_by_label("Answer").input_value()


@pytest.mark.long
def test_recording_is_answered(open_page):
    page = open_page()
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_label("Play", exact=True).wait_for()
    ask(page)
    picture(page).wait_for()
    assert page.get_by_label("Answer").input_value()
