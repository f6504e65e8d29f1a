"""Optimizers, sorted by increasing complexity.

Rules: an optimizer is two functions and its state is named 1-D arrays, so the same code serves a rank's slice, a
parameter server's chunk and a checkpoint. Everything is in place and element by element: cutting the vector anywhere
changes no result; what a step needs of whole tensors is added up between two passes (trust_ratio.py). The gradient is
the mean over the batch and becomes scratch space, so no step allocates. Work goes slice by slice, so that the several
passes over a slice find it in the processor's cache. Formulas and conventions are PyTorch's.

The scale of the moments: `first_moment` and `second_moment` hold the plain sums m <- b1 m + g and v <- b2 v + g^2.
The textbook's averages are (1 - b1) m and (1 - b2) v; those factors are folded into the learning rate and epsilon,
which saves two passes over the data.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.errors import UsageFault

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
State: TypeAlias = dict[str, FloatArray]
Ranges: TypeAlias = Sequence[tuple[int, int]]

# Slices of 64K float32 are 256 KB: parameters, gradient and two moments of a slice stay in a second-level cache of
# 1 MB. On 0.1, 0.5 and 5.8 million parameters Adam took 0.09, 0.46 and 6.8 ms; with 8K slices, where the cost of the
# calls shows, 0.13, 0.70 and 9.4; in a single slice 0.09, 0.47 and 8.3.
CHUNK_ELEMENTS: Final = 65536


class Optimizer(NamedTuple):
    """How a parameter vector, or any part of it, takes a step."""

    # init(length, dtype): the state of that many parameters, zeros, by name; may be empty.
    init: Callable[[int, npt.DTypeLike], State]
    # update(parameters, gradient, state, step, learning_rate, decayed): one step, in place on 1-D arrays of one length.
    # The gradient is the mean over the batch and is overwritten; steps count from 1; `decayed` are the ranges
    # (start, stop) of these arrays that weight decay applies to.
    update: Callable[[FloatArray, FloatArray, State, int, float, Ranges], None]
    # direct(parameters, gradient, state, step, decayed): where there is one, it comes first. The gradient becomes the
    # step's direction; trust_ratio.py scales that, and `update` takes it in the gradient's place.
    direct: Callable[[FloatArray, FloatArray, State, int, Ranges], None] | None = None


def sgd(options: job_pb2.SgdOptimizer) -> Optimizer:
    """W := W - eta dL/dW (seed document, "Weight & Bias Update")."""

    return Optimizer(_zeros(), _descend)


def _descend(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
    (rate,) = _numbers(p.dtype, float(learning_rate))
    for _, (w, d) in _pieces(p, g):
        np.multiply(d, rate, out=d)
        np.subtract(w, d, out=w)


def momentum(options: job_pb2.MomentumOptimizer) -> Optimizer:
    """The velocity gathers gradients, v <- mu v + g, and W := W - eta v (seed document, "Add velocity term").

    Nesterov's step looks one velocity ahead: W := W - eta (g + mu v), as PyTorch rewrites Sutskever et al. 2013.
    """
    mu, nesterov = options.momentum, options.nesterov

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        rate, ahead, keep = _numbers(p.dtype, float(learning_rate), float(learning_rate) * (mu if nesterov else 1), mu)
        for _, (w, d, v) in _pieces(p, g, state["velocity"]):
            np.multiply(v, keep, out=v)
            np.add(v, d, out=v)
            if nesterov:
                np.multiply(d, rate, out=d)
                np.subtract(w, d, out=w)
            np.multiply(v, ahead, out=d)
            np.subtract(w, d, out=w)

    return Optimizer(_zeros("velocity"), update)


def adagrad(options: job_pb2.AdagradOptimizer) -> Optimizer:
    """Each element's rate falls with its squared gradients: s <- s + g^2, W := W - eta g / (sqrt(s) + eps).

    Duchi, Hazan and Singer 2011.
    """
    epsilon = options.epsilon

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        rate, floor = _numbers(p.dtype, float(learning_rate), epsilon)
        for _, (w, d, s) in _pieces(p, g, state["square_sum"]):
            t = scratch(w)
            np.multiply(d, d, out=t)
            np.add(s, t, out=s)
            np.sqrt(s, out=t)
            np.add(t, floor, out=t)
            np.divide(d, t, out=d)
            np.multiply(d, rate, out=d)
            np.subtract(w, d, out=w)

    scratch = _scratch()
    return Optimizer(_zeros("square_sum"), update)


def lion(options: job_pb2.LionOptimizer) -> Optimizer:
    """Only the sign of c = b1 m + (1 - b1) g counts; then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2).

    W := W - eta (sign(c) + lambda W); only `decayed` ranges have the second term. The average is (1 - b2) m of the sum
    m kept here, so c has the sign of k m + g with k = b1 (1 - b2)/(1 - b1).
    """
    b1, b2, weight_decay = options.beta1, options.beta2, options.weight_decay
    k = b1 * (1 - b2) / (1 - b1)

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        rate, keep, ahead, fading = _numbers(
            p.dtype, float(learning_rate), 1 - float(learning_rate) * weight_decay, k, b2
        )
        for start, (w, d, m) in _pieces(p, g, state["first_moment"]):
            t = scratch(w)
            if weight_decay:
                for first, last in _within(decayed, start, start + len(w)):
                    np.multiply(p[first:last], keep, out=p[first:last])
            np.multiply(m, ahead, out=t)
            np.add(t, d, out=t)
            np.multiply(m, fading, out=m)
            np.add(m, d, out=m)
            np.sign(t, out=t)
            np.multiply(t, rate, out=t)
            np.subtract(w, t, out=w)

    scratch = _scratch()
    return Optimizer(_zeros("first_moment"), update)


def rmsprop(options: job_pb2.RmspropOptimizer) -> Optimizer:
    """W := W - eta g / (sqrt(V) + eps) with V the mean square, V <- a V + (1 - a) g^2 (Tieleman and Hinton 2012).

    V = (1 - a) v of the sum v kept here, so with c = sqrt(1 - a) the step is (eta/c) g / (sqrt(v) + eps/c). Momentum
    gathers what follows eta, as PyTorch has it: b <- mu b + g / (sqrt(V) + eps), W := W - eta b.
    """
    a, mu = options.alpha, options.momentum
    c = math.sqrt(1 - a)
    floor = options.epsilon / c

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        rate, fading, least, keep = _numbers(p.dtype, float(learning_rate) / c, a, floor, mu)
        for start, (w, d, v) in _pieces(p, g, state["square_sum"]):
            t = scratch(w)
            np.multiply(v, fading, out=v)
            np.multiply(d, d, out=t)
            np.add(v, t, out=v)
            np.sqrt(v, out=t)
            np.add(t, least, out=t)
            np.divide(d, t, out=d)
            if mu:
                b = state["velocity"][start : start + len(w)]
                np.multiply(b, keep, out=b)
                np.add(b, d, out=b)
                np.multiply(b, rate, out=d)
            else:
                np.multiply(d, rate, out=d)
            np.subtract(w, d, out=w)

    scratch = _scratch()
    return Optimizer(_zeros("square_sum", "velocity") if mu else _zeros("square_sum"), update)


def adam(options: job_pb2.AdamOptimizer | job_pb2.AdamwOptimizer, weight_decay: float = 0.0) -> Optimizer:
    """Kingma and Ba 2015, algorithm 1 (seed document, "Adaptive learning rates").

    With averages M = (1 - b1) m and V = (1 - b2) v of the sums m and v kept here, the paper's step is
    eta (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps). Let c1 = (1 - b1)/(1 - b1^t), c2 = sqrt((1 - b2)/(1 - b2^t)):
    that is eta c1 m / (c2 sqrt(v) + eps) = (eta c1/c2) m / (sqrt(v) + eps/c2).
    """
    b1, b2, epsilon = options.beta1, options.beta2, options.epsilon

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        c1 = (1 - b1) / (1 - b1**step)
        c2 = math.sqrt((1 - b2) / (1 - b2**step))
        rate, floor, keep, fading, fading_squares = _numbers(
            p.dtype, float(learning_rate) * c1 / c2, epsilon / c2, 1 - float(learning_rate) * weight_decay, b1, b2
        )
        for start, (w, d, m, v) in _pieces(p, g, state["first_moment"], state["second_moment"]):
            if weight_decay:
                for first, last in _within(decayed, start, start + len(w)):
                    np.multiply(p[first:last], keep, out=p[first:last])
            np.multiply(m, fading, out=m)
            np.add(m, d, out=m)
            np.multiply(v, fading_squares, out=v)
            np.multiply(d, d, out=d)
            np.add(v, d, out=v)
            np.sqrt(v, out=d)
            np.add(d, floor, out=d)
            np.divide(m, d, out=d)
            np.multiply(d, rate, out=d)
            np.subtract(w, d, out=w)

    return Optimizer(_zeros("first_moment", "second_moment"), update)


def adamw(options: job_pb2.AdamwOptimizer) -> Optimizer:
    """Adam with decoupled decay: W := (1 - eta lambda) W before Adam's step (Loshchilov and Hutter 2019).

    Only `decayed` ranges shrink: weights do, biases do not.
    """
    return adam(options, options.weight_decay)


def lamb(options: job_pb2.LambOptimizer) -> Optimizer:
    """Each weight tensor goes as far as its norm allows: W := W - eta (||W|| / ||r||) r (You et al. 2020, algorithm 2).

    The direction is Adam's with decay, r = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) + lambda W; as in `adam` that
    is (c1/c2) m / (sqrt(v) + eps/c2) + lambda W. The norms' quotient is the trust ratio, 1 for biases.
    """
    b1, b2, epsilon, weight_decay = options.beta1, options.beta2, options.epsilon, options.weight_decay

    def direct(p: FloatArray, g: FloatArray, state: State, step: int, decayed: Ranges) -> None:
        c1 = (1 - b1) / (1 - b1**step)
        c2 = math.sqrt((1 - b2) / (1 - b2**step))
        size, floor, decay, fading, fading_squares = _numbers(p.dtype, c1 / c2, epsilon / c2, weight_decay, b1, b2)
        for start, (d, m, v) in _pieces(g, state["first_moment"], state["second_moment"]):
            t = scratch(d)
            np.multiply(m, fading, out=m)
            np.add(m, d, out=m)
            np.multiply(v, fading_squares, out=v)
            np.multiply(d, d, out=d)
            np.add(v, d, out=v)
            np.sqrt(v, out=d)
            np.add(d, floor, out=d)
            np.divide(m, d, out=d)
            np.multiply(d, size, out=d)
            if weight_decay:
                for first, last in _within(decayed, start, start + len(d)):
                    shrinking = t[: last - first]
                    np.multiply(p[first:last], decay, out=shrinking)
                    np.add(g[first:last], shrinking, out=g[first:last])

    scratch = _scratch()
    return Optimizer(_zeros("first_moment", "second_moment"), _descend, direct)


OPTIMIZERS: Final[dict[str, Callable[[Any], Optimizer]]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "lion": lion,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
}


def make_optimizer(spec: job_pb2.Optimizer) -> Optimizer:
    """The optimizer a resolved job names. UsageFault when it names none or a setting is absent."""
    options = _options(spec)
    return OPTIMIZERS[spec.WhichOneof("kind") or ""](options)


def base_learning_rate(spec: job_pb2.Optimizer) -> float:
    """The learning rate a resolved job gives. UsageFault as for make_optimizer."""
    return float(_options(spec).learning_rate)


def _options(spec: job_pb2.Optimizer) -> Any:
    """The message of the optimizer named; an absent setting would read as 0 and quietly train nothing."""
    kind = spec.WhichOneof("kind")
    if kind is None:
        raise UsageFault(f"optimizer: names none of {', '.join(OPTIMIZERS)}")
    options = getattr(spec, kind)
    absent = [field.name for field in options.DESCRIPTOR.fields if not options.HasField(field.name)]
    if absent:
        raise UsageFault(f"optimizer.{kind}.{absent[0]}: is absent, a resolved job has every setting")
    return options


def _pieces(*arrays: FloatArray) -> Iterable[tuple[int, tuple[FloatArray, ...]]]:
    """Arrays of one length in slices that stay in cache: where each begins, and the slice of every array."""
    length = len(arrays[0])
    if length <= CHUNK_ELEMENTS:  # as an exchange gives them, which has cut its arrays once
        return ((0, arrays),)
    starts = range(0, length, CHUNK_ELEMENTS)
    return ((start, tuple(array[start : start + CHUNK_ELEMENTS] for array in arrays)) for start in starts)


@lru_cache(maxsize=64)
def _numbers(dtype: np.dtype[Any], *values: float) -> tuple[FloatArray, ...]:
    """What arrays of `dtype` are multiplied by: an array without dimensions costs a call 0.3 us less than a float."""
    return tuple(np.array(value, dtype) for value in values)


def _within(ranges: Ranges, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of `ranges` that lie between start and stop."""
    for first, last in ranges:
        if first < stop and start < last:
            yield max(first, start), min(last, stop)


def _scratch() -> Callable[[FloatArray], FloatArray]:
    """Room for one slice's intermediate values, made at the first step and used at every other."""
    room: State = {}

    def like(w: FloatArray) -> FloatArray:
        kept = room.get(w.dtype.char)
        if kept is None or len(kept) < len(w):
            kept = room[w.dtype.char] = np.empty_like(w)
        return kept[: len(w)]

    return like


def _zeros(*names: str) -> Callable[[int, npt.DTypeLike], State]:
    """The `init` of a state whose arrays have these names."""
    return lambda length, dtype: {name: np.zeros(length, dtype) for name in names}
