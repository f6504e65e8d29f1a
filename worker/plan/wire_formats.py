"""What each wire format costs: bytes and coding seconds an element, measured here on a vector of the job's length.

Rules: a table by the name that the job file has for a format. Where this installation cannot code one, its cost is not
known and no plan offers it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from worker.plan.prediction import Change, WireFormat

# Encodes the vector and decodes it again, once; returns the bytes that would travel.
Coder: TypeAlias = Callable[[NDArray[np.float32]], int]

# Which exchanges a format is for; each loses something, which later steps make good.
FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "float16": ("all_reduce", "parameter_server"),
    "bfloat16": ("all_reduce", "parameter_server"),
    "int8": ("all_reduce", "parameter_server"),
    "top_k": ("all_reduce", "parameter_server"),
    "sign": ("all_reduce", "parameter_server"),
    "power_sgd": ("all_reduce",),
}
# The codecs of this installation, by the names of FORMATS.
CODERS: Final[Mapping[str, Coder]] = {}
MOST_ELEMENTS: Final = 1 << 20
REPETITIONS: Final = 5


def measure_formats(parameters: int, coders: Mapping[str, Coder] = CODERS) -> tuple[list[WireFormat], list[str]]:
    """The formats whose cost is known for a vector of so many elements, and the names of the others."""
    vector = np.random.default_rng(0).standard_normal(min(parameters, MOST_ELEMENTS)).astype(np.float32)
    known = [_measured(name, coders[name], vector) for name in FORMATS if name in coders]
    return known, [name for name in FORMATS if name not in coders]


def _measured(name: str, code: Coder, vector: NDArray[np.float32]) -> WireFormat:
    taken = []
    sent = 0
    for _ in range(REPETITIONS):
        began = perf_counter()
        sent = code(vector)
        taken.append(perf_counter() - began)
    seconds = statistics.median(taken) / len(vector)
    return WireFormat(name, sent / len(vector), seconds, Change.ROUNDING, FORMATS[name])
