"""Why a launch failed, from what Open MPI 5.0.11 really said: tests/golden/open_mpi_5.0.11 was recorded with two-rank
programs that were killed, raised, exited and aborted (only paths were made neutral)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator.launchers.causes import LAST_LINES, begin_attempt, explain

RECORDED = Path(__file__).parents[2] / "golden" / "open_mpi_5.0.11"


@pytest.fixture
def explained(tmp_path: Path):
    """explained(exit_code, recording, {rank: its log}) -> Cause."""

    def explain_recorded(exit_code: int, recording: str | None, logs: dict[int, str] | None = None):
        if recording is not None:
            shutil.copy(RECORDED / f"{recording}.txt", tmp_path / "launcher.log")
        for rank, text in (logs or {}).items():
            (tmp_path / f"rank-{rank}.log").write_text(text)
        return explain(exit_code, tmp_path)

    return explain_recorded


@pytest.mark.parametrize(
    ("recording", "exit_code", "reason", "message", "rank"),
    [
        ("rank_killed", 137, "RankKilled", "rank 1 on vm was killed by signal 9 (SIGKILL)", 1),
        ("rank_segfault", 139, "RankKilled", "rank 1 on vm was killed by signal 11 (SIGSEGV)", 1),
        ("rank_aborted", 1, "RankFailed", "rank 1 of 2 on node7: data broken", 1),
        ("rank_exited", 3, "RankExited", "rank 1 exited with code 3 and said nothing", 1),
        ("exit_after_finalize", 3, "LaunchFailed", "mpirun ended with exit code 3: rank 0 pid 9997", None),
        ("not_enough_slots", 1, "NotEnoughSlots", "mpirun has fewer than 5 slots: ask for fewer workers", None),
        (
            "executable_missing",
            183,
            "WorkerMissing",
            "mpirun cannot run /no/such/worker: is Paceline installed there?",
            None,
        ),
        (
            "launcher_killed",
            -9,
            "LauncherKilled",
            "mpirun was killed by signal 9 (SIGKILL), and its ranks with it",
            None,
        ),
        (
            "root_refused",
            1,
            "RootRefused",
            "mpirun refuses to run as root: set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            None,
        ),
        ("host_lost", 0, "HostLost", "mpirun lost host host2 in the middle of the run", None),
        (
            "daemon_lost",
            255,
            "HostLost",
            "mpirun has no daemon on host host2: the host died, or a firewall keeps it from calling back",
            None,
        ),
        (
            "peer_lost",
            255,
            "HostLost",
            "a rank on host host2 is gone without a word: it, or its host, has died",
            None,
        ),
        (None, 1, "LaunchFailed", "mpirun ended with exit code 1 and said nothing", None),
    ],
)
def test_each_recorded_ending_has_its_cause_in_one_line(explained, recording, exit_code, reason, message, rank):
    cause = explained(exit_code, recording)
    assert (cause.reason, cause.message, cause.rank) == (reason, message, rank)


def test_each_host_that_cannot_be_used_is_named_by_the_first_of_them(tmp_path):
    lines = ("host a cannot be used: ssh says: refused", "host b cannot be used: it did not answer", "too few slots")
    (tmp_path / "launcher.log").write_text("\n".join(lines) + "\n")
    cause = explain(69, tmp_path)
    assert (cause.reason, cause.message) == ("HostUnreachable", "host a cannot be used: ssh says: refused")


def test_a_killed_rank_comes_with_its_signal_and_the_last_lines_of_its_own_log(explained):
    lines = [f"line {number}" for number in range(30)]
    cause = explained(137, "rank_killed", {0: "another\n", 1: "\n".join(lines) + "\n"})
    assert cause.signal == "SIGKILL"
    assert cause.last_lines == tuple(lines[-LAST_LINES:])


def test_where_the_killed_rank_wrote_nothing_the_lines_of_rank_0_say_how_far_the_job_was(explained):
    assert explained(137, "rank_killed", {0: "epoch 3/9\n", 1: ""}).last_lines == ("epoch 3/9",)


def test_a_killed_mpirun_comes_with_the_last_lines_of_every_rank_that_said_something(explained):
    lines = [f"step {number}" for number in range(30)]
    cause = explained(-9, "launcher_killed", {0: "\n".join(lines) + "\n", 1: "warning\n", 2: ""})
    assert cause.reason == "LauncherKilled"
    assert cause.last_lines == (*(f"rank-0 | {line}" for line in lines[-LAST_LINES // 2 :]), "rank-1 | warning")


def test_a_killed_rank_is_the_cause_and_not_the_peers_that_noticed(explained):
    cause = explained(137, "rank_killed", {0: "error: rank 0 of 2 on vm: rank 1 is gone\n", 1: "epoch 1\n"})
    assert cause.message == "rank 1 on vm was killed by signal 9 (SIGKILL)"


def test_what_a_survivor_saw_of_a_killed_rank_joins_its_signal(explained):
    place = "in step 12 (epoch 2), phase forward"
    logs = {0: f"epoch 1\nerror: rank 1 of 2 on vm: gone {place}; killed by a signal, which the launcher names\n"}
    cause = explained(137, "rank_killed", logs)
    assert (cause.reason, cause.message) == ("RankKilled", f"rank 1 on vm was killed by signal 9 (SIGKILL) {place}")
    assert cause.last_lines == ("epoch 1",)


def test_what_a_killed_rank_itself_called_an_error_comes_first(explained):
    said = {1: "error: rank 1 of 2 on vm: the loss is nan at step 7\n"}
    assert explained(134, "rank_killed", said).message == "rank 1 of 2 on vm: the loss is nan at step 7"


def test_an_error_that_names_its_rank_is_found_in_whatever_log(explained):
    cause = explained(
        1, "rank_aborted", {0: "epoch 1\n", 1: "warning\nerror: rank 1 of 2 on vm: the label 12 is no class\n"}
    )
    assert (cause.rank, cause.message) == (1, "rank 1 of 2 on vm: the label 12 is no class")
    assert cause.last_lines == ("warning",)  # the error is the message: it is not said twice


def test_an_error_rank_0_says_for_all_names_no_rank(explained):
    cause = explained(1, None, {0: "error: a.npz: No such file\n", 1: ""})
    assert (cause.rank, cause.message) == (None, "a.npz: No such file")


def test_an_error_of_another_rank_alone_is_given_its_number(explained):
    assert explained(1, None, {0: "", 2: "error: disk is full\n"}).message == "rank 2: disk is full"


def test_all_faults_of_a_job_file_stay_together(explained):
    said = {0: "starting\nerror: loss: 'x' is unknown\nerror: training.epochs: 0 is not at least 1\n"}
    cause = explained(2, None, said)
    assert cause.message == "loss: 'x' is unknown; training.epochs: 0 is not at least 1"
    assert cause.last_lines == ("starting",)


@pytest.mark.parametrize(
    ("exit_code", "recording", "logs", "told_whole"),
    [
        (1, None, {0: "error: a.npz: No such file\n"}, True),
        (1, "rank_aborted", {0: "", 1: "error: rank 1 of 2 on vm: the label 12 is no class\n"}, True),
        (1, None, {0: "warning\nerror: a.npz: No such file\n"}, False),
        (137, "rank_killed", {0: "", 1: ""}, False),
        (1, None, {}, False),
    ],
)
def test_only_what_a_rank_said_itself_and_nothing_else_is_told_whole(explained, exit_code, recording, logs, told_whole):
    assert explained(exit_code, recording, logs).told_whole is told_whole


def test_a_traceback_without_an_error_line_gives_its_last_line(tmp_path):
    (tmp_path / "launcher.log").write_text((RECORDED / "rank_aborted.txt").read_text().replace("error: ", ""))
    (tmp_path / "rank-0.log").write_text("fine\n")
    (tmp_path / "rank-1.log").write_text("Traceback (most recent call last):\n  File ...\nValueError: no such thing\n")
    cause = explain(1, tmp_path)
    assert (cause.reason, cause.rank) == ("RankAborted", 1)
    assert cause.message == "rank 1 stopped the job: ValueError: no such thing"
    assert cause.last_lines == ("Traceback (most recent call last):", "  File ...")


def test_no_log_folder_at_all_is_still_explained(tmp_path):
    assert explain(1, tmp_path / "gone").message == "mpirun ended with exit code 1 and said nothing"


def test_what_an_earlier_attempt_said_is_not_why_the_last_one_ended(explained, tmp_path) -> None:
    said = {0: "step 1\nerror: rank 0 of 2 on here: the disk is full"}
    assert explained(137, "rank_killed", said).reason == "RankKilled"
    begin_attempt(tmp_path, 2)
    assert (tmp_path / "rank-0.log").read_text().endswith("the disk is full\n=== attempt 2 ===\n")
    with (tmp_path / "rank-0.log").open("a") as log:
        log.write("resuming after step 1\n")
    cause = explain(-9, tmp_path)
    assert (cause.reason, cause.last_lines) == ("LauncherKilled", ("rank-0 | resuming after step 1",))
