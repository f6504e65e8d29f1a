"""The whole update a job asks for: its optimizer, with the gradient clipped before and the weights averaged after.

Rules: what is put around an optimizer is an optimizer again, so it runs wherever one does (a rank's slice, a parameter
server's chunk), and what it remembers is state, gathered, saved and restored like any other.
"""

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.clipping import clip_by_value
from worker.optimizers import FloatArray, Optimizer, Ranges, State, make_optimizer

AVERAGE = "average"  # the state that holds the averaged weights


def make_update(job: job_pb2.JobSpec) -> Optimizer:
    """The update of a resolved job; UsageFault as for make_optimizer."""
    optimizer = make_optimizer(job.optimizer)
    if job.training.clip_value:
        optimizer = clip_by_value(optimizer, job.training.clip_value)
    if job.training.HasField("average"):
        optimizer = average(optimizer, job.training.average.decay)
    return optimizer


def whole_gradient_user(job: job_pb2.JobSpec) -> str | None:
    """What of a resolved job needs the whole mean gradient in one place, as messages call it; None if nothing does."""
    if job.training.clip_norm:
        return "training.clip_norm"
    return f"optimizer {job.optimizer.WhichOneof('kind')}" if make_update(job).direct is not None else None


def average(optimizer: Optimizer, decay: float) -> Optimizer:
    """The optimizer, after which A <- d A + (1 - d) W; A begins as the weights after the first step.

    As PyTorch's AveragedModel with get_ema_multi_avg_fn.
    """

    def init(length: int, dtype: npt.DTypeLike) -> State:
        return optimizer.init(length, dtype) | {AVERAGE: np.zeros(length, dtype)}

    def update(p: FloatArray, g: FloatArray, state: State, step: int, learning_rate: float, decayed: Ranges) -> None:
        optimizer.update(p, g, state, step, learning_rate, decayed)
        mean = state[AVERAGE]
        if step == 1:
            np.copyto(mean, p)
            return
        np.subtract(p, mean, out=g)
        np.multiply(g, 1 - decay, out=g)
        np.add(mean, g, out=mean)

    return optimizer._replace(init=init, update=update)
