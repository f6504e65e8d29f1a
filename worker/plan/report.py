"""A plan as people read it, and as programs do.

Rules: pure; every number in the text is in the document too, in seconds and bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from worker.plan.choices import Choice
from worker.plan.machine import Machine, Workload
from worker.plan.network import Cluster
from worker.plan.offers import as_sync
from worker.plan.prediction import Prediction
from worker.plan.recommendation import Recommendation
from worker.plan.units import bandwidth_text, bytes_text, seconds_text

HEADER = ("", "step", "compute", "exchange", "waiting", "samples/s", "speed-up", "sent a node", "memory a rank")


class Plan(NamedTuple):
    """Everything there is to say."""

    name: str  # of the job
    cluster: Cluster
    machine: Machine
    work: Workload
    alone: Prediction
    predictions: Sequence[Prediction]
    own: Choice  # what the job file asks for
    recommendation: Recommendation


def plan_text(plan: Plan) -> str:
    """A heading, a line for each choice, the recommendation and how to make it."""
    nodes, ranks = _counted(plan.cluster.nodes, "node"), _counted(plan.cluster.ranks_per_node, "rank")
    link = "one medium of" if plan.cluster.shared_link else "links of"
    share = -(-plan.work.batch_size // plan.cluster.ranks)
    lines = [
        f"{_printable(plan.name)} on {nodes} of {ranks}, {link} {bandwidth_text(plan.cluster.bytes_per_second)} "
        f"and {seconds_text(plan.cluster.latency_seconds)}: steps of {plan.work.batch_size} samples, "
        f"{share} a rank; {plan.work.parameters:,} parameters, {bytes_text(plan.work.gradient_bytes)}",
        "",
    ]
    rows = [HEADER, _row("one node alone", plan.alone, plan)]
    for prediction in plan.predictions:
        marked = " *" if prediction.choice == plan.own else ""
        rows.append(_row(prediction.choice.name + marked, prediction, plan))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += ["", "* what the job file asks for"]
    lines.append(f"take {plan.recommendation.sentence}")
    best = plan.recommendation.best.choice
    if plan.recommendation.best is not plan.alone and best != plan.own:
        lines.append(f"  in the job file: sync: {json.dumps(as_sync(best)).replace(chr(34), '')}")
    return "\n".join(lines)


def plan_document(plan: Plan) -> dict[str, Any]:
    """The same for programs."""
    return {
        "job": plan.name,
        "nodes": plan.cluster.nodes,
        "ranks_per_node": plan.cluster.ranks_per_node,
        "bytes_per_second": plan.cluster.bytes_per_second,
        "latency_seconds": plan.cluster.latency_seconds,
        "shared_link": plan.cluster.shared_link,
        "workload": dataclasses.asdict(plan.work),
        "measured": dataclasses.asdict(plan.machine),
        "one_node": _document(plan.alone, plan),
        "choices": [_document(prediction, plan) for prediction in plan.predictions],
        "recommendation": {
            "one_node": plan.recommendation.best is plan.alone,
            "sync": as_sync(plan.recommendation.best.choice),
            "sentence": plan.recommendation.sentence,
        },
    }


def _document(prediction: Prediction, plan: Plan) -> dict[str, Any]:
    return {
        "choice": prediction.choice.name,
        "sync": as_sync(prediction.choice),
        "change": prediction.choice.change.name.lower(),
        "in_job_file": prediction.choice == plan.own and prediction is not plan.alone,
        "step_seconds": prediction.step_seconds,
        "compute_seconds": prediction.compute_seconds,
        "exchange_seconds": prediction.exchange_seconds,
        "waiting_seconds": prediction.waiting_seconds,
        "samples_per_second": plan.work.batch_size / prediction.step_seconds,
        "speed_up": plan.alone.step_seconds / prediction.step_seconds,
        "sent_bytes": prediction.sent_bytes,
        "memory_bytes": prediction.memory_bytes,
    }


def _row(name: str, prediction: Prediction, plan: Plan) -> tuple[str, ...]:
    return (
        name,
        seconds_text(prediction.step_seconds),
        seconds_text(prediction.compute_seconds),
        seconds_text(prediction.exchange_seconds),
        seconds_text(prediction.waiting_seconds),
        f"{plan.work.batch_size / prediction.step_seconds:,.0f}",
        f"{plan.alone.step_seconds / prediction.step_seconds:.2f}x",
        bytes_text(prediction.sent_bytes),
        bytes_text(prediction.memory_bytes),
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _printable(text: str) -> str:
    """Without characters that would command a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
