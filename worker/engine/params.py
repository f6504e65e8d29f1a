"""The flat parameter vector: which parameter lies where.

Rules: all parameters of a model are one 1-D array and all gradients another; layers hold views of them and write in
place (`w[...] = x`, never `w = x`). Slots follow each other without gaps in layer order, so during backward the
finished gradient is always a suffix of the vector.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Shape: TypeAlias = tuple[int, ...]


class Parameter(NamedTuple):
    """One array of a layer, trained or (as a bias is described) kept as state, as the layer describes it."""

    name: str  # within the layer: "weight"
    shape: Shape
    fan_in: int  # inputs that feed one output; 0 for a bias
    fan_out: int  # outputs that one input feeds; 0 for a bias
    initial: float = 0.0  # where a bias starts; the factors of a normalization are biases that start at 1
    is_rectified: bool = False  # a rectifier stands behind, which decides how a weight is drawn; the chain fills it in
    slope: float = 0.0  # of that rectifier for negative inputs

    @property
    def is_bias(self) -> bool:
        """Biases start at `initial` and do not decay."""
        return self.fan_in == 0


class ParameterSlot(NamedTuple):
    """Where one parameter lies in the flat vector."""

    name: str  # "0.dense.weight": index of the layer, its kind, the parameter's name
    shape: Shape
    offset: int  # of the first element
    decayed: bool  # weight decay applies: true for weights, false for biases

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Offset behind the last element."""
        return self.offset + self.size


def lay_out(named: Sequence[tuple[str, Parameter]]) -> tuple[ParameterSlot, ...]:
    """Slots for parameters under their full names, one behind the other."""
    slots: list[ParameterSlot] = []
    offset = 0
    for name, parameter in named:
        slots.append(ParameterSlot(name, parameter.shape, offset, decayed=not parameter.is_bias))
        offset = slots[-1].stop
    return tuple(slots)


def view(vector: FloatArray, slot: ParameterSlot) -> FloatArray:
    """The slot's part of `vector` in the parameter's shape; writing to it writes to the vector."""
    return vector[slot.offset : slot.stop].reshape(slot.shape)


def layout_digest(slots: Sequence[ParameterSlot]) -> str:
    """SHA-256 in hexadecimal over names and shapes: two models that differ anywhere differ here."""
    text = "".join(f"{slot.name}:{'x'.join(map(str, slot.shape))}\n" for slot in slots)
    return hashlib.sha256(text.encode()).hexdigest()


def decayed_ranges(slots: Sequence[ParameterSlot], start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges of `vector[start:stop]` that decay, counted from `start`: what `Optimizer.update` takes with it.

    One range for each parameter, also where two meet: trust_ratio.py takes a norm of each.
    """
    clipped = ((max(slot.offset, start), min(slot.stop, stop)) for slot in slots if slot.decayed)
    return [(first - start, last - start) for first, last in clipped if first < last]
