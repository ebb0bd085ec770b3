"""`BlspKdTrainer` with stock `TrainingArguments` and a plain data set: no row is lost or doubled, also after a resume.

Steps do not train here; they note which rows they get, and disturb the random state as dropout does.
"""

import atexit
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from modeling_blsp_kd import BlspKdTrainer
from modeling_blsp_kd.training.batch_order import row_lengths
from processing import BlspKdDataCollator, BlspKdProcessor
from tests.helpers.models import make_model
from tests.helpers.prompts import clip

NUM_ROWS = 22  # so that no batch size divides it
BATCH_SIZE = 4
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}


def rows() -> list[dict]:
    seconds = [0.3 + 0.05 * (5 * index % 9) for index in range(NUM_ROWS)]
    audio = [{"array": clip(seconds[index], seed=index).tolist(), "sampling_rate": 16_000} for index in range(NUM_ROWS)]
    return [
        {"audio": audio[index], "text": "cat", "response": "red", "length": seconds[index], "number": index}
        for index in range(NUM_ROWS)
    ]


class NumberedCollator(BlspKdDataCollator):
    def __call__(self, rows):
        return {**super().__call__(rows), "numbers": [row["number"] for row in rows]}


class RecordingTrainer(BlspKdTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        torch.rand(1 + self.args.process_index)
        self.seen.append(inputs["numbers"])
        return torch.zeros(())


def batches(
    output: Path, processor, dataset=None, resume: Path | None = None, max_batch_length: float | None = None, **options
) -> list[list[int]]:
    """Return the rows of each batch of this process over three epochs; each has checkpoints at 2/3 of an epoch."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=3,
        save_steps=4 // world_size,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if world_size > 1 else None,
        **options,
    )
    trainer = RecordingTrainer(
        model=make_model(),
        args=args,
        train_dataset=Dataset.from_list(rows()) if dataset is None else dataset,
        data_collator=NumberedCollator(processor),
        processing_class=processor,
        max_batch_length=max_batch_length,
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.seen


def check(runs: list[dict[str, list[list[int]]]]):
    """Check what all processes saw: `"whole"`, and from a checkpoint in the first, and in the second epoch."""
    num_processes = len(runs)
    per_epoch = -(-NUM_ROWS // (BATCH_SIZE * num_processes))
    for seen in runs:
        assert len(seen["whole"]) == 3 * per_epoch
        for step in (4 // num_processes, 8 // num_processes):
            assert seen[f"from {step}"] == seen["whole"][step:]
    orders = []
    for start in (0, per_epoch, 2 * per_epoch):
        epoch = [seen["whole"][start : start + per_epoch] for seen in runs]
        assert Counter(row for process in epoch for batch in process for row in batch) == Counter(range(NUM_ROWS))
        orders.append(epoch)
    assert orders[0] != orders[1] != orders[2], "each epoch has an order of its own"


def runs_of(folder: Path, processor, num_processes: int, **options) -> dict[str, list[list[int]]]:
    runs = {"whole": batches(folder, processor, **options)}
    for step in (4 // num_processes, 8 // num_processes):
        runs[f"from {step}"] = batches(folder / "again", processor, resume=folder / f"checkpoint-{step}", **options)
    return runs


@pytest.mark.parametrize("workers", [{}, pytest.param(WORKERS, marks=pytest.mark.long)])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_resumed_run_sees_the_rows_of_the_uninterrupted_one(strategy, workers, tmp_path, processor):
    """Later epochs grouped by length drew their order from the global generator, which dropout moves."""
    check([runs_of(tmp_path, processor, 1, train_sampling_strategy=strategy, **workers)])


def test_a_list_of_rows_will_do(tmp_path, processor):
    check([runs_of(tmp_path, processor, 1, dataset=rows(), train_sampling_strategy="group_by_length")])
    with pytest.raises(ValueError, match="needs the field 'length' in every row of train_dataset"):
        nameless = [{name: value for name, value in row.items() if name != "length"} for row in rows()]
        batches(tmp_path, processor, nameless, train_sampling_strategy="group_by_length")


class Stream(IterableDataset):
    """Rows that are only iterated, in another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(self.epoch))
        every = rows()
        yield from (every[index] for index in order)


