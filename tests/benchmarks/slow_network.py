"""What training costs where the network is the bottleneck: `make bench-network`.

Two hosts of one rank each, network namespaces on this machine, on links of 100 Mbit/s; the job is the same, what
differs is `sync`. Each row: the time until the validation accuracy is that of the target, and the accuracy after the
last epoch, so that a saving that costs accuracy shows.

Rules: needs root, as tests/mpi/hosts.py says. Every run does all its epochs within a deadline. Ratios are against the
first row, the all-reduce of float32, of the same round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.benchmarks.__main__ import positive_integer, positive_number, tell
from tests.benchmarks.machine import busy_cores, busy_warning, machine_facts
from tests.benchmarks.measurement import KERNEL_WISHES
from tests.benchmarks.spread import spread
from tests.benchmarks.table import Table, format_markdown, format_spread, format_text
from tests.mpi.hosts import Hosts, make_hosts, why_not

FASHION = Path("/usr/share/datasets/fashion-mnist")
SAMPLES = 12_800  # of the training set, so that an epoch is 50 steps and the accuracy is seen often
EPOCHS, BATCH = 8, 256
TARGET_ACCURACY = 0.82
LINK_MEGABITS_PER_SECOND = 100.0
DEADLINE_SECONDS = 300.0  # for a run
FLOAT32 = "all-reduce, float32"
CHOICES: dict[str, Any] = {
    FLOAT32: "all_reduce",
    "all-reduce, float16": {"all_reduce": {"wire_format": "float16"}},
    "all-reduce, bfloat16": {"all_reduce": {"wire_format": "bfloat16"}},
    "all-reduce, int8": {"all_reduce": {"wire_format": "int8"}},
    "all-reduce, top_k 1 %": {"all_reduce": {"wire_format": {"top_k": {"fraction": 0.01}}}},
    "all-reduce, sign": {"all_reduce": {"wire_format": "sign"}},
    "all-reduce, power_sgd of rank 4": {"all_reduce": {"wire_format": {"power_sgd": {"rank": 4}}}},
    "parameter server": {"parameter_server": {}},
    "local steps, average every 25": {"local": {"steps": 25}},
    "local steps, nesterov every 25": {"local": {"steps": 25, "outer": "nesterov"}},
}
CAPTION = """\
Two hosts (network namespaces) of one rank and one thread each, link as stated each way (tc-tbf). 784-512-256-10, Adam,
batch 256, {samples:,} training images of Fashion-MNIST, {epochs} epochs, accuracy on its 10,000 test images after each.
Seconds to the target: from the start of training to the end of the first epoch with that accuracy; "-": not reached.
Median [lowest .. highest] over the rounds; ratios within rounds."""


class Trained(NamedTuple):
    """One run."""

    target_seconds: float | None
    accuracy: float  # after the last epoch
    samples_per_second: float


def make_job(sync: Any, seed: int, folder: Path) -> dict[str, Any]:
    """The job with one `sync`; its data lie in `folder`, which `write_data` has filled."""
    parts = {name: {"npz": {"path": str(folder / f"{name}.npz")}} for name in ("train", "validation")}
    return {
        "data": {**parts, "scale": 1 / 255},
        "model": [{"dense": {"units": 512}}, "relu", {"dense": {"units": 256}}, "relu", {"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": "adam",
        "training": {"epochs": EPOCHS, "batch_size": BATCH, "seed": seed},
        "sync": sync,
    }


def write_data(folder: Path) -> None:
    """The first SAMPLES training images and all test images, as npz."""
    import numpy as np

    from worker.data.idx import read_idx

    for name, stem, count in (("train", "train", SAMPLES), ("validation", "t10k", None)):
        images, labels = (read_idx(str(next(FASHION.glob(f"{stem}-{kind}*")))).values for kind in ("images", "labels"))
        np.savez(folder / f"{name}.npz", x=images[:count], y=labels[:count])


def read_run(output: Path, target: float) -> Trained:
    """What a finished run left."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "validation_accuracy" in line]
    reached = [line["wall_seconds"] for line in ends if line["validation_accuracy"] >= target]
    rate = json.loads((output / "summary.json").read_text())["samples_per_second"]
    return Trained(reached[0] if reached else None, ends[-1]["validation_accuracy"], rate)


