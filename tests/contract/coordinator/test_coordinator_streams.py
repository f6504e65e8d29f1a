"""Watching, logs, metrics and output."""

import hashlib
import time
import urllib.request
from collections import defaultdict

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import coordinator_pb2 as pb
from protos import job_pb2

pytestmark = pytest.mark.parametrize("store", ["sqlite", "postgres"], indirect=True)

DEADLINE_SECONDS = 20


def watch(talk, job_id: str, **options: int) -> list[pb.WatchJobResponse]:
    return list(talk.stub.WatchJob(pb.WatchJobRequest(job_id=job_id, **options), timeout=DEADLINE_SECONDS))


def test_a_watch_begins_with_the_job_gives_every_report_and_ends_with_the_end(talk) -> None:
    events = watch(talk, talk.submit("good").id)
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("job", "job")
    assert [event.report.step for event in events if event.HasField("report")] == [2, 4]
    states = [event.job.state for event in events if event.HasField("job")]
    assert states[-1] == job_pb2.JOB_STATE_SUCCEEDED
    assert states == sorted(states)
    assert events[-1].job.progress.step == 4


def test_a_watch_of_an_ended_job_gives_the_same_reports_and_ends(talk) -> None:
    job_id = talk.until_ended(talk.submit("good").id).id
    assert [event.report.step for event in watch(talk, job_id) if event.HasField("report")] == [2, 4]
    later = watch(talk, job_id, after_step=2)
    assert [event.report.step for event in later if event.HasField("report")] == [4]
    assert [event.WhichOneof("event") for event in watch(talk, job_id, after_step=4)] == ["job"]


def test_a_watch_ends_at_its_own_deadline(talk) -> None:
    job_id = talk.submit("long").id
    with pytest.raises(grpc.RpcError) as error:
        list(talk.stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=0.5))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_reports_are_kept_for_later(talk) -> None:
    job_id = talk.until_ended(talk.submit("good").id).id
    reports = talk.stub.GetMetrics(pb.GetMetricsRequest(job_id=job_id), timeout=10).reports
    assert [(report.step, report.loss) for report in reports] == [(2, 1.5), (4, 0.5)]
    assert reports[1].validation_accuracy == 0.75
    later = talk.stub.GetMetrics(pb.GetMetricsRequest(job_id=job_id, after_step=2), timeout=10).reports
    assert list(later) == [reports[1]]


def test_logs_are_followed_from_the_queue_to_the_end(talk) -> None:
    holder, job = talk.submit("long", workers=2), talk.submit("good")
    logs = talk.stub.StreamLogs(pb.StreamLogsRequest(job_id=job.id, follow=True), timeout=DEADLINE_SECONDS)
    talk.cancel(holder.id)
    assert [(entry.source, entry.line) for entry in logs] == [("rank-0", "training begins"), ("rank-0", "done")]


def test_logs_without_follow_are_what_there_is_now(talk) -> None:
    job_id = talk.submit("long").id
    talk.until_state(job_id, job_pb2.JOB_STATE_RUNNING)
    request = pb.StreamLogsRequest(job_id=job_id, rank=0)
    assert [entry.line for entry in talk.stub.StreamLogs(request, timeout=DEADLINE_SECONDS)] == ["training begins"]


def pull(talk, job_id: str) -> dict[str, bytes]:
    """The files as a client puts them together, each held against its size and digest."""
    files: dict[str, bytes] = defaultdict(bytes)
    for piece in talk.stub.PullArtifacts(pb.PullArtifactsRequest(job_id=job_id), timeout=DEADLINE_SECONDS):
        assert piece.offset == len(files[piece.path])
        files[piece.path] += piece.data
        if piece.sha256:
            assert len(files[piece.path]) == piece.size
            assert piece.sha256 == hashlib.sha256(files[piece.path]).hexdigest()
    return dict(files)


def test_pulled_files_are_the_files(talk) -> None:
    job_id = talk.until_ended(talk.submit("good").id).id
    files = pull(talk, job_id)
    output = talk.coordinator.settings.state / "jobs" / job_id / "output"
    names = {"checkpoints/step-4", "empty.txt", "model.safetensors", "summary.json"}
    assert files == {name: (output / name).read_bytes() for name in names}
    assert len(files["model.safetensors"]) > 2 * 1024 * 1024


def test_links_in_the_output_are_not_followed_out(talk) -> None:
    job_id = talk.until_ended(talk.submit("leaky").id).id
    assert set(pull(talk, job_id)) == {"checkpoints/step-4", "empty.txt", "model.safetensors", "summary.json"}


def get_page(talk, path: str) -> str:
    port = talk.coordinator.http.port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_reads_what_the_workers_reported(talk) -> None:
    job_id = talk.until_ended(talk.submit("good", workers=2).id).id
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get_page(talk, "/metrics"))
        for sample in family.samples
    }
    job = ("job", job_id)
    assert samples["paceline_train_loss", job] == 0.5
    assert samples["paceline_validation_accuracy_ratio", job] == 0.75
    assert samples["paceline_samples_total", job] == 40
    assert samples["paceline_steps_total", job] == 4
    assert samples["paceline_exchange_bytes_total", ("direction", "received"), job, ("transport", "mpi")] == 400
    assert samples["paceline_exchange_wait_seconds_total", job, ("rank", "1")] == 0.5
    assert samples["paceline_step_duration_seconds_count", job, ("phase", "forward")] == 4
    assert abs(samples["paceline_worker_last_heartbeat_timestamp_seconds", job, ("rank", "1")] - time.time()) < 60
    assert samples["paceline_jobs", ("state", "SUCCEEDED")] == 1
    assert samples["paceline_queue_wait_seconds_count",] == 1
    assert samples["paceline_slots", ("state", "free")] == 2


def test_the_http_port_tells_its_health_and_what_it_has(talk) -> None:
    assert get_page(talk, "/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError) as missing:
        get_page(talk, "/")
    assert missing.value.code == 404
    assert "/metrics" in missing.value.read().decode()
    missing.value.close()


def test_more_reports_than_one_answer_holds_are_asked_for_step_by_step(talk, monkeypatch) -> None:
    monkeypatch.setattr("coordinator.service.REPORTS_AT_MOST", 1)
    job_id = talk.until_ended(talk.submit("good").id).id
    steps, after_step = [], 0
    while reports := talk.stub.GetMetrics(
        pb.GetMetricsRequest(job_id=job_id, after_step=after_step), timeout=10
    ).reports:
        after_step = reports[-1].step
        steps.append([report.step for report in reports])
    assert steps == [[2], [4]]
