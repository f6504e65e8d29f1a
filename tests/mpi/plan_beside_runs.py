"""A plan's predictions beside what was measured, on two hosts with a shaped link between them.

Run as `python -m tests.mpi.plan_beside_runs [--quick]`, as root: every choice of the plan is trained with, on two
networks and two links, and the table is printed. The two hosts and their parameter servers share this machine's cores,
so others that are busy here slow the runs and not the plan, which knows a machine that nobody disturbs.

Rules: a step's time is from its report to the next one's, every step or meeting reported, which costs a fraction of a
millisecond; of one run's the lower quartile, as the plan's own figures are, without the first, which makes connections,
and the epoch's last, behind which whole weights or averages are exchanged.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.mpi.conftest import ENVIRONMENT, PROJECT
from tests.mpi.shaped_link import SlowPair, slow_pair, why_not
from worker.plan.machine import undisturbed

PROGRAM = Path(__file__).with_name("programs") / "train_on_nodes.py"
BATCH, STEPS = 256, 20
MEETINGS = 4  # of local steps: the first and the last do not count
NETWORKS = {"784-128-10": (128,), "784-512-256-10": (512, 256)}
BANDWIDTHS = ("100Mbit", "1Gbit")
LATENCY = "20us"  # of a veth pair
TIMEOUT_SECONDS = 120.0


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


def write_job(folder: Path, network: str, sync: Mapping[str, Any] | None = None) -> Path:
    """As many steps as are measured, on noise."""
    steps = max(STEPS, MEETINGS * (sync or {}).get("local", {}).get("steps", 0))
    random = np.random.default_rng(1)
    data = folder / f"noise-{steps}.npz"
    if not data.exists():
        features = random.integers(0, 256, (BATCH * steps, 784), np.uint8)
        np.savez(data, x=features, y=random.integers(0, 10, BATCH * steps))
    hidden = [layer for units in NETWORKS[network] for layer in ({"dense": {"units": units}}, "relu")]
    job = {
        "name": network,
        "data": {"train": {"npz": {"path": str(data)}}, "scale": 1 / 255},
        "model": [*hidden, {"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": 1e-4}},
        "training": {"epochs": 1, "batch_size": BATCH},
        "sync": sync or "all_reduce",
        "workers": 2,
    }
    path = folder / f"{network}.json"
    path.write_text(json.dumps(job))
    return path


def compare(
    pair: SlowPair,
    folder: Path,
    networks: Sequence[str],
    bandwidths: Sequence[str],
    only: Collection[str] | None = None,
) -> Iterator[Row]:
    """A row for each network, link and choice of the plan, or of `only` some of them."""
    for network in networks:
        job = write_job(folder, network)
        figures = folder / f"{network}.measured"
        figures.write_text(_worker("measure", job, "--nodes", 2))
        for bandwidth in bandwidths:
            options = ("--nodes", 2, "--bandwidth", bandwidth, "--latency", LATENCY, "--measured", figures)
            plan = json.loads(_worker("plan", write_job(folder, network), *options, "--format", "json"))
            pair.shape(plan["bytes_per_second"])
            for choice in plan["choices"]:
                if only is None or choice["choice"] in only:
                    taken = trained(pair, folder, write_job(folder, network, choice["sync"]))
                    yield Row(network, bandwidth, choice["choice"], choice["step_seconds"], taken)


def trained(pair: SlowPair, folder: Path, job: Path) -> float:
    """Seconds a step of training on both hosts, once it is under way."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "out"
    done = pair.mpirun([sys.executable, PROGRAM, 1, "train", job, "-o", output], TIMEOUT_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    reports = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    taken = [
        (after["wall_seconds"] - before["wall_seconds"]) / (after["step"] - before["step"])
        for before, after in pairwise(reports[:-1])
    ]
    return undisturbed(taken)


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
    parser.add_argument("--only", action="append", metavar="CHOICE", help="this row of the plan alone, or with others")
    options = parser.parse_args()
    networks = ["784-128-10"] if options.quick else list(NETWORKS)
    bandwidths = ["1Gbit"] if options.quick else list(BANDWIDTHS)
    with tempfile.TemporaryDirectory(prefix="pl-") as folder:
        reason = why_not(Path(folder))
        if reason is not None:
            sys.exit(reason)
        with slow_pair(Path(folder)) as pair:
            print(table(list(compare(pair, Path(folder), networks, bandwidths, options.only))))


if __name__ == "__main__":
    main()
