"""Batches by total length instead of a fixed number of rows, so that the longest clips do not set the memory.

A batch costs its longest row times its number of rows, because rows are padded. Leaves out: what a length is; the rows
tell (`batch_order.py`).
"""

import math

import torch
from torch.utils.data import Sampler

# Rows whose lengths differ by less change places between epochs, so that batches differ from epoch to epoch.
CLASS_WIDTH = 1.05
# Text-only rows have the length 0; this bounds the number of them in a batch.
MAX_ROWS = 256
MAX_STEPS = int(math.log(MAX_ROWS) / math.log(CLASS_WIDTH))


class LengthBudgetBatches(Sampler):
    """Batches of rows of similar length whose padded length is at most a budget.

    Each epoch has the same number of batches, with the same numbers of rows, so that steps can be counted in advance
    and a resume can skip batches unread. The order of batches and the choice of rows among those of one length class
    follow from seed and epoch. Batches that several processes take at the same step are of similar length.

    Args:
        lengths (`list[float]`): one per row, for example seconds of audio.
        budget (`float`): largest number of rows times longest row of a batch, in the unit of the lengths.
        seed (`int`).
        num_processes (`int`): the number of batches is a multiple of it.

    Raises:
        ValueError: a row is longer than the budget, or rows cannot be shared out so that each process has as many
            batches: there are fewer rows than processes, or too many of them fill a batch alone.
    """

    batch_size = None  # accelerate asks: it differs between batches
    drop_last = False

    def __init__(self, lengths: list[float], budget: float, seed: int, num_processes: int = 1):
        if len(lengths) < num_processes:
            raise ValueError(
                f"There are {len(lengths)} training row(s) for {num_processes} processes. Use fewer processes."
            )
        for row, length in enumerate(lengths):
            if not length <= budget:
                raise ValueError(
                    f"Training row {row} has the length {length:.4g}, but a batch may have {budget:.4g}. Raise the "
                    "budget, or leave out longer rows."
                )
        self.seed, self.epoch, self.num_processes = seed, 0, num_processes
        self.classes = [_length_class(length, budget) for length in lengths]
        self.sizes = _split_to_multiple(_plan(sorted(self.classes), budget), num_processes)
        if 0 in self.sizes:
            raise ValueError(
                f"{len(lengths)} training rows make no multiple of {num_processes} batches, one per process, of up to "
                f"{budget:.4g}, because too many of them fill a batch alone. Raise the budget, or use another number "
                "of processes."
            )

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.classes), generator=generator).tolist()
        rows = iter(sorted(shuffled, key=self.classes.__getitem__))  # stable: random within a class
        batches = [[next(rows) for _ in range(size)] for size in self.sizes]
        rounds = [batches[start : start + self.num_processes] for start in range(0, len(batches), self.num_processes)]
        for number in torch.randperm(len(rounds), generator=generator).tolist():
            yield from rounds[number]


def _length_class(length: float, budget: float) -> int:
    """Return the number of steps of `CLASS_WIDTH` below the budget, negative, so that longer classes are greater."""
    return -min(int(math.log(budget / max(length, 1e-9)) / math.log(CLASS_WIDTH)), MAX_STEPS)


def _plan(classes: list[int], budget: float) -> list[int]:
    """Return the number of rows of each batch, for classes in ascending order."""
    sizes, size = [], 0
    for each in classes:
        # The longest length of class -k is budget / width^k, so width^k rows of it fill the budget.
        if size and size + 1 > CLASS_WIDTH**-each:
            sizes.append(size)
            size = 0
        size += 1
    return [*sizes, size]


def _split_to_multiple(sizes: list[int], divisor: int) -> list[int]:
    """Halve the largest batches until their number is a multiple of the divisor."""
    sizes = list(sizes)
    while len(sizes) % divisor:
        largest = sizes.index(max(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    return sizes
