"""Training rows as data sets: in memory, or streamed.

`BlspKdTrainer` batches rows in memory; a stream makes its own batches. `clips.py` turns rows into features.
"""

from itertools import count
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .clips import BadClipError, ClipFeatures, lengths
from .kept_teacher import TeacherOnDisk


class RowsInMemory(Dataset):
    """Training rows by number.

    Args:
        rows (`list[dict]`).
        lengths (`list[float]`): what batches are grouped by, one per row.
        clip_features ([`ClipFeatures`]).
        teacher ([`TeacherOnDisk`], *optional*): what the teacher predicts, which each row then brings.
    """

    def __init__(
        self,
        rows: list[dict],
        lengths: list[float],
        clip_features: ClipFeatures,
        teacher: TeacherOnDisk | None = None,
    ):
        self.rows, self.lengths, self.clip_features, self.teacher = rows, lengths, clip_features, teacher
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch: int):
        """Tell the rows, also in workers that are running, in which epoch they are read."""
        self.epoch.fill_(epoch)

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
        rows = self.clip_features([{**self.rows[index], "epoch": epoch} for index in indices])
        return rows if self.teacher is None else [{**row, "kept_teacher": self.teacher(row)} for row in rows]


class StreamedRows(Dataset):
    """A stream of rows that never ends.

    Its "indices" are the rows themselves: the batch sampler reads them in the main process, and the workers that
    receive them decode the audio. So each row is read once per process, whatever the number of workers, and a resume
    reads the rows that it skips but decodes none of them.

    Args:
        stream (`datasets.IterableDataset`): see `stream_sources`.
        clip_features ([`ClipFeatures`]).
        seed (`int`).
        length_buffer (`int`): batches that are sorted by length together.
        seconds_per_token (`float`): see [`lengths`].
    """

    teacher = None  # rows of a stream are not known before, so none is kept

    def __init__(
        self, stream: Any, clip_features: ClipFeatures, seed: int, length_buffer: int, seconds_per_token: float
    ):
        self.stream, self.clip_features, self.seed = stream, clip_features, seed
        self.length_buffer, self.seconds_per_token = length_buffer, seconds_per_token
        self.num_rows = 0  # read so far; rows count once
        self.voices: set[str] = set()

    def batch_sampler(self, batch_size: int) -> "StreamedBatches":
        """Return the batches of one process."""
        return StreamedBatches(self, batch_size)

    def __getitems__(self, rows: list[dict]) -> list[dict]:
        return self.clip_features(rows)


class StreamedBatches(Sampler):
    """Batches of rows of a similar length, without end: epochs follow each other in the middle of a batch."""

    drop_last = True  # there is no last one

    def __init__(self, dataset: StreamedRows, batch_size: int):
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self):
        data, buffer, number = self.dataset, [], count()
        tokenizer = data.clip_features.processor.tokenizer
        for row in self._rows():
            try:
                length = lengths([row], tokenizer, data.seconds_per_token)[0]
            except BadClipError as error:
                if data.clip_features.skipped is None:
                    raise
                data.clip_features.skipped.add(row, error)
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
