"""Sigmoid, softmax and the normal tail, each written once: the layers and the losses' predictions share them.

Rules: stable for every finite input, in place where `out` is the input, warnings about overflow are the caller's to
silence (Model does).
"""

import math
from typing import Final

import numpy as np

from worker.engine.params import FloatArray

# T(a) e^(a^2/2) / t as a polynomial in t = 1 / (1 + a TAIL_SCALE), highest power first: fitted for the least largest
# relative error over 0 <= a <= 14, which is 3.2e-8.
TAIL_SCALE: Final = 0.35
TAIL_COEFFICIENTS: Final = (
    -0.0291463385,
    0.143973658,
    -0.255718241,
    0.159178629,
    -0.0231128427,
    0.105509244,
    0.119832563,
    0.13986191,
    0.139621402,
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
    Abramowitz and Stegun 7.1.25 to 28. In float32 that differs from T by at most 1.8e-7, and relatively by at most 8e-7
    up to a = 5 and 5e-6 up to a = 12, where 1 + erf would have no digit left. In float64, which only checks use, T is
    taken from Python's own error function, one value after the other.
    """
    np.multiply(a, a, out=bell)
    np.multiply(bell, -0.5, out=bell)
    np.exp(bell, out=bell)
    if a.dtype != np.float32:
        out[...] = np.reshape([math.erfc(value / math.sqrt(2)) / 2 for value in a.flat], a.shape)
        return
    t = np.multiply(a, TAIL_SCALE, out=scratch)
    np.add(t, 1, out=t)
    np.divide(1, t, out=t)
    np.multiply(t, TAIL_COEFFICIENTS[0], out=out)
    for coefficient in TAIL_COEFFICIENTS[1:-1]:
        np.add(out, coefficient, out=out)
        np.multiply(out, t, out=out)
    np.add(out, TAIL_COEFFICIENTS[-1], out=out)
    np.multiply(out, t, out=out)
    np.multiply(out, bell, out=out)
