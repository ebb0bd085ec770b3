"""Generate the responses of a training manifest: each process answers its share of the source's blocks of rows.

A block's answers do not depend on the process that makes them, so a run may be killed and continued with another number
of processes. Every process reads all rows; a streamed data set is thus fetched once per process.
"""

import os
from contextlib import closing
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import AutoConfig, WhisperFeatureExtractor

from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.process_group import end_with_interpreter
from processing.chat_templates import read_options
from processing.processing_blsp_kd import BlspKdProcessor

from .engines import make_engine
from .options import AnswerOptions, RowOptions, SourceOptions, check_output
from .rows import RowMaker
from .sources import DatasetSource, ManifestSource, file_identity, open_source
from .templates import Instruction, read_templates
from .unfinished import Unfinished

WEIGHTS = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "chat_template*")
# The settings of a run describe these by their contents, not by their names.
DESCRIBED = ("manifest", "parquet", "dataset", "config", "split", "revision", "templates", "instructions", "text_model")
WITHOUT_EFFECT_ON_ROWS = ("output", "allow_outside_paths", "num_gpus", "use_cpu")


class Generated(NamedTuple):
    """The files that `generate_responses` made, and what is in them."""

    output: Path
    rejects: Path
    num_rows: int
    num_rejects: int
    num_processes: int


def generate_responses(
    source_options: SourceOptions, row_options: RowOptions, answer_options: AnswerOptions
) -> Generated | None:
    """Let the LLM answer prompts about transcripts, and write the training manifest `row_options.output`.

    Under `accelerate launch` or `torchrun`, every process calls this function. If an earlier call was killed, a call
    with the same options continues it, and the files become the same byte for byte.

    Returns:
        [`Generated`] in every process, or None if the output was complete before.

    Raises:
        ValueError: options cannot be used, or audio paths leave the folder of the data, or the output was begun with
            other settings or by another program.
        RuntimeError: another run writes the output, a file of this run was damaged, or processes did not join.
        ImportError: the engine is not installed.
    """
    check_output(source_options, row_options)
    state = join_processes(answer_options)
    answer_options = replace(answer_options, dtype=fast_dtype(answer_options.dtype, state.device))
    source = open_source(source_options)
    templates = read_templates(row_options.templates, row_options.instructions)
    settings = describe(source, templates, source_options, row_options, answer_options)
    unfinished = Unfinished(Path(row_options.output), settings)
    if state.is_main_process:
        unfinished.prepare()
    state.wait_for_everyone()
    if unfinished.is_complete():
        return None
    done = set(unfinished.done())
    state.wait_for_everyone()  # before any process writes
    processor = text_processor(answer_options)
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
    num_blocks = answer_share(maker, done, state)
    state.wait_for_everyone()
    counts = [unfinished.finish(num_blocks) if state.is_main_process else None]
    num_rows, num_rejects = broadcast_object_list(counts)[0]
    return Generated(unfinished.output, unfinished.rejects, num_rows, num_rejects, state.num_processes)


def join_processes(options: AnswerOptions) -> PartialState:
    """Return the state of this process among those that were launched together.

    Raises:
        RuntimeError: they did not join.
        ValueError: several processes were launched for vLLM.
    """
    # Without `cpu`, accelerate does not see that processes without a GPU belong together. The timeout is long because a
    # process that is done waits for the slowest one.
    use_cpu = options.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=use_cpu, timeout=timedelta(days=7))
    end_with_interpreter()
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but accelerate joined {state.num_processes}: all "
            "would do the same. Launch one process."
        )
    if options.engine == "vllm" and state.num_processes > 1:
        raise ValueError(
            f"vLLM uses several GPUs by itself, but {state.num_processes} processes were launched: use python instead "
            "of accelerate launch, with --num_gpus."
        )
    return state


def describe(
    source: ManifestSource | DatasetSource,
    templates: list[Instruction],
    source_options: SourceOptions,
    row_options: RowOptions,
    answer_options: AnswerOptions,
) -> dict:
    """Return all that the rows depend on, and nothing else: it must be the same when a run is continued."""
    name = answer_options.text_model
    model: str | dict = name
    if os.path.isdir(name):
        files = sorted({path for pattern in WEIGHTS for path in Path(name).glob(pattern)})
        model = {"folder": Path(name).name, "files": [file_identity(path) for path in files]}
    options = asdict(source_options) | asdict(row_options) | asdict(answer_options)
    if options["vllm_options"] is None:
        del options["vllm_options"]  # runs that began before this option existed go on
    return {
        "source": source.identity(),
        "model": model,
        "templates": {template.name: template.text for template in templates},
        **{name: value for name, value in options.items() if name not in DESCRIBED + WITHOUT_EFFECT_ON_ROWS},
    }


def text_processor(options: AnswerOptions) -> BlspKdProcessor:
    """Return a processor that makes the same text prompts as the one of training."""
    given = read_options(options.chat_template_kwargs)
    with TemporaryDirectory() as speech_model:
        # Prompts are text, so any feature extractor will do.
        WhisperFeatureExtractor().save_pretrained(speech_model)
        return BlspKdProcessor.from_backbones(speech_model, options.text_model, **given)


def longest_prompt(row_options: RowOptions, answer_options: AnswerOptions) -> int:
    """Return the number of tokens that a prompt may have, so that the longest answer fits in the LLM's positions.

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


def answer_share(maker: RowMaker, done: set[int], state: PartialState) -> int:
    """Answer this process's share of the blocks that no earlier run has finished.

    Args:
        done: the numbers of the finished blocks.

    Returns:
        `int`: the number of all blocks.
    """
    source, size = maker.source, maker.answer_options.batch_size
    num_blocks = num_left = num_rejects = 0
    total = None if source.num_rows is None else max(0, source.num_rows - len(done) * size) // state.num_processes
    share = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    bar = tqdm(total=total, desc=f"answering{share}", unit=" rows", mininterval=1, disable=not state.is_main_process)
    with closing(maker.unfinished) as unfinished, bar:
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
    return num_blocks
