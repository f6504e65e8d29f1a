"""What training reaches beside PyTorch, and how long the whole command takes: `python -m tests.benchmarks.quality`.

Rules: both sides do one job file on the same data, on two ranks of one thread each, with initial weights of the same
distributions; they take turns at going first. The data are real. No figure of another day is printed.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from coordinator.launchers.local import LauncherMissing, find_worker
from tests.benchmarks.cases import CASES, CONTEXT, LEARNING_RATE, Case
from tests.benchmarks.contenders import PEERS
from tests.benchmarks.machine import busy_cores, busy_warning, machine_facts
from tests.benchmarks.measurement import BenchmarkFailed, Command, read_statement, run_command
from tests.benchmarks.options import PEERS_ENVIRONMENT, positive_integer, tell
from tests.benchmarks.real_text import bytes_for, join_texts, list_texts, split
from tests.benchmarks.spread import spread
from tests.benchmarks.table import Table, format_markdown, format_spread, format_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist_cnn.yaml"
RANKS = 2
STEPS = 400  # of the transformer
QUICK_STEPS = 10
DEADLINE_SECONDS = 1200.0  # for a whole command
OURS, PEER = "Paceline, all-reduce", "PyTorch DDP, gloo"
CAPTION = """\
Both sides do the same job file: network, Adam, batches, epochs, and initial weights of the same distributions; each
evaluates and saves weights and optimizer state after every epoch.
Whole command: `paceline run` or `python pytorch_job.py` from its start to its end, imports, launcher and data included.
samples/s: training steps alone, without the first epoch, or the first 10 steps where there is one.
Test accuracy: of Fashion-MNIST's 10,000 test images after the last epoch. Bits per byte: validation loss / ln 2 on the
last tenth of a text of licences, copyright notes and changelogs of this machine, which nobody trained on.
Several seeds: median [lowest .. highest] of seconds and samples/s."""


class Reached(NamedTuple):
    """What one command came to."""

    validation_loss: float  # nats a label
    validation_accuracy: float
    samples_per_second: float
    command_seconds: float
    version: str = ""  # of the peer; empty for ours


class Trial(NamedTuple):
    """One job that both sides do, and what is asked of it."""

    name: str
    classes: int
    metric: str
    read_metric: Callable[[Reached], float]
    digits: int
    seeds: int  # unless the user says otherwise
    make_job: Callable[[Path, bool], dict[str, Any]]  # for the folder its data may lie in; quick or not


class Result(NamedTuple):
    """A trial and what each side reached, seed by seed."""

    trial: Trial
    title: str
    reached: Mapping[str, Sequence[Reached]]


# --------------------------------------------------------------------------------------------------------------- jobs


def make_cnn_job(folder: Path, quick: bool) -> dict[str, Any]:
    """The example as it stands; quick, its first epoch."""
    job: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    files = [Path(path) for source in ("train", "validation") for path in job["data"][source]["idx"].values()]
    if absent := [path for path in files if not path.is_file()]:
        raise BenchmarkFailed(f"there is no {absent[0]}: apt-get install dataset-fashion-mnist, or --only transformer")
    if quick:
        job["training"]["epochs"] = 1
    return job


def make_transformer_job(folder: Path, quick: bool) -> dict[str, Any]:
    """One epoch over a text that is as long as the steps need; fewer steps where the machine has less."""
    case: Case = next(case for case in CASES if case.of_text)
    batch_size = RANKS * case.batch_size
    text = join_texts(list_texts(), bytes_for((QUICK_STEPS if quick else STEPS) * batch_size, CONTEXT))
    try:
        parts = split(text, CONTEXT, batch_size)
    except ValueError as error:
        raise BenchmarkFailed(f"/usr/share/common-licenses and /usr/share/doc: {error}; try --only cnn") from error
    data = {}
    for source, content in (("train", parts.training), ("validation", parts.validation)):
        path = folder / f"{source}.txt"
        path.write_bytes(content)
        data[source] = {"text": {"path": str(path), "context": CONTEXT}}
    return {
        "name": "quality-transformer",
        "data": data,
        "model": list(case.model),
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": LEARNING_RATE}},
        "training": {"epochs": 1, "batch_size": batch_size},
        "sync": "all_reduce",
        "workers": RANKS,
    }


def describe(trial: Trial, job: Mapping[str, Any]) -> str:
    """The first cell of a trial's rows."""
    if trial.name == "cnn":
        return f"{EXAMPLE.name}, epochs: {job['training']['epochs']}"
    training_bytes = Path(job["data"]["train"]["text"]["path"]).stat().st_size
    steps = training_bytes // CONTEXT // job["training"]["batch_size"]
    return f"{next(case for case in CASES if case.of_text).network}, steps: {steps}"


