"""The fault table: a rank raises, is killed or is stopped, or a parameter server is, in each phase of a step.

Every row ends within the stall limit and the seconds a launcher takes. A rank's fault: one line names the rank, its
host, step and phase; the checkpoint of the epoch before stays readable, and no process is left. A server's: it comes
back and the job ends well and says what was lost; or one line names it. What a hostile worker does to a server is in
tests/contract/test_hostile_workers.py, a server killed within a step in test_parameter_server_restart.py beside it.
Print the table with

    python -m pytest tests/mpi/test_fault_table.py tests/contract -k 'row or fault' -rP -q | grep '^row'
"""

import re
import socket
from collections.abc import Iterator

import pytest

from tests.mpi import jobs
from tests.mpi.fault_rows import EPOCHS, STEPS_AN_EPOCH, WAYS, Fault, Row, Rows, run_rows

HOST = socket.gethostname()
END = EPOCHS * STEPS_AN_EPOCH

# Which rank is at fault: in a checkpoint the one that writes it. And the step in which it is.
PHASES = {
    "data": (1, STEPS_AN_EPOCH + 1),
    "forward": (1, STEPS_AN_EPOCH + 1),
    "backward": (0, STEPS_AN_EPOCH + 1),
    "exchange": (1, STEPS_AN_EPOCH + 1),
    "update": (1, STEPS_AN_EPOCH + 1),
    "evaluate": (1, 2 * STEPS_AN_EPOCH),
    "checkpoint": (0, 2 * STEPS_AN_EPOCH),
}
# What is said behind the place.
OUTCOMES = {
    "raise": "internal error: ValueError: out of cheese",
    "kill": "killed by a signal",
    "stop": "no progress for",
}

# Where there are servers they update. Where each rank is a worker of its own, a server sees first that one is gone; and
# of three ranks that share no memory one of two is to speak.
RANK_FAULTS = [
    Fault(what, phase, way, rank)
    for what in OUTCOMES
    for way in ("all_reduce", "one_server")
    for phase, (rank, _) in PHASES.items()
    if (phase, way) != ("update", "one_server")
] + [
    *(Fault(what, "forward", "apart", 2) for what in ("kill", "stop")),
    *(Fault("kill", phase, way, 1) for way in ("asynchronous", "reproducible") for phase in ("forward", "exchange")),
]

KILLED_SERVERS = [
    *(Fault("kill_server", phase, "one_server") for phase in ("data", "backward", "evaluate")),
    *(Fault("kill_server", phase, "servers") for phase in ("forward", "exchange", "update", "checkpoint")),
    # Behind the last step: what the servers lose then, nobody would meet in another.
    *(Fault("kill_server", "pull", way, epochs=2) for way in ("bounded", "asynchronous", "lossy")),
]

# Who stays away or stands still is named by whom waits for it next: in which step and phase.
EXCHANGE, BEHIND = "step 6 (epoch 2), phase exchange", "step 11 (epoch 3), phase exchange"
STOPPED_SERVERS = {
    Fault("stop_server", "data", "asynchronous"): EXCHANGE,
    Fault("stop_server", "forward", "servers"): EXCHANGE,
    Fault("stop_server", "backward", "one_server"): EXCHANGE,
    Fault("stop_server", "exchange", "servers"): EXCHANGE,
    Fault("stop_server", "update", "servers"): EXCHANGE,
    Fault("stop_server", "evaluate", "servers"): "step 10 (epoch 2), phase checkpoint",
    Fault("stop_server", "checkpoint", "servers"): BEHIND,
}
CANNOT = "/no/such/python cannot be started"
LOST_SERVERS = {
    Fault("kill_server_for_good", "forward", "servers"): (r"step \d+", "(1 of 3 times)"),
    Fault("lose_server", "data", "servers"): ("step 6", CANNOT),
    Fault("lose_server", "forward", "one_server"): ("step 6", CANNOT),
    Fault("lose_server", "backward", "servers"): ("step 6", CANNOT),
    Fault("lose_server", "exchange", "asynchronous"): (r"step \d+", CANNOT),
    Fault("lose_server", "update", "servers"): ("step 6", CANNOT),
    Fault("lose_server", "evaluate", "servers"): ("pull", CANNOT),
    Fault("lose_server", "checkpoint", "servers"): ("step 11", CANNOT),
}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """Those that are asked for."""
    asked = [item.callspec.params["fault"] for item in request.session.items if item.path == request.path]
    with run_rows(tmp_path_factory.mktemp("rows"), asked) as made:
        yield made


