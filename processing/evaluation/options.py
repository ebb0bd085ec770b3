"""Options of `examples/evaluate.py`: the model, the systems, the data, and how to score.

Leaves out: what the data is if none is named, which the script decides.
"""

from argparse import ArgumentParser

from modeling_blsp_kd.training.command_line import add_backbone_options

from .systems import SYSTEMS, TASKS, names_of
from .text_scores import NORMALIZERS


def add_options(parser: ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a BLSP-KD model")
    parser.add_argument("--output", required=True, help="folder for results and predictions")
    parser.add_argument("--systems", type=names_of(SYSTEMS), help="some of text,speech,blind,cascade (all but cascade)")
    parser.add_argument(
        "--asr_model",
        nargs="+",
        help="of the cascade: Hub id or folder, or several; omitted, the model itself transcribes",
    )
    parser.add_argument("--engine_url", help="of a server of this model, up to /v1, which gives the answers instead")
    parser.add_argument("--asr_language", help="that multilingual Whispers are told to hear, such as en")
    parser.add_argument("--tasks", type=names_of(TASKS), default=TASKS, help=f"some of {','.join(TASKS)} (all)")
    parser.add_argument("--manifest", help="JSONL manifest of the rows")
    parser.add_argument("--train_manifest", help="with --manifest: voices in it count as seen")
    parser.add_argument(
        "--allow_outside_paths", action="store_true", help="let audio paths leave the manifest's folder"
    )
    parser.add_argument("--dataset", help="data set of the Hub, or folder of one")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", help="split of the data set, or of the tiny world (test)")
    parser.add_argument("--streaming", action="store_true", help="read the data set as it downloads")
    parser.add_argument("--num_utterances", type=int, default=480, help="tiny world: clips per kind of voice")
    parser.add_argument("--cache_dir", default="outputs/tiny_world_speech", help="tiny world: where clips are kept")
    parser.add_argument("--kinds", nargs="+", help="use rows of these kinds only")
    parser.add_argument("--instruction", help="ask this of every row, instead of its own instruction")
    parser.add_argument("--limit", type=int, help="use the first rows only")
    parser.add_argument("--dtype", help="of the models; omitted, float32 on a CPU, elsewhere as they are stored")
    add_backbone_options(parser)
    parser.add_argument("--kept_frames", help="file for frames of a Whisper encoder, see train.py: encodes a clip once")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at once")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument(
        "--chat_template_kwargs", help="JSON options of the LLM's chat template (those that it was trained with)"
    )
    parser.add_argument(
        "--transcription_instruction", help="what asks for the transcript; omitted, what the model was saved with"
    )
    parser.add_argument("--translation_instruction", help="what to ask where rows have a translation")
    parser.add_argument("--bleu_tokenizer", default="13a", help="sacrebleu's: 13a, intl, zh, ja-mecab, ko-mecab, char")
    parser.add_argument(
        "--normalizer", choices=NORMALIZERS, default="basic", help="of answers and transcripts, on both sides"
    )
    parser.add_argument(
        "--num_timed", type=int, default=0, help="rows to time, one by one: from the clip to the first token"
    )
    parser.add_argument("--num_resamples", type=int, default=1000, help="bootstrap samples of an interval")
