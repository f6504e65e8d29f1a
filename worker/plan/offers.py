"""What a job may choose from: read off the schema of the job file, so a plan never names what cannot be written there.

Rules: the plain all-reduce comes first, and what changes less before what changes more. The choice that the job file
makes is among them, and none that this job's other fields forbid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job, to_dict
from protos.rules import rule_of, schema_of
from worker.compression import kind_of
from worker.plan.choices import FLOAT32, Choice, WireFormat
from worker.plan.prediction import Practice
from worker.update import whole_gradient_user

# How worker/sync goes about it: a node is one worker, and servers are started on the nodes in turn.
PRACTICE: Final = Practice(buckets=True, node_pushes_once=True, servers_spread=True)
SERVERS: Final = (1, 2, 4, 8)
LOCAL_STEPS: Final = (4, 16, 64)


def offers(job: job_pb2.JobSpec, nodes: int, wires: Sequence[WireFormat], epoch_steps: int) -> list[Choice]:
    """Everything worth a row of the table.

    Args:
        job: resolved.
        wires: all but float32.
    """
    servers = schema_of(job_pb2.ParameterServerSync()).fields_by_name["servers"]
    shards = int(rule_of(servers).at_most or max(SERVERS))
    choices = [Choice("all_reduce")]
    choices += [Choice("parameter_server", servers=count) for count in SERVERS if count <= min(shards, max(2, nodes))]
    exchanges: dict[str, Message] = {
        "all_reduce": job_pb2.AllReduceSync(),
        "parameter_server": job_pb2.ParameterServerSync(),
    }
    for kind, settings in exchanges.items():
        if _takes_formats(settings):
            choices += [Choice(kind, wire) for wire in wires if kind == "all_reduce" or not wire.factors]
    choices.sort(key=lambda choice: choice.change)
    if nodes > 1 and "local" in schema_of(job.sync).fields_by_name:
        choices += [Choice("local", steps=steps) for steps in LOCAL_STEPS if steps <= epoch_steps]
    own = own_choice(job.sync, wires)
    plain, *others = choices
    choices = [plain, *(choice for choice in others if choice == own or is_permitted(job, choice))]
    return choices if own in choices else [*choices, own]


def is_permitted(job: job_pb2.JobSpec, choice: Choice) -> bool:
    """Whether the job's file may make the choice: an exact step, say, forbids local steps."""
    if choice.servers > 1 and whole_gradient_user(job) is not None:
        return False
    try:
        parse_job(json.dumps({**to_dict(job), "sync": as_sync(choice)}))
    except JobFileInvalid:
        return False
    return True


def own_choice(sync: job_pb2.Sync, wires: Sequence[WireFormat]) -> Choice:
    """What the job file asks for."""
    kind = sync.WhichOneof("kind") or "all_reduce"
    settings: Any = getattr(sync, kind)
    if kind == "local":
        return Choice("local", steps=settings.steps)
    name = kind_of(settings.wire_format) if _takes_formats(settings) else FLOAT32.name
    wire = next(wire for wire in (FLOAT32, *wires) if wire.name == name)
    return Choice(kind, wire, servers=settings.servers if kind == "parameter_server" else 1)


def as_sync(choice: Choice) -> Mapping[str, Any]:
    """What stands under `sync` in a job file that makes the choice."""
    if choice.kind == "local":
        return {"local": {"steps": choice.steps}}
    settings: dict[str, Any] = {"servers": choice.servers} if choice.kind == "parameter_server" else {}
    if choice.wire != FLOAT32:
        settings["wire_format"] = choice.wire.name
    return {choice.kind: settings}


def _takes_formats(settings: Message) -> bool:
    return "wire_format" in schema_of(settings).fields_by_name
