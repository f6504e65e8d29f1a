"""Rank 0's line to the coordinator: reports leave in the background and never hold up a step.

The coordinator may be away for a while: reports wait and are sent again, to where it says it is when it is back. What
can't be delivered by the end stays in metrics.jsonl, from which the coordinator takes it, and the log says so.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos import environment
from worker.coordinator_line import CoordinatorLine, Tls, tls_of

Item = tuple[dict[str, Any] | None, list[dict[str, Any]]]
CALL_SECONDS = 5.0  # deadline of one call
RETRY_SECONDS = 0.5
BATCH = 1000  # items in one call: what piles up while the coordinator is away may be more than gRPC takes at once
CLOSE_SECONDS = 10.0  # how long the end of a job waits for the last reports to leave


class CoordinatorClient:
    """Sends reports of one job attempt.

    Args:
        address: host:port of the CoordinatorService.
        token: the job's own, shown on every call.
        address_file: says the address anew when the coordinator came back at another; None: it never does.
        tls: how the coordinator is known; None where it speaks without TLS.
    """

    def __init__(
        self,
        address: str,
        job_id: str,
        attempt: int,
        token: str,
        address_file: Path | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._line = CoordinatorLine(address, address_file, tls)
        self._job_id = job_id
        self._attempt = attempt
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator-client", daemon=True)
        self._thread.start()

    def send(self, report: dict[str, Any] | None, ranks: list[dict[str, Any]]) -> None:
        """Queue one report, or news of ranks without one; returns at once."""
        self._queue.put((report, ranks))

    def close(self) -> None:
        """Wait, at most CLOSE_SECONDS, until what was queued has been delivered."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)
        if self._thread.is_alive():
            print(
                f"the coordinator at {self._line.address} did not take the last reports in {CLOSE_SECONDS:g} s",
                flush=True,
            )

    def _run(self) -> None:
        ended = False
        try:
            while not ended:
                batch, ended = self._next_batch()
                if batch:
                    ended |= not self._deliver(batch)
        finally:
            self._line.close()

    def _next_batch(self) -> tuple[list[Item], bool]:
        """What waits, at least one; and whether it is the last."""
        batch: list[Item] = []
        item = self._queue.get()
        while item is not None:
            batch.append(item)
            if len(batch) == BATCH:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _deliver(self, batch: list[Item]) -> bool:
        """Try until the coordinator has answered; False when it never will."""
        import grpc
        from google.protobuf import json_format

        from protos import coordinator_pb2, job_pb2

        newest = {rank["rank"]: rank for _, ranks in batch for rank in ranks}
        request = coordinator_pb2.ReportProgressRequest(
            job_id=self._job_id,
            attempt=self._attempt,
            reports=[json_format.ParseDict(report, job_pb2.Report()) for report, _ in batch if report is not None],
            ranks=[coordinator_pb2.RankReport(**rank) for rank in newest.values()],
        )
        tries_after_closing = int(CLOSE_SECONDS / (CALL_SECONDS + RETRY_SECONDS))
        while tries_after_closing > 0:
            try:
                self._line.stub().ReportProgress(request, timeout=CALL_SECONDS, metadata=self._metadata)
                return True
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    print(f"the coordinator refused a report: {error.details()}", file=sys.stderr, flush=True)
                    return False
            if self._closing.wait(RETRY_SECONDS):
                tries_after_closing -= 1
            self._line.renew()
        waiting = len(request.reports)
        print(f"the coordinator at {self._line.address} did not take the last reports, {waiting} or more", flush=True)
        return False


def connect(settings: Mapping[str, str]) -> CoordinatorClient | None:
    """The client the environment asks for, or None when no coordinator launched this job."""
    address = settings.get(environment.COORDINATOR_ADDRESS)
    if not address:
        return None
    return CoordinatorClient(
        address,
        settings[environment.JOB_ID],
        int(settings[environment.JOB_ATTEMPT]),
        settings[environment.JOB_TOKEN],
        Path(file) if (file := settings.get(environment.COORDINATOR_ADDRESS_FILE)) else None,
        tls_of(settings),
    )
