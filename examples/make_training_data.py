"""Turn (audio, transcript) pairs into training rows: the LLM answers prompts about the transcripts.

    accelerate launch examples/make_training_data.py --manifest asr.jsonl --text_model Qwen/Qwen2.5-0.5B-Instruct \\
        --normaliser librispeech --templates continue repeat --output train.jsonl
    accelerate launch examples/make_training_data.py --dataset openslr/librispeech_asr --config clean \\
        --split train.100 --text_model Qwen/Qwen2.5-0.5B-Instruct --normaliser librispeech --output speech/train.jsonl

The output is a manifest that `examples/train.py` reads: `audio` (relative to it), `text`, `instruction`, `response`,
and `id`, `duration` (seconds), `source_text` (before the normaliser), `template`, `seed`, `engine`, `finished` (false:
the answer was cut at `--max_new_tokens`). Rows that cannot be used are in `train.rejects.jsonl`, with line (or index)
and reason. Audio of manifests stays where it is, embedded audio becomes files in `train.audio`.

Killed at any point, the same command goes on, also with another number of processes. Blocks of `--batch_size` rows are
answered together whoever answers them, so the rows are the same. With sampling, every row has its own seed and random
numbers: its answer depends on the other rows only through rounding (padding changes the last bits of logits, and vLLM
batches as it likes), which can tip a near-tie, in half precision sooner than in float32.

Every process reads all rows and answers its share; a streamed data set is thus fetched once per process.
"""

import hashlib
import json
import os
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm
from training_data.engines import TransformersEngine, VllmEngine
from training_data.normalisers import NORMALISERS
from training_data.sources import DatasetSource, ManifestSource, check_audio, file_identity
from training_data.templates import choose, read_templates
from training_data.unfinished import Unfinished
from transformers import AutoConfig, HfArgumentParser

from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.command_line import HelpFormatter
from processing import BlspKdProcessor
from processing.chat_templates import is_in_thought, read_options
from processing.manifests import BadRow
from processing.spoken_inputs import user_turn

TINY_TEXT_MODEL = str(Path(__file__).parent / "tiny_world" / "llm")
# Prompts are text: of the processor only tokenizer and chat template are used, so any feature extractor will do.
ANY_SPEECH_MODEL = str(Path(__file__).parent / "tiny_world" / "speech_encoder")
WEIGHTS = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")


@dataclass
class SourceOptions:
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


@dataclass
class RowOptions:
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


@dataclass
class AnswerOptions:
    text_model: str = field(default=TINY_TEXT_MODEL, metadata={"help": "Hub id or folder of the LLM."})
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
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})


def main(arguments: list[str] | None = None):
    parser = HfArgumentParser(
        (SourceOptions, RowOptions, AnswerOptions), description=__doc__, formatter_class=HelpFormatter
    )
    source_options, row_options, answer_options = parser.parse_args_into_dataclasses(arguments)
    check_options(source_options, row_options, answer_options)
    # Unless it is told, accelerate does not see that processes without a GPU belong together. The timeout is long since
    # a process that is done waits for the slowest, and must not give up on it.
    use_cpu = answer_options.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=use_cpu, timeout=timedelta(days=7))
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but accelerate joined {state.num_processes}: all "
            "would do the same. Launch one process."
        )
    if answer_options.engine == "vllm" and state.num_processes > 1:
        raise ValueError(
            f"vLLM uses several GPUs by itself, but {state.num_processes} processes were launched: use python instead "
            "of accelerate launch, with --num_gpus."
        )
    answer_options.dtype = fast_dtype(answer_options.dtype, state.device)
    source = open_source(source_options)
    names = row_options.templates
    if names is None:
        names = [] if row_options.instructions else ["continue"]
    templates = read_templates(names, row_options.instructions)
    unfinished = Unfinished(
        Path(row_options.output), describe(source, templates, source_options, row_options, answer_options)
    )
    if state.is_main_process:
        unfinished.prepare()
    state.wait_for_everyone()
    if unfinished.is_complete():
        state.print(f"{row_options.output} is complete. Nothing to do.")
    else:
        answer_all(state, source, templates, unfinished, source_options, row_options, answer_options)
    state.destroy_process_group()


