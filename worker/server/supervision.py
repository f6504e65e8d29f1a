"""A shard's process kept alive: one that dies is started again on the same address, from its last snapshot.

Rules: it is started again RESTARTS times at most, and not at all once `stop` is called. Its folder holds the job file
and the snapshot, which is the start file at first, and goes with it.
"""

from __future__ import annotations

import sys
import threading

from protos import job_pb2
from protos.job_file import to_yaml
from worker.checkpoint import Checkpoint, write_checkpoint
from worker.errors import TrainingFault
from worker.server.process import Part, ServerProcess, start_server_process
from worker.server.server_folder import ServerFolder

RESTARTS = 3


class SupervisedServer:
    """One shard's process, by the process that started it."""

    def __init__(
        self, job: job_pb2.JobSpec, start: Checkpoint, part: Part, workers: int, generation: int, token: str, host: str
    ) -> None:
        """Start it on any free port of `host`, with `start`, which holds the part's elements alone.

        Raises:
            TrainingFault: it does not start.
            CheckpointFault: the disk takes no start file.
        """
        self._folder = ServerFolder()
        self._job_file, self._snapshot = self._folder.path / "job.yaml", self._folder.path / "shard.safetensors"
        self._given = (workers, generation, token)
        self._part = part
        self._job_file.write_text(to_yaml(job))
        write_checkpoint(self._snapshot, start)
        self._server = self._start(f"{host}:0", restored=False)
        self.address = self._server.address
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._watch = threading.Thread(target=self._supervise, name="parameter-server-supervision", daemon=True)
        self._watch.start()

    @property
    def pid(self) -> int:
        """Of the process there is now."""
        return self._server.process.pid

    def stop(self) -> None:
        """End it for good. All workers must have left."""
        self._stopping.set()
        with self._lock:
            self._server.stop()
        self._watch.join()
        self._folder.remove()

    def _start(self, listen: str, restored: bool) -> ServerProcess:
        return start_server_process(
            self._job_file, self._snapshot, *self._given, listen, part=self._part, snapshots=True, restored=restored
        )

    def _supervise(self) -> None:
        for restart in range(1, RESTARTS + 2):
            code = self._server.process.wait()
            with self._lock:
                if self._stopping.is_set():
                    return
                self._server.stop()
                what = f"parameter server {self.address} ended with code {code}"
                if restart > RESTARTS:
                    _say(f"{what}; it was started again {RESTARTS} times already and stays away")
                    return
                _say(f"{what}; it is started again from its last snapshot ({restart} of {RESTARTS} times)")
                try:
                    self._server = self._start(self.address, restored=True)
                except TrainingFault as fault:
                    _say(f"{what} and cannot be started again: {fault}")
                    return


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
