"""Ask a trained model about an audio file.

    python examples/infer.py --model outputs/default --audio question.wav --instruction "Name the animal."

Works with a folder or a Hub id; the answer appears as it is generated.
"""

import argparse
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoProcessor, TextStreamer

from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.command_line import add_backbone_options, read_backbone_options
from processing.chat_templates import read_options
from processing.spoken_inputs import user_turn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--audio", required=True, help="audio file, of any format in docs/audio_inputs.md")
    parser.add_argument("--instruction", default="Repeat the words.", help="what to do with what is said")
    parser.add_argument(
        "--chat_template_kwargs", help="JSON options of the LLM's chat template (those that it was trained with)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    add_backbone_options(parser)
    parser.add_argument("--dtype", help="of the weights; omitted, float32 on a CPU, elsewhere as they are stored")
    options = parser.parse_args()
    if not Path(options.audio).is_file():
        parser.error(f"--audio {options.audio} is no file.")
    if not Path(options.model).is_dir():
        try:
            validate_repo_id(options.model)
        except HFValidationError:  # the Hub would be asked again and again before it says so
            parser.error(f"--model {options.model} is no folder, and no Hub id either.")

    given = read_options(options.chat_template_kwargs)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True, **given)
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        trust_remote_code=True,
        device_map="auto",
        dtype=fast_dtype(options.dtype),
        **read_backbone_options(options),
    )
    inputs = processor.apply_chat_template(
        user_turn(options.instruction, {"type": "audio", "path": options.audio}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    ).to(model.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=options.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main()