def tell(fault: Fault, row: Row, what: str) -> None:
    victim = "server" if "server" in fault.what else "rank"
    print(f"row {fault.way:12} {victim:6} {fault.what:20} {fault.phase:10} {row.seconds:5.1f} s  {what}")


@pytest.mark.parametrize("fault", RANK_FAULTS, ids=str)
def test_a_fault_in_a_phase_ends_the_job_and_is_named(rows, fault) -> None:
    row, ranks, (_, step) = rows[fault], WAYS[fault.way].ranks, PHASES[fault.phase]
    assert len(row.errors) == 1, row.said
    tell(fault, row, row.errors[0])
    assert row.code != 0
    assert f"rank {fault.rank} of {ranks} on {HOST}: " in row.errors[0]
    assert f"step {step} (epoch 2), phase {fault.phase}" in row.errors[0]
    assert OUTCOMES[fault.what] in row.errors[0]
    # mpirun lets a stopped rank run on before it ends it: then the second checkpoint may become complete.
    whole = [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH]
    assert row.checkpoints == whole[:1] or (fault.what, row.checkpoints) == ("stop", whole)
    assert (row.started, row.running) == (ranks, [])


@pytest.mark.parametrize("fault", KILLED_SERVERS, ids=str)
def test_a_server_killed_in_a_phase_comes_back_and_the_job_ends_well(rows, fault) -> None:
    row, way = rows[fault], WAYS[fault.way]
    assert row.code == 0, row.said
    back = re.findall(r"^parameter server \S+ is back at step \d+: .* (\d+) steps are lost$", row.said, re.M)
    workers = way.ranks if fault.way in ("bounded", "asynchronous") else 1
    assert len(back) == workers, row.said  # each of whom says it
    tell(fault, row, f"{back[0]} steps lost")
    assert "ended with code -9; it is started again from its last snapshot (1 of 3 times)" in row.said
    told = jobs.summary(row.output)
    assert [told["exchange"]["shard_restarts"], told["exchange"]["steps_lost"]] == [1, int(back[0])]
    assert told["steps"] == fault.epochs * STEPS_AN_EPOCH
    assert row.running == []


@pytest.mark.parametrize("fault", LOST_SERVERS, ids=str)
def test_a_server_that_stays_away_ends_the_job_in_one_line(rows, fault) -> None:
    row, (place, words) = rows[fault], LOST_SERVERS[fault]
    # A server that is being started when the job ends may still say that its files are gone.
    errors = [line for line in row.errors if "cannot be read: No such file" not in line]
    assert errors, row.said
    tell(fault, row, errors[0])
    assert row.code != 0
    assert len(errors) == 1 or fault.way == "asynchronous"  # where each rank meets it on its own
    for line in errors:
        assert re.search(rf"parameter server \S+ \(\d of \d\), {place}: it is gone and did not come back within", line)
    assert words in row.said
    assert row.checkpoints == [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH][: 1 + (fault.phase == "checkpoint")]
    assert row.running == []


@pytest.mark.parametrize("fault", STOPPED_SERVERS, ids=str)
def test_a_server_that_stands_still_is_named_by_who_waits_for_it(rows, fault) -> None:
    row, place = rows[fault], STOPPED_SERVERS[fault]
    assert row.errors, row.said
    tell(fault, row, row.errors[0])
    assert row.code != 0
    for line in row.errors:  # of asynchronous ranks each waits on its own
        assert re.search(rf"rank \d of 2 on {HOST}: no progress for \d s in {re.escape(place)}; waits for", line)
        assert re.search(r"waits for parameter server \S+ \(\d of \d\): it is stopped or overloaded", line)
    assert row.checkpoints == [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH][: 1 + (fault.phase == "checkpoint")]
    assert row.running == []
