"""`paceline-worker`: what mpirun starts. Reads its settings once, builds the parts, runs one verb.

Rules: whatever goes wrong ends with a line `error: ...` on standard error and a code of protos/exit_codes.py. A fault
one rank alone knows of aborts all ranks at once; nobody is left waiting.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from protos.exit_codes import ExitCode
from worker import processes
from worker.errors import Fault, ReplicaFault, TrainingFault, UsageFault

if TYPE_CHECKING:
    from protos import job_pb2

DEBUG = "PACELINE_DEBUG"


class Parser(argparse.ArgumentParser):
    """Argparse that words its errors as the rest of Paceline does."""

    def error(self, message: str) -> NoReturn:
        raise UsageFault(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """The command line, verb by verb."""
    parser = Parser(prog="paceline-worker", description="Train and use models; started by mpirun or by paceline.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    verb = verbs.add_parser("train", help="train a job on the ranks mpirun has started")
    verb.add_argument("job", type=Path, metavar="JOB.yaml")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the output folder")
    verb.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    verb.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings",
                      help="override a field of the job file, such as training.epochs=5")  # fmt: skip
    verb.add_argument("--log-dir", type=Path, metavar="DIR", help="send each rank's output to DIR/rank-N.log")

    verb = verbs.add_parser("evaluate", help="loss and accuracy of a finished run on a job's validation data")
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("job", type=Path, metavar="JOB.yaml")
    verb.add_argument("--format", choices=("text", "json"), default="text")

    verb = verbs.add_parser("predict", help="what a finished run says to new samples")
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("input", metavar="INPUT",
                      help="features: .npy, .npz (array x), .csv, .parquet or idx; or text")  # fmt: skip
    verb.add_argument("-o", "--output", type=Path, metavar="FILE", help="write here, not to standard output")
    verb.add_argument("--format", choices=("csv", "npz", "jsonl", "json"),
                      help="json is JSON lines too; else by the ending of FILE; CSV without one")  # fmt: skip

    verb = verbs.add_parser("export", help="the model of a finished run in a format that other programs read")
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="write an ONNX graph here")

    verb = verbs.add_parser("plan", help="what to expect of a job on several nodes, and how to exchange there")
    verb.add_argument("job", type=Path, metavar="JOB.yaml")
    verb.add_argument("--nodes", type=int, required=True, metavar="N", help="machines like this one")
    verb.add_argument("--bandwidth", required=True, metavar="B",
                      help="of each node's link, each way: 100Mbit, 1Gbit, 10Gbit/s, 12MB/s")  # fmt: skip
    verb.add_argument("--latency", default="0.1ms", metavar="T", help="of the network, one way; 0.1ms")
    verb.add_argument("--shared-link", action="store_true", help="all nodes share one medium of that bandwidth")
    verb.add_argument("--ranks-per-node", type=int, metavar="K", help="the job's workers over the nodes")
    verb.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings",
                      help="override a field of the job file, such as training.batch_size=512")  # fmt: skip
    verb.add_argument("--measured", type=Path, metavar="FILE", help="figures that `measure` printed on such a node")
    verb.add_argument("--format", choices=("text", "json"), default="text")

    verb = verbs.add_parser("measure", help="what `plan` measures of this machine and a job, as JSON")
    verb.add_argument("job", type=Path, metavar="JOB.yaml")
    verb.add_argument("--nodes", type=int, default=1, metavar="N", help="the most that will be planned for; 1")
    verb.add_argument("--ranks-per-node", type=int, metavar="K", help="the job's workers over the nodes")
    verb.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings",
                      help="override a field of the job file")  # fmt: skip

    for name, what in (
        ("join", "take part in a running job with parameter servers, as its guest"),
        ("follow", "evaluate the weights of such a job while it runs"),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("job", metavar="HOST:PORT|DIR", help="of its first server, or its output folder on this host")
        verb.add_argument("--token-file", type=Path, metavar="FILE",
                          help="the output folder's guests.json; else the token is in PACELINE_JOB_TOKEN")  # fmt: skip
    verb.add_argument("--every", type=int, default=1, metavar="STEPS", help="only weights after every so many steps; 1")
    verb.add_argument("--format", choices=("text", "json"), default="text")

    verb = verbs.add_parser("serve-parameters", help="one parameter-server shard; started by train")
    verb.add_argument("job", type=Path, metavar="JOB.yaml")
    verb.add_argument("start", type=Path, metavar="CHECKPOINT", help="weights and optimizer state to begin with")
    verb.add_argument("--workers", type=int, required=True, metavar="N", help="how many push in each step")
    verb.add_argument("--generation", type=int, default=1, metavar="N", help="pushes of another one are refused")
    verb.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    verb.add_argument("--part", type=int, nargs=2, metavar=("FIRST", "COUNT"),
                      help="CHECKPOINT holds the elements from FIRST on, of the model's COUNT")  # fmt: skip
    verb.add_argument("--snapshots", action="store_true", help="keep CHECKPOINT up to date, so that it can come back")
    verb.add_argument("--restored", action="store_true", help="it has died: CHECKPOINT is its last snapshot")
    return parser


def main() -> None:
    """Run the program and exit with its code."""
    arguments = argparse.Namespace(verb="", log_dir=None)
    try:
        arguments = make_parser().parse_args()
        code = run_verb(arguments)
    except Fault as fault:
        code = fail(str(fault), int(fault.exit_code))
    except KeyboardInterrupt:
        code = fail("interrupted", ExitCode.FAILED)
    except BrokenPipeError:
        # The reader left, as `head` does; Python flushes once more at exit.
        leave_output()
        code = ExitCode.FAILED
    except MemoryError as error:
        code = fail(out_of_memory(error), ExitCode.FAILED)
    except OSError as error:
        leave_output()
        code = fail(
            f"{error.filename or 'output'}: {error.strerror or error}; free it, or name another file", ExitCode.FAILED
        )
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(code)


def say(line: str) -> None:
    """A line for a person or a pipe, at once."""
    print(line, flush=True)


def leave_output() -> None:
    """Let what is still buffered go nowhere: nobody reads it, or it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def out_of_memory(error: MemoryError) -> str:
    """What a person can do about it."""
    return (
        f"out of memory: {error or 'an array could not be made'}; make the model or training.batch_size smaller, "
        "set training.micro_batch, or take a machine with more"
    )


