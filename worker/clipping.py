"""Keeping gradients small: by value, element by element, or by global norm, the whole gradient at once.

The global norm needs every element before the first may be used. Whoever holds a part of the vector adds up its
squares; one number a part is exchanged, and all scale by the same factor. Squares are summed in float64, so the result
does not depend on how the vector is cut.
"""

import math

import numpy as np
import numpy.typing as npt

from worker.optimizers import FloatArray, Optimizer, Ranges, State

NORM_FLOOR = 1e-6  # PyTorch's, in clip_grad_norm_


def clip_by_value(optimizer: Optimizer, limit: float) -> Optimizer:
    """The optimizer on a mean gradient with every element brought between -limit and limit."""

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        np.clip(g, -limit, limit, out=g)
        optimizer.update(p, g, state, step, learning_rate, decayed)

    first_pass = optimizer.direct
    if first_pass is None:
        return optimizer._replace(update=update)

    def direct(p: FloatArray, g: FloatArray, state: State, step: int, decayed: Ranges) -> None:
        np.clip(g, -limit, limit, out=g)
        first_pass(p, g, state, step, decayed)

    return optimizer._replace(direct=direct)


def sum_of_squares(values: npt.NDArray[np.float32]) -> float:
    """Of a piece of the gradient, in float64."""
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))


def norm_factor(square_sum: float, limit: float) -> float:
    """What brings a gradient whose squares add up to `square_sum` down to the norm `limit`; 1 if it is below."""
    return min(1.0, limit / (math.sqrt(square_sum) + NORM_FLOOR))
