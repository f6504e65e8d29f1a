"""PowerSGD between nodes: the slice's weight matrices as all-reduced factors, the rest of the slice as float32.

The rest rides with the first factors in one all-reduce; the second factors take another.

Rules: as in compressed_reduction.py. The sum of factors is MPI's, which gives every node the same bits as it does for
gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from worker.compression.codec import Float32
from worker.compression.power_sgd import Factors
from worker.engine.params import ParameterSlot
from worker.sync.compression_costs import CompressionCosts


class PowerSgdReduction:
    """As CompressedReduction."""

    def __init__(self, peers: Any, rank: int, bounds: tuple[int, int], slots: tuple[ParameterSlot, ...]) -> None:
        self.costs = CompressionCosts(peers)
        self._peers = peers
        self._factors = Factors(slots, bounds, rank)
        self.residual = self._factors.residual

    def factors(self) -> Float32:
        """As in CompressedReduction: Q of every matrix."""
        return self._factors.second

    def take_factors(self, factors: Float32) -> None:
        """As in CompressedReduction."""
        self._factors.second[:] = factors

    def reduce(self, total: np.ndarray, samples: int) -> None:
        """As in CompressedReduction."""
        from mpi4py import MPI

        costs, factors = self.costs, self._factors
        costs.begin()
        with costs.coding():
            factors.begin(total, samples)
        self._peers.Allreduce(MPI.IN_PLACE, factors.first, op=MPI.SUM)
        with costs.coding():
            factors.turn()
        self._peers.Allreduce(MPI.IN_PLACE, factors.second, op=MPI.SUM)
        with costs.coding():
            factors.end(total, samples)
        costs.end(costs.all_reduced(factors.first.size + factors.second.size), len(total))
