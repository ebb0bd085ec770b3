"""The demo page: a visitor records or chooses a clip, reads the answer as it grows, and sees the picture.

    serve("outputs/default", "examples/tiny_world/clips")

Needs the extra `demo`; fetches nothing from other servers while it runs. `listener.py` answers clips, `talk.py` talks
with visitors if the model streams, and this file lays out.
Host and port are those of GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_blsp_kd.devices import fast_dtype
from processing.manifests import read_objects

from .listener import MAX_DURATION_S, NARROW_BELOW_PX, Listener
from .talk import Talker, understood

MAX_FILE_SIZE = "20mb"
MAX_WAITING = 16
# How often a browser sends what was said, and how long it may do so without a stop, seconds.
PIECE_S, MAX_TALK_S = 0.3, 600

ABOUT = """# An LLM with ears
Say something or choose a clip, tell the LLM what to do with it, and see its answer and what it heard."""
# In the head of the page: Gradio's own `css` option does not reach the padding around everything.
STYLE = f"""<style>
.html-container {{ padding: 0 !important; }}
@media (max-width: {NARROW_BELOW_PX}px) {{ .gradio-container > .main {{ padding: 8px !important; }} }}
.problem {{ border-left: 4px solid #D55E00; padding: 0.5em 1em; }}
.picture img {{ width: 100%; height: auto; background: white; }}
</style>"""


def serve(model_id: str, clips: str | Path, model_options: dict | None = None, **processor_options):
    """Load a model and serve its page until the process ends.

    Args:
        model_id (`str`): folder or Hub id of a BLSP-KD model.
        clips (`str` or `os.PathLike`): folder of example clips with a `metadata.jsonl`; see [`read_clips`].
        model_options (`dict`, *optional*): passed to `from_pretrained` of the model, for example `backbones`.
        **processor_options: passed to [`BlspKdProcessor.from_pretrained`], for example `chat_template_kwargs`.
    """
    processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True, **processor_options)
    model = AutoModelForCausalLM.from_pretrained(
        model_id, trust_remote_code=True, device_map="auto", dtype=fast_dtype(), **(model_options or {})
    )
    launch(build_page(Listener(model, processor), read_clips(clips)), clips)


def read_clips(folder: str | Path) -> list[dict]:
    """Read rows of `file_name` (made a full path), `text` and `instruction`; the first row of a file is its example."""
    folder = Path(folder).resolve()
    rows = (row for _, row in read_objects(folder / "metadata.jsonl"))
    return [{**row, "file_name": str(folder / row["file_name"])} for row in rows]


def build_page(listener: Listener, clips: list[dict]) -> gr.Blocks:
    """Return the page. `clips` are rows of [`read_clips`], whose instructions the visitor can choose from."""
    examples: dict[str, dict] = {}
    for row in clips:
        examples.setdefault(row["file_name"], row)
    instructions = list(dict.fromkeys(row["instruction"] for row in clips))
    with gr.Blocks(title="An LLM with ears", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(ABOUT)
        if listener.model.config.streaming is not None:
            with gr.Tab("Talk"):
                _lay_out_talk(Talker(listener.model, listener.processor, listener.max_new_tokens), instructions)
        with gr.Tab("Clips") if listener.model.config.streaming is not None else gr.Column():
            _lay_out_clips(listener, examples, instructions)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def _lay_out_clips(listener: Listener, examples: dict[str, dict], instructions: list[str]):
    """Lay out a clip, what to do with it, the answer, and the picture."""
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
            instruction = _instruction(instructions)
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


def _lay_out_talk(talker: Talker, instructions: list[str]):
    """Lay out a microphone that is read while one speaks, what was understood so far, and the answer."""
    talk, num_ended = gr.State(), gr.State(0)
    with gr.Row():
        with gr.Column():
            microphone = gr.Audio(label="Microphone", sources=["microphone"], type="filepath", streaming=True)
            instruction = _instruction(instructions)
        with gr.Column():
            so_far = gr.HTML(understood(None), label="Understood so far")
            problem = gr.HTML()
            answer = gr.Textbox(label="Answer", interactive=False, max_lines=8)
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    microphone.start_recording(lambda: (None, 0, "", ""), outputs=[talk, num_ended, problem, answer], **hidden)
    microphone.stream(
        talker.push,
        inputs=[microphone, instruction, talk],
        outputs=[talk, num_ended, so_far, problem],
        stream_every=PIECE_S,
        time_limit=MAX_TALK_S,
        **hidden,
    )
    # When one has stopped speaking, or recording.
    for stops in (num_ended.change, microphone.stop_recording):
        stops(talker.answer, inputs=talk, outputs=[answer, problem], **hidden)


def _instruction(instructions: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        instructions,
        value=instructions[0] if instructions else "",
        label="Instruction (choose one, or write your own)",
        allow_custom_value=True,
    )


def launch(page: gr.Blocks, clips_folder: str | Path, **options) -> Any:
    """Serve the page with the fonts of the visitor's system, so that it fetches none from another server."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(button_primary_background_fill="*primary_700")
    return page.launch(
        theme=theme,
        head=STYLE,
        max_file_size=MAX_FILE_SIZE,
        allowed_paths=[str(Path(clips_folder).resolve())],
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        **options,
    )
