"""What is done to every feature before the first layer: scaling, or standardizing.

Rules: decided once, from the job and the training set; stored with the model, so that validation and prediction do the
same. The JSON form loses nothing: reading it back gives an equal object.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos import job_pb2
from worker.data.sources import Dataset
from worker.data.stored_array import BLOCK_BYTES, Progress, unwatched
from worker.errors import CheckpointFault, DataFault


@dataclass(frozen=True)
class Preprocessing:
    """x -> x * scale; or, where mean and deviation are given, x -> (x - mean) / deviation for each feature."""

    scale: float = 1.0
    mean: tuple[float, ...] | None = None  # one for each number of a sample, channels fastest
    deviation: tuple[float, ...] | None = None  # none of them 0

    def apply(self, raw: NDArray[Any], out: NDArray[Any]) -> None:
        """Write the features for `raw` (n, ...), in a stored type, into `out`: floats, C-contiguous, as many numbers.

        `raw` may be `out` itself. DataFault when a sample has another number of features than the training set.
        """
        if self.mean is not None:
            self._standardize(raw, out)
            return
        if raw is not out:
            np.copyto(out.reshape(raw.shape), raw)
        if self.scale != 1.0:
            np.multiply(out, self.scale, out=out)

    def _standardize(self, raw: NDArray[Any], out: NDArray[Any]) -> None:
        assert self.mean is not None
        width = math.prod(raw.shape[1:])
        if width != len(self.mean):
            raise DataFault(
                f"features of shape {raw.shape[1:]}, {width} a sample, do not fit the {len(self.mean)} "
                "that the model was standardized on; give samples of the same shape"
            )
        # The mean is subtracted in a type that holds the stored numbers: a time in seconds loses its digits in float32.
        wide = np.result_type(raw.dtype, out.dtype)
        key = (wide, out.dtype)
        if key not in self._columns:
            self._columns[key] = (np.array(self.mean, wide), (1.0 / np.array(self.deviation)).astype(out.dtype))
        mean, inverse = self._columns[key]
        rows, flat = raw.reshape(len(raw), width), out.reshape(len(out), width)
        np.subtract(rows, mean, out=flat, dtype=wide, casting="same_kind")
        np.multiply(flat, inverse, out=flat)

    @cached_property
    def _columns(self) -> dict[tuple[np.dtype[Any], np.dtype[Any]], tuple[NDArray[Any], NDArray[Any]]]:
        """(type of the subtraction, type of the output) -> (mean, 1 / deviation), made when first met."""
        return {}

    def to_json(self) -> str:
        """One line of JSON; numbers are written with all the digits they need."""
        if self.mean is None:
            return json.dumps({"scale": self.scale})
        return json.dumps({"mean": self.mean, "deviation": self.deviation})

    @classmethod
    def from_json(cls, text: str) -> "Preprocessing":
        """What `to_json` wrote; CheckpointFault when it is anything else."""
        try:
            fields = json.loads(text)
            if fields.keys() == {"scale"}:
                return cls(scale=float(fields["scale"]))
            mean, deviation = fields.pop("mean"), fields.pop("deviation")
            if fields or len(mean) != len(deviation):
                raise ValueError(f"{len(mean)} means, {len(deviation)} deviations, and {sorted(fields)}")
            return cls(mean=tuple(map(float, mean)), deviation=tuple(map(float, deviation)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointFault(
                f"the model's stored preprocessing is damaged ({error!r}, in {text[:80]!r}); use an intact model file"
            ) from None


def make_preprocessing(data: job_pb2.Data, train: Dataset, progress: Progress = unwatched) -> Preprocessing:
    """What the job asks for; with `standardize`, mean and deviation are taken over `train`, every rank alike."""
    if not data.standardize:
        return Preprocessing(scale=data.scale if data.HasField("scale") else 1.0)
    mean, deviation = mean_and_deviation(train, progress)
    return Preprocessing(mean=tuple(mean.tolist()), deviation=tuple(deviation.tolist()))


def mean_and_deviation(
    dataset: Dataset, progress: Progress = unwatched
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each feature over the samples, float64 (k,) each; the deviation is the population's, and 1 where it is 0.

    Two sets of n and b samples with means p and q and sums of squared deviations S and T have together
        mean = p + (q - p) b / (n + b)        sum = S + T + (q - p)^2 n b / (n + b)
    (T. Chan, G. Golub and R. LeVeque, 1979), so one pass in blocks is as exact as two over the whole set.
    """
    count, width = 0, math.prod(dataset.features.shape[1:])
    mean, squares = np.zeros(width), np.zeros(width)
    for block in _sample_blocks(dataset):
        progress()
        added = len(block)
        block_mean = block.mean(axis=0)
        block -= block_mean
        difference = block_mean - mean
        squares += np.einsum("ij,ij->j", block, block) + difference**2 * (count * added / (count + added))
        mean += difference * (added / (count + added))
        count += added
    variance = squares / count
    # What rounding alone leaves of a constant feature is no deviation (scikit-learn's StandardScaler draws this line).
    epsilon = np.finfo(np.float64).eps
    constant = variance <= count * epsilon * variance + (count * mean * epsilon) ** 2
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def _sample_blocks(dataset: Dataset) -> Iterator[NDArray[np.float64]]:
    """The samples in order, as float64 (block, k), a few megabytes at a time."""
    width = math.prod(dataset.features.shape[1:])
    block = max(1, BLOCK_BYTES // (8 * width))
    for start in range(0, len(dataset), block):
        run = slice(start, start + block)
        picked = dataset.features[run if dataset.rows is None else dataset.rows[run]]
        yield picked.reshape(len(picked), width).astype(np.float64)
