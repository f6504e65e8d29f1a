"""Trust ratios: how far each weight tensor may go, by its norm over its step's (You et al. 2020).

A ratio needs the whole tensor before its first element may move, and whoever runs an optimizer holds only a part of the
vector. So an optimizer with trust ratios takes its step in two passes (`Optimizer.direct`, then `update`); between
them everyone's sums of squares are added up here. Sums are float64, so the result does not depend on how the vector is
cut.

Rules: a tensor is a range that weight decay applies to; biases and normalizations have none, and a ratio of 1. So it
is in the authors' code (TensorFlow Addons' LAMB), where what is excluded from decay is excluded from adaptation too.
"""

import numpy as np
import numpy.typing as npt

from worker.clipping import sum_of_squares
from worker.optimizers import CHUNK_ELEMENTS, FloatArray, Ranges

# (tensors, 2): sums over each tensor's weights squared and over its direction squared.
SquareSums = npt.NDArray[np.float64]


def tensors_within(decayed: Ranges, start: int, stop: int) -> slice:
    """Which of the vector's tensors, in the order of `decayed`, lie at least partly between start and stop."""
    first = sum(last <= start for _, last in decayed)
    return slice(first, first + sum(first < stop and start < last for first, last in decayed))


def add_square_sums(sums: SquareSums, parameters: FloatArray, direction: FloatArray, decayed: Ranges) -> None:
    """Add to row i of `sums` what range i of these arrays holds of its tensor."""
    for row, (first, last) in zip(sums, decayed, strict=True):
        for start in range(first, last, CHUNK_ELEMENTS):
            piece = slice(start, min(start + CHUNK_ELEMENTS, last))
            row += sum_of_squares(parameters[piece]), sum_of_squares(direction[piece])


def trust_ratios(sums: SquareSums) -> npt.NDArray[np.float64]:
    """||W|| / ||direction|| of each tensor; 1 where either is 0, so that a tensor of zeros can leave them."""
    weights, directions = np.sqrt(sums.T)
    ratios = np.ones(len(sums))
    np.divide(weights, directions, out=ratios, where=(weights > 0) & (directions > 0))
    return ratios


def scale(direction: FloatArray, decayed: Ranges, ratios: npt.NDArray[np.float64]) -> None:
    """Multiply range i of `direction` by ratio i."""
    for (first, last), ratio in zip(decayed, ratios, strict=True):
        np.multiply(direction[first:last], float(ratio), out=direction[first:last])