def answer_all(state, source, templates, unfinished, source_options, row_options, answer_options):
    """Answer this process's share of the blocks that no earlier run has finished; the main process joins them all."""
    done = set(unfinished.done())
    state.wait_for_everyone()  # before anybody writes
    processor = BlspKdProcessor.from_backbones(
        ANY_SPEECH_MODEL, answer_options.text_model, **read_options(answer_options.chat_template_kwargs)
    )
    max_prompt_tokens = longest_prompt(row_options, answer_options)
    maker = RowMaker(
        source=source,
        templates=templates,
        processor=processor,
        engine=make_engine(answer_options, processor, state.device, max_prompt_tokens),
        max_prompt_tokens=max_prompt_tokens,
        unfinished=unfinished,
        source_options=source_options,
        row_options=row_options,
        answer_options=answer_options,
    )
    size, num_blocks, num_left, num_rejects = answer_options.batch_size, 0, 0, 0
    total = None if source.num_rows is None else max(0, source.num_rows - len(done) * size) // state.num_processes
    share = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    with (
        closing(unfinished),
        tqdm(
            total=total, desc=f"answering{share}", unit=" rows", mininterval=1, disable=not state.is_main_process
        ) as bar,
    ):
        unfinished.open_part(state.process_index)
        for number, block in source.blocks(size):
            num_blocks += 1
            if number in done:
                continue
            num_left += 1
            if (num_left - 1) % state.num_processes != state.process_index:
                continue
            rows, rejects = maker.make(number * size, block)
            unfinished.append(number, rows, rejects)
            num_rejects += len(rejects)
            bar.set_postfix(rejects=num_rejects, refresh=False)
            bar.update(len(block))
    state.wait_for_everyone()
    if state.is_main_process:
        num_rows, num_rejects = unfinished.finish(num_blocks)
        print(f"{unfinished.output}: {num_rows} rows, made by {state.num_processes} process(es)")
        print(f"{unfinished.rejects}: {num_rejects} rejects")


