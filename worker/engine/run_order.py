"""The order in which a chain's layers run: that of the job file, but for a pooling that runs before its activation.

Rules: only what changes no result is exchanged. A ReLU never falls, so the largest value of a window is the same
whether it is looked for before or behind it: max over k of f(x_k) = f(max over k of x_k). The gradient is the same too.
It goes to the first of the largest f(x_k): where that is above 0, f is the identity and this is the first of the
largest x_k; where it is 0, ReLU hands nothing on, whichever pixel is asked. Run behind the pooling, ReLU has a quarter
of the values to work on where windows are 2 x 2.
"""

from collections.abc import Sequence

from protos import job_pb2


def run_order(layers: Sequence[job_pb2.Layer]) -> list[int]:
    """The layers' places in the job file, in the order in which they run."""
    order = list(range(len(layers)))
    for index in range(len(layers) - 1):
        # From front to back, so of several ReLUs before a pooling only the last is exchanged; more would be rare.
        if (layers[index].WhichOneof("kind"), layers[index + 1].WhichOneof("kind")) == ("relu", "max_pool2d"):
            order[index], order[index + 1] = index + 1, index
    return order
