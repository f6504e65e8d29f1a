"""What training costs where the network is the bottleneck: part of `make bench`, and `make bench-network`.

Two hosts of one rank each, network namespaces on this machine. Every choice of `sync` trains with several seeds on free
links, for the accuracy after each epoch, and with the first seed on links of 100 Mbit/s until the validation accuracy
is that of the target, for the time; as part of `make bench` fewer seeds, and there one epoch. The link changes no bit
of the weights, and every epoch is as many steps and bytes, so any epoch of any seed takes as long there.

Rules: needs root, as tests/mpi/hosts.py says. Every run has a deadline. All choices do one job and differ in `sync`;
the formats that Adam does not suit have the optimizer that learns most with them. Differences and ratios are against
the first row, of the same seed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeAlias

from tests.benchmarks.machine import busy_cores, busy_warning, machine_facts
from tests.benchmarks.measurement import KERNEL_WISHES, BenchmarkFailed
from tests.benchmarks.options import positive_integer, positive_number, tell
from tests.benchmarks.section import Section, Setting
from tests.benchmarks.spread import ratio_spread, spread
from tests.benchmarks.table import Table, format_markdown, format_spread, format_text
from tests.mpi.hosts import Hosts, make_hosts, why_not

FASHION = Path("/usr/share/datasets/fashion-mnist")
SAMPLES = 12_800  # of the training set, so that an epoch is 50 steps and the accuracy is seen often
EPOCHS, BATCH, SEEDS = 8, 256, 5
SEEDS_OF_BENCH, SLOW_EPOCHS_OF_BENCH = 2, 1  # of `make bench`, which has other parts too
TARGET_ACCURACY = 0.85
LINK_MEGABITS_PER_SECOND = 100.0
DEADLINE_SECONDS = 300.0  # for a run
STOP_SECONDS = 20.0  # for what has been told to end
LOOKING_SECONDS = 0.1  # between two looks at what a run has reported
FLOAT32 = "all-reduce, float32"
Epochs: TypeAlias = list[tuple[float, float]]  # (seconds since the start of training, validation accuracy) of each


class Choice(NamedTuple):
    """A row: how gradients or weights are exchanged, and the optimizer that goes with it."""

    sync: Any
    optimizer: Any = "adam"

    @property
    def optimizer_name(self) -> str:
        return self.optimizer if isinstance(self.optimizer, str) else next(iter(self.optimizer))


def compressed(wire_format: Any) -> Any:
    """The all-reduce in one format."""
    return {"all_reduce": {"wire_format": wire_format}}


def served(wire_format: Any) -> Any:
    """The parameter server in one format."""
    return {"parameter_server": {"wire_format": wire_format}}


# The optimizer that loses least with a format, of these: with five seeds, points below float32 with Adam, float32 with
# momentum 0.0, top_k of 10 % 0.3 with momentum and 0.8 with Adam, of 5 % 0.6 with momentum; from a server top_k of 10 %
# 0.5 with momentum and 1.7 with Adam, sign 0.2 with plain descent and 2.4 with Adam.
MOMENTUM = {"momentum": {"learning_rate": 0.1, "momentum": 0.9}}
PLAIN_DESCENT = {"sgd": {"learning_rate": 1.0}}
TOP_K = {"top_k": {"fraction": 0.1}}
CHOICES = {
    FLOAT32: Choice("all_reduce"),
    "all-reduce, float16": Choice(compressed("float16")),
    "all-reduce, bfloat16": Choice(compressed("bfloat16")),
    "all-reduce, int8": Choice(compressed("int8")),
    "all-reduce, top_k 10 %": Choice(compressed(TOP_K), MOMENTUM),
    "all-reduce, sign": Choice(compressed("sign"), PLAIN_DESCENT),
    "all-reduce, power_sgd of rank 4": Choice(compressed({"power_sgd": {"rank": 4}})),
    "all-reduce, power_sgd of rank 8": Choice(compressed({"power_sgd": {"rank": 8}})),
    "all-reduce, power_sgd of rank 16": Choice(compressed({"power_sgd": {"rank": 16}})),
    "parameter server, float32": Choice(served("float32")),
    "parameter server, float16": Choice(served("float16")),
    "parameter server, bfloat16": Choice(served("bfloat16")),
    "parameter server, int8": Choice(served("int8")),
    "parameter server, top_k 10 %": Choice(served(TOP_K), MOMENTUM),
    "parameter server, sign": Choice(served("sign"), PLAIN_DESCENT),
    "local steps, average every 25": Choice({"local": {"steps": 25}}),
    "local steps, nesterov every 25": Choice({"local": {"steps": 25, "outer": "nesterov"}}),
    "local steps, nesterov every 50": Choice({"local": {"steps": 50, "outer": "nesterov"}}),
}
CAPTION = """\
Slow network: two hosts (network namespaces) of one rank and one thread each, {megabits:g} Mbit/s each way (tc-tbf).
784-512-256-10, batch {batch}, the rate falling along half a cosine, {samples:,} training images of Fashion-MNIST,
{epochs} epochs, accuracy on its 10,000 test images after each; seeds: {seeds}. Seconds an epoch: on that link,
evaluation included, measured while the first seed trained {until}. Seconds to {target:g} %: that, times the epochs each
seed took; "-": some seed did not reach it. Median [lowest .. highest] over the seeds; ratios within seeds.
Points lost at the end: float32's accuracy less the row's, mean over the seeds and its standard error."""


class Replay(NamedTuple):
    """What is asked of all choices."""

    choices: Mapping[str, Choice]
    seeds: int = SEEDS
    epochs: int = EPOCHS
    slow_epochs: int | None = None  # on the slow link; None: until the target is reached, or to the end
    megabits: float = LINK_MEGABITS_PER_SECOND
    target: float = TARGET_ACCURACY

    def enough(self, epochs: Epochs) -> bool:
        """Whether a run on the slow link has told what is asked of it."""
        if self.slow_epochs is not None:
            return len(epochs) >= self.slow_epochs
        return any(accuracy >= self.target for _, accuracy in epochs)


class Trained(NamedTuple):
    """What one choice came to."""

    accuracies: Sequence[Sequence[float]]  # by seed, after each epoch
    epoch_seconds: float  # on the slow link

    def seconds_to(self, target: float) -> list[float] | None:
        """By seed; None where one did not reach it."""
        epochs = [next((n for n, seen in enumerate(run, 1) if seen >= target), None) for run in self.accuracies]
        return None if None in epochs else [n * self.epoch_seconds for n in epochs if n]


def make_job(choice: Choice, seed: int, folder: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """The job of one choice; its data lie in `folder`, which `write_data` has filled."""
    parts = {name: {"npz": {"path": str(folder / f"{name}.npz")}} for name in ("train", "validation")}
    return {
        "data": {**parts, "scale": 1 / 255},
        "model": [{"dense": {"units": 512}}, "relu", {"dense": {"units": 256}}, "relu", {"dense": {"units": 10}}],
        "loss": "softmax_cross_entropy",
        "optimizer": choice.optimizer,
        "schedule": "cosine",
        "training": {"epochs": epochs, "batch_size": BATCH, "seed": seed},
        "sync": choice.sync,
    }


def write_data(folder: Path) -> None:
    """The first SAMPLES training images and all test images, as npz."""
    import numpy as np

    from worker.data.idx import read_idx

    for name, stem, count in (("train", "train", SAMPLES), ("validation", "t10k", None)):
        images, labels = (read_idx(str(next(FASHION.glob(f"{stem}-{kind}*")))).values for kind in ("images", "labels"))
        np.savez(folder / f"{name}.npz", x=images[:count], y=labels[:count])


def read_epochs(output: Path) -> Epochs:
    """What a run has reported so far."""
    text = ""
    with suppress(FileNotFoundError):  # it has not begun
        text = (output / "metrics.jsonl").read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may still be written
    lines = [json.loads(line) for line in whole]
    return [(line["wall_seconds"], line["validation_accuracy"]) for line in lines if "validation_accuracy" in line]


def train(hosts: Hosts, job: Mapping[str, Any], enough: Callable[[Epochs], bool], folder: Path) -> Epochs:
    """One run on both hosts, ended when its epochs are `enough`, or else by itself.

    Raises:
        BenchmarkFailed: it failed, or took longer than the deadline.
    """
    job_file, output = folder / "job.json", folder / "output"
    job_file.write_text(json.dumps(job))
    process = hosts.start((1, 1), ["-m", "worker", "train", job_file, "-o", output])
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while process.poll() is None and not enough(read_epochs(output)):
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"was still training after {DEADLINE_SECONDS:g} s")
            time.sleep(LOOKING_SECONDS)
        epochs = read_epochs(output)
        if process.poll() is None:
            process.terminate()
        _, errors = process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired as expired:
        raise BenchmarkFailed(f"had not ended {STOP_SECONDS:g} s after it was told to") from expired
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()
    if process.returncode != 0 and not enough(epochs):
        raise BenchmarkFailed(f"exited with {process.returncode}: {errors.strip()[-500:]}")
    return epochs


def replay(asked: Replay, scratch: Path) -> dict[str, Trained]:
    """Every choice: all seeds on free links, then the first on slow ones."""
    write_data(scratch)
    accuracies: dict[str, list[list[float]]] = {name: [] for name in asked.choices}
    found = {}
    with make_hosts(2) as hosts:

        def run(name: str, seed: int, enough: Callable[[Epochs], bool]) -> Epochs:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                job = make_job(asked.choices[name], seed, scratch, asked.epochs)
                try:
                    return train(hosts, job, enough, Path(folder))
                except BenchmarkFailed as failed:
                    raise BenchmarkFailed(f"{name} on the slow network, seed {seed}: {failed}") from failed

        for seed in range(1, asked.seeds + 1):
            for name in asked.choices:
                accuracies[name].append([accuracy for _, accuracy in run(name, seed, lambda epochs: False)])
                tell(f"seed {seed} of {asked.seeds}  {name}  {accuracies[name][-1][-1]:.4f} at the end")
        for host in hosts.hosts:
            host.slow_down(asked.megabits)
        for name in asked.choices:
            epochs = run(name, 1, asked.enough)
            seconds, accuracy = epochs[-1]
            found[name] = Trained(accuracies[name], seconds / len(epochs))
            tell(f"{asked.megabits:g} Mbit/s  {name}  {accuracy:.4f} after {len(epochs)} epochs, {seconds:.1f} s")
    return found


def network_table(choices: Mapping[str, Choice], found: Mapping[str, Trained], target: float) -> Table:
    """A row for each choice, in their order."""
    base = found[FLOAT32]
    base_seconds = base.seconds_to(target)
    rows = []
    for name, own in found.items():
        seconds = own.seconds_to(target)
        lost = [100 * (theirs[-1] - mine[-1]) for theirs, mine in zip(base.accuracies, own.accuracies, strict=True)]
        error = f" ± {stdev(lost) / math.sqrt(len(lost)):.2f}" if len(lost) > 1 else ""
        rows.append(
            (
                name,
                choices[name].optimizer_name,
                f"{own.epoch_seconds:.2f}",
                format_spread(spread(seconds), 1) if seconds else "-",
                format_spread(ratio_spread(base_seconds, seconds), 1) if seconds and base_seconds else "-",
                format_spread(spread(100 * run[-1] for run in own.accuracies), 2),
                "" if own is base else f"{mean(lost):+.2f}{error}",
            )
        )
    headings = (
        *("sync", "optimizer", "seconds an epoch", f"seconds to {100 * target:g} %", "times as fast"),
        *("accuracy at the end, %", "points lost"),
    )
    return Table(headings, rows)


def lacking() -> str | None:
    """What this machine does not have or permit."""
    return why_not() or (None if FASHION.is_dir() else f"no {FASHION}: apt-get install dataset-fashion-mnist")


def network_section(asked: Replay, scratch: Path) -> Section:
    """The table and what it means."""
    found = replay(asked, scratch)
    until = "until the target or to its end" if asked.slow_epochs is None else f"{asked.slow_epochs} of them"
    caption = CAPTION.format(
        megabits=asked.megabits, batch=BATCH, samples=SAMPLES, epochs=asked.epochs, seeds=asked.seeds,
        target=100 * asked.target, until=until,
    )  # fmt: skip
    return Section((network_table(asked.choices, found, asked.target),), caption)


def run(setting: Setting) -> Section:
    """As part of `make bench`, within minutes; a quick run does one epoch of one seed."""
    reason = lacking()
    if reason:
        return Section((), "", reason)
    seeds, epochs = (1, 1) if setting.quick else (SEEDS_OF_BENCH, EPOCHS)
    return network_section(Replay(CHOICES, seeds, epochs, SLOW_EPOCHS_OF_BENCH), setting.scratch)


def main() -> int:
    """Run every choice, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.slow_network")
    parser.add_argument("--only", action="append", choices=CHOICES, metavar="NAME", help="beside float32, this alone")
    parser.add_argument("--seeds", type=positive_integer, default=SEEDS, metavar="N", help=f"default {SEEDS}")
    parser.add_argument("--megabits", type=positive_number, default=LINK_MEGABITS_PER_SECOND, metavar="N",
                        help="what a link carries in a second (default 100)")  # fmt: skip
    parser.add_argument("--target", type=positive_number, default=TARGET_ACCURACY, metavar="SHARE",
                        help=f"validation accuracy to reach (default {TARGET_ACCURACY})")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="end with the table in Markdown")
    arguments = parser.parse_args()
    reason = lacking()
    if reason:
        tell(f"error: {reason}")
        return 2
    warning = busy_warning(busy_cores())
    for name in KERNEL_WISHES:
        os.environ.pop(name, None)
    chosen = {name: choice for name, choice in CHOICES.items() if name in (FLOAT32, *(arguments.only or CHOICES))}
    asked = Replay(chosen, arguments.seeds, megabits=arguments.megabits, target=arguments.target)
    with tempfile.TemporaryDirectory(prefix="paceline-network-") as scratch:
        try:
            section = network_section(asked, Path(scratch))
        except BenchmarkFailed as failed:
            tell(f"error: {failed}")
            return 1
    facts = {name: fact for name, fact in machine_facts([]).items() if fact} | ({"warning": warning} if warning else {})
    listed = "\n".join(f"{name:<10} {fact}" for name, fact in facts.items())
    print(listed, *map(format_text, section.tables), section.caption, sep="\n\n")
    if arguments.markdown:
        print("", *map(format_markdown, section.tables), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
