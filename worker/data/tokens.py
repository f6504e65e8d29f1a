"""Tokens of a data set, held against a vocabulary before the first step.

Rules: samples are read as training will read them, preprocessed and in blocks of a few megabytes, each once. Bytes that
no vocabulary of 256 can refuse are not read.
"""

import numpy as np
from numpy.typing import NDArray

from worker.data.batches import BatchReader
from worker.data.preprocessing import Preprocessing
from worker.data.sources import Dataset
from worker.data.stored_array import BLOCK_BYTES, Progress, unwatched
from worker.data.text import LARGEST_BYTE
from worker.engine.layers.embedding import Embedding, token_fault
from worker.engine.params import FloatArray
from worker.errors import DataFault


def check_tokens(
    dataset: Dataset, preprocessing: Preprocessing, embedding: Embedding, progress: Progress = unwatched
) -> None:
    """DataFault naming the file, the sample and the value of the first that is no token of the vocabulary."""
    bytes_as_they_are = dataset.features.dtype == np.uint8 and preprocessing == Preprocessing()
    if bytes_as_they_are and embedding.vocabulary > LARGEST_BYTE:
        return
    samples = len(dataset)
    block = max(1, min(samples, BLOCK_BYTES // (4 * embedding.tokens_per_sample)))
    reader = BatchReader(dataset, preprocessing, block)
    for start in range(0, samples, block):
        progress()
        numbers = np.arange(start, min(start + block, samples))
        features, _ = reader.take(numbers)
        check_batch(features, numbers if dataset.rows is None else dataset.rows[numbers], embedding, dataset.place)


def check_batch(features: FloatArray, numbers: NDArray[np.int64], embedding: Embedding, place: str) -> None:
    """DataFault for the first of these samples, of such `numbers` in the file, that holds what is no token."""
    wrong = embedding.wrong_tokens(features)
    if wrong is None:
        return
    first = np.unravel_index(int(wrong.argmax()), wrong.shape)
    what = token_fault(float(features[first]), embedding.vocabulary)
    raise DataFault(f"{place}: sample {numbers[first[0]]} (counted from 0) has {what}")