class CountedStream(Stream):
    def __len__(self):
        return NUM_ROWS


STEPS_OF_STREAM = 3 * NUM_ROWS // BATCH_SIZE  # nearly three passes, of which one and a half precede the resume


def test_a_stream_goes_on_in_a_later_pass(tmp_path, processor):
    """A resume skipped batches in the first pass alone, so one in a later pass began with its first rows again."""
    whole = batches(tmp_path, processor, Stream(), max_steps=STEPS_OF_STREAM)
    assert set(Counter(sum(whole[: 2 * NUM_ROWS // BATCH_SIZE], [])).values()) == {2}
    assert whole[:5] != whole[5:10]
    again = batches(tmp_path / "b", processor, Stream(), tmp_path / "checkpoint-8", max_steps=STEPS_OF_STREAM)
    assert again == whole[8:]


def test_a_stream_is_not_grouped_by_length(tmp_path, processor):
    """It was read in its own order without a word."""
    with pytest.raises(ValueError, match=r"needs all rows by number, but train_dataset is an IterableDataset \(Stream"):
        batches(tmp_path, processor, Stream(), train_sampling_strategy="group_by_length", max_steps=3)


def test_lengths_are_read_by_number():
    """A torch Dataset need not raise an IndexError after its last row, and then its lengths were never all read."""

    class Wrapped:
        def __len__(self):
            return 3

        def __getitem__(self, number):
            return {"length": float(number % 3)}

    assert row_lengths(Wrapped(), "length") == [0.0, 1.0, 2.0]
    for nameless in (Wrapped(), Dataset.from_list([{"seconds": 1.0}])):
        with pytest.raises(ValueError, match="max_batch_length.* needs the field 'size' in every row"):
            row_lengths(nameless, "size")


@pytest.mark.long
def test_two_processes_share_the_rows_and_resume(tmp_path, processor):
    """Each process drew an order of its own, so rows were lost and doubled; and in an epoch that was resumed in its
    middle, rows that fill the last batches counted twice."""
    processor.save_pretrained(tmp_path / "processor")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(tmp_path / f"{rank} at exit").read_text() for rank in range(2)] == ["no group", "no group"]
    streams, budgets = [rank.pop("stream") for rank in ranks], [rank.pop("budget") for rank in ranks]
    for name in ranks[0]:
        check([rank[name] for rank in ranks])
    # accelerate joined batches of different length, which failed.
    for process in (*streams, *budgets):
        assert process["from 6"] == process["whole"][6:]
    # accelerate before 1.15 refused batches of different sizes.
    assert Counter(row for process in budgets for batch in process["whole"] for row in batch) == {
        row: 3 for row in range(NUM_ROWS)
    }
    assert len({len(batch) for process in budgets for batch in process["whole"]}) > 1
    read = Counter(row for process in streams for batch in process["whole"] for row in batch)
    assert len(read) == NUM_ROWS and set(read.values()) <= {2, 3}, "nearly three passes"


def note_group(path: Path):
    path.write_text("a group" if torch.distributed.is_initialized() else "no group")


def main(folder: Path):
    """One of two processes."""
    atexit.register(note_group, folder / f"{os.environ['RANK']} at exit")  # runs after those that are registered later
    processor = BlspKdProcessor.from_pretrained(folder / "processor")
    runs = {
        "random": runs_of(folder / "random", processor, 2, train_sampling_strategy="random", **WORKERS),
        "group_by_length": runs_of(folder / "length", processor, 2, train_sampling_strategy="group_by_length"),
    }
    runs["counted stream"] = runs_of(folder / "counted", processor, 2, dataset=CountedStream())
    stream = {"max_steps": STEPS_OF_STREAM // 2}
    runs["stream"] = {
        "whole": batches(folder / "stream", processor, Stream(), **stream),
        "from 6": batches(folder / "again", processor, Stream(), folder / "stream" / "checkpoint-6", **stream),
    }
    budget = {"max_batch_length": 2.0}
    runs["budget"] = {
        "whole": batches(folder / "budget", processor, **budget),
        "from 6": batches(folder / "again", processor, resume=folder / "budget" / "checkpoint-6", **budget),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
