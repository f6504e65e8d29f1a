"""Holding samples out of training.

Rules: which samples are held out depends on their number, the fraction and the seed alone; never on the number of
ranks or the epoch. Both parts are views of the same arrays, in stored order.
"""

from dataclasses import replace

import numpy as np

from worker.data.sharding import HELD_OUT, permutation
from worker.data.sources import Dataset
from worker.errors import DataFault


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation): `fraction` of the samples, 0 < fraction < 1, to the nearest whole number, is held out.

    Each part gets at least one sample; DataFault when there are not two.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    samples = len(dataset)
    if samples < 2:
        raise DataFault(f"{dataset.place}: holds {samples} sample, too few to hold any out; drop validation_fraction")
    held_out = min(max(round(samples * fraction), 1), samples - 1)
    shuffled = permutation(samples, seed, HELD_OUT)
    rows = np.arange(samples) if dataset.rows is None else dataset.rows
    validation, train = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])
    return replace(dataset, rows=rows[train]), replace(dataset, rows=rows[validation])
