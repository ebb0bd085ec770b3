"""What the teacher predicts for training rows, on disk: made once, read instead of the teacher's pass.

A folder has shards (safetensors), each with the same number of consecutive rows, and `index.json` with their
checksums. Rows are found by what the teacher reads of them, so their order does not matter. Leaves out: what is kept
of a distribution (`modeling_blsp_kd/kept_teacher.py`).
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.kept_teacher import KeptTeacher, keep_top
from modeling_blsp_kd.llm_outputs import LlmStates, OutputHead
from modeling_blsp_kd.training.output_head import check_output_head
from modeling_blsp_kd.training.process_group import end_with_interpreter
from processing.data_collator import BlspKdDataCollator, is_spoken_row
from processing.teacher_distributions import KeptDistributions, compared_positions

INDEX = "index.json"


@dataclass(frozen=True)
class KeepOptions:
    """Says how the teacher is kept.

    Args:
        teacher: its name, for the reader.
        k: kept tokens of each distribution.
        temperature: that of the losses.
        rows_per_shard: rows in a file.
        batch_size: prompts that the teacher reads at once; does not matter for what is kept.
    """

    teacher: str
    k: int = 32
    temperature: float = 2.0
    rows_per_shard: int = 1000
    batch_size: int = 16

    @property
    def settings(self) -> dict:
        """Return what the contents depend on."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


def key_of(row: dict) -> str:
    """Return what a row is found by: all that the teacher reads of it, and whether its content is spoken."""
    read = [row.get("instruction"), row["text"].strip(), row["response"].strip(), is_spoken_row(row)]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def keep_teacher(
    rows: list[dict], llm: PreTrainedModel, collator: BlspKdDataCollator, folder: str | Path, options: KeepOptions
) -> Path:
    """Let a teacher read the rows, and keep what it predicts in a folder. All processes call this, and share the work.

    It can be stopped at any time; the same call goes on where it was. A row that is there twice is kept once.

    Args:
        rows: as for training, each with its `response`. Audio is not read.
        llm: the teacher, in evaluation mode. It may be another LLM than the student's, of the same tokenizer.

    Returns:
        `Path`: the index, complete.

    Raises:
        ValueError: the folder has shards of other rows or settings, or the LLM does not suit.
    """
    folder, state = Path(folder), PartialState()
    end_with_interpreter()
    folder.mkdir(parents=True, exist_ok=True)
    if lacking := [row for row in rows if not row.get("response")]:
        raise ValueError(
            f"{len(lacking)} of {len(rows)} rows have no response, the first with the text {lacking[0]['text']!r}. "
            "Make responses first: examples/make_training_data.py."
        )
    check_output_head(llm)
    distinct = list({key_of(row): row for row in rows}.values())
    shards = [
        distinct[start : start + options.rows_per_shard] for start in range(0, len(distinct), options.rows_per_shard)
    ]
    for number, shard in list(enumerate(shards))[state.process_index :: state.num_processes]:
        path, settings = folder / f"shard-{number:05}.safetensors", _settings_of(shard, options)
        if not path.exists():
            _write(path, _predict(shard, llm, collator, options), settings)
        elif _read_settings(path) != settings:
            raise ValueError(f"{path} was made with other rows or settings. Name a new folder, or remove this one.")
    state.wait_for_everyone()
    index = folder / INDEX
    if state.is_main_process:
        files = {f"shard-{number:05}.safetensors": len(shard) for number, shard in enumerate(shards)}
        listed = [{"file": name, "rows": num, "sha256": _sha256(folder / name)} for name, num in files.items()]
        described = {**options.settings, "vocab_size": len(OutputHead.of(llm).weight), "shards": listed}
        partial = index.with_suffix(".partial")
        partial.write_text(json.dumps(described, indent=1) + "\n")
        os.replace(partial, index)
    state.wait_for_everyone()
    return index


