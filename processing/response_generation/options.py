"""Options of `generate_responses`: where rows come from, what is made of them, and how the LLM answers.

`examples/make_training_data.py` has the same options on its command line, so error messages name them with "--".
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from .normalisers import NORMALISERS

ENGINES = ("transformers", "vllm")
SET_BY_OTHER_OPTIONS = {"model", "dtype", "tensor_parallel_size", "max_model_len"}


@dataclass
class SourceOptions:
    """
    Raises:
        ValueError: there is not exactly one source, or `limit` is below 1.
    """

    manifest: str | None = field(default=None, metadata={"help": "JSONL manifest; audio paths are relative to it."})
    parquet: list[str] = field(default_factory=list, metadata={"help": "Parquet files with embedded audio."})
    dataset: str | None = field(default=None, metadata={"help": "Data set on the Hub (or a folder), streamed."})
    config: str | None = field(default=None, metadata={"help": "Configuration of --dataset."})
    split: str = field(default="train", metadata={"help": "Split of --dataset."})
    revision: str | None = field(default=None, metadata={"help": "Commit of --dataset, so that it cannot change."})
    audio_column: str = field(default="audio", metadata={"help": "Where the audio is."})
    text_column: str = field(default="text", metadata={"help": "Where the transcript is; Common Voice: sentence."})
    limit: int | None = field(default=None, metadata={"help": "Take only the first rows."})
    allow_outside_paths: bool = field(
        default=False, metadata={"help": "Let audio paths leave the folder of the manifest or parquet file."}
    )

    def __post_init__(self):
        if sum(map(bool, (self.manifest, self.parquet, self.dataset))) != 1:
            raise ValueError("Give one source of rows: --manifest, --parquet or --dataset.")
        _check_counts(self, "limit")


@dataclass
class RowOptions:
    """
    Raises:
        ValueError: an unknown normaliser, an output that is no `.jsonl` file, or a count below 1.
    """

    output: str = field(metadata={"help": "The manifest to make, .jsonl; best beside the source manifest."})
    normaliser: str = field(
        default="none", metadata={"help": f"How transcripts are written: {', '.join(NORMALISERS)}."}
    )
    templates: list[str] | None = field(
        default=None,
        metadata={
            "help": "continue, answer, repeat, own (the row's own instruction), or files: .json (name to instruction), "
            ".txt (one per line). $column stands for a column of the row. If none is given at all: continue."
        },
    )
    instructions: list[str] = field(default_factory=list, metadata={"help": "Further templates, given as texts."})
    templates_per_row: int | None = field(
        default=None, metadata={"help": "Draw so many of the templates for each row; all if omitted."}
    )
    keep: list[str] = field(
        default_factory=lambda: ["voice", "words", "translation"],
        metadata={"help": "Columns to copy; with own, --keep voice kind answer keeps what to score with."},
    )
    max_duration_s: float = field(default=30.0, metadata={"help": "Longer clips are rejected, seconds."})
    max_prompt_tokens: int = field(default=512, metadata={"help": "Longer prompts are rejected."})

    def __post_init__(self):
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"--normaliser must be one of {[*NORMALISERS]}, got {self.normaliser!r}.")
        _check_counts(self, "max_prompt_tokens", "templates_per_row")
        if Path(self.output).suffix != ".jsonl":
            raise ValueError(f"--output must be a .jsonl file, got {self.output!r}.")


@dataclass
class AnswerOptions:
    """
    Raises:
        ValueError: an unknown engine, or a temperature, probability or count out of its range.
    """

    text_model: str = field(metadata={"help": "Hub id or folder of the LLM."})
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "JSON options of the LLM's chat template, for example '{\"enable_thinking\": false}'. Give "
            "train.py the same."
        },
    )
    engine: str = field(default="transformers", metadata={"help": "transformers, or vllm where it is installed."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "auto, float32, bfloat16 or float16. If omitted: float32 on a CPU, auto elsewhere."},
    )
    batch_size: int = field(default=64, metadata={"help": "Rows per block, and prompts answered at once."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    temperature: float = field(default=0.0, metadata={"help": "0: the most probable token each time."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the top tokens of this probability together."})
    seed: int = field(default=0, metadata={"help": "Every row's own seed follows from it."})
    num_gpus: int = field(default=1, metadata={"help": "GPUs that vLLM splits the LLM over."})
    vllm_options: str | None = field(
        default=None,
        metadata={"help": "JSON with further arguments of vllm.LLM, for example '{\"gpu_memory_utilization\": 0.5}'."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"--engine must be transformers or vllm, got {self.engine!r}.")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature must be 0 or more and --top_p above 0 up to 1, got {self.temperature} and {self.top_p}."
            )
        _check_counts(self, "batch_size", "max_new_tokens")
        if self.vllm_options is not None and self.engine != "vllm":
            raise ValueError("--vllm_options are of --engine vllm, which is not given.")
        self.read_vllm_options()

    def read_vllm_options(self) -> dict:
        """Return `vllm_options` as keyword arguments of `vllm.LLM`.

        Raises:
            ValueError: they are not a JSON object, or name what other options set.
        """
        try:
            read = json.loads(self.vllm_options or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"--vllm_options must be a JSON object, got {self.vllm_options!r}: {error}.") from error
        if not isinstance(read, dict) or (own := sorted(read.keys() & SET_BY_OTHER_OPTIONS)):
            reason = f"other options set {own}" if isinstance(read, dict) else "it is none"
            raise ValueError(f"--vllm_options must be a JSON object of further arguments, but {reason}.")
        return read


def check_output(source: SourceOptions, rows: RowOptions):
    """
    Raises:
        ValueError: the output would overwrite the source.
    """
    if source.manifest and os.path.realpath(source.manifest) == os.path.realpath(rows.output):
        raise ValueError(f"--output {rows.output!r} is the source manifest itself. Choose another name.")


def _check_counts(options, *names: str):
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