def run_verb(arguments: argparse.Namespace) -> int:
    """Carry out one verb; its modules are loaded only now."""
    if arguments.verb == "train":
        return train(arguments)
    cores = len(os.sched_getaffinity(0))
    if arguments.verb in ("plan", "measure"):
        return look_ahead(arguments, cores)
    processes.set_blas_threads(os.environ, cores)
    if arguments.verb == "evaluate":
        from worker.use import evaluate_folder

        evaluate_folder(arguments.folder, arguments.job, as_json=arguments.format == "json")
    elif arguments.verb == "predict":
        from worker.use import predict_file

        predict_file(arguments.folder, arguments.input, arguments.output, arguments.format)
    elif arguments.verb == "export":
        from worker.onnx_export import export_folder

        export_folder(arguments.folder, arguments.onnx)
    elif arguments.verb == "join":
        from worker.invitation import read_invitation
        from worker.join import join_job

        join_job(read_invitation(arguments.job, arguments.token_file), say)
    elif arguments.verb == "follow":
        from worker.follow import follow_job
        from worker.invitation import read_invitation

        if arguments.every < 1:
            raise UsageFault(f"--every: {arguments.every} is not at least 1")
        invitation = read_invitation(arguments.job, arguments.token_file)
        follow_job(invitation, arguments.every, arguments.format == "json", say)
    else:
        from worker.server.process import Part, serve_parameters

        job = read_job(arguments.job)
        part = Part(*(arguments.part or ()))
        serve_parameters(
            *(arguments.start, job, arguments.workers, arguments.listen, arguments.generation),
            *(part, arguments.snapshots, arguments.restored),
        )
    return ExitCode.DONE


