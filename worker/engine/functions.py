"""Sigmoid, softmax and the normal tail, each written once: the layers and the losses' predictions share them.

Rules: stable for every finite input, in place where `out` is the input, warnings about overflow are the caller's to
silence (Model does).
"""

import math
from typing import Final

import numpy as np

from worker.engine.params import FloatArray

# T(a) e^(a^2/2) as a polynomial in t = 1 / (a + TAIL_SHIFT) that is 0 at t = 0, highest power first: fitted for the
# least largest relative error over 0 <= a <= 14, which is 2.1e-7. Each further coefficient takes two passes.
TAIL_SHIFT: Final = 2.4
TAIL_COEFFICIENTS: Final = (
    -47.5834061,
    92.2374269,
    -63.4344333,
    13.3167321,
    0.938231032,
    2.03243931,
    0.951840995,
    0.399040072,
)


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


def normal_tail(a: FloatArray, bell: FloatArray, scratch: FloatArray, out: FloatArray) -> None:
    """T(a) = (1 - erf(a / sqrt 2)) / 2, the standard normal's share beyond a, for a >= 0; `bell` gets e^(-a^2/2).

    NumPy has no error function. T is `bell` times a function that falls slowly, here t times a polynomial in t as in
    Abramowitz and Stegun 7.1.25 to 28. In float32 that differs from T by at most 2.2e-7, and relatively by at most 1e-6
    up to a = 5 and 5e-6 up to a = 12, where 1 + erf would have no digit left. In float64, which only checks use, T is
    taken from Python's own error function, one value after the other.
    """
    np.multiply(a, a, out=bell)
    np.multiply(bell, -0.5, out=bell)
    np.exp(bell, out=bell)
    if a.dtype != np.float32:
        out[...] = np.reshape([math.erfc(value / math.sqrt(2)) / 2 for value in a.flat], a.shape)
        return
    t = np.add(a, TAIL_SHIFT, out=scratch)
    np.divide(1, t, out=t)
    np.multiply(t, TAIL_COEFFICIENTS[0], out=out)
    for coefficient in TAIL_COEFFICIENTS[1:]:
        np.add(out, coefficient, out=out)
        np.multiply(out, t, out=out)
    np.multiply(out, bell, out=out)
