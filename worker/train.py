"""The training loop.

Each step: this rank's gradient over its share of the batch, exchange. Each epoch: evaluate, write a checkpoint. What is
decided on the way is decided by others (schedules.py, stopping.py, checkpointing.py), and what is said about it is said
by others (measurements.py counts, the observers write).

Rules: every rank runs the same steps in the same order, also those that have no samples in one. What ends training is
known to all ranks at the same step. Between two meetings of an exchange with local steps nothing is collective over all
ranks; reports, evaluations and checkpoints come at meetings, and so does the end of a job that is told to stop. Of the
lines of metrics.jsonl those up to a checkpoint's step are written before it, and one ends there, so that a resumed run
goes on with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from time import perf_counter, time
from typing import Any

from protos import job_pb2
from worker.data.ahead import open_reader
from worker.data.sharding import batch_bounds, sample_order, steps_per_epoch
from worker.engine.layers.layer import Moment
from worker.errors import ReplicaFault, TrainingFault
from worker.evaluation import Evaluator
from worker.measurements import Meter, Position, SteadyRate, make_report, rank_report, validation_losses
from worker.optimizers import base_learning_rate
from worker.preparation import Prepared
from worker.schedules import make_schedule
from worker.sharded_accumulation import open_accumulator
from worker.stopping import bound_of_loss, has_diverged, why_stop
from worker.sync.exchange import TOTALS, Exchange
from worker.sync.world import World
from worker.update import AVERAGE

REPORT_SECONDS = 0.5  # between two reports within an epoch


@dataclass(frozen=True)
class Observers:
    """Whom the loop tells. All are called on every rank at the same step, except `report`: on rank 0 alone."""

    first_step: Callable[[dict[str, Any]], None]  # the first step of this run is done; this rank's statistics
    report: Callable[[dict[str, Any], list[dict[str, Any]], bool], None]  # report, all ranks' statistics, ends_epoch
    checkpoint_due: Callable[[int], bool]  # whether one is to follow a step; rank 0 decides
    checkpoint: Callable[[Position, bool], None]  # takes one; whether it ends an epoch
    stop_asked: Callable[[], bool]  # whether this rank was told to stop
    doing: Callable[[str], None]  # what comes next, for the watchdog


@dataclass(frozen=True)
class Result:
    """What training came to; the same on every rank but for times."""

    position: Position
    stopped: str | None  # why it ended before the last epoch
    interrupted: bool  # a rank was told to stop: there is more to do
    train_loss: float | None  # mean over the last epoch
    samples_per_second: float
    first_step_time: float  # seconds since the Unix epoch at which the first step had ended; 0 when there was none
    wall_seconds: float


def train(
    world: World, job: job_pb2.JobSpec, prepared: Prepared, exchange: Exchange, start: Position, observers: Observers
) -> Result:
    """Run the job from `start` to the end of its last epoch. Collective.

    Raises:
        TrainingFault: on every rank alike, when the loss is no longer finite; names the step.
        ReplicaFault: on one rank alone, likewise, where the others are at other steps and do not know of it.
    """
    began = perf_counter()
    model, seed, epochs = prepared.model, job.training.seed, job.training.epochs
    samples = len(prepared.train)
    batches = steps_per_epoch(samples, job.training.batch_size)
    batch_size = min(job.training.batch_size or samples, samples)
    schedule = make_schedule(job.schedule, base_learning_rate(job.optimizer), samples, epochs)

    accumulator, own_share = open_accumulator(world, model, exchange, job.training, batch_size)
    ranks_here = world.gather_everywhere(world.host).count(world.host)
    reader = open_reader(
        prepared.train, prepared.preprocessing, accumulator.capacity, prepared.augmentation, ranks_here
    )
    evaluator = None
    if prepared.validation is not None:
        pieces = job.training.virtual_shards if job.training.reproducible else 0
        evaluator = Evaluator(world, model, prepared.validation, prepared.preprocessing, job.metrics, pieces)
    model.reserve(max(reader.capacity, evaluator.capacity if evaluator else 0))

    def report(position: Position, meter: Meter, validation: dict[str, Any] | None = None) -> None:
        ranks = world.gather_everywhere(rank_report(world.rank, world.host, exchange.statistics))
        if world.rank == 0:
            line = make_report(position, epochs * batches, meter, learning_rate, perf_counter() - began)
            observers.report(line | (validation or {}), ranks, validation is not None)

    def checkpoint(position: Position, where: str) -> None:
        observers.doing(f"writing the checkpoint {where}")
        world.beat.phase("checkpoint")
        observers.checkpoint(position, not position.batches)

    step, samples_done, validations = start.step, start.samples, start.validations
    learning_rate = schedule(samples_done, validation_losses(validations))
    first_step_time, highest_loss = 0.0, start.highest_loss
    train_loss: float | None = None
    position, stopped, interrupted = start, None, False
    averaged = job.training.HasField("average")
    validation: dict[str, Any] = {}
    steady = SteadyRate(warm_up_steps=batches if epochs - start.epoch > 1 else min(10, batches // 2))
    for epoch in range(start.epoch, epochs):
        losses = validation_losses(validations)
        stopped = why_stop(job.training, losses)
        if stopped:
            break
        order = sample_order(seed, epoch, samples)
        reader.begin_epoch(epoch)
        resumed = start if epoch == start.epoch else Position()
        meter, epoch_meter = Meter(world.beat.phase), Meter(sums=resumed.sums)
        for batch in range(resumed.batches, batches):
            step += 1
            observers.doing(f"in step {step} (epoch {epoch + 1})")
            world.beat.step(step, epoch + 1)
            first, last = batch_bounds(batch, samples, job.training.batch_size)
            low, high = own_share(first, last)
            following = order[:0]
            if batch < batches - 1:
                following = order[slice(*own_share(*batch_bounds(batch + 1, samples, job.training.batch_size)))]
            learning_rate = schedule(samples_done, losses)

            meter.start_step()
            sums = accumulator.compute(reader, order[low:high], following, Moment(seed, step, low - first), meter)
            world.beat.phase("exchange")
            report_due = world.rank == 0 and perf_counter() - meter.began > REPORT_SECONDS
            asked = report_due, observers.checkpoint_due(step), observers.stop_asked()
            exchange.totals[: len(TOTALS)] = sums.loss, sums.correct, *asked
            update_seconds_before = exchange.statistics.update_seconds
            exchange.step(step, last - first, learning_rate)
            model.update_state()
            counted = exchange.meet(last - first, model.state, ends_epoch=batch == batches - 1)
            meter.lap_exchange(exchange.statistics.update_seconds - update_seconds_before)
            if not first_step_time:
                first_step_time = time()
                observers.first_step(rank_report(world.rank, world.host, exchange.statistics))
            samples_done += last - first
            steady.step(last - first)
            if not counted:
                continue

            loss, correct, reports_due, checkpoints_due, stops = exchange.totals[: len(TOTALS)].tolist()
            mean_loss = loss / counted
            if not highest_loss:
                highest_loss = bound_of_loss(mean_loss if exchange.first_loss is None else exchange.first_loss)
            if has_diverged(mean_loss, highest_loss):
                raise (TrainingFault if exchange.in_step else ReplicaFault)(
                    f"step {step} (epoch {epoch + 1}): the loss is {mean_loss:g}; "
                    f"lower the learning rate ({learning_rate:g}) or scale the features"
                )
            meter.add(loss, correct, counted)
            epoch_meter.add(loss, correct, counted)
            saves = stops or (checkpoints_due and batch < batches - 1)
            if saves or (reports_due and batch < batches - 1):
                report(Position(step, epoch + 1, samples_done), meter)
                meter = Meter(world.beat.phase)
                if saves:
                    done = batch + 1, epoch_meter.sums, highest_loss
                    position = Position(step, epoch, samples_done, validations, *done)
                    checkpoint(position, f"after step {step}")
                steady.pause()
            if stops:
                interrupted = True
                break
        if interrupted:
            break

        train_loss = epoch_meter.mean_loss()
        if evaluator is not None:
            evaluating = f"evaluating after epoch {epoch + 1}"
            observers.doing(evaluating)
            world.beat.phase("evaluate")
            with exchange.showing(AVERAGE) if averaged else nullcontext():
                evaluation = evaluator.evaluate(partial(observers.doing, evaluating))
            if not math.isfinite(evaluation.loss):
                raise TrainingFault(
                    f"step {step} (end of epoch {epoch + 1}): the validation loss is {evaluation.loss:g}; look for "
                    f"enormous values in the validation set, or lower the learning rate ({learning_rate:g})"
                )
            validation = evaluation.as_report()
            validations += (validation,)
        position = Position(step, epoch + 1, samples_done, validations, highest_loss=highest_loss)
        report(position, meter, validation)
        checkpoint(position, f"after epoch {epoch + 1}")
        steady.pause()

    reader.close()
    return Result(
        position=position,
        stopped=stopped,
        interrupted=interrupted,
        train_loss=train_loss,
        samples_per_second=steady.samples_per_second(),
        first_step_time=first_step_time,
        wall_seconds=perf_counter() - began,
    )
