"""A plan's predictions beside what was measured, on two hosts with a shaped link between them.

Run as `python -m tests.mpi.plan_beside_runs [--quick]`, as root: it prints the table. The two hosts share this
machine's cores, so others that are busy here slow the runs and not the plan.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protos import environment
from tests.mpi.conftest import ENVIRONMENT, PROJECT
from tests.mpi.shaped_link import ADDRESSES, SlowPair, slow_pair, why_not

PROGRAM = Path(__file__).with_name("programs") / "push_and_pull.py"
BATCH, STEPS = 256, 20
NETWORKS = {"784-128-10": (128,), "784-512-256-10": (512, 256)}
BANDWIDTHS = ("100Mbit", "1Gbit")
LATENCY = "20us"  # of a veth pair
TIMEOUT_SECONDS = 90.0


class Row(NamedTuple):
    """One way of exchanging, on one link."""

    network: str
    bandwidth: str
    choice: str
    predicted_seconds: float
    measured_seconds: float

    @property
    def ratio(self) -> float:
        """How much longer it took than was said."""
        return self.measured_seconds / self.predicted_seconds


def write_job(folder: Path, network: str) -> Path:
    """As many steps as are measured, on noise."""
    random = np.random.default_rng(1)
    data = folder / "noise.npz"
    if not data.exists():
        features = random.standard_normal((BATCH * STEPS, 784)).astype(np.float32)
        np.savez(data, x=features, y=random.integers(0, 10, BATCH * STEPS))
    hidden = [layer for units in NETWORKS[network] for layer in ({"dense": {"units": units}}, "relu")]
    job = {
        "name": network,
        "data": {"train": {"npz": {"path": str(data)}}},
        "model": [*hidden, {"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": 1e-4}},
        "training": {"epochs": 1, "batch_size": BATCH},
        "workers": 2,
    }
    path = folder / f"{network}.json"
    path.write_text(json.dumps(job))
    return path


def compare(
    pair: SlowPair, folder: Path, networks: Sequence[str], bandwidths: Sequence[str], servers: bool = True
) -> Iterator[Row]:
    """A row for each network, link and exchange."""
    for network in networks:
        job = write_job(folder, network)
        figures = folder / f"{network}.measured"
        figures.write_text(_worker("measure", job, "--nodes", 2))
        for bandwidth in bandwidths:
            options = ("--nodes", 2, "--bandwidth", bandwidth, "--latency", LATENCY, "--measured", figures)
            plan = json.loads(_worker("plan", job, *options, "--format", "json"))
            said = {choice["choice"]: choice for choice in plan["choices"]}
            pair.shape(plan["bytes_per_second"])
            yield Row(network, bandwidth, "all-reduce", said["all-reduce"]["step_seconds"], trained(pair, folder, job))
            if servers:
                server = said["parameter server"]
                exchange = server["exchange_seconds"] + server["waiting_seconds"]
                taken = pushed(pair, folder, job, plan["workload"]["parameters"])
                yield Row(network, bandwidth, "push and pull alone", exchange, taken)


def trained(pair: SlowPair, folder: Path, job: Path) -> float:
    """Seconds a step of training by all-reduce on both hosts, once it is under way."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "out"
    done = pair.mpirun([sys.executable, "-m", "worker", "train", job, "-o", output], TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return BATCH / float(json.loads((output / "summary.json").read_text())["samples_per_second"])


def pushed(pair: SlowPair, folder: Path, job: Path, elements: int) -> float:
    """Seconds of a round trip of a worker on each host with a parameter server on the first."""
    from worker.checkpoint import Checkpoint, write_checkpoint

    start = folder / f"{elements}.safetensors"
    write_checkpoint(start, Checkpoint(0, 0, 0, "0" * 64, [], np.zeros(elements, np.float32), {}))
    settings = os.environ | {environment.JOB_TOKEN: secrets.token_hex(), "PYTHONPATH": str(PROJECT)}
    serve = [sys.executable, "-m", "worker", "serve-parameters", job, start, "--workers", 2]
    server = subprocess.Popen(
        pair.on(0, [*serve, "--listen", f"{ADDRESSES[0]}:0"]),
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = []
    try:
        address = server.stdout.readline().split()[1]
        for host in range(2):
            argv = [sys.executable, PROGRAM, address, host, 2, elements, STEPS]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            workers.append(subprocess.Popen(pair.on(host, argv), env=settings, text=True, **pipes))
        said = [worker.communicate(timeout=TIMEOUT_SECONDS) for worker in workers]
        if any(worker.returncode for worker in workers):
            raise RuntimeError(f"a worker of the parameter server ended badly: {said}")
        return max(float(figure) for figure, _ in said)
    finally:
        for process in (*workers, server):
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=20)


def table(rows: Sequence[Row]) -> str:
    """For a note."""
    lines = [
        "| network | link | exchange | predicted | measured | measured / predicted |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        predicted, measured = f"{1e3 * row.predicted_seconds:.1f} ms", f"{1e3 * row.measured_seconds:.1f} ms"
        lines.append(f"| {row.network} | {row.bandwidth} | {row.choice} | {predicted} | {measured} | {row.ratio:.2f} |")
    return "\n".join(lines)


def _worker(*arguments: object) -> str:
    """What a verb prints."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


def main() -> None:
    """Print the table, or why there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small network on the fast link")
    options = parser.parse_args()
    networks = ["784-128-10"] if options.quick else list(NETWORKS)
    bandwidths = ["1Gbit"] if options.quick else list(BANDWIDTHS)
    with tempfile.TemporaryDirectory(prefix="pl-") as folder:
        reason = why_not(Path(folder))
        if reason is not None:
            sys.exit(reason)
        with slow_pair(Path(folder)) as pair:
            print(table(list(compare(pair, Path(folder), networks, bandwidths))))


if __name__ == "__main__":
    main()
