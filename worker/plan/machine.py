"""What the cost model knows of a machine and of a job: figures measured here, and counts taken from the job.

Rules: seconds, bytes and elements, no text; every figure is that of one rank with the threads it will have. The
figures can be written to a file and read again, so that a cluster can be planned for on another machine than its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from worker.errors import UsageFault

FLOAT32_BYTES: Final = 4


class Line(NamedTuple):
    """A cost that grows with an amount: `fixed` seconds and `each` seconds for every sample, byte or element."""

    fixed: float
    each: float

    def at(self, amount: float) -> float:
        """Seconds for that amount."""
        return self.fixed + self.each * amount


class Ready(NamedTuple):
    """A run of the gradient and the moment in the backward pass at which it is finished."""

    elements: int
    moment: float  # 0 .. 1 of the backward pass


@dataclass(frozen=True)
class Machine:
    """One node, measured with one job."""

    cores: int
    threads: int  # of a rank's matrix products while it was measured
    compute: Line  # forward and backward of one piece of a share, over samples; reading the samples included
    backward_share: float  # of `compute`
    ready: tuple[Ready, ...]  # from the end of the vector to its front
    update_each: float  # seconds an element of the optimizer's step
    sum_each: float  # seconds a byte of adding one vector to another
    fence_seconds: float  # until all ranks of a node have met in shared memory
    mpi: Line  # one message between two processes over TCP without a network between, over bytes
    grpc: Line  # a push and pull with a parameter server likewise, its optimizer included, over bytes of the vector
    base_memory_bytes: int  # of a rank before it holds any vector: program, libraries, data read whole

    def to_json(self) -> str:
        """As `from_json` takes it."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Workload:
    """What a job asks for, in counts."""

    parameters: int
    batch_size: int  # of a step over all ranks
    micro_batch: int  # 0: a rank takes its share at once
    state_arrays: int  # arrays of `parameters` elements that the optimizer remembers
    buffer_bytes: int  # that a rank holds for each sample it takes at once
    epoch_steps: int  # after which ranks that train apart meet in any case

    @property
    def gradient_bytes(self) -> int:
        """Of the whole float32 vector."""
        return FLOAT32_BYTES * self.parameters


def machine_from(text: str, place: str) -> Machine:
    """Read what `Machine.to_json` wrote.

    Raises:
        UsageFault: it is something else; names `place`.
    """
    remedy = "write it anew with `paceline-worker measure JOB.yaml`"
    try:
        values: dict[str, Any] = json.loads(text)
        fields = {field.name for field in dataclasses.fields(Machine)}
        if set(values) != fields:
            wrong = ", ".join(sorted(fields ^ set(values)))
            raise UsageFault(f"{place}: holds measurements of another version ({wrong}); {remedy}")
        values["ready"] = tuple(Ready(int(elements), _amount(moment)) for elements, moment in values["ready"])
        for name in ("compute", "mpi", "grpc"):
            values[name] = Line(*map(_amount, values[name]))
        single = fields - {"ready", "compute", "mpi", "grpc"}
        return Machine(**(values | {name: _amount(values[name]) for name in single}))
    except (ValueError, TypeError) as error:
        raise UsageFault(f"{place}: holds no measurements ({error}); {remedy}") from None


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number from 0")
    return value


def undisturbed(seconds: Sequence[float]) -> float:
    """The lower quartile of several times: what others on the machine add comes on top, and not always."""
    return sorted(seconds)[len(seconds) // 4]


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line nearest the points by relative error, neither part below 0.

    Relative, because a thousandth of a second is nothing at the large end and everything at the small one: least
    squares with weights 1/t^2. Minimizing sum w (t - a - b x)^2 gives, with weighted means X and T,
    b = sum w (x - X)(t - T) / sum w (x - X)^2 and a = T - b X. One point, or a fall, gives the line through 0 or a
    level one.
    """
    weights = [1 / t**2 for t in seconds]
    total = sum(weights)
    mean_amount = sum(w * x for w, x in zip(weights, amounts, strict=True)) / total
    mean_seconds = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (x - mean_amount) ** 2 for w, x in zip(weights, amounts, strict=True))
    if spread <= 1e-12 * total * mean_amount**2:
        return Line(0.0, mean_seconds / mean_amount)
    products = zip(weights, amounts, seconds, strict=True)
    each = sum(w * (x - mean_amount) * (t - mean_seconds) for w, x, t in products) / spread
    if each <= 0:
        return Line(mean_seconds, 0.0)
    fixed = mean_seconds - each * mean_amount
    if fixed >= 0:
        return Line(fixed, each)
    # Through 0: b = sum w x t / sum w x^2.
    through = zip(weights, amounts, seconds, strict=True)
    return Line(
        0.0, sum(w * x * t for w, x, t in through) / sum(w * x * x for w, x in zip(weights, amounts, strict=True))
    )
