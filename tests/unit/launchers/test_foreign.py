"""A launch through another system, with a system made of memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from coordinator.jobs import Observed
from coordinator.launchers import foreign, keeper, local
from coordinator.launchers.foreign import NoAnswer, Phase, Seen, SubmitRefused

WAIT_SECONDS = 30.0
WAITS = Seen(Phase.WAITS, "HeldForNodes", "waits for nodes")
RUNS = Seen(Phase.RUNS, "Launching", "runs")
GONE = Seen(Phase.ENDED)


class Memory:
    """A system that has what it is given until it is told otherwise."""

    title = "Memory"

    def __init__(self) -> None:
        self.silent = False
        self.names: dict[str, str] = {}
        self.says: dict[str, Seen] = {}
        self.ended: list[tuple[str, bool]] = []
        self.obeys = True

    def submit(self, name: str) -> str:
        self._answer()
        assert name not in self.names, "the same launch twice"
        self.names[name] = handle = str(len(self.names) + 1)
        self.says[handle] = WAITS
        return handle

    def find(self, name: str) -> str | None:
        self._answer()
        return self.names.get(name)

    def look(self, handles: Collection[str]) -> Mapping[str, Seen]:
        self._answer()
        return {handle: self.says[handle] for handle in handles if handle in self.says}

    def ask_to_stop(self, handle: str) -> None:
        self._answer()

    def end(self, handle: str, kill: bool) -> None:
        self._answer()
        self.ended.append((handle, kill))
        if self.obeys or kill:
            self.says[handle] = GONE

    def _answer(self) -> None:
        if self.silent:
            raise NoAnswer("nobody there")


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(foreign, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(foreign, "RECORD_SECONDS", 0.2)


@pytest.fixture
def system() -> Memory:
    return Memory()


@pytest.fixture
def launch(system: Memory, tmp_path: Path) -> Callable[[], foreign.Running]:
    watch = foreign.Watch(system)
    return lambda: foreign.start(system, watch, "job-1", tmp_path, 1, lambda: system.submit("job-1"))


def until(wanted: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def record(folder: Path, text: str = f"{keeper.HOSTED}/scratch\n", ended: int | None = None) -> None:
    (folder / "attempt-1").write_text(text)
    if ended is not None:
        (folder / f"attempt-1{keeper.ENDED}").write_text(f"{ended}\n")


def test_a_launch_says_how_far_the_system_is_with_it(launch, system: Memory) -> None:
    running = launch()
    until(lambda: running.observed() == Observed("HeldForNodes", "waits for nodes"))
    assert running.poll() is None
    system.says["1"] = RUNS
    until(lambda: running.observed() == Observed("Launching", "runs"))
    assert running.process is None


def test_what_the_keeper_wrote_down_is_the_exit_code(launch, system: Memory, tmp_path: Path) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    record(tmp_path, ended=0)
    assert running.poll() == 0


def test_a_bad_end_waits_for_what_the_system_says_of_it(launch, system: Memory, tmp_path: Path) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    record(tmp_path, ended=5)
    assert running.poll() is None
    system.says["1"] = Seen(Phase.ENDED, "Preempted", "gave way")
    assert running.wait(WAIT_SECONDS) == -signal.SIGTERM
    cause = foreign.explain_end(running, -15, tmp_path)
    assert (cause.reason, cause.message) == ("Preempted", "gave way")


def test_an_end_without_a_cause_of_the_systems_is_told_by_the_logs(launch, system: Memory, tmp_path: Path) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    record(tmp_path, ended=1)
    system.says["1"] = GONE
    assert running.wait(WAIT_SECONDS) == 1
    (tmp_path / "rank-0.log").write_text("error: rank 0 of 1 on vm: the disk is full\n")
    assert foreign.explain_end(running, 1, tmp_path).message == "rank 0 of 1 on vm: the disk is full"


@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_system_forgot_ends_by_its_record_or_as_forgotten(launch, system: Memory, tmp_path, recorded) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    record(tmp_path, ended=3 if recorded else None)
    del system.says["1"]
    code = running.wait(WAIT_SECONDS)
    assert code == (3 if recorded else -signal.SIGTERM)
    assert foreign.explain_end(running, code, tmp_path).reason == ("LaunchFailed" if recorded else "Forgotten")


def test_a_system_that_does_not_answer_is_asked_until_it_does_and_takes_a_job_once(launch, system: Memory) -> None:
    system.silent = True
    running = launch()
    until(lambda: running.observed() is not None)
    said = running.observed()
    assert said.reason == "HeldByNoAnswer"
    assert said.message == "Memory does not answer and is asked again: nobody there"
    system.names["job-1"] = "1"  # it had taken the job, and its answer was lost
    system.says["1"] = RUNS
    system.silent = False
    until(lambda: running.observed() == Observed("Launching", "runs"))


def test_silence_under_way_ends_nothing(launch, system: Memory) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    system.silent = True
    assert running.wait(0.3) is None
    system.silent = False
    system.says["1"] = GONE
    assert running.wait(WAIT_SECONDS) is not None


def test_a_refused_job_ends_with_the_systems_words(system: Memory, tmp_path: Path) -> None:
    def refuse() -> str:
        raise SubmitRefused("no such partition")

    running = foreign.start(system, foreign.Watch(system), "job-1", tmp_path, 1, refuse)
    assert running.wait(WAIT_SECONDS) == 1
    cause = foreign.explain_end(running, 1, tmp_path)
    assert (cause.reason, cause.message) == ("SubmitRefused", "Memory refuses the job: no such partition")


def test_a_launch_is_ended_kindly_and_then_not(launch, system: Memory) -> None:
    running = launch()
    until(lambda: running.observed() is not None)
    system.obeys = False
    running.terminate(grace_seconds=0.1)
    assert system.ended[0] == ("1", False)
    assert system.ended[-1] == ("1", True)


def test_one_that_will_not_end_is_named_when_the_time_is_over(launch, system: Memory, monkeypatch) -> None:
    monkeypatch.setattr(foreign, "END_SECONDS", 0.1)
    running = launch()
    until(lambda: running.observed() is not None)
    system.silent = True
    with pytest.raises(TimeoutError, match=r"Memory job 1 is still there .*: nobody there"):
        running.terminate(0.1)


def test_one_that_is_not_wanted_any_more_is_not_submitted(launch, system: Memory, tmp_path: Path) -> None:
    system.silent = True
    running = launch()
    until(lambda: running.observed() is not None)
    assert running.terminate(1.0) == 1
    assert (tmp_path / "attempt-1").read_text() == keeper.VOID
    assert system.names == {}


# ----------------------------------------------------------------------------------------- another's launch


def adopt(system: Memory, folder: Path) -> foreign.Running | local.Running | None:
    return foreign.adopt(system, foreign.Watch(system), "job-1", folder, 1)


def test_a_recorded_launch_is_taken_over_without_a_word_to_the_system(launch, system: Memory, tmp_path: Path) -> None:
    first = launch()
    until(lambda: first.observed() is not None)
    system.silent = True
    found = adopt(system, tmp_path)
    assert isinstance(found, foreign.Running)
    assert found.poll() is None
    system.silent = False
    until(lambda: found.observed() == Observed("HeldForNodes", "waits for nodes"))


def test_a_launch_whose_coordinator_died_before_it_wrote_it_down_is_found_by_its_name(system, tmp_path) -> None:
    system.submit("job-1")
    found = adopt(system, tmp_path)
    until(lambda: found.observed() == Observed("HeldForNodes", "waits for nodes"))
    assert (tmp_path / f"attempt-1{foreign.HANDLE}").read_text() == "1\n"


def test_a_launch_that_never_was_can_never_be(system: Memory, tmp_path: Path) -> None:
    assert adopt(system, tmp_path) is None
    assert adopt(system, tmp_path) is None
    done = hosted(tmp_path, "touch ran")
    assert done.returncode != 0
    assert not (tmp_path / "ran").exists()


def test_a_launch_that_ran_and_was_forgotten_ends_as_its_record_says(system: Memory, tmp_path: Path) -> None:
    assert hosted(tmp_path, "exit 7").returncode == 7
    assert adopt(system, tmp_path).wait(WAIT_SECONDS) == 7


def test_a_launch_on_this_machine_is_taken_over_as_such(system: Memory, tmp_path: Path) -> None:
    launched = local.start(local.Launch(("/bin/sh", "-c", "exit 4"), {}), tmp_path)
    assert launched.wait(WAIT_SECONDS) == 4
    found = adopt(system, tmp_path)
    assert isinstance(found, local.Running)
    assert found.poll() == 4


def test_a_local_coordinator_leaves_a_launch_through_another_system_alone(tmp_path: Path) -> None:
    assert hosted(tmp_path, "exit 0").returncode == 0
    with pytest.raises(ValueError, match=r"it was launched through another system; .* start with that --launcher"):
        local.adopt(tmp_path, 1)


def test_a_silent_system_may_have_it_and_is_no_proof_that_it_has_not(system: Memory, tmp_path: Path) -> None:
    system.silent = True
    with pytest.raises(OSError, match="Memory does not answer: nobody there"):
        adopt(system, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- a keeper of its own


def hosted_words(folder: Path, script: str) -> list[str]:
    words = [sys.executable, "-I", "-S", keeper.__file__, "--hosted", str(folder / "attempt-1")]
    return [*words, "/bin/sh", "-c", script]


def hosted(folder: Path, script: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(hosted_words(folder, script), cwd=folder, timeout=WAIT_SECONDS, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_hosted_keeper_hands_on_that_it_is_time_to_leave(tmp_path: Path, sent: signal.Signals) -> None:
    script = 'trap "exit 5" USR1; touch ready; while :; do sleep 0.02; done'
    with subprocess.Popen(hosted_words(tmp_path, script), cwd=tmp_path) as process:
        until((tmp_path / "ready").exists)
        process.send_signal(sent)
        assert process.wait(WAIT_SECONDS) == 5
    assert (tmp_path / f"attempt-1{keeper.ENDED}").read_text() == "5\n"


def test_a_hosted_launch_leaves_no_process_and_no_scratch_folder(tmp_path: Path) -> None:
    script = "sleep 1000 & echo $! >left; echo $TMPDIR >scratch; test -d $TMPDIR"
    assert hosted(tmp_path, script).returncode == 0
    stat = keeper.read_stat(int((tmp_path / "left").read_text()))
    assert stat is None or stat.state in "ZX"
    assert not os.path.exists((tmp_path / "scratch").read_text().strip())


def test_a_program_that_cannot_be_run_is_an_end_too(tmp_path: Path) -> None:
    words = [sys.executable, "-I", "-S", keeper.__file__, "--hosted", str(tmp_path / "attempt-1"), "/nowhere/mpirun"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == keeper.CANNOT_RUN
    assert "cannot run /nowhere/mpirun: No such file" in done.stderr
    assert (tmp_path / f"attempt-1{keeper.ENDED}").read_text() == f"{keeper.CANNOT_RUN}\n"
