"""Residuals of a lossy wire format as part of a checkpoint: `residual.N` over the whole flat vector for each node N.

Rules: on as many nodes as wrote them they come back exactly. On another number their sum is divided evenly, and on one
node alone it joins the first step's gradient, so nothing that was to be sent is lost. PowerSGD's factors go with them,
`power_sgd.SLICES`: they belong to the rows of each slice, and where the slices are others they begin anew, which costs
some steps of accuracy and no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from worker.sync.world import World

RESIDUAL = "residual."
FACTORS = "power_sgd."
LOST = "what a lossy wire format had yet to send is left out, because float32 is sent now"


class Held(Protocol):
    """What a rank carries from step to step."""

    residual: np.ndarray  # (elements of its slice,) float32

    def factors(self) -> np.ndarray:
        """(any,) float32, the same on every node; empty for most formats."""

    def take_factors(self, factors: np.ndarray) -> None:
        """Go on from what `factors` gave."""


class Owner(Protocol):
    """A rank and the slice that it sends."""

    node: int  # its place among the slice's owners
    nodes: int  # how many they are
    slices: int
    bounds: tuple[int, int]  # of the slice; empty on a rank that owns none

    @property
    def reduction(self) -> Held | None:
        """None on a rank that owns no slice."""


class NodeResidual:
    """A node's residual, for a checkpoint: an Owner of the whole vector, and what it holds."""

    slices = 1

    def __init__(self, node: int, nodes: int, residual: np.ndarray, lowest: bool) -> None:
        """`lowest`: this rank speaks for its node."""
        self.node, self.nodes, self.residual = node, nodes, residual
        self.bounds = (0, residual.size if lowest else 0)

    @property
    def reduction(self) -> NodeResidual | None:
        """As in Owner."""
        return self if self.bounds[1] else None

    def factors(self) -> np.ndarray:
        """As in Held."""
        return np.empty(0, np.float32)

    def take_factors(self, factors: np.ndarray) -> None:
        """As in Held."""


def gather(world: World, own: Owner, elements: int) -> dict[str, np.ndarray]:
    """All nodes' residuals, on rank 0 (elsewhere none). Collective; nobody may be at a step."""
    residual, factors = _held(own)
    parts = world.gather_everywhere([own.node, *own.bounds, factors.size])
    if world.rank != 0:
        world.comm.Send(residual, 0)
        world.comm.Send(factors, 0)
        return {}
    gathered: dict[str, np.ndarray] = {}
    all_factors = []
    for rank, (node, start, stop, size) in enumerate(parts):
        if rank:
            residual, factors = np.empty(stop - start, np.float32), np.empty(size, np.float32)
            world.comm.Recv(residual, rank)
            world.comm.Recv(factors, rank)
        if stop > start:
            whole = gathered.setdefault(f"{RESIDUAL}{node}", np.zeros(elements, np.float32))
            whole[start:stop] = residual
        if stop > start and node == 0:
            all_factors.append(factors)
    if any(factors.size for factors in all_factors):
        gathered[f"{FACTORS}{own.slices}"] = np.concatenate(all_factors)
    return gathered


def restore(world: World, own: Owner, elements: int, state: Mapping[str, np.ndarray] | None) -> None:
    """Give every rank its part of rank 0's `state`, a checkpoint's. Collective."""
    held: Mapping[str, np.ndarray] = state or {}
    names = _names(world, held)
    start, stop = own.bounds
    for node, name in enumerate(names):
        whole = world.broadcast_array(held.get(name), elements)
        if own.reduction is None:
            continue
        if len(names) != own.nodes:
            own.reduction.residual += whole[start:stop] / np.float32(own.nodes)
        elif node == own.node:
            own.reduction.residual[:] = whole[start:stop]
    _restore_factors(world, own, held)


def restore_sum(
    world: World, bounds: tuple[int, int], elements: int, state: Mapping[str, np.ndarray] | None
) -> np.ndarray | None:
    """The part within `bounds` of the sum of rank 0's residuals in `state`; None where there are none. Collective."""
    held: Mapping[str, np.ndarray] = state or {}
    total = None
    for name in _names(world, held):
        part = world.broadcast_array(held.get(name), elements)[slice(*bounds)]
        total = part.copy() if total is None else total + part
    return total


def is_any(world: World, state: Mapping[str, np.ndarray] | None) -> bool:
    """Whether rank 0's `state` holds any. Collective."""
    return bool(_names(world, state or {}))


def _restore_factors(world: World, own: Owner, held: Mapping[str, np.ndarray]) -> None:
    _, factors = _held(own)
    everyone = world.gather_everywhere([own.node, own.bounds[0], int(factors.size)])
    sizes = {start: size for node, start, size in everyone if node == 0 and size}  # by slice
    found = held.get(f"{FACTORS}{own.slices}")
    if not world.broadcast(found is not None and found.size == sum(sizes.values())):
        return
    whole = world.broadcast_array(found, sum(sizes.values()))
    if own.reduction is not None and factors.size:
        first = sum(size for start, size in sizes.items() if start < own.bounds[0])
        own.reduction.take_factors(whole[first : first + factors.size])


def _held(own: Owner) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.empty(0, np.float32)
    return (nothing, nothing) if own.reduction is None else (own.reduction.residual, own.reduction.factors())


def _names(world: World, held: Mapping[str, np.ndarray]) -> list[str]:
    """Of rank 0's residuals, by node, on every rank."""
    names: list[str] = world.broadcast(sorted((name for name in held if name.startswith(RESIDUAL)), key=_node))
    return names


def _node(name: str) -> int:
    return int(name.removeprefix(RESIDUAL))
