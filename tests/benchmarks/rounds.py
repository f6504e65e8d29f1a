"""The order of the runs: everyone once a round, on one network after the other, every other round backwards.

Rules: whatever drifts (heat, a neighbour on the machine) then meets all sides alike. The first round is thrown away: it
warms the file cache and says how many epochs each contender needs to fill the asked seconds. Who cannot run on this
machine is asked once and left out.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import Contender
from tests.benchmarks.measurement import BenchmarkFailed, Measurement, PeerAbsent
from tests.benchmarks.spread import epochs_for

Key = tuple[str, str]  # the names of a case and of a contender
WARM_UP_EPOCHS = 2


class Outcome(NamedTuple):
    """What the rounds came to."""

    results: dict[Key, list[Measurement]]  # a value for each round; none where the contender is absent
    absent: dict[str, str]  # why, by the name of the contender


def run_rounds(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    rounds: int,
    seconds: float | None,
    measure: Callable[[Case, Contender, int], Measurement],
    say: Callable[[str], None],
) -> Outcome:
    """Every round's measurement of every contender on every case of its kinds.

    Args:
        seconds: how long the timed part of a run is to last; None for two epochs a run and no warm-up round.
        measure: makes one run of so many epochs.
        say: takes one line as each run ends.

    Raises:
        BenchmarkFailed: names the contender and the case.
    """
    pairs = [(case, contender) for case in cases for contender in contenders if case.kind in contender.kinds]
    epochs = {(case.name, contender.name): WARM_UP_EPOCHS for case, contender in pairs}
    outcome = Outcome({key: [] for key in epochs}, {})
    for number in range(0 if seconds else 1, rounds + 1):
        title = f"round {number} of {rounds}" if number else "warm-up"
        for case, contender in pairs if number % 2 else reversed(pairs):
            if contender.name in outcome.absent:
                continue
            key = case.name, contender.name
            began = time.monotonic()
            try:
                measured = measure(case, contender, epochs[key])
            except PeerAbsent as absent:
                outcome.absent[contender.name] = str(absent)
                say(f"{title}  {case.name}  {contender.name}  absent: {absent}")
                continue
            except BenchmarkFailed as failed:
                raise BenchmarkFailed(f"{contender.name} on {case.title}: {failed}") from failed
            rate, took = f"{measured.samples_per_second:,.0f} samples/s", f"{time.monotonic() - began:.1f} s"
            say(f"{title}  {case.name}  {contender.name}  {rate}  ({took})")
            if number:
                outcome.results[key].append(measured)
            elif seconds:
                epochs[key] = epochs_for(seconds, measured.samples_per_second, case.samples)
    return outcome
