"""A page in the browser: talk to a trained model, watch its answer come, and see what it heard.

    python examples/app.py --model outputs/default

Works with a folder or a Hub id (or the environment variable MODEL_ID, as in a Space), without a microphone too: the
clips of `--clips` are offered as examples. Host and port are those of GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
Needs the extra `demo`, and nothing from the network while it runs. Leaves out: conversations, several clips at a time.
"""

import argparse
import base64
import html
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
from transformers import AutoModelForCausalLM, AutoProcessor, TextIteratorStreamer

from modeling_blsp_kd.devices import fast_dtype
from processing.audio_loading import load_audio
from processing.chat_templates import read_options
from processing.demo import Hearing, hear, plot_hearing
from processing.manifests import read_objects

CLIPS = Path(__file__).parent / "tiny_world" / "clips"
MAX_DURATION_S = 60.0
MAX_FILE_SIZE = "20mb"
MAX_NEW_TOKENS = 128
MAX_WAITING = 16
# Width in inches and dots per inch of the picture, for a desktop and for a phone.
WIDE, NARROW = (10.0, 130), (3.6, 200)
NARROW_BELOW_PX = 640

ABOUT = """# An LLM with ears
Say something or choose a clip, tell the LLM what to do with it, and see its answer and what it heard."""
# In the head of the page: Gradio's own `css` option does not reach the padding around everything.
STYLE = f"""<style>
.html-container {{ padding: 0 !important; }}
@media (max-width: {NARROW_BELOW_PX}px) {{ .gradio-container > .main {{ padding: 8px !important; }} }}
.problem {{ border-left: 4px solid #D55E00; padding: 0.5em 1em; }}
.picture img {{ width: 100%; height: auto; background: white; }}
</style>"""


class Listener:
    """A loaded model behind the page.

    Args:
        model ([`BlspKdForCausalLM`]), processor ([`BlspKdProcessor`]).
    """

    def __init__(self, model, processor):
        self.model = model.eval()
        self.processor = processor

    def respond(self, path: str | None, instruction: str | None, transcript: str | None):
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
            # Where uploads lie on this machine is nobody's business.
            problem = str(error).replace(str(path), Path(path or "").name)
            yield answer, picture, f'<p class="problem" role="alert">{html.escape(problem)}</p>'
        else:
            yield answer, picture, ""

    def stream(self, audio, instruction: str):
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
                self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, streamer=streamer)
            finally:
                streamer.end()  # or an error would leave the reader waiting

        with ThreadPoolExecutor(1) as pool:
            generated = pool.submit(generate)
            answer = ""
            for text in streamer:
                answer += text
                yield answer
            generated.result()


def as_html(hearing: Hearing) -> str:
    """The picture of what was heard, for desktop and phone, with its text for screen readers."""
    wide, narrow = (_png_url(hearing, width, dpi) for width, dpi in (WIDE, NARROW))
    return (
        f'<picture class="picture"><source media="(max-width: {NARROW_BELOW_PX}px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{html.escape(hearing.describe())}"></picture>'
    )


def _png_url(hearing: Hearing, width: float, dpi: int) -> str:
    file = io.BytesIO()
    plot_hearing(hearing, width=width).savefig(file, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_clips(folder: Path) -> list[dict]:
    """Rows of `file_name` (made a full path), `text` and `instruction`; the first row of each file is its example."""
    rows = (row for _, row in read_objects(folder / "metadata.jsonl"))
    return [{**row, "file_name": str(folder.resolve() / row["file_name"])} for row in rows]


def build_page(listener: Listener, clips: list[dict]) -> gr.Blocks:
    """The page. `clips`: rows of [`read_clips`], whose instructions are offered too."""
    examples: dict[str, dict] = {}
    for row in clips:
        examples.setdefault(row["file_name"], row)
    instructions = list(dict.fromkeys(row["instruction"] for row in clips))
    with gr.Blocks(title="An LLM with ears", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    label=f"Audio, up to {MAX_DURATION_S:g} s",
                    sources=["upload", "microphone"],
                    type="filepath",
                    editable=False,
                    buttons=[],
                )
                gr.Markdown("No microphone? Choose a clip:", visible=bool(examples))
                with gr.Row():
                    choices = [gr.Button(f"“{row['text']}”", size="sm", min_width=220) for row in examples.values()]
            with gr.Column():
                instruction = gr.Dropdown(
                    instructions,
                    value=instructions[0] if instructions else "",
                    label="Instruction (choose one, or write your own)",
                    allow_custom_value=True,
                )
                transcript = gr.Textbox(
                    label="Transcript (if you know it: shows how close hearing comes to reading)", max_lines=3
                )
                ask = gr.Button("Ask", variant="primary")
                problem = gr.HTML()
                answer = gr.Textbox(label="Answer", interactive=False, max_lines=8)
        picture = gr.HTML()

        for choice, row in zip(choices, examples.values()):
            choice.click(
                lambda row=row: (row["file_name"], row["instruction"], row["text"]),
                outputs=[audio, instruction, transcript],
                show_progress="hidden",
                api_visibility="private",
            )
        ask.click(
            listener.respond,
            inputs=[audio, instruction, transcript],
            outputs=[answer, picture, problem],
            show_progress="minimal",
            api_name="answer",
        )
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(page: gr.Blocks, clips_folder: Path, **options):
    """Serve the page; the fonts are those of the visitor's system, so that nothing is fetched from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(button_primary_background_fill="*primary_700")
    return page.launch(
        theme=theme,
        head=STYLE,
        max_file_size=MAX_FILE_SIZE,
        allowed_paths=[str(clips_folder.resolve())],
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        **options,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("MODEL_ID", "outputs/default")
    parser.add_argument("--model", default=model, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--clips", type=Path, default=CLIPS, help="folder of example clips, with a metadata.jsonl")
    parser.add_argument(
        "--chat_template_kwargs", help="JSON options of the LLM's chat template (those that it was trained with)"
    )
    options = parser.parse_args()

    given = read_options(options.chat_template_kwargs)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True, **given)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, trust_remote_code=True, device_map="auto", dtype=fast_dtype()
    )
    launch(build_page(Listener(model, processor), read_clips(options.clips)), options.clips)


if __name__ == "__main__":
    main()
