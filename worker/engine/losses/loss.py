"""What a loss is to the model.

Rules: a loss is a sum over samples and so is its gradient; the exchange divides both by the m of the whole batch, which
makes them the means of the seed document. `forward` finds the loss and delta^[L] = dL/d(outputs) together, since they
share their exponentials; `backward` hands delta over. The cross-entropies take logits, never probabilities.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from worker.engine.params import FloatArray, Shape
from worker.errors import DataFault, ModelFault


class Totals(NamedTuple):
    """Sums over the samples of one call."""

    loss: float  # of the loss of each sample
    correct: float  # labels the model got right; nan where there are none to get right (mean_squared_error)
    samples: int


class Loss(Protocol):
    """One loss; outputs are (n, k), what the last layer returned."""

    def __init__(self, options: Any, output_shape: Shape) -> None: ...

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """Make the buffers for up to `batch_size` samples. `in_place`: delta may be written over the outputs."""

    def forward(self, outputs: FloatArray, targets: npt.NDArray[Any]) -> Totals:
        """The totals of n >= 1 samples; keeps delta."""

    def backward(self) -> FloatArray:
        """delta^[L] (n, k) of the last forward, which the caller may write over."""

    def predict(self, outputs: FloatArray) -> None:
        """Turn outputs into what a person wants to see, in place: probabilities for the cross-entropies."""

    def check_targets(self, targets: npt.NDArray[Any], place: str, first: int = 0) -> None:
        """DataFault when some target cannot belong to these outputs; `first` is the number of the first sample."""


def require_row(output_shape: Shape) -> int:
    """Number of values the model puts out for a sample; ModelFault unless they are one row."""
    if len(output_shape) != 1:
        raise ModelFault(f"got outputs of shape {output_shape}, needs one row of values: end with a dense layer")
    return output_shape[0]


def check_values(targets: npt.NDArray[Any], units: int, place: str, first: int = 0) -> None:
    """DataFault unless targets are finite values (n, units)."""
    if targets.ndim != 2 or targets.shape[1] != units:
        got = targets.shape[1] if targets.ndim == 2 else f"shape {targets.shape[1:]}"
        raise DataFault(f"{place}: {got} target values a sample, but the model has {units} outputs")
    if not np.isfinite(targets).all():
        row = int(np.argmin(np.isfinite(targets).all(axis=1)))
        raise DataFault(f"{place}: the target of sample {first + row} is not a finite number")
