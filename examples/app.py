"""Serve a page in the browser: talk to a trained model, read its answer as it grows, and see what it understood.

    python examples/app.py --model outputs/default

The model is a folder or a Hub id (default: the environment variable MODEL_ID, as in a Space). A visitor without a
microphone chooses one of `--clips`. Host and port are those of GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
Needs the extra `demo`. Clips are answered one by one. With a streaming model (docs/streaming.md) the page also listens
to the microphone while one speaks, over several turns.
"""

import argparse
import os
from pathlib import Path

from modeling_blsp_kd.training.command_line import add_backbone_options, read_backbone_options
from processing.chat_templates import read_options
from processing.demo.page import serve

CLIPS = Path(__file__).parent / "tiny_world" / "clips"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("MODEL_ID", "outputs/default")
    parser.add_argument("--model", default=model, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--clips", type=Path, default=CLIPS, help="folder of example clips, with a metadata.jsonl")
    parser.add_argument(
        "--chat_template_kwargs", help="JSON options of the LLM's chat template (those that it was trained with)"
    )
    add_backbone_options(parser)
    options = parser.parse_args()
    processor_options = read_options(options.chat_template_kwargs)
    serve(options.model, options.clips, model_options=read_backbone_options(options), **processor_options)


if __name__ == "__main__":
    main()
