"""Initial weights.

Rules: weights in front of a rectifier are drawn as He et al. advise, all others as Glorot and Bengio; biases start at
zero, the factors of a normalization at one. Each parameter has a generator of its own, seeded by (seed, parameter name)
alone, so that every rank, every world size and every process starts alike, and adding a layer at the end changes no
weight before it.
"""

import hashlib
import math

import numpy as np

from worker.engine.params import FloatArray, Parameter


def fill(values: FloatArray, parameter: Parameter, seed: int) -> None:
    """Write the initial values of one parameter, under its full name ("0.dense.weight"), in place.

    Values are drawn in float32 and then rounded to the type of `values`.
    """
    if parameter.is_bias:
        values[...] = parameter.initial
    elif parameter.is_rectified:
        values[...] = he_normal(parameter, generator(seed, parameter.name))
    else:
        values[...] = glorot_uniform(parameter, generator(seed, parameter.name))


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator that depends on seed and name alone (`hash()` differs from process to process, SHA-256 does not)."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")])))


def he_normal(parameter: Parameter, random: np.random.Generator) -> FloatArray:
    """Normal with variance 2 / ((1 + slope^2) fan_in).

    A rectifier keeps (1 + slope^2)/2 of its input's second moment, and a sum over fan_in inputs multiplies it by
    fan_in Var(w): this variance keeps the signal's size from layer to layer. (He et al. 2015, equations 10 and 15.)
    """
    deviation = math.sqrt(2.0 / ((1.0 + parameter.slope**2) * parameter.fan_in))
    values = random.standard_normal(parameter.shape, dtype=np.float32)
    values *= np.float32(deviation)
    return values


def glorot_uniform(parameter: Parameter, random: np.random.Generator) -> FloatArray:
    """Uniform within +-sqrt(6 / (fan_in + fan_out)), of variance 2 / (fan_in + fan_out).

    Var(w) = 1/fan_in would keep the signal's size forward, 1/fan_out the gradient's size backward; this is between.
    (Glorot and Bengio 2010, equation 16.)
    """
    limit = math.sqrt(6.0 / (parameter.fan_in + parameter.fan_out))
    values = random.random(parameter.shape, dtype=np.float32)
    values *= np.float32(2.0 * limit)
    values -= np.float32(limit)
    return values
