"""Answer one clip for the demo page: text that grows while the LLM generates it, then the picture of `picture.py`.

Needs no Gradio. Supports one clip and one turn; conversations are in `talk.py`.
"""

import base64
import html
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from transformers import TextIteratorStreamer

from modeling_blsp_kd import BlspKdForCausalLM
from processing.audio_loading import load_audio
from processing.processing_blsp_kd import BlspKdProcessor

from .hearing import Hearing, hear
from .picture import plot_hearing

MAX_DURATION_S = 60.0
MAX_NEW_TOKENS = 128
# Width in inches and dots per inch of the picture, for a desktop and for a phone.
WIDE, NARROW = (10.0, 130), (3.6, 200)
NARROW_BELOW_PX = 640


class Listener:
    """A loaded model that answers clips of the page.

    Args:
        model ([`BlspKdForCausalLM`]), processor ([`BlspKdProcessor`]).
        max_new_tokens (`int`): longest answer.
    """

    def __init__(self, model: BlspKdForCausalLM, processor: BlspKdProcessor, max_new_tokens: int = MAX_NEW_TOKENS):
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens

    def respond(
        self, path: str | None, instruction: str | None, transcript: str | None
    ) -> Iterator[tuple[str, str, str]]:
        """Answer one clip.

        Args:
            path: audio file, or None if none was given.
            instruction: what to do with what is said; may be empty.
            transcript: what is said, if known; may be empty.

        Yields:
            `tuple[str, str, str]`: the answer so far, the picture and the problem, the last two as HTML, maybe empty.
        """
        answer = picture = ""
        yield answer, picture, ""
        try:
            if path is None:
                raise ValueError("There is no audio yet. Record or upload some, or choose a clip.")
            rate = self.processor.feature_extractor.sampling_rate
            audio = load_audio(path, rate, max_duration_s=MAX_DURATION_S), rate
            instruction = (instruction or "").strip()
            for answer in self.stream(audio, instruction):
                yield answer, picture, ""
            hearing = hear(self.model, self.processor, audio, instruction, (transcript or "").strip() or None)
            picture = as_html(hearing)
        except (OSError, TypeError, ValueError) as error:
            yield answer, picture, problem_of(error, path)
        else:
            yield answer, picture, ""

    def stream(self, audio: tuple[np.ndarray, int], instruction: str) -> Iterator[str]:
        """Yield the answer to (samples, rate) as it grows.

        Raises:
            ValueError: the prompt does not fit the LLM, or the clip is too short.
        """
        content = [{"type": "text", "text": instruction}] if instruction else []
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "audio", "audio": audio}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate():
            try:
                self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, streamer=streamer)
            finally:
                streamer.end()  # or an error would leave the reader waiting

        with ThreadPoolExecutor(1) as pool:
            generated = pool.submit(generate)
            answer = ""
            for text in streamer:
                answer += text
                yield answer
            generated.result()


def problem_of(error: Exception, path: str | None = None) -> str:
    """Return an error as HTML, without the folder of uploads on this machine, which visitors must not learn."""
    text = str(error) if path is None else str(error).replace(path, Path(path).name)
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def as_html(hearing: Hearing) -> str:
    """Return the picture as HTML, in one size for desktops and one for phones, with its text for screen readers."""
    wide, narrow = (_png_url(hearing, width, dpi) for width, dpi in (WIDE, NARROW))
    return (
        f'<picture class="picture"><source media="(max-width: {NARROW_BELOW_PX}px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{html.escape(hearing.describe())}"></picture>'
    )


def _png_url(hearing: Hearing, width: float, dpi: int) -> str:
    file = io.BytesIO()
    plot_hearing(hearing, width=width).savefig(file, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
