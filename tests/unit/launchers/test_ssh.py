"""The launcher over hosts without hosts: what is rendered, where ranks go, and what is said of a host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.launchers import local, reach, ssh
from coordinator.launchers.options import OptionInvalid

GOLDEN = Path(__file__).parents[2] / "golden" / "ssh"
WAIT_SECONDS = 30.0
FREE = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 4))


@pytest.mark.parametrize(
    ("golden", "options"),
    [("two_hosts", {"hosts": "/hosts"}), ("own_settings", {"hosts": "/hosts", "ssh-config": "/settings"})],
)
def test_a_launch_over_hosts_is_rendered_as_the_golden_file_says(golden: str, options: dict[str, str]) -> None:
    launch = local.render(
        mpirun="/venv/bin/mpirun",
        worker="/venv/bin/paceline-worker",
        ranks=3,
        cores=4,
        arguments=["train", "/state/jobs/digits-1/job.yaml"],
        forwarded={"PACELINE_JOB_TOKEN": "hidden-value"},
    )
    rendered = ssh.render(
        python="/venv/bin/python",
        launch=launch,
        prefix="/venv",
        ranks=3,
        free={"node1": 2, "node2": 4},
        record=Path("/state/jobs/digits-1/logs/attempt-2"),
        job_file=Path("/state/jobs/digits-1/job.yaml"),
        options=options,
    )
    assert rendered.launch.environment == launch.environment
    said = [*rendered.launch.argv, "", *json.dumps(rendered.plan._asdict(), indent=1).splitlines()]
    text = "\n".join(said).replace(reach.__file__, "/venv/reach.py") + "\n"
    assert "hidden-value" not in text
    assert text == (GOLDEN / f"{golden}.txt").read_text()


@given(FREE, st.integers(1, 12))
def test_ranks_go_where_there_is_room_and_to_one_host_alone_if_it_has_enough(free: dict[str, int], ranks: int) -> None:
    placed = reach.spread(free, ranks)
    if placed is None:
        assert sum(free.values()) < ranks
        return
    assert sum(placed.values()) == ranks
    assert all(0 < count <= free[host] for host, count in placed.items())
    assert (len(placed) == 1) == (max(free.values()) >= ranks)


def test_slots_are_free_that_no_running_launch_has(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a slots=2\nb slots=1\n")
    (tmp_path / "other").write_text("b slots=1\n")
    taken = [tmp_path / "one", tmp_path / "other", tmp_path / "not there yet"]
    assert ssh.free_slots({"a": 2, "b": 4, "c": 1}, taken) == {"a": 0, "b": 2, "c": 1}


def test_a_host_file_is_read_as_open_mpi_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=4  # the big one\n\n10.0.0.2\nfe80::1 slots=2\n")
    assert ssh.read_host_file(path) == {"node1": 4, "10.0.0.2": 1, "fe80::1": 2}


@pytest.mark.parametrize("line", ["node1 slots=0", "node1 max_slots=3", "-oProxyCommand=id slots=1", "node1;id", "a b"])
def test_a_line_that_names_no_host_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts").write_text(f"good slots=1\n{line}\n")
    with pytest.raises(OptionInvalid, match=r"^hosts=.*: line 2: "):
        ssh.read_host_file(tmp_path / "hosts")


def test_the_host_file_must_be_given_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(OptionInvalid, match=r"^hosts=FILE is missing"):
        ssh.read_options({})
    with pytest.raises(OptionInvalid, match=r"there is no such file"):
        ssh.read_options({"hosts": str(tmp_path / "none")})


# ------------------------------------------------------------------------------------- the program that looks for hosts

SSH = """#!/bin/sh
case $1 in
  refused) echo 'connect to host refused port 22: Connection refused' >&2; exit 255;;
  silent) exec sleep 1000;;
  *) shift; exec sh -c "$*";;
esac
"""


def plan(folder: Path, free: dict[str, int], ranks: int = 2, seconds: float = 20.0, **changed: str) -> reach.Plan:
    fake = folder / "ssh"
    fake.write_text(SSH)
    fake.chmod(0o755)
    (folder / "job.yaml").touch()
    files = {"program": "/bin/sh", "file": str(folder / "job.yaml"), "host_file": str(folder / "chosen")}
    return reach.Plan(ranks, free, [str(fake)], seconds, **(files | changed))


def look(folder: Path, told: reach.Plan) -> "subprocess.CompletedProcess[str]":
    path = folder / "plan"
    path.write_text(json.dumps(told._asdict()))
    words = [sys.executable, "-I", "-S", reach.__file__, str(path), "/bin/echo", "mpirun runs"]
    return subprocess.run(words, capture_output=True, text=True, timeout=WAIT_SECONDS)


def test_mpirun_takes_the_place_of_the_search_once_hosts_are_found(tmp_path: Path) -> None:
    done = look(tmp_path, plan(tmp_path, {"good": 1, "better": 2}))
    assert (done.returncode, done.stdout) == (0, "mpirun runs\n")
    assert (tmp_path / "chosen").read_text() == "better slots=2\n"


def test_a_host_that_cannot_be_used_is_named_and_another_takes_its_place(tmp_path: Path) -> None:
    done = look(tmp_path, plan(tmp_path, {"refused": 1, "good": 1, "spare": 1}))
    assert done.returncode == 0
    line, ran = done.stdout.splitlines()
    assert ran == "mpirun runs"
    assert line == (
        "host refused cannot be used: ssh says: connect to host refused port 22: Connection refused; "
        f"`{tmp_path / 'ssh'} refused true` must work without a question"
    )
    assert (tmp_path / "chosen").read_text() == "good slots=1\nspare slots=1\n"


def test_without_enough_hosts_the_launch_ends_and_says_what_is_missing(tmp_path: Path) -> None:
    done = look(tmp_path, plan(tmp_path, {"refused": 1, "good": 1}))
    assert done.returncode == reach.UNUSABLE
    assert done.stdout.splitlines()[1] == "too few slots without it: 2 are needed, and there are 1 slots on good"
    assert not (tmp_path / "chosen").exists()


@pytest.mark.parametrize(
    ("host", "changed", "said"),
    [
        ("silent", {}, "it did not answer ssh within 0.5 s: is it up, and its sshd?"),
        ("good", {"program": "/nowhere/worker"}, "it has no /nowhere/worker: install Paceline there at the same path"),
        ("good", {"file": "/no/job"}, "it does not see /no/job: the state folder must be the same on every host"),
        ("localhost", {"file": "/no/job"}, "it does not see /no/job: the state folder must be the same on every host"),
    ],
)
def test_each_fault_of_a_host_has_its_remedy(tmp_path: Path, host: str, changed: dict[str, str], said: str) -> None:
    seconds = 0.5 if host == "silent" else 20.0
    assert reach.faults_of(plan(tmp_path, {host: 1}, seconds=seconds, **changed), [host]) == {host: said}


def test_this_machine_needs_no_ssh() -> None:
    assert reach.is_here("localhost")
    assert not reach.is_here("192.0.2.1")  # of the range for documentation (RFC 5737)
