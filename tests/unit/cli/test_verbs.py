"""Each client verb against a coordinator over real gRPC: what it asks, prints and exits with, as text and as JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest

from protos import job_pb2

FAILED = job_pb2.JOB_STATE_FAILED
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED


def test_submit_prints_the_id_alone(ask, coordinator, job_file):
    done = ask("submit", str(job_file), "--request-id", "mine", "--set", "training.epochs=7")
    assert done == (0, "digits-1\n", "")
    (request,) = coordinator.requests
    assert (request.request_id, request.validate_only, request.spec.training.epochs) == ("mine", False, 7)


def test_submit_as_json_prints_the_job(ask, job_file):
    job = json.loads(ask("submit", str(job_file), "--format", "json").out)
    assert (job["id"], job["state"], job["spec"]["workers"]) == ("digits-1", "SUCCEEDED", 2)


def test_dry_run_asks_the_coordinator_to_check_only(ask, coordinator, job_file):
    done = ask("submit", str(job_file), "--dry-run")
    assert done == (0, "valid: digits, 3 epochs, workers 2\n", "")
    assert coordinator.requests[0].validate_only
    assert json.loads(ask("submit", str(job_file), "--dry-run", "--format", "json").out)["valid"] is True


def test_submit_and_watch_exits_with_the_result(ask, coordinator, job_file, job_in):
    done = ask("submit", str(job_file), "--watch")
    assert done.code == 0
    assert done.out.splitlines()[0] == "digits-1"
    coordinator.job = job_in(FAILED, "rank 1 on n1 was killed by signal 9 (SIGKILL)\nlast log lines:\n    epoch 1")
    done = ask("submit", str(job_file), "--watch")
    assert done.code == 1
    assert done.err.splitlines()[0] == (
        "error: job digits-1 is FAILED: rank 1 on n1 was killed by signal 9 (SIGKILL); "
        "all it wrote: paceline logs digits-1"
    )
    assert done.err.splitlines()[1:] == ["  last log lines:", "      epoch 1"]


def test_watching_a_dry_run_is_bad_usage(ask, job_file):
    assert ask("submit", str(job_file), "--watch", "--dry-run").code == 2


def test_list_reads_every_page_and_aligns(ask, coordinator):
    done = ask("list")
    header, *rows = done.out.splitlines()
    assert header.split() == ["ID", "STATE", "NAME", "WORKERS", "PROGRESS", "AGE", "WHY"]
    assert len(rows) == len(coordinator.requests) == 2
    assert all("digits-1  SUCCEEDED  digits  2        epoch 3/3 (100%)" in row for row in rows)
    assert ask("list", "--limit", "1").err == "there are older ones; see them with --limit 10\n"


def test_list_asks_for_what_its_options_say_on_every_page(ask, coordinator):
    options = ("--state", "running", "--label", "team=vision", "--owner", "ada", "--filter", "priority>=5")
    ask("list", *options)
    wanted = 'priority>=5 AND state="RUNNING" AND labels.team="vision" AND owner="ada"'
    assert [request.filter for request in coordinator.requests] == [wanted] * 2
    assert ask("list", "--label", "team").code == 2


def test_list_as_json_is_one_document(ask):
    document = json.loads(ask("list", "--format", "json").out)
    assert [job["id"] for job in document["jobs"]] == ["digits-1", "digits-1"]
    assert document["more"] is False


def test_get_tells_everything_about_a_job(ask, coordinator):
    coordinator.job.spec.labels.update({"team": "vision", "kind": "test"})
    coordinator.job.owner = "ada"
    coordinator.job.queue_position = 3
    out = ask("get", "digits-1").out
    assert [" ".join(line.split()) for line in out.splitlines()[2:6]] == [
        "state: SUCCEEDED (number 3 in the queue): every rank finished",
        "owner: ada",
        "priority: 0",
        "labels: kind=test, team=vision",
    ]
    for words in ("id:", "validation loss", "validation accuracy", "0.9500", "history:", "2023-11-14T"):
        assert words in out


def test_get_as_json_has_numbers_as_numbers_and_times_as_text(ask):
    job = json.loads(ask("get", "digits-1", "--format", "json").out)
    assert job["create_time"] == "2023-11-14T22:13:20.000Z"
    assert job["progress"]["step"] == 135
    assert job["progress"]["phase_seconds"] == {"data": 0.1, "forward": 0.25}
    assert job["summary"]["peak_memory_bytes"] == 70_000_000
    assert job["spec"]["model"][1] == "relu"


def test_what_json_cannot_say_is_left_out(ask, coordinator):
    coordinator.job.progress.loss = float("nan")
    assert "loss" not in json.loads(ask("get", "digits-1", "--format", "json").out)["progress"]


def test_watch_in_a_pipe_prints_plain_lines_and_the_result(ask):
    done = ask("watch", "digits-1")
    lines = done.out.splitlines()
    assert lines[0] == "digits: RUNNING: 2 ranks report"
    assert lines[1] == (
        "epoch 1/3  step 45/135  loss 1.0000  accuracy 0.5000  12,345 samples/s  val loss 1.5000  val accuracy 0.7500"
    )
    assert lines[4] == "digits: SUCCEEDED: every rank finished"
    assert (done.code, done.err) == (0, "")


def test_watch_as_json_is_a_line_an_event(ask):
    events = [json.loads(line) for line in ask("watch", "digits-1", "--format", "json").out.splitlines()]
    assert [next(iter(event)) for event in events] == ["job", "report", "report", "report", "job"]
    assert events[-1]["job"]["state"] == "SUCCEEDED"


def test_logs_name_their_source_and_take_a_rank(ask, coordinator):
    assert ask("logs", "digits-1").out.splitlines()[:2] == ["launcher | warming up", "rank-0 | epoch 1"]
    assert ask("logs", "digits-1", "--rank", "0").out == "rank-0 | epoch 1\n"
    lines = [json.loads(line) for line in ask("logs", "digits-1", "--format", "json").out.splitlines()]
    assert lines[1] == {"source": "rank-0", "line": "epoch 1"}


def test_following_logs_ends_with_the_job_and_repeats_no_line(ask):
    assert len(ask("logs", "digits-1", "-f").out.splitlines()) == 3


def test_metrics_are_asked_until_there_are_no_more(ask, coordinator):
    table = ask("metrics", "digits-1").out.splitlines()
    assert table[0].split("  ")[0].strip() == "step"
    assert [row.split()[0] for row in table[1:]] == ["45", "90", "135"]
    assert [request.after_step for request in coordinator.requests] == [0, 90, 135]


def test_metrics_as_csv_and_json_hold_every_number(ask):
    rows = list(csv.DictReader(io.StringIO(ask("metrics", "digits-1", "--csv").out)))
    assert rows[2]["step"] == "135"
    assert (rows[0]["data_seconds"], rows[0]["backward_seconds"]) == ("0.1", "")
    reports = json.loads(ask("metrics", "digits-1", "--format", "json").out)["reports"]
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert ask("metrics", "digits-1", "--csv", "--format", "json").code == 2


def test_metrics_of_a_job_that_reported_nothing(ask, coordinator):
    coordinator.reports = []
    assert ask("metrics", "digits-1") == (0, "", "job digits-1 has reported nothing yet\n")
    assert json.loads(ask("metrics", "digits-1", "--format", "json").out) == {"reports": []}


def test_cancel_says_what_becomes_of_the_job(ask):
    assert ask("cancel", "digits-1") == (0, "digits-1 is CANCELLING: told to stop\n", "")
    assert json.loads(ask("cancel", "digits-1", "--format", "json").out)["state"] == "CANCELLING"


def test_pull_writes_every_file(ask, coordinator, tmp_path):
    folder = tmp_path / "deep" / "output"
    done = ask("pull", "digits-1", "-o", str(folder))
    assert done == (0, f"{folder}: 3 files, 0.0 MB\n", "")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == coordinator.files
    as_json = json.loads(ask("pull", "digits-1", "-o", str(tmp_path / "second"), "--format", "json").out)
    assert (as_json["files"], as_json["bytes"]) == (3, 7002)


def test_the_server_is_taken_from_the_environment(paceline, coordinator, monkeypatch):
    monkeypatch.setenv("PACELINE_SERVER", coordinator.address)
    assert paceline("get", "digits-1").code == 0


def test_ctrl_c_on_watch_leaves_the_job_and_says_how_to_end_it(ask, coordinator, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.progress.PlainLines.report", interrupted)
    done = ask("watch", "digits-1")
    assert done.code == 130
    assert f"goes on. To end it: paceline cancel digits-1 --server {coordinator.address}" in done.err
    assert not any(type(request).__name__ == "CancelJobRequest" for request in coordinator.requests)


@pytest.mark.parametrize("verb", ["list", "get", "watch", "logs", "metrics", "cancel", "pull", "submit"])
def test_every_client_verb_takes_server_and_format(paceline, verb):
    text = paceline(verb, "--help").out
    assert "--server" in text
    assert "--format" in text
