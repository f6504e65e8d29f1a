"""One attempt at a job, from the job file to the output folder: opens the parts, trains, leaves the results.

Rules: what can be refused is refused before the output folder is made, by all ranks together. Rank 0 alone writes
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from protos import job_pb2
from protos.exit_codes import ExitCode
from protos.urls import shown
from worker import output_folder
from worker.best_weights import BestWeights
from worker.checkpoint import Checkpoint, write_atomically
from worker.checkpointing import Checkpointer, evaluated_weights
from worker.coordinator_client import connect
from worker.data.stores import fetch_all, local_path
from worker.errors import TrainingFault
from worker.initial_weights import open_initial_weights
from worker.invitation import leave_invitation
from worker.measurements import Position, from_plain, rank_report, validation_losses
from worker.memory import MemoryPeak
from worker.model_file import write_model
from worker.preparation import Prepared, check_shares, check_size, prepare, remark
from worker.reporter import Reporter
from worker.stopping import best_epoch, result_of
from worker.sync import compression_costs
from worker.sync.exchange import check_fits, open_exchange
from worker.sync.world import AgreedFault, World
from worker.termination import StopRequest
from worker.train import Observers, Result, train
from worker.watchdog import Watchdog

OPENING_SECONDS = 30.0  # an exchange may have to start processes, which has a deadline of its own


def run_job(
    world: World,
    job: job_pb2.JobSpec,
    folder: Path,
    resume: bool,
    process_start_time: float,
    say: Callable[[str], None],
    watchdog: Watchdog,
    stop: StopRequest,
    memory: MemoryPeak,
) -> ExitCode:
    """Train `job` and leave the output in `folder`, or a checkpoint where a rank is told to `stop`. Collective.

    Args:
        process_start_time: seconds since the Unix epoch, for `seconds_to_first_step`.
        say: takes a line for people.

    Returns:
        DONE or INTERRUPTED.

    Raises:
        Fault: AgreedFault when every rank knows of it, any other when it is this rank's own.
    """
    world.agree(lambda: fetch_all(job, lambda: watchdog.doing("fetching the data")))
    watchdog.doing("opening the data")
    prepared = world.agree(lambda: prepare(job, lambda: watchdog.doing("opening the data")))
    world.agree(lambda: check_size(prepared, os.environ))
    world.agree(lambda: check_shares(prepared, job, world.size))
    shards = job.training.virtual_shards
    if job.training.reproducible and shards < world.size:
        idle = f"{world.size - shards} of {world.size} workers"
        say(f"{idle} have nothing to compute: training.virtual_shards is {shards}")
    initial = None
    if job.initialize_from and not resume:
        named = job.initialize_from
        initial = world.agree(lambda: open_initial_weights(Path(local_path(named)), prepared.model, shown(named)))
        for line in initial.lines():
            say(line)
    watchdog.doing("opening the output folder")
    found = world.agree(lambda: _open_folder(world, folder, job, prepared, resume, say))
    start = from_plain(world.broadcast(asdict(found.position if found else Position())))
    watchdog.doing("opening the exchange", OPENING_SECONDS)
    exchange = open_exchange(world, job, prepared.model, found, resume, initial)
    if exchange.note:
        say(exchange.note)
    invitation: Path | None = None
    if exchange.invitation is not None and world.rank == 0:
        invitation = leave_invitation(folder, exchange.invitation)
        say(f"guests may come: paceline-worker join {exchange.invitation.address} --token-file {invitation}")
    if remarkable := remark(prepared, job):
        say(remarkable)

    best = None
    if job.training.keep_best:
        best = BestWeights(found.best, found.best_model_state) if found else BestWeights(None, None)
    client = connect(os.environ) if world.rank == 0 else None
    reporter = None
    if world.rank == 0:
        output_folder.cut_metrics(folder, start)
        send = client.send if client else None
        reporter = Reporter(folder / output_folder.METRICS, job.training.epochs, say, send)

    def saved(time: float) -> None:
        if reporter:
            reporter.saved(time, rank_report(world.rank, world.host, exchange.statistics))

    checkpointer = Checkpointer(world, job, prepared.model, exchange, folder, best, saved)
    observers = Observers(
        first_step=reporter.first_step if reporter else lambda _: None,
        report=reporter.report if reporter else lambda *_: None,
        checkpoint_due=checkpointer.due,
        checkpoint=checkpointer.take,
        stop_asked=lambda: stop.asked is not None,
        doing=watchdog.doing,
    )
    try:
        stop.wait_for_step(job.limits.grace_seconds)
        # What overflows ends in a loss or a weight that is not finite, which is reported by step.
        with np.errstate(over="ignore", invalid="ignore"):
            result = train(world, job, prepared, exchange, start, observers)
        watchdog.doing("writing the last checkpoint")
        last = checkpointer.settle()
        if result.interrupted:
            names = filter(None, world.gather_everywhere(stop.asked))
            done = result.position.step
            say(f"stopped by {next(names, 'request')} after step {done}; checkpoint {last}: go on with --resume")
        if result.stopped:
            say(result.stopped)
        watchdog.doing("writing the results")
        world.beat.phase("results")
        nothing_done = result.position == start
        if nothing_done:
            say(f"nothing was left to do: the run has done its {start.epoch} epochs; ask for more with training.epochs")
        averages = job.training.HasField("average") and not result.interrupted
        peaks = world.gather_everywhere(memory.bytes(prepared.maps_data))
        state = exchange.gather_state() if averages else {}
        if world.rank == 0 and not result.interrupted and not (nothing_done and output_folder.is_finished(folder)):
            if best is None or best.weights is None:
                exchange.parameters[:] = evaluated_weights(exchange.parameters, state)
            else:
                exchange.parameters[:], prepared.model.state[:] = best.weights, best.state
            write_model(folder, job, prepared.model, prepared.preprocessing)
            summary = summarize(job, result, prepared, world.size, max(peaks), process_start_time)
            if initial is not None:
                summary["initialized"] = initial.summary()
            if facts := exchange.facts():
                summary["exchange"] = facts
            if costs := compression_costs.line(facts):
                say(costs)
            write_atomically(folder / output_folder.SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
    except TrainingFault as fault:
        # Every rank took the step and saw the same totals, so every rank is here.
        kept = checkpointer.settle_after_fault() or "no checkpoint was written yet"
        if world.rank == 0 and output_folder.has_checkpoint(folder):
            kept = f"the last good checkpoint is kept in {folder / output_folder.CHECKPOINTS}"
        raise AgreedFault(f"{fault}; {kept}", fault.exit_code) from fault
    finally:
        if reporter:
            reporter.close()
        if client:
            client.close()
        if invitation:
            invitation.unlink(missing_ok=True)
    world.agree(lambda: None)  # nobody leaves before rank 0 has written everything
    exchange.close()
    return ExitCode.INTERRUPTED if result.interrupted else ExitCode.DONE


def summarize(
    job: job_pb2.JobSpec,
    result: Result,
    prepared: Prepared,
    world_size: int,
    peak_bytes: int,
    process_start_time: float,
) -> dict[str, Any]:
    """summary.json; names as in the contract. The evaluation is that of the weights the run leaves."""
    validations = result.position.validations
    best = best_epoch(validation_losses(validations)) if job.training.keep_best else 0
    validation = result_of(validations, best)
    summary = {
        "state": "SUCCEEDED",
        "steps": result.position.step,
        "epochs": result.position.epoch,
        "samples": result.position.samples,
        "world_size": world_size,
        "train_loss": result.train_loss,
        "validation_loss": validation.get("validation_loss"),
        "validation_accuracy": validation.get("validation_accuracy"),
        "validation_metrics": validation.get("validation_metrics"),
        "best_epoch": best or None,
        "stopped_early": bool(result.stopped) or None,
        # A run killed between its last checkpoint and its results is finished without a step: then there is no rate.
        "samples_per_second": result.samples_per_second or None,
        "seconds_to_first_step": result.first_step_time - process_start_time if result.first_step_time else None,
        "wall_seconds": result.wall_seconds,
        "parameters": prepared.model.parameter_count,
        "peak_memory_bytes": peak_bytes,
    }
    return {name: value for name, value in summary.items() if value is not None}


def _open_folder(
    world: World, folder: Path, job: job_pb2.JobSpec, prepared: Prepared, resume: bool, say: Callable[[str], None]
) -> Checkpoint | None:
    if world.rank != 0:
        return None
    if not resume:
        output_folder.open_new(folder, job)
        return None
    found = output_folder.open_again(folder, job, say)
    check_fits(found, prepared.model, job)
    within = f", after {found.batches} steps of epoch {found.epoch + 1}" if found.batches else ""
    say(f"resuming after step {found.step} (epoch {found.epoch}{within})")
    return found
