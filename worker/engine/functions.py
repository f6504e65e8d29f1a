"""Sigmoid and softmax, each written once: the layers and the losses' predictions share them.

Rules: stable for every finite input, in place where `out` is the input, warnings about overflow are the caller's to
silence (Model does).
"""

import numpy as np

from worker.engine.params import FloatArray


def sigmoid(z: FloatArray, out: FloatArray) -> None:
    """f(z) = 1 / (1 + e^-z).

    For z below -88 (float32) e^-z overflows to infinity and f is 0, its limit; no smaller value loses its digits, as
    they would with (1 + tanh(z/2)) / 2.
    """
    np.negative(z, out=out)
    np.exp(out, out=out)
    np.add(out, 1, out=out)
    np.divide(1, out, out=out)


def softmax(z: FloatArray, out: FloatArray) -> None:
    """f(z)_i = e^z_i / sum_j e^z_j for each row of z (n, k).

    The row's largest value is subtracted first: numerator and denominator shrink alike and no e^z overflows.
    """
    np.subtract(z, z.max(axis=1, keepdims=True), out=out)
    np.exp(out, out=out)
    np.divide(out, out.sum(axis=1, keepdims=True), out=out)
