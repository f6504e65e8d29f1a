"""The kinds of parameter-server training, each a row of one table.

A synchronous chunk waits for every worker's gradient. In the other modes each worker has a clock of its own, and a
push is applied when it comes: with the mean gradient over the worker's own samples, at the learning rate times its
part of the batch. With plain descent, and pushes computed on the same weights, the W pushes of one clock so move the
weights as one synchronous step does: sum_w (rate n_w / N) (g_w / n_w) = rate (sum_w g_w) / N.

- `bounded_staleness` (stale synchronous parallel, Ho et al., NeurIPS 2013): a worker has the answer to its clock c only
  when c - slowest clock <= steps. With 0 steps it waits as a synchronous worker does.
- `asynchronous` (staleness-aware, Zhang et al., IJCAI 2016): answered at once, at the rate divided by
  max(1, staleness). Staleness counts the updates by others since the weights that the gradient was computed on, in
  steps: by one update of each other worker it is 1, so workers of one speed are not slowed down.
"""

import math
from typing import NamedTuple

from protos import job_pb2
from protos.rules import chosen_option


class Mode(NamedTuple):
    """What tells one kind of parameter-server training from another."""

    at_once: bool  # a push is applied when it comes, not when all workers' are there
    lead_steps: float  # a worker further ahead of the slowest one waits for its answer
    scaled: bool  # the learning rate is divided by the staleness in steps, where that is above 1

    def rate_factor(self, staleness: float) -> float:
        """What to multiply the learning rate of a push of this staleness (in steps) with."""
        return 1 / max(1.0, staleness) if self.scaled else 1.0


MODES = {
    "synchronous": Mode(at_once=False, lead_steps=0, scaled=False),
    "bounded_staleness": Mode(at_once=True, lead_steps=0, scaled=False),  # its steps are the job's to say
    "asynchronous": Mode(at_once=True, lead_steps=math.inf, scaled=True),
}
SYNCHRONOUS = MODES["synchronous"]


def mode_of(sync: job_pb2.ParameterServerSync) -> Mode:
    """The mode a job asks for; synchronous where it names none."""
    word = chosen_option(sync.mode) or "synchronous"
    mode = MODES[word]
    return mode._replace(lead_steps=sync.mode.bounded_staleness.steps) if word == "bounded_staleness" else mode
