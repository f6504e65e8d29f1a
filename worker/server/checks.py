"""What a shard refuses of a push, and in which words; nothing here changes anything.

A Conflict is a push that would have been right at another time or to another shard, any other Refused one that is wrong
in itself.
"""

import math
from collections.abc import Mapping

import numpy as np

from worker.server.chunk import Chunk
from worker.server.members import Members
from worker.server.pushes import Conflict, Push, Refused, ShardSetup
from worker.server.subtrees import Subtrees

# Sums of float32 losses and counts; more would overflow once it is summed.
MOST_OF_A_TOTAL = float(np.finfo(np.float32).max)


def check_push(
    push: Push,
    setup: ShardSetup,
    members: Members,
    chunks: Mapping[int, Chunk],
    subtrees: Subtrees | None,
    step: int,
    terms: Push | None,
    total_count: int | None,
) -> Chunk:
    """The push's chunk, or the reason why the push is refused.

    Args:
        step: applied to every chunk.
        terms: the open step's first push by a founding worker, which all others must agree with.
        total_count: how many totals the founding workers send; None where none of them has pushed here yet.
    """
    members.check_joined(push.worker, push.generation)
    where = f"{members.name(push.worker)}, step {push.step}, offset {push.offset}"
    founding = members.is_founding(push.worker)
    chunk = chunks.get(push.offset)
    if chunk is None:
        raise Refused(
            f"{where}: no chunk begins there; they begin at {setup.start} and every "
            f"{setup.chunk_elements} elements up to {setup.stop}"
        )
    needed = len(chunk.parameters) * (subtrees.rows[push.worker] if subtrees else 1)
    if len(push.gradient) != needed:
        raise Refused(f"{where}: {len(push.gradient)} elements, the chunk has {needed}")
    if setup.mode.at_once:
        if push.worker in members.left:
            raise Conflict(f"{where}: {members.parted(push.worker)}")
        applied = chunk.clocks.done[push.worker]
        if push.step not in (applied, applied + 1) or push.step == 0:
            raise Conflict(f"{where}: this worker is at step {applied + 1}")
    else:
        applied = chunk.step
        if push.step not in (applied, step + 1) or push.step == 0:
            raise Conflict(f"{where}: the shard is at step {step + 1}")
    if applied == push.step:
        return chunk
    if push.samples < 1:
        raise Refused(f"{where}: {push.samples} samples in the batch, at least 1 is needed")
    if founding and not (math.isfinite(push.learning_rate) and push.learning_rate >= 0):
        raise Refused(f"{where}: learning rate {push.learning_rate} is not a finite number of at least 0")
    if not 0 <= push.share <= push.samples:
        raise Refused(f"{where}: a share of {push.share} samples in a batch of {push.samples}")
    if not (founding or setup.mode.at_once or push.worker in push.guests):
        raise Refused(f"{where}: its batch was cut for the guests {list(push.guests)}, and it is none of them")
    if not founding and push.offset == setup.start:
        _check_guest_totals(push, where, setup.mode.at_once, total_count)
    _check_agreement(push, where, setup, members, chunk, subtrees, terms)
    if not np.isfinite(push.gradient).all():
        element = push.offset + int(np.argmin(np.isfinite(push.gradient))) % len(chunk.parameters)
        raise Refused(f"{where}: the gradient is not finite at element {element}: lower the learning rate")
    if not setup.mode.at_once:
        for worker in members.left:
            raise Conflict(f"{where}: {members.parted(worker)}")
    return chunk


def _check_guest_totals(push: Push, where: str, at_once: bool, total_count: int | None) -> None:
    """What founding workers and guests send is summed, so a guest's own totals must not end the job for all.

    In the synchronous mode a guest's first step is at least two behind its join. Elsewhere it may be the first to push
    this chunk, and totals of another count are summed with none.
    """
    if total_count is None and not at_once:
        raise Conflict(f"{where}: no founding worker has pushed here yet; join again")
    if total_count is not None and len(push.totals) != total_count:
        raise Refused(f"{where}: {len(push.totals)} totals, but the founding workers send {total_count}")
    for index, total in enumerate(push.totals):
        if not abs(total) <= MOST_OF_A_TOTAL:
            raise Refused(f"{where}: total {index} is {total}, which is not a finite number of float32's range")


def _check_agreement(
    push: Push,
    where: str,
    setup: ShardSetup,
    members: Members,
    chunk: Chunk,
    subtrees: Subtrees | None,
    terms: Push | None,
) -> None:
    """Every push of a step states the same batch and rate, and as many totals."""
    if push.totals and push.offset != setup.start:
        raise Refused(f"{where}: totals ride on the chunk at {setup.start} only")
    if subtrees and not subtrees.fits(push.worker, len(push.totals)):
        shards = subtrees.shards[push.worker]
        raise Refused(f"{where}: {len(push.totals)} totals, which is not as many for each of {shards} virtual shards")
    if terms is None:
        return
    rate = push.learning_rate if members.is_founding(push.worker) else terms.learning_rate
    for name, given, agreed in (
        ("samples", push.samples, terms.samples),
        ("learning rate", rate, terms.learning_rate),
    ):
        if given != agreed:
            raise Refused(f"{where}: {name} {given}, but {members.name(terms.worker)} said {agreed}")
    for other in chunk.held.values():
        if not _as_many_totals(other, push, subtrees):
            raise Refused(
                f"{where}: {len(push.totals)} totals, but {members.name(other.worker)} sent {len(other.totals)}"
            )


def _as_many_totals(one: Push, other: Push, subtrees: Subtrees | None) -> bool:
    if subtrees:
        return subtrees.agree(one.worker, len(one.totals), other.worker, len(other.totals))
    return len(one.totals) == len(other.totals)
