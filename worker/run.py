"""One attempt at a job, from the job file to the output folder: opens the parts, trains, leaves the results.

Rules: what can be refused is refused before the output folder is made, by all ranks together. Rank 0 alone writes
files. The last checkpoint on disk is always good: weights that are not finite are never written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from protos import job_pb2
from protos.urls import shown
from worker import output_folder
from worker.best_weights import BestWeights
from worker.checkpoint import (
    Checkpoint,
    checkpoint_path,
    prune_checkpoints,
    write_atomically,
    write_checkpoint,
)
from worker.coordinator_client import connect
from worker.data.stores import fetch_all, local_path
from worker.engine.params import decayed_ranges
from worker.errors import TrainingFault
from worker.initial_weights import open_initial_weights
from worker.invitation import leave_invitation
from worker.measurements import Position, validation_losses
from worker.model_file import write_model
from worker.preparation import Prepared, check_shares, prepare, remark
from worker.reporter import Reporter
from worker.stopping import best_epoch, result_of
from worker.sync import compression_costs
from worker.sync.exchange import Exchange, check_fits, open_exchange
from worker.sync.world import AgreedFault, World
from worker.train import Observers, Result, train
from worker.update import AVERAGE
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
) -> None:
    """Train `job` and leave the output in `folder`. Collective.

    Args:
        process_start_time: seconds since the Unix epoch, for `seconds_to_first_step`.
        say: takes a line for people.

    Raises:
        Fault: AgreedFault when every rank knows of it, any other when it is this rank's own.
    """
    world.agree(lambda: fetch_all(job, lambda: watchdog.doing("fetching the data")))
    watchdog.doing("opening the data")
    prepared = world.agree(lambda: prepare(job))
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
    start = Position(
        *world.broadcast([found.step, found.epoch, found.samples, found.validations] if found else [0, 0, 0, ()])
    )
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
        output_folder.cut_metrics(folder, start.step)
        send = client.send if client else None
        reporter = Reporter(folder / output_folder.METRICS, job.training.epochs, say, send)
    observers = Observers(
        report=reporter.report if reporter else lambda *_: None,
        end_of_epoch=lambda position: _checkpoint(world, job, prepared, exchange, folder, position, best),
        doing=watchdog.doing,
    )
    try:
        # What overflows ends in a loss or a weight that is not finite, which is reported by step.
        with np.errstate(over="ignore", invalid="ignore"):
            result = train(world, job, prepared, exchange, start, observers)
        if result.stopped:
            say(result.stopped)
        watchdog.doing("writing the results")
        world.beat.phase("results")
        nothing_done = result.position.step == start.step
        if nothing_done:
            say(f"nothing was left to do: the run has done its {start.epoch} epochs; ask for more with training.epochs")
        peaks = world.gather_everywhere(peak_memory_bytes())
        state = exchange.gather_state() if job.training.HasField("average") else {}
        if world.rank == 0 and not (nothing_done and output_folder.is_finished(folder)):
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
        # Every rank saw the same totals, so every rank is here.
        kept = "no checkpoint was written yet"
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


def evaluated_weights(parameters: np.ndarray, state: dict[str, np.ndarray]) -> np.ndarray:
    """What is evaluated and left: the average of the weights where there is one, else the weights."""
    return state.get(AVERAGE, parameters)


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


def peak_memory_bytes() -> int:
    """The most memory this process has held at once, shared pages it touched included.

    From Linux's VmHWM: getrusage's ru_maxrss keeps what the parent process held when it started this one.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


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
    say(f"resuming after step {found.step} (epoch {found.epoch})")
    return found


def _checkpoint(
    world: World,
    job: job_pb2.JobSpec,
    prepared: Prepared,
    exchange: Exchange,
    folder: Path,
    position: Position,
    best: BestWeights | None,
) -> float | None:
    """Write a checkpoint; rank 0 says when it was complete. Collective: every rank gives its part of the state."""
    state = exchange.gather_state()
    fault: str | None = None
    if world.rank == 0:
        if best:
            best.see(position, evaluated_weights(exchange.parameters, state), prepared.model.state)
        fault = _write_checkpoint(job, prepared, exchange, folder, position, state, best)
    fault = world.broadcast(fault)
    if fault:
        raise TrainingFault(fault)
    return time.time() if world.rank == 0 else None


def _write_checkpoint(
    job: job_pb2.JobSpec,
    prepared: Prepared,
    exchange: Exchange,
    folder: Path,
    position: Position,
    state: dict[str, np.ndarray],
    best: BestWeights | None,
) -> str | None:
    model = prepared.model
    # One pass: a sum is finite exactly when no element is nan or infinite (float64 cannot overflow on float32 values).
    for what, values in (("weight", exchange.parameters), ("running statistic", model.state)):
        if not np.isfinite(values.sum(dtype=np.float64)):
            when = f"step {position.step} (epoch {position.epoch})"
            return f"{when}: a {what} is no longer finite; lower the learning rate"
    checkpoints = folder / output_folder.CHECKPOINTS
    path = checkpoint_path(checkpoints, position.step)
    held = bool(model.state_count)
    write_checkpoint(
        path,
        Checkpoint(
            *(position.step, position.epoch, position.samples),
            model.layout_digest,
            decayed_ranges(model.slots, 0, model.parameter_count),
            exchange.parameters,
            state,
            position.validations,
            best.weights if best else None,
            model.state if held else None,
            best.state if best and held else None,
        ),
    )
    prune_checkpoints(checkpoints, job.training.keep_checkpoints)
    return None
