"""A chunk of a shard: its views of the shard's arrays, and what it waits for."""

from collections.abc import Mapping, Sequence

from worker.server.clocks import Clocks
from worker.server.pushes import Push
from worker.wire import Float32


class Chunk:
    """As far as it is applied, and the pushes that are not."""

    def __init__(
        self, bounds: tuple[int, int], shard_start: int, parameters: Float32, state: Mapping[str, Float32],
        decayed: Sequence[tuple[int, int]], step: int, workers: int,
    ) -> None:  # fmt: skip
        start, stop = bounds
        here = slice(start - shard_start, stop - shard_start)
        self.offset = start
        self.parameters = parameters[here]
        self.state = {name: array[here] for name, array in state.items()}
        # Weight decay's ranges, cut to this chunk and counted from its first element.
        self.decayed = tuple(
            (max(first, start) - start, min(last, stop) - start)
            for first, last in decayed
            if max(first, start) < min(last, stop)
        )
        self.step = step
        self.held: dict[int, Push] = {}
        self.mean: Float32 | None = None  # of the gradients held, once there are enough
        self.clocks = Clocks(workers, step)
        self.updates_before = step * workers  # what the optimizer counts on from, where each push is an update
