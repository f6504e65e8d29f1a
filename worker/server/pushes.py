"""What goes into a shard and what comes out: its setup, pushes, answers, refusals."""

from dataclasses import dataclass
from typing import NamedTuple

from worker.server.modes import SYNCHRONOUS, Mode
from worker.wire import Float32, even_chunk_elements

MOST_GUESTS = 256  # at a time
NO_GUESTS = "the job takes no guests: give its file `sync: {parameter_server: {guests: true}}`"


@dataclass(frozen=True)
class ShardSetup:
    """What does not change while a shard lives."""

    parameter_count: int  # of the whole model
    layout_digest: str
    workers: int
    generation: int = 1
    mode: Mode = SYNCHRONOUS
    start: int = 0  # the shard holds elements start to stop - 1 of the flat vector
    stop: int = -1  # -1: to the end
    decayed: tuple[tuple[int, int], ...] = ()  # ranges of the flat vector that weight decay applies to
    chunk_elements: int = 0  # 0: equal chunks of about 1 MB
    step_timeout_seconds: float = 60.0  # from a founding worker's first push of a step to the last push
    guests: bool = False  # others than the `workers` may join (members.py)
    lease_seconds: float = 15.0  # a guest that is silent for longer is dropped
    restored: bool = False  # from a snapshot, after a death: the step is the workers', once all have told theirs
    clip_norm: float = 0.0  # the mean gradient is scaled down to this norm, 0: never; for a shard of the whole vector
    virtual_shards: int = 0  # of a reproducible job, whose workers push subtrees (subtrees.py); 0: any other job

    def __post_init__(self) -> None:
        if self.stop == -1:
            object.__setattr__(self, "stop", self.parameter_count)
        if self.chunk_elements == 0:
            object.__setattr__(self, "chunk_elements", even_chunk_elements(self.stop - self.start))


class Push(NamedTuple):
    """One worker's part of one chunk's gradient."""

    worker: int
    generation: int
    step: int  # from 1
    offset: int  # in the flat vector
    samples: int  # of the whole batch
    learning_rate: float  # a guest's is not looked at: the founding workers' holds
    gradient: Float32  # sum over this worker's samples, or subtrees; kept until the chunk is applied, never written
    totals: tuple[float, ...] = ()  # on the chunk at the shard's start only
    share: int = 0  # samples in this worker's sum; what a push that is applied at once is divided by
    guests: tuple[int, ...] = ()  # that the batch was cut for


class Answer(NamedTuple):
    """A chunk's weights for the workers that wait for them."""

    workers: tuple[int, ...]
    step: int
    offset: int
    weights: Float32  # a view: send or copy it before the next push
    totals: tuple[float, ...]  # over all workers; on the chunk at the shard's start only
    staleness: float = 0.0  # of the push, in steps
    guests: tuple[int, ...] = ()  # that the next batch is to be cut for; on the chunk at 0 only
    dropped_guests: int = 0  # so far; on the chunk at 0 only
    samples: int = 0  # that the totals are of; on the chunk at the shard's start only
    again: bool = False  # for a repeated push, of whose step others have had the answer


class Refused(Exception):
    """The request is wrong in itself; the shard is as it was before."""


class Apart(Refused):
    """The guest is not here: it was dropped, has left, or cannot be taken in now. It may join again."""


class Conflict(Refused):
    """The request does not fit the shard's model, generation or step; the shard is as it was before."""
