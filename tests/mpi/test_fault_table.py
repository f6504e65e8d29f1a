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

import pytest

from tests.mpi import jobs
from tests.mpi.fault_rows import OUTCOMES, PHASES, STEPS_AN_EPOCH, run_row
from tests.mpi.jobs import EPOCHS

STALL_SECONDS = 1.0
# Parameter servers update within the exchange.
SYNCS = {"all_reduce": (3, "all_reduce"), "parameter_server": (2, {"parameter_server": {}})}
# A server that dies needs about a second to come back, and has half the stall limit; where it stays away, that is
# what the row takes.
RETURNING, AWAY = 40.0, 5.0
HOST = socket.gethostname()
# When a rank is killed mpirun kills the others a quarter of a second later: on a busy machine that can be too short for
# the one that is to say which rank is gone.
KILLED_TRIES = 3


@pytest.mark.parametrize(
    ("sync", "phase"), [(s, p) for s in SYNCS for p in PHASES if (s, p) != ("parameter_server", "update")]
)
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_fault_in_a_phase_ends_the_job_and_is_named(run_ranks, tmp_path, outcome, phase, sync) -> None:
    ranks, asked = SYNCS[sync]
    rank, step = PHASES[phase]
    for attempt in range(KILLED_TRIES if outcome == "kill" else 1):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        row = run_row(run_ranks, folder, (outcome, phase, rank), ranks, (STALL_SECONDS, STALL_SECONDS), asked)
        if row.errors:
            break
    assert len(row.errors) == 1, row.said
    print(f"row {sync:16} rank   {outcome:6} {phase:10} {row.seconds:5.1f} s  {row.errors[0]}")
    assert row.code != 0
    assert f"rank {rank} of {ranks} on {HOST}: " in row.errors[0]
    assert f"step {step} (epoch 2), phase {phase}" in row.errors[0]
    assert OUTCOMES[outcome] in row.errors[0]
    # mpirun lets a stopped rank run on before it ends it: then the second checkpoint may become complete.
    whole = [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH]
    assert row.checkpoints == whole[:1] or (outcome, row.checkpoints) == ("stop", whole)
    assert (row.started, row.running) == (ranks, [])


@pytest.mark.parametrize(
    ("phase", "servers"),
    [("data", 1), ("forward", 2), ("backward", 1), ("exchange", 2), ("evaluate", 1), ("checkpoint", 2)],
)
def test_a_server_killed_in_a_phase_comes_back_and_the_job_ends_well(run_ranks, tmp_path, phase, servers) -> None:
    sync = {"parameter_server": {"servers": servers, "snapshot_steps": 2}}
    row = run_row(run_ranks, tmp_path, ("kill_server", phase, 0), 2, (RETURNING, RETURNING), sync)
    assert row.code == 0, row.said
    [back] = re.findall(r"^parameter server \S+ is back at step \d+: .* (\d+) steps are lost$", row.said, re.M)
    print(f"row parameter_server server kill   {phase:10} {row.seconds:5.1f} s  {servers} servers, {back} steps lost")
    assert "ended with code -9; it is started again from its last snapshot (1 of 3 times)" in row.said
    told = jobs.summary(row.output)
    assert (told["exchange"]["shard_restarts"], told["exchange"]["steps_lost"]) == (1, int(back))
    assert told["steps"] == EPOCHS * STEPS_AN_EPOCH
    assert row.running == []


@pytest.mark.parametrize(
    ("what", "phase", "mode", "place", "words"),
    [
        ("kill_server_for_good", "forward", "synchronous", "step ", "(1 of 3 times)"),
        ("lose_server", "backward", "synchronous", "step 6: ", "/no/such/python cannot be started"),
        ("lose_server", "evaluate", "synchronous", "pull: ", "/no/such/python cannot be started"),
        ("lose_server", "exchange", "asynchronous", "step ", "/no/such/python cannot be started"),
    ],
)
def test_a_server_that_stays_away_ends_the_job_in_one_line(
    run_ranks, tmp_path, what, phase, mode, place, words
) -> None:
    sync = {"parameter_server": {"servers": 2, "mode": mode}}
    row = run_row(run_ranks, tmp_path, (what, phase, 0), 2, (AWAY, AWAY), sync)
    # A server that is being started when the job ends may still say that its files are gone.
    errors = [line for line in row.errors if "cannot be read: No such file" not in line]
    assert errors, row.said
    print(f"row parameter_server server {what} {phase:10} {row.seconds:5.1f} s  {errors[0]}")
    assert row.code != 0
    assert len(errors) == 1 or mode == "asynchronous"  # where each rank meets it on its own
    for line in errors:
        assert re.search(
            rf"parameter server \S+ \(\d of 2\), {place}.*it is gone and did not come back within 2.5 s", line
        )
    assert words in row.said
    assert row.checkpoints == [STEPS_AN_EPOCH]
    assert row.running == []


@pytest.mark.parametrize(
    ("phase", "mode", "place"),
    [
        ("exchange", "synchronous", "step 6 (epoch 2), phase exchange"),
        ("data", "asynchronous", "step 6 (epoch 2), phase exchange"),
        ("evaluate", "synchronous", "step 10 (epoch 2), phase checkpoint"),
    ],
)
def test_a_server_that_stands_still_is_named_by_who_waits_for_it(run_ranks, tmp_path, phase, mode, place) -> None:
    sync = {"parameter_server": {"servers": 2, "mode": mode}}
    row = run_row(run_ranks, tmp_path, ("stop_server", phase, 0), 2, (2 * STALL_SECONDS, 2 * STALL_SECONDS), sync)
    assert row.errors, row.said
    print(f"row parameter_server server stop   {phase:10} {row.seconds:5.1f} s  {row.errors[0]}")
    assert row.code != 0
    for line in row.errors:  # of asynchronous ranks each waits on its own
        assert re.search(rf"rank \d of 2 on {HOST}: no progress for \d s in {re.escape(place)}; waits for", line)
        assert re.search(r"waits for parameter server \S+ \(\d of 2\): it is stopped or overloaded", line)
    assert row.checkpoints == [STEPS_AN_EPOCH]
    assert row.running == []


@pytest.mark.parametrize("outcome", ["kill", "stop"])
def test_where_no_weights_are_shared_a_rank_is_named_all_the_same(run_ranks, tmp_path, outcome) -> None:
    sync = {"all_reduce": {"shared_memory": False}}
    for attempt in range(KILLED_TRIES if outcome == "kill" else 1):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        row = run_row(run_ranks, folder, (outcome, "forward", 2), 3, (STALL_SECONDS, STALL_SECONDS), sync)
        if row.errors:
            break
    assert len(row.errors) == 1, row.said
    print(f"row all_reduce apart rank   {outcome:6} forward    {row.seconds:5.1f} s  {row.errors[0]}")
    assert f"rank 2 of 3 on {HOST}: " in row.errors[0]
    assert "step 6 (epoch 2), phase forward" in row.errors[0]
    assert OUTCOMES[outcome] in row.errors[0]
    assert row.code != 0
    assert row.running == []