TRIALS = (
    Trial("cnn", 10, "test accuracy", lambda reached: reached.validation_accuracy, 4, 1, make_cnn_job),
    Trial("transformer", 256, "bits per byte", lambda reached: reached.validation_loss / math.log(2), 3, 2,
          make_transformer_job),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- runs


def run_ours(job_file: Path, folder: Path, classes: int) -> Reached:
    """`paceline run` as a user types it."""
    output = folder / "output"
    paceline = Path(find_worker()).with_name("paceline")
    began = time.perf_counter()
    run_command(Command((str(paceline), "run", str(job_file), "-o", str(output)), {}), folder, DEADLINE_SECONDS)
    seconds = time.perf_counter() - began
    return read_reached(json.loads((output / "summary.json").read_text()), seconds, classes)


def run_peer(job_file: Path, folder: Path, classes: int, peers_python: Path) -> Reached:
    """The same job file by peers/pytorch_job.py."""
    argv = (str(peers_python), str(PEERS / "pytorch_job.py"), str(job_file), str(folder))
    began = time.perf_counter()
    output = run_command(Command(argv, {}), folder, DEADLINE_SECONDS)
    return read_reached(read_statement(output), time.perf_counter() - began, classes)


def read_reached(stated: Mapping[str, Any], command_seconds: float, classes: int) -> Reached:
    """Check what a side says of itself.

    Raises:
        BenchmarkFailed: a figure is missing or not positive, or the loss is no better than guessing.
    """
    figures = {}
    for field in Reached._fields[:3]:
        value = stated.get(field)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise BenchmarkFailed(f"states {field} as {value!r}; a positive number is needed")
        figures[field] = float(value)
    chance = math.log(classes)
    if figures["validation_loss"] >= chance:
        loss = figures["validation_loss"]
        raise BenchmarkFailed(f"did not learn: its validation loss is {loss:.3f}, guessing has {chance:.3f}")
    return Reached(**figures, command_seconds=command_seconds, version=str(stated.get("version", "")))


def run_trial(trial: Trial, seeds: int, quick: bool, peers_python: Path, scratch: Path) -> Result:
    """Both sides for each seed from 1 on, each run in a folder of its own that goes when the run has ended."""
    job = trial.make_job(scratch, quick)
    sides: dict[str, Callable[[Path, Path], Reached]] = {
        OURS: lambda job_file, folder: run_ours(job_file, folder, trial.classes),
        PEER: lambda job_file, folder: run_peer(job_file, folder, trial.classes, peers_python),
    }
    reached: dict[str, list[Reached]] = {side: [] for side in sides}
    for seed in range(1, seeds + 1):
        for side in sides if seed % 2 else reversed(sides):
            folder = scratch / "run"
            folder.mkdir()
            job_file = folder / "job.json"
            job_file.write_text(json.dumps(job | {"training": job["training"] | {"seed": seed}}))
            try:
                reached[side].append(sides[side](job_file, folder))
            except BenchmarkFailed as failed:
                raise BenchmarkFailed(f"{side}, {trial.name}, seed {seed}: {failed}") from failed
            finally:
                shutil.rmtree(folder)
            last = reached[side][-1]
            figure = f"{trial.metric} {trial.read_metric(last):.{trial.digits}f}"
            tell(f"{trial.name}  seed {seed}  {side}  {figure}  ({last.command_seconds:.1f} s)")
    return Result(trial, describe(trial, job), reached)


# -------------------------------------------------------------------------------------------------------------- table


def quality_table(result: Result) -> Table:
    """A row for each side: the metric for each seed, the whole command's seconds, samples a second."""
    trial, rows = result.trial, []
    for side, runs in result.reached.items():
        metrics = [f"{trial.read_metric(run):.{trial.digits}f}" for run in runs]
        seconds = format_spread(spread(run.command_seconds for run in runs), 1)
        rate = format_spread(spread(run.samples_per_second for run in runs), 0)
        rows.append((result.title, str(RANKS), side, *metrics, seconds, rate))
    seeds = range(1, 1 + max(map(len, result.reached.values())))
    metrics = [f"{trial.metric}, seed {seed}" for seed in seeds]
    return Table(("network", "ranks", "program", *metrics, "seconds of the whole command", "samples/s"), rows)


# ------------------------------------------------------------------------------------------------------------ command


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality", description="What training reaches beside PyTorch."
    )
    names = [trial.name for trial in TRIALS]
    parser.add_argument("--only", choices=names, help="this one alone")
    seeds = ", ".join(f"{trial.name} {trial.seeds}" for trial in TRIALS)
    parser.add_argument("--seeds", type=positive_integer, metavar="N", help=f"runs a side (default: {seeds})")
    parser.add_argument("--quick", action="store_true", help="one epoch or a few steps, to see that everything runs")
    parser.add_argument("--peers", type=Path, default=PEERS_ENVIRONMENT, metavar="DIR",
                        help=f"the peers' environment (default {PEERS_ENVIRONMENT}, made by `make bench`)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="end with the tables in Markdown")
    return parser


def main() -> int:
    """Run both sides, then print the facts, the tables and what they mean."""
    arguments = make_parser().parse_args()
    peers_python = (arguments.peers / "bin" / "python").absolute()
    if not os.access(peers_python, os.X_OK):
        tell(f"error: there is no {peers_python}; say `make bench-quality`, which makes it, or give --peers DIR")
        return 2
    warning = busy_warning(busy_cores())
    if warning:
        tell(f"warning: {warning}")
    began = time.monotonic()
    results = []
    for trial in TRIALS:
        if arguments.only in (None, trial.name):
            with tempfile.TemporaryDirectory(prefix="paceline-quality-") as scratch:
                seeds = arguments.seeds or (1 if arguments.quick else trial.seeds)
                try:
                    results.append(run_trial(trial, seeds, arguments.quick, peers_python, Path(scratch)))
                except (BenchmarkFailed, LauncherMissing) as failed:
                    tell(f"error: {failed}")
                    return 1

    facts = machine_facts(run.version for result in results for run in result.reached[PEER])
    if warning:
        facts["warning"] = warning
    if arguments.quick:
        facts["warning"] = "--quick: hardly any training; these figures say only that everything runs"
    tables = [quality_table(result) for result in results]
    listed = "\n".join(f"{name:<10} {fact}" for name, fact in facts.items())
    print(listed, *map(format_text, tables), CAPTION, f"Took {time.monotonic() - began:.0f} s.", sep="\n\n")
    if arguments.markdown:
        listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        print("", listed, *map(format_markdown, tables), CAPTION, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
