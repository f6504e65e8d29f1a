"""Who may call what: one table.

Rules: a call that has no row is refused. A reach of OWN means that a job of somebody else does not exist for the
caller: it is answered NOT_FOUND, and left out of lists. A row that is recorded is written to the audit log whenever
somebody known has called it; a refusal is always written.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from coordinator.tokens import Role


class Reach(Enum):
    """Which jobs a caller's call is good for."""

    OWN = "own"
    ALL = "all"


class Rule(NamedTuple):
    reach: Mapping[Role, Reach]  # a role that is not here may not call
    recorded: bool
    by_worker: bool = False  # instead of a role: the token of the job that is named, which the controller looks at


SEE = MappingProxyType({Role.VIEWER: Reach.ALL, Role.SUBMITTER: Reach.OWN, Role.ADMINISTRATOR: Reach.ALL})
CHANGE = MappingProxyType({Role.SUBMITTER: Reach.OWN, Role.ADMINISTRATOR: Reach.ALL})
NOBODY: Mapping[Role, Reach] = MappingProxyType({})

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "SubmitJob": Rule(CHANGE, recorded=True),
        "GetJob": Rule(SEE, recorded=False),
        "ListJobs": Rule(SEE, recorded=False),
        "WatchJob": Rule(SEE, recorded=False),
        "CancelJob": Rule(CHANGE, recorded=True),
        "PauseJob": Rule(CHANGE, recorded=True),
        "ResumeJob": Rule(CHANGE, recorded=True),
        "StreamLogs": Rule(SEE, recorded=True),
        "GetMetrics": Rule(SEE, recorded=False),
        "PullArtifacts": Rule(SEE, recorded=True),
        "ReportProgress": Rule(NOBODY, recorded=False, by_worker=True),
    }
)

SEES_METRICS = frozenset(role for role, reach in SEE.items() if reach is Reach.ALL)  # /metrics is of all jobs
