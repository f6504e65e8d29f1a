"""Stands where mpirun and paceline-worker stand: does what the job's name asks and reports over real gRPC.

Called like mpirun: `-n RANKS ... paceline-worker train JOB.yaml -o OUTPUT --log-dir LOGS`; or by the real mpirun in
place of paceline-worker, and then it is one rank of many.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

arguments = sys.argv[sys.argv.index("train") + 1 :]
job_file, output, logs = Path(arguments[0]), Path(arguments[2]), Path(arguments[4])
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or sys.argv[sys.argv.index("-n") + 1])
name = next(line.split()[1] for line in job_file.read_text().splitlines() if line.startswith("name:"))
rank_log = (logs / f"rank-{rank}.log").open("a", buffering=1)


def report(step: int, **fields: float) -> None:
    if rank != 0:
        return
    import grpc

    from protos import coordinator_pb2, coordinator_pb2_grpc, job_pb2

    line = job_pb2.Report(step=step, epoch=1, samples=step * 10, total_steps=4, learning_rate=0.01, **fields)
    line.phase_seconds.update({"forward": 0.002, "backward": 0.004})
    measured = [
        coordinator_pb2.RankReport(
            rank=number, host="here", exchange_wait_seconds=0.5, sent_bytes={"mpi": 100}, received_bytes={"mpi": 200}
        )
        for number in range(ranks)
    ]
    request = coordinator_pb2.ReportProgressRequest(
        job_id=os.environ["PACELINE_JOB_ID"],
        attempt=int(os.environ["PACELINE_JOB_ATTEMPT"]),
        reports=[line],
        ranks=measured,
    )
    token = (("authorization", f"Bearer {os.environ['PACELINE_JOB_TOKEN']}"),)
    while True:
        address = Path(os.environ["PACELINE_COORDINATOR_FILE"]).read_text().strip()
        with grpc.insecure_channel(address) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            try:
                stub.ReportProgress(request, metadata=token, timeout=10)
                return
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
        time.sleep(0.05)


def told_to_go_on() -> None:
    while not (logs / "go-on").exists():
        time.sleep(0.02)


def write_down(*steps: int) -> None:
    """Reports that nobody is told of."""
    output.mkdir(exist_ok=True)
    with (output / "metrics.jsonl").open("a") as metrics:
        for step in steps:
            metrics.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")


def finish() -> None:
    (output / "checkpoints").mkdir(parents=True)
    (output / "empty.txt").write_bytes(b"")
    (output / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (output / "checkpoints" / "step-4").write_text("weights")
    summary = {"state": "SUCCEEDED", "steps": 4, "world_size": ranks, "validation_accuracy": 0.75}
    (output / "summary.json").write_text(json.dumps(summary))


print("training begins", file=rank_log)
match name:
    case "short":  # ends well without a word
        finish()
    case "good":
        report(2, loss=1.5)
        report(4, loss=0.5, validation_loss=0.6, validation_accuracy=0.75)
        finish()
    case "hollow":  # says it ended well and left nothing
        report(1, loss=1.0)
    case "broken":
        report(1, loss=1.0)
        print("error: rank 0 of 1 on here: the loss is nan at step 2", file=rank_log)
        sys.exit(1)
    case "killed":
        report(1, loss=1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    case "silent":  # never reports, never ends
        time.sleep(600)
    case "long":  # reports once, then never ends by itself
        report(1, loss=1.0)
        time.sleep(600)
    case "chatty":  # goes on writing lines
        while True:
            print("still here", file=rank_log)
            time.sleep(0.05)
    case "long-once":  # the same, but another attempt ends well
        if os.environ["PACELINE_JOB_ATTEMPT"] == "1":
            report(1, loss=1.0)
            time.sleep(600)
        finish()
    case "patient":  # ends well when it is told to go on
        report(1, loss=1.0)
        told_to_go_on()
        report(4, loss=0.5)
        finish()
    case "deaf" | "deaf-broken":  # the same, but reports into its folder alone
        report(1, loss=1.0)
        told_to_go_on()
        write_down(2, 3)
        if name == "deaf-broken":
            print("error: rank 0 of 1 on here: the loss is nan at step 2", file=rank_log)
            sys.exit(1)
        finish()
    case "counted" | "counted-mute":  # leaves a line when it begins and when it ends, whoever is there to see it
        with (logs / "counted").open("a") as counted:
            counted.write("begun\n")
        time.sleep(random.uniform(0, 0.3))
        if name == "counted":
            report(2, loss=1.5)
        finish()
        with (logs / "counted").open("a") as counted:
            counted.write("ended\n")
    case "rank-killed":  # rank 1 is killed once rank 0 has reported
        report(1, loss=1.0)
        if rank == 0:
            (logs / "reported").touch()
        while rank == 1 and not (logs / "reported").exists():
            time.sleep(0.01)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    case "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report(1, loss=1.0)
        time.sleep(600)
    case "leaky":  # its output holds links out of the folder
        finish()
        (output / "passwd").symlink_to("/etc/passwd")
        (output / "etc").symlink_to("/etc")
print("done", file=rank_log)
