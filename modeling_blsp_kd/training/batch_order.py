"""The order of rows in batches: the same after a resume and in every process.

The Trainer resumes by skipping batches of the sampler, which workers do not read. So the order must follow from seed
and epoch alone. `BlspKdTrainer` has it; another Trainer gets it from [`ExactOrder`].
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import seed_worker

from .length_budget import LengthBudgetBatches


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of rows of `TrainingArguments`."""
    return args.seed if args.data_seed is None else args.data_seed


class LengthGroupedOrder(Sampler):
    """transformers' order by length, but the same in every process and after a resume.

    `LengthGroupedSampler` draws from the global generator. In the first epoch, `set_seed` determines its state, so
    it is used there. Later, dropout has advanced it, differently in each process and after a resume, and rows would be
    lost and doubled. So later epochs have a generator of their own.
    """

    def __init__(self, lengths: list[float], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch) if self.epoch else None
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class RandomOrder(Sampler):
    """Any order, the same in every process and after a resume."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed, self.epoch = num_rows, seed, 0

    def __len__(self):
        return self.num_rows

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.num_rows, generator=generator).tolist())


class EndlessRows(IterableDataset):
    """The rows of a data set that only iterates, again and again.

    The Trainer counts all passes over such rows as one epoch, and a resume skips batches in the first pass alone. Here
    passes follow each other in the middle of a batch, so that the training is one pass, and skipping goes through all.

    Args:
        dataset (`IterableDataset`): its `set_epoch`, if it has one, is called before each pass.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            has_rows = False
            for row in self.dataset:
                has_rows = True
                yield row
            if not has_rows:  # of a worker without a share, or none at all
                return


class ExactOrder(Trainer):
    """A Trainer that neither loses nor doubles rows after a resume, and with several processes.

    Orders are "random", "sequential" and "group_by_length". Lengths are the column `length_column_name` of a
    `datasets.Dataset`, the attribute `lengths` of another data set, or that field of each of its rows.

    A data set without numbered rows may make its own batches, in a method `batch_sampler(batch_size)`. The method
    `set_epoch` of a data set, if it has one, is called before each epoch, also after a resume.

    An `IterableDataset` keeps its own order. One without a length is read as one epoch without end ([`EndlessRows`]),
    until `max_steps`; a resume reads the rows that it skips again.

    Args:
        max_batch_length (`float`, *optional*): make batches of up to this padded length, in the unit of the lengths,
            instead of `per_device_train_batch_size` rows; see [`LengthBudgetBatches`].
    """

    train_dataset: Any  # of the Trainer, whose types are not known here

    def __init__(self, *args, max_batch_length: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.order: RandomOrder | LengthGroupedOrder | LengthBudgetBatches | None = None
        self.max_batch_length = max_batch_length
        # Of all processes at the last step of an epoch, where a part of a batch is left; None: as accelerate counts.
        self.num_last_rows: int | None = None
        self.args.remove_unused_columns = False  # the collator knows which it reads
        self.add_callback(_TellEpoch(self))
        # Otherwise accelerate has the first process read an `IterableDataset` for all, and joins their batches, which
        # are padded to different lengths.
        self.accelerator.dataloader_config.dispatch_batches = False

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        # Of one process; `auto_find_batch_size` may have lowered it.
        batch_size = self.get_total_train_batch_size(args) // (args.gradient_accumulation_steps * args.world_size)
        batch_sampler = self._batch_sampler(batch_size)
        self.num_last_rows = None
        batching: dict[str, Any] = {"batch_sampler": batch_sampler}
        if batch_sampler is None:
            if hasattr(dataset, "__len__") and not args.dataloader_drop_last:
                # accelerate forgets it in an epoch that is resumed in its middle.
                self.num_last_rows = len(dataset) % (batch_size * args.world_size)
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                return self._dataloader_without_sampler()
            batching = {"batch_size": batch_size, "sampler": self._sampler(), "drop_last": args.dataloader_drop_last}
        loader = DataLoader(
            dataset,
            **batching,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
        )
        even_batches = self.accelerator.even_batches
        if batch_sampler is not None and batch_sampler.batch_size is None:
            self.accelerator.even_batches = False  # accelerate before 1.15 evens no batches of different sizes
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even_batches

    def _dataloader_without_sampler(self) -> DataLoader:
        """Return the Trainer's own loader, for a data set that keeps its own order."""
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__"):
            self.train_dataset = EndlessRows(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _batch_sampler(self, batch_size: int) -> Sampler | None:
        """Return what makes whole batches; None if the loader makes them of single rows."""
        dataset, args = self.train_dataset, self.args
        is_by_length = self.max_batch_length is not None or args.train_sampling_strategy == "group_by_length"
        if is_by_length and isinstance(dataset, IterableDataset):
            raise ValueError(
                "Grouping by length (train_sampling_strategy='group_by_length', or max_batch_length) needs all rows by "
                f"number, but train_dataset is an IterableDataset ({type(dataset).__name__}). Leave it out, or pass a "
                "list, a datasets.Dataset or another torch Dataset."
            )
        if self.max_batch_length is not None:
            lengths = row_lengths(dataset, args.length_column_name)
            self.order = LengthBudgetBatches(lengths, self.max_batch_length, data_seed(args), args.world_size)
            return self.order
        if hasattr(dataset, "batch_sampler"):
            return dataset.batch_sampler(batch_size)
        return None

    def _sampler(self) -> Sampler:
        """Return the order of single rows, of which the loader makes batches."""
        dataset, args = self.train_dataset, self.args
        if args.train_sampling_strategy == "group_by_length":
            batch_size = args.train_batch_size * args.gradient_accumulation_steps
            self.order = LengthGroupedOrder(row_lengths(dataset, args.length_column_name), batch_size, data_seed(args))
        elif args.train_sampling_strategy == "random":
            self.order = RandomOrder(len(dataset), data_seed(args))
        else:
            self.order = None
            return SequentialSampler(dataset)
        return self.order


def row_lengths(dataset: Any, column: str) -> list[float]:
    """Return the length of each row of a data set, see [`ExactOrder`].

    Raises:
        ValueError: the rows have no such field.
    """
    if hasattr(dataset, "lengths"):
        return dataset.lengths
    try:
        if column in getattr(dataset, "column_names", ()):
            return list(dataset[column])
        # By number, because a data set of torch need not end when it is iterated.
        return [dataset[number][column] for number in range(len(dataset))]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "Grouping by length (train_sampling_strategy='group_by_length', or max_batch_length) needs the field "
            f"{column!r} in every row of train_dataset, for example seconds of audio."
        ) from error


class _TellEpoch(TrainerCallback):
    """Tells order and rows the epoch. The Trainer's own `set_epoch` does not reach the sampler of a resumed run of
    several processes (transformers 5.23, accelerate 1.15)."""

    def __init__(self, trainer: ExactOrder):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))
        if self.trainer.order is not None:
            self.trainer.order.epoch = int(state.epoch)
