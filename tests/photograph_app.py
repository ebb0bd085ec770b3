"""Photograph the demo page, as a visitor with a desktop sees it after an answer.

    python tests/photograph_app.py --model outputs/default --output docs/demo.png

Needs Chromium, as `test_app.py` does. Leaves out: other clips than the one named here.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright
from transformers import AutoModelForCausalLM, AutoProcessor

from processing.demo.listener import Listener
from processing.demo.page import build_page, launch, read_clips

CLIPS = Path(__file__).parent.parent / "examples" / "tiny_world" / "clips"
CLIP = "victor had three bottles"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--output", required=True, help="PNG file")
    parser.add_argument("--width", type=int, default=1180, help="of the window, pixels")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True)
    blocks = build_page(Listener(model, processor), read_clips(CLIPS))
    _, url, _ = launch(blocks, CLIPS, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": options.width, "height": 800})
        page.goto(url)
        page.get_by_role("button", name=CLIP).click()
        page.get_by_label("Play", exact=True).wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".picture img").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until what fades has faded
        page.screenshot(path=options.output, full_page=True)
        browser.close()
    blocks.close(verbose=False)


if __name__ == "__main__":
    main()