def check_options(source: SourceOptions, rows: RowOptions, answers: AnswerOptions):
    """
    Raises:
        ValueError: an option cannot be as it is.
    """
    if sum(map(bool, (source.manifest, source.parquet, source.dataset))) != 1:
        raise ValueError("Give one source of rows: --manifest, --parquet or --dataset.")
    if rows.normaliser not in NORMALISERS:
        raise ValueError(f"--normaliser must be one of {[*NORMALISERS]}, got {rows.normaliser!r}.")
    if answers.engine not in ("transformers", "vllm"):
        raise ValueError(f"--engine must be transformers or vllm, got {answers.engine!r}.")
    if not answers.temperature >= 0 or not 0 < answers.top_p <= 1:
        raise ValueError(
            "--temperature must be 0 or more and --top_p above 0 up to 1, got "
            f"{answers.temperature} and {answers.top_p}."
        )
    counts = {
        "batch_size": answers.batch_size,
        "max_new_tokens": answers.max_new_tokens,
        "max_prompt_tokens": rows.max_prompt_tokens,
        "templates_per_row": rows.templates_per_row,
        "limit": source.limit,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if Path(rows.output).suffix != ".jsonl":
        raise ValueError(f"--output must be a .jsonl file, got {rows.output!r}.")
    if source.manifest and os.path.realpath(source.manifest) == os.path.realpath(rows.output):
        raise ValueError(f"--output {rows.output!r} is the source manifest itself. Choose another name.")


def open_source(options: SourceOptions) -> ManifestSource | DatasetSource:
    common = {
        "audio_column": options.audio_column,
        "allow_outside": options.allow_outside_paths,
        "limit": options.limit,
    }
    if options.manifest:
        return ManifestSource(options.manifest, **common)
    if options.parquet:
        return DatasetSource("parquet", data_files=options.parquet, split="train", **common)
    return DatasetSource(
        options.dataset, config=options.config, split=options.split, revision=options.revision, **common
    )


def describe(source, templates, source_options, row_options, answer_options) -> dict:
    """All that the rows depend on, and nothing else: it must be the same when a run goes on."""
    model = answer_options.text_model
    if os.path.isdir(model):
        files = sorted({path for pattern in WEIGHTS for path in Path(model).glob(pattern)})
        model = {"folder": Path(model).name, "files": [file_identity(path) for path in files]}
    options = asdict(source_options) | asdict(row_options) | asdict(answer_options)
    described = "manifest parquet dataset config split revision templates instructions text_model"
    indifferent = "output allow_outside_paths num_gpus use_cpu"
    return {
        "source": source.identity(),
        "model": model,
        "templates": {template.name: template.text for template in templates},
        **{name: value for name, value in options.items() if name not in f"{described} {indifferent}".split()},
    }


def longest_prompt(row_options: RowOptions, answer_options: AnswerOptions) -> int:
    """Tokens that a prompt may have, so that the longest answer still fits in the LLM's positions.

    Raises:
        ValueError: the answer alone takes them all.
    """
    config = AutoConfig.from_pretrained(answer_options.text_model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return row_options.max_prompt_tokens
    if positions <= answer_options.max_new_tokens:
        raise ValueError(
            f"The LLM has {positions} positions, and --max_new_tokens {answer_options.max_new_tokens} leaves none for "
            "prompts. Lower it."
        )
    return min(row_options.max_prompt_tokens, positions - answer_options.max_new_tokens)


def make_engine(options: AnswerOptions, processor, device, max_prompt_tokens: int) -> TransformersEngine | VllmEngine:
    common = {
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    if options.engine == "vllm":
        return VllmEngine(options.text_model, num_gpus=options.num_gpus, max_prompt_tokens=max_prompt_tokens, **common)
    return TransformersEngine(options.text_model, processor, device, batch_size=options.batch_size, **common)


class Asked(NamedTuple):
    """One prompt for the LLM, and what becomes a training row with its answer."""

    index: int  # of the source row
    source_row: dict
    audio: Path | bytes
    kind: str  # the audio's format
    row: dict
    prompt: list[int]  # token ids


@dataclass
class RowMaker:
    """Makes the training rows of one block of source rows."""

    source: ManifestSource | DatasetSource
    templates: list
    processor: BlspKdProcessor
    engine: TransformersEngine | VllmEngine
    unfinished: Unfinished
    source_options: SourceOptions
    row_options: RowOptions
    answer_options: AnswerOptions
    max_prompt_tokens: int

    def make(self, first_index: int, block: list) -> tuple[list[dict], list[dict]]:
        """Training rows and rejects of a block, both in the order of its rows."""
        asked, rejects, places = [], [], {}
        for index, raw in enumerate(block, start=first_index):
            source_row = {}
            try:
                source_row = self.source.parse(raw)
                audio, kind, common = self._prepare(source_row)
            except BadRow as error:
                rejects.append(self._reject(index, source_row, error))
                continue
            for template in choose(self.templates, self.row_options.templates_per_row, self.answer_options.seed, index):
                try:
                    row, prompt = self._ask(index, source_row, common, template)
                except BadRow as error:
                    rejects.append(self._reject(index, source_row, error))
                else:
                    asked.append(Asked(index, source_row, audio, kind, row, prompt))
        rows = []
        answers = self.engine.answer([one.prompt for one in asked], [one.row["seed"] for one in asked]) if asked else []
        for one, answer in zip(asked, answers):
            if fault := self._fault(one.prompt, answer.text):
                error = BadRow(f"answer: that of the LLM to template {one.row['template']!r} {fault}")
                rejects.append(self._reject(one.index, one.source_row, error))
                continue
            if one.index not in places:
                places[one.index] = self._place(one)
            rows.append(
                {**one.row, "audio": places[one.index], "response": answer.text, "finished": answer.is_finished}
            )
        return rows, sorted(rejects, key=lambda reject: reject[self.source.place_name])

    def _prepare(self, source_row: dict) -> tuple[Path | bytes, str, dict]:
        """A source row's audio, its format, and what all training rows made of it have in common."""
        source_text = source_row.get(self.source_options.text_column)
        if not isinstance(source_text, str) or not source_text.strip():
            raise BadRow(f"text: expected some in {self.source_options.text_column!r}, got {source_text!r}")
        text = NORMALISERS[self.row_options.normaliser](source_text)
        if not text:
            raise BadRow(f"text: nothing is left of {source_text!r}")
        audio = self.source.audio(source_row)
        duration, kind = check_audio(audio, self.row_options.max_duration_s)
        kept = {name: source_row[name] for name in self.row_options.keep if source_row.get(name) is not None}
        return audio, kind, {**kept, "text": text, "duration": duration, "source_text": source_text}

    def _ask(self, index: int, source_row: dict, common: dict, template) -> tuple[dict, list[int]]:
        """A training row without its answer, and the prompt's token ids."""
        instruction = template.fill(source_row)
        if self.processor.audio_token in instruction + common["text"]:
            raise BadRow(f"text: holds the audio placeholder {self.processor.audio_token!r}")
        name = source_row.get("id")
        key = f"{self.answer_options.seed}/{index}/{template.name}"
        row = {
            "id": f"{index if name is None else name}-{template.name}",
            "audio": None,
            **common,
            "instruction": instruction,
            "response": None,
            "template": template.name,
            "seed": int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1,
            "engine": self.answer_options.engine,
        }
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadRow(f"cannot be written as JSON: {error}") from error
        conversation = user_turn(instruction, {"type": "text", "text": row["text"]})
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        prompt = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(prompt) > self.max_prompt_tokens:
            raise BadRow(f"text: too long, the prompt has {len(prompt)} tokens, at most {self.max_prompt_tokens}")
        return row, prompt

    def _fault(self, prompt: list[int], answer: str) -> str | None:
        """What makes an answer useless, if anything."""
        if not answer:
            return "is empty"
        if self.processor.audio_token in answer:
            return "holds the audio placeholder"
        if is_in_thought(self.processor.decode(prompt) + answer):
            return (
                "ends within a thought. Raise --max_new_tokens, or have the LLM not think, for example with "
                "--chat_template_kwargs '{\"enable_thinking\": false}'"
            )
        return None

    def _place(self, one: Asked) -> str:
        """The path of a row's audio, relative to the output; embedded audio becomes a file."""
        path = one.audio
        if isinstance(path, bytes):
            path = self.unfinished.keep_audio(one.index, one.audio, one.kind)
        folder = self.unfinished.output.parent
        place = os.path.relpath(path, folder)
        if os.path.realpath(folder / place) != os.path.realpath(path):  # ".." after a symbolic link leads elsewhere
            place = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        return Path(place).as_posix()

    def _reject(self, index: int, source_row: dict, error: BadRow) -> dict:
        audio = source_row.get(self.source_options.audio_column)
        return {
            self.source.place_name: index + self.source.first_place,
            "reason": printable(error),
            "audio": printable(audio.get("path") if isinstance(audio, dict) else audio),
            "text": printable(source_row.get(self.source_options.text_column)),
        }


def printable(value) -> str | None:
    """Text that can be written as UTF-8, whatever a bad row held."""
    return None if value is None else str(value).encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
