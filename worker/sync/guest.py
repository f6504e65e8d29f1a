"""A guest's side of the parameter servers: comes to a running job, takes part, goes. No MPI.

A guest of a synchronous job needs no start but the answers that others are sent: it listens until one names it
(worker/server/members.py says when that is), and has all weights then. One with a clock of its own pulls them.

Rules: as in parameter_server.py, whose step this is. A guest is heard by its servers while it computes, through gRPC's
thread; what is heard back extends its own patience, so it waits as long as the servers live. When a server has dropped
it or is gone, it leaves the others too.
"""

import time
from typing import NoReturn

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import parameter_server_pb2 as pb
from worker.data.sharding import samples_of
from worker.errors import NotAllowedFault, TrainingFault, UnreachableFault
from worker.sync.exchange_stream import check_ranges, words
from worker.sync.parameter_server import JOIN_TIMEOUT_SECONDS, WEIGHTS, ParameterServerExchange
from worker.sync.server_connection import Server
from worker.wire import Float32, decode

SIGNS_IN_A_LEASE = 5
PATIENCE_SECONDS = 60.0  # without a sign of the servers
# How a server says that it does not know this guest, is gone, or is not ready for guests yet.
APART = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Leaving:
    """Whether a person has asked this guest to leave."""

    asked = False


class JobOver(Exception):
    """The founding workers have left: there is nothing more to do."""


class Apart(Exception):
    """This guest takes part no longer: it was dropped, or a server is gone. It may join again."""


def describe(address: str, token: str) -> pb.DescribeResponse:
    """What the authority of the job at HOST:PORT tells of it.

    Raises:
        UnreachableFault, NotAllowedFault, TrainingFault: by what is in the way.
    """
    server = Server(address, token)
    try:
        return server.call("Describe", pb.DescribeRequest(), pb.DescribeResponse, JOIN_TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        raise _fault_of(address, error) from error
    finally:
        server.close()


def _fault_of(address: str, error: grpc.RpcError) -> Exception:
    code = error.code() if isinstance(error, grpc.Call) else None
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            return NotAllowedFault(f"{address}: {words(error)}; the run that takes guests says which file holds it")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableFault(f"{address}: no answer in time; the job may not have begun")
        case grpc.StatusCode.UNAVAILABLE:
            return UnreachableFault(f"{address}: no job that takes guests answers there: {words(error)}")
    return TrainingFault(f"{address}: {words(error)}")


class GuestExchange(ParameterServerExchange):
    """Pushes a guest's gradients; arrays as of ParameterServerExchange."""

    def __init__(
        self, job: pb.DescribeResponse, token: str, layout_digest: str, at_once: bool,
        parameters: Float32, gradient: Float32, totals: NDArray[np.float64],
    ) -> None:  # fmt: skip
        super().__init__(
            job.addresses, -1, job.ranks, job.generation, token, layout_digest, parameters, gradient, totals,
            timeout_seconds=PATIENCE_SECONDS, share_of=self._own_share,
        )  # fmt: skip
        self._ranks = job.ranks
        self._at_once = at_once

    @property
    def number(self) -> int:
        """What the authority calls this guest; after `join`."""
        return self._worker

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many shares of the next batch is this guest's."""
        return self._ranks + self.guests.index(self._worker), self._ranks + len(self.guests)

    def join(self) -> int:
        """Become a guest and open the streams; the steps that the authority has applied.

        Raises:
            Apart: this time it could not be; JobOver; or a fault where it never can.
        """
        self._begin()
        authority, *others = self._servers
        try:
            for server in self._servers:
                response = self._join(server, JOIN_TIMEOUT_SECONDS)
                server.heard_every = response.lease_seconds / SIGNS_IN_A_LEASE
                if server is authority:
                    self._worker, self._step = response.worker, response.step
                    self._who = f"guest {self._worker}"
        except grpc.RpcError as error:
            self.close()
            raise self._sorted(_fault_of(server.address, error), error) from error
        check_ranges(self.held, len(self._parameters))
        try:
            for server in (*others, authority):
                self._expires = time.monotonic() + PATIENCE_SECONDS
                self._open_stream(server)
                self._next(server, "join", "its stream", time.perf_counter())
            self._expires = float("inf")
            if self._at_once:
                self._parameters[:] = self.pull(state=False)["parameters"]
                self.guests = (self._worker,)  # until an answer tells of others
        except TrainingFault as fault:
            self._leave_others(fault)
        return self._step

    def listen(self, leaving: Leaving) -> int | None:
        """Wait until this guest is to take part; the steps done, which `parameters` are the result of.

        None: it was asked to leave before. In a job of clocks it takes part at once.
        """
        if self._at_once:
            return self._step
        authority, *others = self._servers
        self._expires = time.monotonic() + PATIENCE_SECONDS
        step: int | None = None
        try:
            while self._worker not in self.guests:
                if (step := self._hear(authority, None, leaving)) is None:
                    return None
            for server in others:
                if self._hear(server, step, leaving) is None:
                    return None
        except TrainingFault as fault:
            self._leave_others(fault)
        assert step is not None
        self._step = step
        self._expires = float("inf")
        return step

    def _hear(self, server: Server, wanted: int | None, leaving: Leaving) -> int | None:
        """Take the weights of a whole step, `wanted` or the next that is heard whole; None when asked to leave."""
        step, missing = 0, dict(server.chunks)
        began = time.perf_counter()
        while missing:
            if leaving.asked:
                return None
            head, payload = decode(pb.ExchangeResponse, WEIGHTS, self._next(server, "join", "others' steps", began))
            self._expires = time.monotonic() + PATIENCE_SECONDS
            if head.step == 0:  # a sign of life, which may come between two chunks
                continue
            if head.step != step:
                step, missing = head.step, dict(server.chunks)
            if wanted is not None and step < wanted:
                continue
            self.wire.take(head, payload, missing.pop(head.offset))
            if head.offset == 0:
                self.guests = tuple(head.guests)
        return step

    def take_part(self, step: int, samples: int, last: bool) -> None:
        """As `step` of any worker; with `last` the next batch is cut without this guest, which then has left.

        Raises:
            Apart, JobOver: the step was not done.
        """
        try:
            if last and not self._at_once:
                self._say_leave()
            self.step(step, samples, 0.0)
            if last and self._at_once:
                self._say_leave()
            if last:
                self.close()
        except TrainingFault as fault:
            self._leave_others(fault)
        if not last and self._worker not in self.guests:
            self._leave_others(TrainingFault(f"{self._servers[0].address}: it does not name this guest any more"))

    def go(self) -> None:
        """Leave without having been asked to take part."""
        try:
            self._say_leave()
            self.close()
        except TrainingFault as fault:
            self._leave_others(fault)

    def _own_share(self, samples: int, guests: int) -> int:
        place, of = self.place
        return samples_of([place], samples, of)

    def _leave_others(self, fault: TrainingFault) -> NoReturn:
        """What a fault means to a guest; it takes part nowhere any more."""
        self.close()
        raise self._sorted(fault, fault.__cause__) from fault

    def _sorted(self, fault: Exception, cause: BaseException | None) -> Exception:
        if isinstance(cause, StopIteration):
            return JobOver()
        code = cause.code() if isinstance(cause, grpc.Call) else None
        if code in APART or cause is None:
            return Apart(str(fault))
        return fault
