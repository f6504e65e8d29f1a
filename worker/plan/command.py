"""`paceline plan` and `paceline-worker measure`: measure, predict, print.

Rules: what is wrong with the command line is said before anything is opened or measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from worker.errors import UsageFault
from worker.plan.units import bytes_per_second, seconds

if TYPE_CHECKING:
    from protos import job_pb2
    from worker.plan.network import Cluster


def cluster_of(arguments: argparse.Namespace, job: job_pb2.JobSpec) -> Cluster:
    """The nodes a person asks about; the ranks of a node are the job's workers spread over them, unless given.

    Raises:
        UsageFault: naming the option.
    """
    from worker.plan.network import Cluster

    nodes = at_least_one("--nodes", arguments.nodes)
    ranks = ranks_of(arguments, job)
    return Cluster(
        nodes, ranks, bytes_per_second(arguments.bandwidth), seconds(arguments.latency), arguments.shared_link
    )


def ranks_of(arguments: argparse.Namespace, job: job_pb2.JobSpec) -> int:
    """Ranks on each node. UsageFault as of `cluster_of`."""
    if arguments.ranks_per_node is not None:
        return at_least_one("--ranks-per-node", arguments.ranks_per_node)
    return max(1, -(-int(job.workers) // at_least_one("--nodes", arguments.nodes)))


def at_least_one(option: str, count: int) -> int:
    """The count. UsageFault naming the option where there is none."""
    if count < 1:
        raise UsageFault(f"{option}: {count} is below 1")
    return count


def plan(job: job_pb2.JobSpec, cluster: Cluster, measured: Path | None, as_json: bool) -> None:
    """Print what to expect of the job on the cluster, and what to choose.

    Args:
        measured: a file that `measure` wrote, for nodes unlike this one; None measures here and now.

    Raises:
        Fault: the data, the model or the file is not usable, or nothing could be measured.
    """
    from worker.data.stores import fetch_all
    from worker.plan.machine import machine_from
    from worker.plan.measurement import measure, workload
    from worker.plan.offers import PRACTICE, offers, own_choice
    from worker.plan.prediction import one_node, predict
    from worker.plan.recommendation import recommend
    from worker.plan.report import Plan, plan_document, plan_text
    from worker.plan.wire_formats import measure_formats
    from worker.preparation import check_shares, prepare

    if measured is None:
        machine, prepared = measure(job, cluster.nodes, cluster.ranks_per_node)
    else:
        machine = machine_from(_read(measured), str(measured))
        fetch_all(job, lambda: None)
        prepared = prepare(job)
        check_shares(prepared, job, cluster.ranks)
    work = workload(job, prepared)
    if work.batch_size < cluster.ranks:
        raise UsageFault(
            f"--nodes: {cluster.nodes} nodes have {cluster.ranks} ranks and a step {work.batch_size} samples; "
            "take fewer, or raise training.batch_size"
        )
    wires = measure_formats(job, prepared.model.slots, cluster.ranks_per_node)
    predictions = [
        predict(machine, work, cluster, choice, PRACTICE)
        for choice in offers(job, cluster.nodes, wires, work.epoch_steps)
    ]
    alone = one_node(machine, work, cluster)
    recommendation = recommend(predictions, alone, cluster.nodes)
    own = own_choice(job.sync, wires)
    result = Plan(job.name, cluster, machine, work, alone, predictions, own, recommendation)
    print(json.dumps(plan_document(result)) if as_json else plan_text(result))


def measure_here(job: job_pb2.JobSpec, nodes: int, ranks_per_node: int) -> None:
    """Print what was measured, as `plan --measured FILE` reads it. Faults as of `plan`."""
    from worker.plan.measurement import measure

    machine, _ = measure(job, nodes, ranks_per_node)
    print(machine.to_json())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise UsageFault(f"{path}: {reason}; write it with `paceline-worker measure JOB.yaml`") from None
