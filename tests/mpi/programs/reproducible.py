"""Under mpirun: trains every job of a folder, one after the other; rank 0 prints each one's name and digest.

Arguments: folder of job files, folder for the outputs, ranks a node (0: ask MPI), and what to do: `whole`, `resume`
what was killed, or `kill`: all ranks end themselves once the first epoch's checkpoint of the only job is written. The
digest is the SHA-256 over the weights, the running statistics and the optimizer's state, in the order of their names.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

from safetensors.numpy import load_file

from protos.job_file import read_job_file
from worker import run
from worker.checkpointing import Checkpointer
from worker.memory import MemoryPeak
from worker.sync.world import World
from worker.termination import StopRequest
from worker.watchdog import Watchdog


def main() -> None:
    jobs, outputs, ranks_per_node, act = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if act == "kill":
        Checkpointer.take = then_die(Checkpointer.take)
    stop = StopRequest()
    for path in sorted(jobs.glob("*.json")):
        world = World(ranks_per_node=ranks_per_node or None)
        watchdog = Watchdog(60, lambda sentence: print(sentence, file=sys.stderr))
        output = outputs / path.stem
        run.run_job(world, read_job_file(path), output, act == "resume", 0.0, say_nothing, watchdog, stop, MemoryPeak())
        watchdog.stop()
        if world.rank == 0:
            print(path.stem, digest(output), flush=True)


def say_nothing(line: str) -> None:
    """The digests alone are said."""


def then_die(take):
    def take_and_die(self, *arguments):
        take(self, *arguments)
        self.settle()
        self._world.broadcast(None)  # nobody dies before rank 0 has written
        os.kill(os.getpid(), signal.SIGKILL)

    return take_and_die


def digest(output: Path) -> str:
    found = hashlib.sha256()
    for path in (output / "model.safetensors", max((output / "checkpoints").iterdir())):
        arrays = load_file(path)
        for name in sorted(arrays):
            found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
