"""Batches by total length: budget kept, no row lost or doubled, the same after a resume and for all processes."""

import random
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard

from modeling_blsp_kd.training.length_budget import LengthBudgetBatches
from tests.helpers.trainers import NUM_ROWS, make_trainer, many_rows

LENGTHS = [random.Random(number).lognormvariate(1.5, 0.7) for number in range(500)]
BUDGET = 80.0


def padded(batch):
    return len(batch) * max(LENGTHS[row] for row in batch)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_each_epoch_has_every_row_once_within_the_budget(num_processes):
    batches = LengthBudgetBatches(LENGTHS, BUDGET, seed=3, num_processes=num_processes)
    epochs = []
    for batches.epoch in range(3):
        epoch = list(batches)
        assert len(epoch) == len(batches) and len(epoch) % num_processes == 0
        assert sorted(row for batch in epoch for row in batch) == list(range(len(LENGTHS)))
        assert max(map(padded, epoch)) <= BUDGET
        assert list(batches) == epoch, "seed and epoch alone decide"
        epochs.append(epoch)
    assert Counter(map(len, epochs[0])) == Counter(map(len, epochs[1])), "steps can be counted in advance"
    together = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert len(together[0] & together[1]) < len(batches) / 2, "rows change places"


def test_batches_fill_the_budget():
    batches = LengthBudgetBatches(LENGTHS, BUDGET, seed=3)
    assert sum(map(padded, batches)) < 1.1 * sum(LENGTHS), "padding costs little"
    assert len(batches) < 1.2 * sum(LENGTHS) / BUDGET


def test_processes_share_the_batches_of_similar_length():
    batches = LengthBudgetBatches(LENGTHS, BUDGET, seed=3, num_processes=2)
    shards = [list(BatchSamplerShard(batches, 2, index, even_batches=False)) for index in range(2)]
    assert len(shards[0]) == len(shards[1]) == len(batches) // 2
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(len(LENGTHS)))
    ratios = [padded(first) / padded(second) for first, second in zip(*shards)]
    assert sum(0.7 < ratio < 1.4 for ratio in ratios) > 0.9 * len(ratios)


def test_rows_without_audio_do_not_make_endless_batches():
    assert max(map(len, LengthBudgetBatches([0.0] * 1000, BUDGET, seed=3))) <= 256


@pytest.mark.parametrize(
    ("lengths", "num_processes", "message"),
    [
        ([1.0, 90.0], 1, r"row 1 has the length 90, but a batch may have 80"),
        ([1.0, float("nan")], 1, r"row 1 has the length nan"),
        ([1.0], 2, r"1 training row\(s\) for 2 processes"),
        # The largest batch, of one row, was halved: a process got a batch of none, and the collator failed.
        ([50.0] * 3, 2, r"3 training rows make no multiple of 2 batches"),
    ],
)
def test_what_fits_no_batch_is_an_error(lengths, num_processes, message):
    with pytest.raises(ValueError, match=message):
        LengthBudgetBatches(lengths, BUDGET, 3, num_processes)


@pytest.mark.long
def test_the_trainer_takes_such_batches_and_resumes(tmp_path, processor, collator):
    seconds = [len(row["audio"]["array"]) / 16_000 for row in many_rows()]

    def train(folder, resume=None):
        trainer = make_trainer(
            folder, processor, collator, save_strategy="steps", save_steps=4, max_steps=9, max_batch_length=3.0
        )
        trainer.train_dataset = trainer.train_dataset.add_column("length", seconds)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "a")
    assert len(whole.order) != NUM_ROWS
    resumed = train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    for (name, value), again in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert value.equal(again), name
