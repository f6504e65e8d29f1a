"""`paceline-worker join HOST:PORT`: take part in a running job as a guest, in one process and without MPI.

The job, its order of samples and how far it is come from the parameter servers; the data is opened here, at the places
that the job file names. A guest that is dropped, because it was silent or a server died, joins again by itself.

Rules: what cannot work is said before the job hears of this guest. A job that ends ends this guest well; SIGINT and
SIGTERM make it leave at the next step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import numpy as np

from protos import job_pb2
from protos import parameter_server_pb2 as pb
from protos.job_file import JobFileInvalid, parse_job
from worker.accumulation import Accumulator
from worker.data.batches import BatchReader
from worker.data.sharding import batch_bounds, sample_order, share, steps_per_epoch
from worker.data.stores import fetch_all
from worker.engine.layers.layer import Moment
from worker.errors import TrainingFault, UnreachableFault, UsageFault
from worker.invitation import Invitation
from worker.measurements import Meter
from worker.preparation import Prepared, prepare
from worker.server.modes import mode_of
from worker.sync.exchange import TOTALS
from worker.sync.guest import Apart, GuestExchange, JobOver, Leaving, describe

JOINS = 5  # in a row without a step in between
FIRST_PAUSE_SECONDS = 0.5  # before the second, doubled from one to the next


def join_job(invitation: Invitation, say: Callable[[str], None]) -> None:
    """Take part in a job until it ends or a signal asks to leave.

    Raises:
        Fault: this guest cannot take part, or no longer.
    """
    leaving = Leaving()

    def ask(*_: object) -> None:
        leaving.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who asks twice does not want to wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    guest = Guest(describe(*invitation), invitation.token, leaving, say)
    joins = 0
    while not leaving.asked:
        before, joins = guest.steps, joins + 1
        try:
            guest.take_part()
            break
        except JobOver:
            say("the job is over")
            break
        except Apart as apart:
            if guest.steps > before:
                joins = 0
            if joins >= JOINS:
                raise TrainingFault(f"{apart}; joined {JOINS} times in a row without a step") from apart
            say(f"apart from the job: {apart}; joining again")
            time.sleep(FIRST_PAUSE_SECONDS * 2**joins)
        try:
            guest.renew(describe(*invitation))
        except UnreachableFault:
            if joins >= JOINS:
                raise
    say(f"{guest.steps} steps done here")


def read_text(text: str) -> job_pb2.JobSpec:
    """The job as a server tells it. UsageFault where this version of Paceline cannot read it."""
    try:
        return parse_job(text)
    except JobFileInvalid as invalid:
        raise UsageFault(f"the job is of another version of Paceline: {invalid}") from invalid


class Guest:
    """The data and the model of one guest, and the steps it has done."""

    def __init__(self, job: pb.DescribeResponse, token: str, leaving: Leaving, say: Callable[[str], None]) -> None:
        """Open everything that is named in the job; ask nobody for anything."""
        self.steps = 0
        self._told = job
        self._token = token
        self._leaving = leaving
        self._say = say
        self._job = read_text(job.job)
        fetch_all(self._job, lambda: None)
        self._prepared: Prepared = prepare(self._job)
        model = self._prepared.model
        self._samples = len(self._prepared.train)
        self._batch = min(self._job.training.batch_size or self._samples, self._samples)
        self._batches = steps_per_epoch(self._samples, self._batch)
        self._parameters = np.zeros(model.parameter_count, np.float32)
        self._gradient = np.zeros_like(self._parameters)
        self._totals = np.zeros(len(TOTALS) + model.sum_count)
        model.attach(self._parameters, self._gradient, self._totals[len(TOTALS) :])
        most = -(-self._batch // (job.ranks + 1))
        model.check_batch(min(most, self._job.training.micro_batch or most), self._batch)
        self._accumulator = Accumulator(model, self._gradient, most, self._job.training.micro_batch)
        model.reserve(self._accumulator.capacity)
        prepared = self._prepared
        self._reader = BatchReader(
            prepared.train, prepared.preprocessing, self._accumulator.capacity, augmentation=prepared.augmentation
        )

    def renew(self, job: pb.DescribeResponse) -> None:
        """Before joining again: what the servers say now."""
        self._told = job

    def take_part(self) -> None:
        """Join, and do steps until this guest is asked to leave or the last one is done.

        Raises:
            Apart, JobOver: it takes part no longer.
        """
        at_once = mode_of(self._job.sync.parameter_server).at_once
        arrays = self._parameters, self._gradient, self._totals
        exchange = GuestExchange(self._told, self._token, self._prepared.model.layout_digest, at_once, *arrays)
        exchange.join()
        self._say(f"joined as guest {exchange.number}")
        step = exchange.listen(self._leaving)
        if step is None:
            exchange.go()
            return
        total = self._job.training.epochs * self._batches
        self._say(f"taking part from step {step + 1} of {total}")
        order = np.empty(0, np.int64)
        # What overflows ends in weights that are not finite, which the founding workers report.
        with np.errstate(over="ignore", invalid="ignore"):
            for number in range(step + 1, total + 1):
                epoch, batch = divmod(number - 1, self._batches)
                if number == step + 1 or batch == 0:
                    order = sample_order(self._job.training.seed, epoch, self._samples)
                    self._reader.begin_epoch(epoch)
                last = self._step(exchange, number, order, *batch_bounds(batch, self._samples, self._batch))
                self.steps += 1
                if last:
                    return
        exchange.go()

    def _step(self, exchange: GuestExchange, number: int, order: np.ndarray, first: int, stop: int) -> bool:
        """This guest's share of the batch [first, stop) of the order; whether it has left with that, being asked."""
        low, high = share(first, stop, *exchange.place)
        moment = Moment(self._job.training.seed, number, low - first)
        sums = self._accumulator.compute(self._reader, order[low:high], order[:0], moment, Meter())
        self._totals[: len(TOTALS)] = 0  # a guest asks for no report and no stop
        self._totals[:2] = sums.loss, sums.correct
        last = self._leaving.asked
        exchange.take_part(number, stop - first, last)
        return last
