"""Which rows make which batch, the same again after a resume and in every process.

The Trainer resumes by skipping batches of the sampler, unread by the workers; so order must follow from seed and epoch
alone. Leaves out: what becomes of the rows (`clips.py`).
"""

from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from modeling_blsp_kd import BlspKdTrainer

from .clips import BadClipError, ClipFeatures, lengths


def data_seed(args) -> int:
    return args.seed if args.data_seed is None else args.data_seed


class RowsInMemory(Dataset):
    """Training rows by number.

    Args:
        rows (`list[dict]`).
        lengths (`list[float]`): what batches are grouped by, one per row.
        hear ([`ClipFeatures`]).
    """

    def __init__(self, rows: list[dict], lengths: list[float], hear: ClipFeatures):
        self.rows, self.lengths, self.hear = rows, lengths, hear
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def voices(self) -> set:
        return {row.get("voice") for row in self.rows}

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        epoch = int(self.epoch)
        return self.hear([{**self.rows[index], "epoch": epoch} for index in indices])


class LengthGroupedOrder(Sampler):
    """transformers' order by length, but the same in every process and after a resume.

    `LengthGroupedSampler` draws from the global generator. That is as `set_seed` left it in the first epoch, and stays
    in use there. Later, dropout has moved it, differently in each process and after a resume: rows would be lost and
    doubled. So later epochs have a generator of their own.
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


class StreamedRows(Dataset):
    """A stream of rows that never ends.

    Its "indices" are the rows themselves: the batch sampler reads them in the main process, and a worker that is handed
    some decodes them. So each row is read once per process, whatever the number of workers, and a resume reads the rows
    that it skips but decodes none of them.

    Args:
        stream (`datasets.IterableDataset`): see `stream_sources`.
        hear ([`ClipFeatures`]).
        seed (`int`).
        length_buffer (`int`): batches that are sorted by length together.
        seconds_per_token (`float`): see [`lengths`].
    """

    def __init__(self, stream, hear: ClipFeatures, seed: int, length_buffer: int, seconds_per_token: float):
        self.stream, self.hear, self.seed = stream, hear, seed
        self.length_buffer, self.seconds_per_token = length_buffer, seconds_per_token
        self.num_rows, self.voices = 0, set()  # read so far; rows count once

    def __getitems__(self, rows: list[dict]) -> list[dict]:
        return self.hear(rows)


class StreamedBatches(Sampler):
    """Batches of rows of a similar length, without end: epochs follow each other in the middle of a batch."""

    drop_last = True  # there is no last one

    def __init__(self, dataset: StreamedRows, batch_size: int):
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self):
        data, buffer, number = self.dataset, [], count()
        tokenizer = data.hear.processor.tokenizer
        for row in self._rows():
            try:
                length = lengths([row], tokenizer, data.seconds_per_token)[0]
            except BadClipError as error:
                if data.hear.skipped is None:
                    raise
                data.hear.skipped.add(row, error)
                continue
            buffer.append((length, row))
            if len(buffer) == data.length_buffer * self.batch_size:
                buffer.sort(key=lambda pair: pair[0])
                generator = torch.Generator().manual_seed(data.seed + next(number))
                for start in torch.randperm(data.length_buffer, generator=generator).tolist():
                    yield [row for _, row in buffer[start * self.batch_size :][: self.batch_size]]
                buffer = []

    def _rows(self):
        for epoch in count():
            self.dataset.stream.set_epoch(epoch)
            row = None
            for row in self.dataset.stream:
                self.dataset.voices.add(row["voice"])
                self.dataset.num_rows += epoch == 0
                yield {**row, "epoch": epoch}
            if row is None:
                raise ValueError("The training data has no rows.")


class ReadsTrainingInput(Trainer):
    """A Trainer that reads [`RowsInMemory`] or [`StreamedRows`]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_TellEpoch(self))

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, StreamedRows):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=StreamedBatches(self.train_dataset, self._train_batch_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def _get_train_sampler(self, train_dataset=None):
        dataset, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        seed = data_seed(args)
        self.order = None
        if args.train_sampling_strategy == "group_by_length":
            batch_size = args.train_batch_size * args.gradient_accumulation_steps
            self.order = LengthGroupedOrder(dataset.lengths, batch_size, seed)
        elif args.train_sampling_strategy == "random":
            self.order = RandomOrder(len(dataset), seed)
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order


class TrainingInputTrainer(BlspKdTrainer, ReadsTrainingInput):
    """`BlspKdTrainer` over [`RowsInMemory`] or [`StreamedRows`]."""


class _TellEpoch(TrainerCallback):
    """Tells order and rows the epoch. The Trainer's own `set_epoch` does not reach the sampler of a resumed run of
    several processes (transformers 5.23, accelerate 1.15)."""

    def __init__(self, trainer: ReadsTrainingInput):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.train_dataset, RowsInMemory):
            self.trainer.train_dataset.epoch.fill_(int(state.epoch))
            if self.trainer.order is not None:
                self.trainer.order.epoch = int(state.epoch)
