"""Keep on disk what the teacher predicts for training rows, so that training need not run it.

    accelerate launch examples/keep_teacher.py --text_model Qwen/Qwen2.5-0.5B-Instruct --train_manifest train.jsonl \\
        --output_dir outputs/teacher
    accelerate launch examples/train.py --text_model Qwen/Qwen2.5-0.5B-Instruct --train_manifest train.jsonl \\
        --kept_teacher outputs/teacher

Kept are the most likely tokens of each distribution (`--k` of them) with their probabilities, and that of all others
together. The rows need responses (`make_training_data.py`). The teacher may be a larger LLM on another machine, if it
has the tokenizer and the size of vocabulary of the student's LLM; `--prompts_of` then names the latter, whose chat
template counts.

You can kill the script at any point; the same command continues, with any number of processes.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCausalLM, HfArgumentParser

from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.command_line import HelpFormatter
from modeling_blsp_kd.training.options import TINY_SPEECH_MODEL, TINY_TEXT_MODEL
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.chat_templates import read_options
from processing.training_rows.kept_teacher import KeepOptions, keep_teacher
from processing.training_rows.loading import load_rows
from processing.training_rows.options import DataOptions


@dataclass
class Options:
    output_dir: str = field(metadata={"help": "Folder for what is kept."})
    train_manifest: str | None = field(default=None, metadata={"help": "JSONL manifest of rows with responses."})
    train_mixture: str | None = field(default=None, metadata={"help": "YAML list of sources, as for train.py."})
    allow_outside_paths: bool = field(default=False, metadata={"help": "Audio may lie outside the manifest's folder."})
    text_model: str = field(default=TINY_TEXT_MODEL, metadata={"help": "Hub id or folder of the teacher."})
    prompts_of: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the student's LLM, or of its processor; the teacher's if omitted."},
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "JSON options of the chat template, as in the training."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16, or auto; if omitted: float32 on a CPU, auto elsewhere."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "auto: spread the teacher over all GPUs of one process."}
    )
    k: int = field(default=32, metadata={"help": "Tokens that are kept of each distribution."})
    temperature: float = field(default=2.0, metadata={"help": "That of the losses (distillation option temperature)."})
    rows_per_shard: int = field(default=1000, metadata={"help": "Rows in a file."})
    batch_size: int = field(default=16, metadata={"help": "Prompts that the teacher reads at once."})


def main():
    parser = HfArgumentParser(Options, description=__doc__, formatter_class=HelpFormatter)
    [options] = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    state = PartialState()
    data = DataOptions(
        train_manifest=options.train_manifest,
        train_mixture=options.train_mixture,
        allow_outside_paths=options.allow_outside_paths,
    )
    rows, _ = load_rows(data, seed=0)
    llm = AutoModelForCausalLM.from_pretrained(
        options.text_model, dtype=fast_dtype(options.dtype, state.device), device_map=options.device_map
    )
    if options.device_map is None:
        llm.to(state.device)
    given = read_options(options.chat_template_kwargs)
    processor = BlspKdProcessor.from_backbones(TINY_SPEECH_MODEL, options.prompts_of or options.text_model, **given)
    keep = KeepOptions(
        teacher=options.text_model,
        k=options.k,
        temperature=options.temperature,
        rows_per_shard=options.rows_per_shard,
        batch_size=options.batch_size,
    )
    index = keep_teacher(rows, llm.eval(), BlspKdDataCollator(processor), options.output_dir, keep)
    size = sum(path.stat().st_size for path in Path(options.output_dir).glob("*.safetensors"))
    state.print(f"{index}: {len(rows)} rows, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
