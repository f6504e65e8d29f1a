"""Rank 0's reports reach a coordinator that was away and came back elsewhere."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from protos import coordinator_pb2, coordinator_pb2_grpc
from worker.coordinator_client import BATCH, CoordinatorClient

WAIT_SECONDS = 30.0


class Taking(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Takes reports until `wanted` of them are there."""

    def __init__(self, wanted: int) -> None:
        self.steps: list[int] = []
        self.calls = 0
        self.complete = threading.Event()
        self._wanted = wanted

    def ReportProgress(self, request, context):
        self.calls += 1
        self.steps += [report.step for report in request.reports]
        if len(self.steps) >= self._wanted:
            self.complete.set()
        return coordinator_pb2.ReportProgressResponse()


@contextmanager
def served(taking: Taking):
    server = grpc.server(ThreadPoolExecutor(1))
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(taking, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_reports_wait_for_a_coordinator_that_comes_back_at_another_address(tmp_path) -> None:
    address_file = tmp_path / "address"
    count = BATCH + 5
    first, second = Taking(1), Taking(count)
    with served(first) as address:
        address_file.write_text(address + "\n")
        client = CoordinatorClient(address, "job-1", 1, "token", address_file)
        client.send({"step": 1}, [])
        assert first.complete.wait(WAIT_SECONDS)
    for step in range(2, count + 2):
        client.send({"step": step}, [])
    with served(second) as address:
        address_file.write_text(address + "\n")
        assert second.complete.wait(WAIT_SECONDS)
        client.close()
    assert second.steps == list(range(2, count + 2))
    assert second.calls >= 2


def test_a_coordinator_that_stays_away_does_not_hold_up_the_end_and_the_log_says_so(capfd) -> None:
    client = CoordinatorClient("127.0.0.1:1", "job-1", 1, "token")
    client.send({"step": 1}, [])
    client.close()
    assert "the coordinator at 127.0.0.1:1 did not take the last reports, 1 or more" in capfd.readouterr().out
