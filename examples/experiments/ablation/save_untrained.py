"""Save the model as it is before training: its LLM is the original, to answer from text, and without any audio.

Takes the options of `examples/train.py`. Leaves out: training.
"""

import json
from pathlib import Path

from transformers import HfArgumentParser, set_seed

from modeling_blsp_kd.training.building import build_model, build_processor
from modeling_blsp_kd.training.command_line import HelpFormatter
from modeling_blsp_kd.training.options import Arguments, ModelOptions
from processing.training_rows.options import DataOptions


def main():
    parser = HfArgumentParser(
        (ModelOptions, DataOptions, Arguments), description=__doc__, formatter_class=HelpFormatter
    )
    model_options, _, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    processor = build_processor(model_options)
    build_model(model_options, processor).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    Path(args.output_dir, "results.json").write_text(json.dumps({"train_seconds": 0.0}) + "\n")


if __name__ == "__main__":
    main()
