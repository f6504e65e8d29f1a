"""Residuals of a lossy wire format as part of a checkpoint: `residual.N` over the whole flat vector for each node N.

Rules: on as many nodes as wrote them they come back exactly. On another number their sum is divided evenly, so nothing
that was to be sent is lost. PowerSGD's factors go with them, `power_sgd.SLICES`: they belong to the rows of each
slice, and where the slices are others they begin anew, which costs a step or two of accuracy and no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from worker.sync.compressed_reduction import CompressedReduction
from worker.sync.world import World

RESIDUAL = "residual."
FACTORS = "power_sgd."


class Owner(NamedTuple):
    """One rank's part of the residuals."""

    node: int  # its place among its slice's owners
    nodes: int
    slices: int
    bounds: tuple[int, int]  # of its slice; empty for a rank that owns none
    reduction: CompressedReduction | None


def gather(world: World, owner: Owner, elements: int) -> dict[str, np.ndarray]:
    """All nodes' residuals, on rank 0 (elsewhere none). Collective; nobody may be at a step."""
    reduction = owner.reduction
    residual = np.empty(0, np.float32) if reduction is None else reduction.residual
    factors = np.empty(0, np.float32) if reduction is None else reduction.factors()
    parts = world.gather_everywhere([owner.node, *owner.bounds, factors.size])
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
            name = f"{RESIDUAL}{node}"
            if name not in gathered:
                gathered[name] = np.zeros(elements, np.float32)
            gathered[name][start:stop] = residual
            if node == 0:
                all_factors.append(factors)
    if any(factors.size for factors in all_factors):
        gathered[f"{FACTORS}{owner.slices}"] = np.concatenate(all_factors)
    return gathered


def restore(world: World, owner: Owner, elements: int, state: Mapping[str, np.ndarray] | None) -> int:
    """Give every rank its part of rank 0's `state`, a checkpoint's. Collective.

    Returns:
        How many nodes' residuals there were, which are lost if nobody encodes now.
    """
    held: Mapping[str, np.ndarray] = state or {}
    names: list[str] = world.broadcast(sorted((n for n in held if n.startswith(RESIDUAL)), key=_node))
    compressed = any(world.gather_everywhere(owner.reduction is not None))
    if not compressed:
        return len(names)
    start, stop = owner.bounds
    for node, name in enumerate(names):
        whole = world.broadcast_array(held.get(name), elements)
        if owner.reduction is None:
            continue
        if len(names) != owner.nodes:
            owner.reduction.residual += whole[start:stop] / np.float32(owner.nodes)
        elif node == owner.node:
            owner.reduction.residual[:] = whole[start:stop]
    _restore_factors(world, owner, held)
    return len(names)


def _restore_factors(world: World, owner: Owner, held: Mapping[str, np.ndarray]) -> None:
    own = np.empty(0, np.float32) if owner.reduction is None else owner.reduction.factors()
    everyone = world.gather_everywhere([owner.node, owner.bounds[0], int(own.size)])
    sizes = {start: size for node, start, size in everyone if node == 0 and size}  # by slice
    found = held.get(f"{FACTORS}{owner.slices}")
    if not world.broadcast(found is not None and found.size == sum(sizes.values())):
        return
    whole = world.broadcast_array(found, sum(sizes.values()))
    if owner.reduction is not None and own.size:
        first = sum(size for start, size in sizes.items() if start < owner.bounds[0])
        owner.reduction.take_factors(whole[first : first + own.size])


def _node(name: str) -> int:
    return int(name.removeprefix(RESIDUAL))