def train(hosts: Hosts, job: Mapping[str, Any], folder: Path, target: float) -> Trained:
    """One run on both hosts, from the job to the accuracy."""
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    output = folder / "output"
    done = hosts.run((1, 1), ["-m", "worker", "train", job_file, "-o", output], DEADLINE_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{job['sync']}: {done.stderr.strip()[-500:]}")
    return read_run(output, target)


def make_table(runs: Mapping[str, Sequence[Trained]], target: float) -> Table:
    """A row for each choice, in their order."""
    base = runs[FLOAT32]
    rows = []
    for name, own in runs.items():
        seconds = [run.target_seconds for run in own if run.target_seconds is not None]
        pairs = [(a.target_seconds, b.target_seconds) for a, b in zip(base, own, strict=True)]
        ratios = [a / b for a, b in pairs if a and b]
        lost = 100 * (median(run.accuracy for run in base) - median(run.accuracy for run in own))
        rows.append(
            (
                name,
                format_spread(spread(run.samples_per_second for run in own), 0),
                format_spread(spread(seconds), 1) if len(seconds) == len(own) else "-",
                format_spread(spread(ratios), 2) if len(ratios) == len(own) else "-",
                format_spread(spread(100 * run.accuracy for run in own), 2),
                f"{lost:+.2f}",
            )
        )
    head = ("sync", "samples/s", f"seconds to {target:.0%}", "times as fast", "accuracy at the end, %", "points lost")
    return Table(head, rows)


def main() -> int:
    """Run every choice, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.slow_network", description=__doc__)
    parser.add_argument("--only", action="append", choices=CHOICES, metavar="NAME", help="beside float32, this alone")
    parser.add_argument("--rounds", type=positive_integer, default=1, metavar="N", help="runs of each (default 1)")
    parser.add_argument("--megabits", type=positive_number, default=LINK_MEGABITS_PER_SECOND, metavar="N",
                        help="what a link carries in a second (default 100)")  # fmt: skip
    parser.add_argument("--target", type=positive_number, default=TARGET_ACCURACY, metavar="SHARE",
                        help=f"validation accuracy to reach (default {TARGET_ACCURACY})")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="end with the table in Markdown")
    arguments = parser.parse_args()
    reason = why_not() or (None if FASHION.is_dir() else f"no {FASHION}: apt-get install dataset-fashion-mnist")
    if reason:
        tell(f"error: {reason}")
        return 2
    warning = busy_warning(busy_cores())
    for name in KERNEL_WISHES:
        os.environ.pop(name, None)
    chosen = {name: sync for name, sync in CHOICES.items() if name in (FLOAT32, *(arguments.only or CHOICES))}
    runs: dict[str, list[Trained]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="paceline-network-") as scratch, make_hosts(2) as hosts:
        write_data(Path(scratch))
        for host in hosts.hosts:
            host.slow_down(arguments.megabits)
        for round_number in range(1, arguments.rounds + 1):
            for name, sync in chosen.items():
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    try:
                        run = train(hosts, make_job(sync, round_number, Path(scratch)), Path(folder), arguments.target)
                    except (RuntimeError, subprocess.TimeoutExpired) as failed:
                        tell(f"error: {name}: {failed}")
                        return 1
                runs[name].append(run)
                when = "not" if run.target_seconds is None else f"in {run.target_seconds:.1f} s"
                tell(f"round {round_number}  {name}  reached {when}, {run.accuracy:.4f} at the end")
    stated = {name: fact for name, fact in machine_facts([]).items() if fact}
    facts = stated | {"link": f"{arguments.megabits:g} Mbit/s"} | ({"warning": warning} if warning else {})
    table = make_table(runs, arguments.target)
    caption = CAPTION.format(samples=SAMPLES, epochs=EPOCHS)
    print("\n".join(f"{name:<10} {fact}" for name, fact in facts.items()), format_text(table), caption, sep="\n\n")
    if arguments.markdown:
        print("", format_markdown(table), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