@torch.no_grad()
def _predict(rows: list[dict], llm: PreTrainedModel, collator: BlspKdDataCollator, options: KeepOptions) -> dict:
    """Return the tensors of a shard: those of its rows one after another, and their numbers."""
    head = OutputHead.of(llm)
    kept, tokens = [], []
    lengths: list[tuple[int, int]] = []
    for start in range(0, len(rows), options.batch_size):
        batch = collator.text_prompts(rows[start : start + options.batch_size])
        ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
        states = LlmStates.after(llm.base_model, [], input_ids=ids.to(llm.device), attention_mask=mask.to(llm.device))
        is_compared = compared_positions(batch)
        hidden = states.last[is_compared.to(states.last.device)]
        top = keep_top(hidden, head.weight, options.temperature, options.k, **head.options)
        kept.append(KeptTeacher(top.ids.int().cpu(), top.log_probs.cpu()))
        lengths += zip(is_compared.sum(1).tolist(), mask.sum(1).tolist())
        tokens.append(ids[mask.bool()].int())
    top = KeptTeacher.cat(kept)
    numbers = torch.tensor(lengths)
    keys = torch.tensor([list(bytes.fromhex(key_of(row))) for row in rows], dtype=torch.uint8)
    return {
        "keys": keys,
        "num_positions": numbers[:, 0].contiguous(),
        "num_tokens": numbers[:, 1].contiguous(),
        "input_ids": torch.cat(tokens),
        "top_ids": top.ids,
        "top_log_probs": top.log_probs,
    }


def _settings_of(rows: list[dict], options: KeepOptions) -> dict:
    return {**options.settings, "rows": hashlib.sha256("".join(map(key_of, rows)).encode()).hexdigest()}


def _write(path: Path, tensors: dict, settings: dict):
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"settings": json.dumps(settings)})
    os.replace(partial, path)


def _read_settings(path: Path) -> dict:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["settings"])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TeacherOnDisk:
    """Reads what [`keep_teacher`] left, by row.

    Args:
        folder: with `index.json`.

    Raises:
        ValueError: it has no index, or a shard is not as it was written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{self.folder} has no {INDEX}: finish examples/keep_teacher.py, which writes it last.")
        self.index = json.loads((self.folder / INDEX).read_text())
        self.places: dict[str, tuple[str, slice, slice]] = {}
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file() or _sha256(path) != shard["sha256"]:
                raise ValueError(f"{path} is missing or not as it was written. Copy it again, or make it anew.")
            with safe_open(path, "np") as file:
                names = [bytes(key).hex() for key in file.get_tensor("keys")]
                ends = [np.cumsum(file.get_tensor(name)) for name in ("num_positions", "num_tokens")]
            starts = [np.concatenate([[0], end[:-1]]) for end in ends]
            for name, *bounds in zip(names, *starts, *ends):
                position, token, position_end, token_end = map(int, bounds)
                self.places[name] = (shard["file"], slice(position, position_end), slice(token, token_end))

    def check(self, model: BlspKdForCausalLM, rows: list[dict]):
        """Make sure that it suits a training.

        Raises:
            ValueError: another temperature or vocabulary, a loss that needs the LLM to read the text, or missing rows.
        """
        options, vocab_size = model.config.distillation_options, len(model.get_output_embeddings().weight)
        if self.index["temperature"] != options.temperature:
            raise ValueError(
                f"{self.folder} was kept at temperature {self.index['temperature']}, but the losses are at "
                f"{options.temperature}. Keep the teacher anew, or change the distillation option temperature."
            )
        if self.index["vocab_size"] != vocab_size:
            raise ValueError(
                f"{self.folder} is of {self.index['teacher']}, which has {self.index['vocab_size']} tokens, but the "
                f"student has {vocab_size}. Teacher and student need the same tokenizer and size of vocabulary."
            )
        if options.layer_alignment:
            raise ValueError(
                "layer_alignment compares hidden states, of which none are kept. Set it to 0, or leave out the kept "
                "teacher."
            )
        for row in rows:
            self.place_of(row)

    def place_of(self, row: dict) -> tuple[str, slice, slice]:
        """Return the shard of a row, its positions and its tokens there.

        Raises:
            ValueError: the row is not there.
        """
        place = self.places.get(key_of(row))
        if place is None:
            raise ValueError(
                f"{self.folder} does not have the row with the text {row['text']!r}, the instruction "
                f"{row.get('instruction')!r} and the response {row['response']!r}. Keep the teacher for these rows."
            )
        return place

    def __call__(self, row: dict) -> KeptDistributions:
        """Return what the teacher predicts for a row. Opens the file anew, since workers cannot share an open one."""
        name, positions, tokens = self.place_of(row)
        with safe_open(self.folder / name, "np") as file:
            parts = {"input_ids": tokens, "top_ids": positions, "top_log_probs": positions}
            return KeptDistributions(**{part: file.get_slice(part)[where] for part, where in parts.items()})
