"""The weights and model state of the epoch with the lowest validation loss, kept by rank 0 and by its checkpoints."""

from __future__ import annotations

import numpy as np

from worker.measurements import Position, validation_losses
from worker.stopping import best_epoch


class BestWeights:
    """Keeps one copy of the weights and of the model's state.

    Attributes:
        weights: (parameter_count,) float32; None before the first epoch with a finite validation loss.
        state: (state_count,) float32, of the same epoch.
    """

    def __init__(self, weights: np.ndarray | None, state: np.ndarray | None) -> None:
        """Go on from what a checkpoint kept, if there is one."""
        self.weights = weights
        self.state = state

    def see(self, position: Position, weights: np.ndarray, state: np.ndarray) -> None:
        """An epoch has been evaluated with these weights and this state; keep them if none was better."""
        losses = validation_losses(position.validations)
        if best_epoch(losses) != len(losses):
            return
        # New arrays: those of before may still be on their way to the disk.
        self.weights, self.state = weights.copy(), state.copy()
