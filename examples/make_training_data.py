"""Turn (audio, transcript) pairs into training rows: the LLM answers prompts about the transcripts.

    accelerate launch examples/make_training_data.py --manifest asr.jsonl --text_model Qwen/Qwen2.5-0.5B-Instruct \\
        --normaliser librispeech --templates continue repeat --output train.jsonl
    accelerate launch examples/make_training_data.py --dataset openslr/librispeech_asr --config clean \\
        --split train.100 --text_model Qwen/Qwen2.5-0.5B-Instruct --normaliser librispeech --output speech/train.jsonl

The output is a manifest that `examples/train.py` reads: `audio` (relative to it), `text`, `instruction`, `response`,
and `id`, `duration` (seconds), `source_text` (before the normaliser), `template`, `seed`, `engine`, `finished` (false:
the answer was cut at `--max_new_tokens`). Rows that cannot be used are in `train.rejects.jsonl`, with line (or index)
and reason. Audio of manifests stays where it is, embedded audio becomes files in `train.audio`.

You can kill the script at any point. The same command continues, also with another number of processes, and the output
is the same: blocks of `--batch_size` rows are answered together, by whichever process. With sampling, every row has its
own seed and random numbers, so its answer depends on the other rows only through rounding (padding changes the last
bits of logits, and vLLM makes its own batches). Rounding can tip a near-tie, in half precision sooner than in float32.

Every process reads all rows and answers its share; a streamed data set is thus fetched once per process.
`processing.response_generation` does the same in Python.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser

from modeling_blsp_kd.training.command_line import HelpFormatter
from processing.response_generation import AnswerOptions, RowOptions, SourceOptions, generate_responses

TINY_TEXT_MODEL = str(Path(__file__).parent / "tiny_world" / "llm")


@dataclass
class Answers(AnswerOptions):
    """Options of the LLM, which is the tiny world's unless another is given."""

    text_model: str = field(default=TINY_TEXT_MODEL, metadata={"help": "Hub id or folder of the LLM."})


def main(arguments: list[str] | None = None):
    parser = HfArgumentParser((SourceOptions, RowOptions, Answers), description=__doc__, formatter_class=HelpFormatter)
    source_options, row_options, answer_options = parser.parse_args_into_dataclasses(arguments)
    made = generate_responses(source_options, row_options, answer_options)
    state = PartialState()
    if made is None:
        state.print(f"{row_options.output} is complete. Nothing to do.")
    else:
        state.print(f"{made.output}: {made.num_rows} rows, made by {made.num_processes} process(es)")
        state.print(f"{made.rejects}: {made.num_rejects} rejects")


if __name__ == "__main__":
    main()
