"""The workers' clocks on one chunk, where each worker goes on at its own pace: who waits, and how stale a push is.

Rules: no I/O and no time but what is given. A worker has at most one push under way: its next one comes after its
answer.
"""


class Clocks:
    """Steps applied for each worker, and what each has seen of the others' updates."""

    def __init__(self, workers: int, step: int) -> None:
        """All `workers` stand at `step`."""
        self.done = dict.fromkeys(range(workers), step)  # worker -> the last step of its own that is applied
        self.updates = 0
        self._seen = dict.fromkeys(range(workers), 0)  # worker -> updates in the weights it has
        self.waiting: dict[int, tuple[float, float]] = {}  # worker -> since when, staleness of its push

    def add(self, worker: int, step: int) -> None:
        """A worker more, that has done `step` steps and has the newest weights."""
        self.done[worker] = step
        self._seen[worker] = self.updates

    def staleness(self, worker: int) -> float:
        """Updates by others since the weights this worker has, in steps: 1 for one update of each other worker."""
        return (self.updates - self._seen[worker]) / max(1, len(self.done) - 1)

    def advance(self, worker: int, now: float) -> None:
        """This worker's next step is applied: it waits for its answer."""
        staleness = self.staleness(worker)
        self.done[worker] += 1
        self.updates += 1
        self.waiting[worker] = now, staleness

    def release(self, lead_steps: float) -> list[tuple[int, float]]:
        """Those whose wait is over, with the staleness of their pushes; they have seen every update then."""
        slowest = min(self.done.values(), default=0)
        ready = [(w, stale) for w, (_, stale) in self.waiting.items() if self.done[w] - slowest <= lead_steps]
        for worker, _ in ready:
            del self.waiting[worker]
            self._seen[worker] = self.updates
        return ready

    def remove(self, worker: int) -> None:
        """Nobody waits for this worker any more."""
        if len(self.done) > 1:
            self.done.pop(worker, None)
        self.waiting.pop(worker, None)
