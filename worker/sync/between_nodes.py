"""What a node's ranks do to add up their slices over all nodes: the interface, and what its implementations are given.

Rules: there is one on every rank of an attempt on several nodes, also where the rank owns no slice, and none on one
node. The owners of a slice, one on each node, are its peers. Sums travel; nobody divides here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from worker.engine.layers.layer import Finished


class Slice(NamedTuple):
    """The part of the vector that one rank of each node sums; empty on a rank that owns none."""

    start: int  # its first element in the vector
    gradients: list[np.ndarray]  # (elements,) float32 each: its part of every local rank's gradient, in rank order
    total: np.ndarray  # (elements,) float32, this rank's own: where the sum goes
    peers: Any  # communicator of its owners; of those who own nothing on a rank that owns none


class BetweenNodes(Protocol):
    """Adds up a slice over this node's ranks and over all nodes."""

    # Takes how far this rank's backward has come, so that the exchange can begin; None: it begins in `finish`.
    finished: Finished | None
    lines: list[str]  # for people, at the start

    def finish(self) -> None:
        """Behind the fence, when every local rank's gradient is whole: let `total` be the sum over all ranks.

        Collective over the peers. The ranks that own no slice call it too.
        """

    def facts(self) -> dict[str, Any]:
        """What summary.json says of it under `exchange`."""


def sum_in_order(parts: list[np.ndarray], out: np.ndarray) -> None:
    """Add up float32 vectors of one size in their order, so that the sum has the same bits however it is cut."""
    if len(parts) == 1:
        np.copyto(out, parts[0])
        return
    np.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        np.add(out, part, out=out)