def look_ahead(arguments: argparse.Namespace, cores: int) -> int:
    """Measure this machine as a node, and plan with it."""
    from worker.plan.command import cluster_of, measure_here, plan, ranks_of

    job = read_job(arguments.job, arguments.settings)
    ranks = ranks_of(arguments, job)
    cluster = cluster_of(arguments, job) if arguments.verb == "plan" else None
    processes.set_blas_threads(os.environ, cores // ranks)
    if cluster is None:
        measure_here(job, arguments.nodes, ranks)
    else:
        plan(job, cluster, arguments.measured, as_json=arguments.format == "json")
    return ExitCode.DONE


def train(arguments: argparse.Namespace) -> int:
    """Join the other ranks and train."""
    rank = processes.rank_before_mpi(os.environ)
    if arguments.log_dir is not None:
        processes.redirect_output(arguments.log_dir, rank)
    processes.die_with_parent(os.environ)
    from worker.termination import StopRequest

    stop = StopRequest()
    # Read before NumPy is loaded, which takes BLAS's threads from the environment; a fault is raised by all together.
    found: job_pb2.JobSpec | UsageFault
    try:
        found = read_job(arguments.job, arguments.settings)
    except UsageFault as fault:
        found = fault
    reproducible = not isinstance(found, UsageFault) and found.training.reproducible
    processes.set_blas_threads(os.environ, os.cpu_count() or 1, reproducible)

    from worker.memory import MemoryPeak
    from worker.run import run_job
    from worker.sync.heartbeats import Heartbeats
    from worker.sync.world import AgreedFault, World
    from worker.watchdog import Watchdog, look_seconds

    world = World()
    place = f"rank {world.rank} of {world.size} on {world.host}: " if world.size > 1 else ""

    def say(line: str) -> None:
        if world.rank == 0:
            print(line, flush=True)

    def say_error(line: str) -> None:
        fail(line, ExitCode.FAILED)

    def job_found() -> job_pb2.JobSpec:
        if isinstance(found, UsageFault):
            raise found
        return found

    def stalled(sentence: str) -> None:
        accusation = heartbeats.accuse(job.limits.stall_seconds)
        if accusation.turn:
            # Another rank knows as much or better, and what it says ends this one; should it be gone too, we speak.
            time.sleep(accusation.turn * look_seconds(job.limits.stall_seconds))
            accusation = heartbeats.accuse(job.limits.stall_seconds)
        if not heartbeats.spoken():
            fail("\n".join(accusation.lines) or place + sentence, ExitCode.FAILED)
            world.beat.leave(spoken=True)
        os._exit(ExitCode.FAILED)  # the main thread is blocked inside MPI; leaving makes the launcher end the others

    try:
        # Together, though every rank reads the same file: one that left before rank 0 has spoken would silence it, for
        # the launcher then ends the others.
        job = world.agree(job_found)
    except AgreedFault as fault:
        return fail(str(fault), fault.exit_code) if world.rank == 0 else fault.exit_code

    def last_words(too_late: bool) -> None:
        heartbeats.tell_gone(say_error)
        if too_late and not heartbeats.spoken():
            here = world.beat.seen()
            say_error(
                f"{place}{here.place()}: told to end by SIGTERM {job.limits.grace_seconds:g} s ago and the step is "
                "not done: it ends without a checkpoint; raise limits.grace_seconds (and what the launcher waits)"
            )
            world.beat.leave(spoken=True)
        world.beat.leave()

    heartbeats = Heartbeats(world)
    memory = MemoryPeak()

    def look() -> None:
        world.beat.live()
        heartbeats.look()
        memory.look()

    watchdog = Watchdog(job.limits.stall_seconds, stalled, look, is_alone=world.size == 1)
    stop.last_words(lambda: heartbeats.spoken() or bool(heartbeats.dead()), last_words)

    def own_fault(what: str, in_phase: bool = True) -> NoReturn:
        """A fault of this rank alone ends the job for all."""
        here = world.beat.seen()
        say_error(place + (f"{here.place()}: " if in_phase and here.step else "") + what)
        world.beat.leave(spoken=True)
        world.abort(ExitCode.FAILED)

    def look_for_the_dead() -> None:
        """A parameter server knows workers by number, and that a connection has ended: the heartbeats know more."""
        if world.awaits is not None and heartbeats.tell_gone_behind_a_fault(say_error):
            world.abort(ExitCode.FAILED)

    try:
        started = processes.process_start_time()
        code = run_job(world, job, arguments.output, arguments.resume, started, say, watchdog, stop, memory)
    except AgreedFault as fault:
        look_for_the_dead()
        if world.rank == 0:
            fail(str(fault), fault.exit_code)
        return fault.exit_code
    except (Fault, KeyboardInterrupt) as fault:
        look_for_the_dead()
        # A TrainingFault or a ReplicaFault names its step itself.
        own_fault(str(fault) or "interrupted", not isinstance(fault, TrainingFault | ReplicaFault | KeyboardInterrupt))
    except MemoryError as error:
        own_fault(out_of_memory(error))
    except BaseException as error:
        # Whatever else happens to one rank must end all of them, or the others wait for ever.
        if arguments.log_dir is not None or DEBUG in os.environ:
            traceback.print_exc()
        kind = type(error).__name__
        own_fault(f"internal error: {kind}: {error}; set {DEBUG}=1 to see where, and please report it")
    finally:
        world.beat.leave()
        watchdog.stop()
        stop.stop()
    heartbeats.close()
    return code


def read_job(path: Path, settings: Sequence[str] = ()) -> job_pb2.JobSpec:
    """The resolved job. UsageFault with a line for each violation."""
    from protos.job_file import JobFileInvalid, read_job_file

    try:
        return read_job_file(path, settings)
    except JobFileInvalid as invalid:
        raise UsageFault(str(invalid)) from invalid


def fail(message: str, code: int) -> int:
    """Print what a person gets, one line for each fault, and hand the exit code on."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
