"""The checkpoints of a run under way: when one is due, what goes in, and that it is worth keeping.

Rules: a checkpoint is of a step boundary that every rank knows; every rank gives its part of the state and rank 0
writes. The last checkpoint on disk is always good: weights that are not finite are never written. By the clock they
come no more often than writing them is cheap; by steps they come exactly then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

import numpy as np

from protos import job_pb2
from worker import output_folder
from worker.best_weights import BestWeights
from worker.checkpoint import Checkpoint
from worker.checkpoint_writer import CheckpointWriter
from worker.engine.model import Model
from worker.engine.params import decayed_ranges
from worker.errors import CheckpointFault, TrainingFault
from worker.measurements import Position
from worker.sync.exchange import Exchange
from worker.sync.world import World
from worker.update import AVERAGE

WRITING_SHARE = 0.1  # of the time, at most, where the clock decides
WAIT_SHARE = 0.8  # of limits.stall_seconds, so that a disk that hangs is named before a rank that waits for it

ENORMOUS = float(np.sqrt(np.finfo(np.float32).max))  # of a weight


class Checkpointer:
    """Writes the checkpoints of one attempt. Every rank has one.

    Args:
        best: on rank 0 the best epoch's weights where they are to be kept; else None.
        written: as of CheckpointWriter.
    """

    def __init__(
        self,
        world: World,
        job: job_pb2.JobSpec,
        model: Model,
        exchange: Exchange,
        folder: Path,
        best: BestWeights | None,
        written: Callable[[float], None],
    ) -> None:
        self._world, self._training, self._model, self._exchange = world, job.training, model, exchange
        self._best = best
        self._path: Path | None = None
        self._taken = monotonic()
        self._writer: CheckpointWriter | None = None
        if world.rank == 0:
            self._writer = CheckpointWriter(
                folder / output_folder.CHECKPOINTS,
                job.training.keep_checkpoints,
                WAIT_SHARE * job.limits.stall_seconds,
                written,
            )

    def due(self, step: int) -> bool:
        """Whether the boundary behind `step` is to have one; rank 0 decides.

        Raises:
            CheckpointFault: the one before could not be written.
        """
        writer = self._writer
        if writer is None:
            return False
        writer.check()
        return is_due(self._training, step, monotonic() - self._taken, writer.seconds, writer.busy)

    def take(self, position: Position, ends_epoch: bool) -> None:
        """Copy the state as it is now and let it be written. Collective.

        Raises:
            TrainingFault: on every rank, where a weight is not finite.
            CheckpointFault: on rank 0, where the one before could not be written.
        """
        state = self._exchange.gather_state()
        fault: str | None = None
        if self._writer is not None:
            fault = self._not_finite(position)
            if fault is None:
                if self._best and ends_epoch:
                    self._best.see(
                        position, evaluated_weights(self._exchange.parameters, state), self._model.state
                    )  # fmt: skip
                self._path = self._writer.take(self._checkpoint(position, state))
        fault = self._world.broadcast(fault)
        if fault:
            raise TrainingFault(fault)
        self._taken = monotonic()

    def settle(self) -> Path | None:
        """Wait until the last one is on disk; where it is, on rank 0. CheckpointFault as of CheckpointWriter.wait."""
        if self._writer is not None:
            self._writer.wait()
        return self._path

    def settle_after_fault(self) -> str | None:
        """As `settle`, where another fault ends the job: what is wrong with the last one, if anything is."""
        try:
            self.settle()
        except CheckpointFault as fault:
            return str(fault)
        return None

    def _not_finite(self, position: Position) -> str | None:
        when = f"step {position.step} (epoch {position.epoch + (position.batches > 0)})"
        # One pass: a sum is finite exactly when no element is nan or infinite (float64 cannot overflow on float32).
        for what, values in (("weight", self._exchange.parameters), ("running statistic", self._model.state)):
            if not np.isfinite(values.sum(dtype=np.float64)):
                return f"{when}: a {what} is no longer finite; lower the learning rate"
        # A layer multiplies weights with what other weights have made: of this size the next product is infinite.
        largest = max(self._exchange.parameters.max(), -self._exchange.parameters.min())  # makes no copy
        if largest > ENORMOUS:
            return (
                f"{when}: a weight has become {largest:.3g}, whose square float32 cannot hold; lower the learning rate"
            )
        return None

    def _checkpoint(self, position: Position, state: dict[str, np.ndarray]) -> Checkpoint:
        model, best = self._model, self._best
        held = bool(model.state_count)
        return Checkpoint(
            layout_digest=model.layout_digest,
            decayed=decayed_ranges(model.slots, 0, model.parameter_count),
            parameters=self._exchange.parameters,
            state=state,
            best=best.weights if best else None,
            model_state=model.state if held else None,
            best_model_state=best.state if best and held else None,
            **vars(position),
        )


def is_due(
    training: job_pb2.Training, step: int, seconds_since: float, writing_seconds: float, writing: bool
) -> bool:  # fmt: skip
    """Whether a checkpoint is to follow `step`.

    Args:
        seconds_since: since the last one was taken.
        writing_seconds: that it took to write.
        writing: whether it still is being written.
    """
    if training.checkpoint_steps and step % training.checkpoint_steps == 0:
        return True
    pause = max(training.checkpoint_seconds, writing_seconds / WRITING_SHARE)
    return training.checkpoint_seconds > 0 and not writing and seconds_since >= pause


def evaluated_weights(parameters: np.ndarray, state: dict[str, np.ndarray]) -> np.ndarray:
    """What is evaluated and left: the average of the weights where there is one, else the weights."""
    return state.get(AVERAGE, parameters)
