"""How far each layer is from PyTorch at most: held to a tolerance by the tests that compare them, and remembered.

A difference is relative to the largest value of an array, or to 1 where all are smaller.
"""

import numpy as np

OUTPUT, INPUT_GRADIENT, PARAMETER_GRADIENTS = WHATS = ("output", "input gradient", "parameter gradients")
# (layer, type, one of WHATS) -> the largest difference seen in this process.
LARGEST: dict[tuple[str, str, str], float] = {}


def hold(layer: str, what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """AssertionError where an element of ours is farther from theirs than the tolerance."""
    scale = max(1.0, float(np.abs(theirs).max()))
    difference = np.abs(ours - theirs)
    key = layer, np.dtype(ours.dtype).name, what
    LARGEST[key] = max(LARGEST.get(key, 0.0), float(difference.max()) / scale)
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=tolerance, err_msg=what)
