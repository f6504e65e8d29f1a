"""`make bench`: Paceline beside its peers on this machine, as tables.

Rules: both sides in one run, the same data, the same threads, taking turns. No figure of another day is printed.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from coordinator.launchers.local import LauncherMissing
from tests.benchmarks import exchange_alone, load, memory, parameter_servers, slow_network
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.contenders import CONTENDERS, MATRIX_PRODUCTS, ONE_RANK, Contender, Run
from tests.benchmarks.data_set import write_data
from tests.benchmarks.machine import busy_cores, busy_warning, machine_facts
from tests.benchmarks.measurement import KERNEL_WISHES, BenchmarkFailed, Measurement
from tests.benchmarks.options import PEERS_ENVIRONMENT, positive_integer, positive_number, tell
from tests.benchmarks.rounds import Outcome, run_rounds
from tests.benchmarks.section import Part, Section, Setting
from tests.benchmarks.table import (
    Table,
    footprint_table,
    format_markdown,
    format_text,
    product_table,
    throughput_table,
)

# What is measured beside the networks, by the names that --only takes.
PARTS: dict[str, Part] = {
    "exchange": exchange_alone.run,
    "servers": parameter_servers.run,
    "memory": memory.run,
    "slow-network": slow_network.run,
    "load": load.run,
}
CAPTION = """\
Training with Adam and softmax cross-entropy in float32, one thread a process, on seeded uint8 images of 28x28 or, the
transformer, on a seeded text whose bytes are the tokens.
Median [lowest .. highest] over the rounds ({rounds}); in a round the sides take turns; ratios are taken within rounds.
samples/s: steady state, all ranks together: every step of every epoch but the first, data loading and shuffling
included; Paceline's reports and the checkpoint it writes after each epoch are not (the peers write none).
Seconds to first step: from the start of rank 0's process to the end of its first step, imports, data and compilation
included, the launcher (mpirun) not. Memory: the peak resident size of the largest rank, shared pages included; of JAX
on two devices, which are one process, half.
Paceline converts its stored uint8 images a batch at a time; the peers hold all of them as float32 in memory.
PyTorch: fused Adam, convolutions channels-last, fused attention; compile: model and loss by torch.compile. JAX: gather,
gradient and Adam in one jit with donated buffers. scikit-learn: partial_fit over whole epochs.
Matrix products alone: those of one of Paceline's steps, done again on the same arrays; a step of one rank beside it."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Paceline beside its peers.")
    parser.add_argument(
        "--quick", action="store_true", help="one round as short as can be, some minutes, to see that everything runs"
    )
    names = [*(case.name for case in CASES), *PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME",
                        help=f"this alone ({', '.join(names)}); may be repeated")  # fmt: skip
    parser.add_argument("--rounds", type=positive_integer, default=3, metavar="N", help="timed rounds (default 3)")
    parser.add_argument("--seconds", type=positive_number, default=1.5, metavar="S",
                        help="length of the timed part of a run of a network (default 1.5)")  # fmt: skip
    parser.add_argument("--peers", type=Path, default=PEERS_ENVIRONMENT, metavar="DIR",
                        help=f"the peers' environment (default {PEERS_ENVIRONMENT}, made by `make bench`)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="end with the tables in Markdown")
    return parser


def benchmark(cases: list[Case], peers_python: Path, rounds: int, seconds: float | None, scratch: Path) -> Outcome:
    """All rounds, each run in a folder of its own under `scratch` that goes when the run has ended."""
    data = {case.name: write_data(scratch, case) for case in cases}

    def measure(case: Case, contender: Contender, epochs: int) -> Measurement:
        folder = scratch / "run"
        folder.mkdir()
        try:
            return contender.measure(Run(case, epochs, data[case.name], folder, peers_python))
        finally:
            shutil.rmtree(folder)

    place = CONTENDERS.index(ONE_RANK)
    timed = [*CONTENDERS[:place], MATRIX_PRODUCTS, *CONTENDERS[place:]]
    return run_rounds(cases, timed, rounds, seconds, measure, tell)


def measure_parts(names: Sequence[str], setting: Setting) -> tuple[dict[str, Section], dict[str, str]]:
    """What each part came to, and what went wrong in which: one that fails does not take the others' figures along."""
    sections, faults = {}, {}
    for name in names:
        try:
            sections[name] = PARTS[name](setting)
        except (BenchmarkFailed, LauncherMissing) as failed:
            faults[name] = str(failed)
            tell(f"error: {name}: {failed}")
    return sections, faults


def in_order(sections: Sequence[Section], form: Callable[[Table], str]) -> Iterator[str]:
    """Each section's tables, and below them what they mean."""
    for section in sections:
        yield from map(form, section.tables)
        yield section.caption


def main() -> int:
    """Measure, then print the facts, the tables and what they mean."""
    arguments = make_parser().parse_args()
    peers_python = (arguments.peers / "bin" / "python").absolute()
    if not os.access(peers_python, os.X_OK):
        tell(f"error: there is no {peers_python}; say `make bench`, which makes it, or give --peers DIR")
        return 2
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    parts = [name for name in PARTS if not arguments.only or name in arguments.only]
    rounds, seconds = arguments.rounds, arguments.seconds
    if arguments.quick:
        cases, rounds, seconds = [case.shortened() for case in cases], 1, None
    warning = busy_warning(busy_cores())
    if warning:
        tell(f"warning: {warning}")

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-bench-") as scratch:
        try:
            results, absent = benchmark(cases, peers_python, rounds, seconds, Path(scratch)) if cases else ({}, {})
        except (BenchmarkFailed, LauncherMissing) as failed:
            tell(f"error: {failed}")
            return 1
        setting = Setting(peers_python, rounds, arguments.quick, Path(scratch), tell)
        sections, faults = measure_parts(parts, setting)

    facts = machine_facts(run.version for runs in results.values() for run in runs if run.version)
    facts = {name: fact for name, fact in facts.items() if fact}  # only the networks' peers state their versions
    withheld = [f"{name}={os.environ[name]}" for name in KERNEL_WISHES if name in os.environ]
    if withheld:
        facts["withheld"] = f"{', '.join(withheld)}, so that every library chooses its own kernels"
    if warning:
        facts["warning"] = warning
    if arguments.quick:
        facts["warning"] = "--quick: one round of a few steps; these figures say only that everything runs"
    facts |= named("absent", absent)
    facts |= named("left out", {name: section.left_out for name, section in sections.items() if section.left_out})
    facts |= named("failed", faults)
    shown = [section for section in sections.values() if not section.left_out]
    if cases:
        tables = (
            throughput_table(results, cases, CONTENDERS),
            footprint_table(results, cases, CONTENDERS),
            product_table(results, cases, ONE_RANK, MATRIX_PRODUCTS),
        )
        shown.insert(0, Section(tables, CAPTION.format(rounds=rounds)))
    listed = "\n".join(f"{name:<10} {fact}" for name, fact in facts.items())
    print(listed, *in_order(shown, format_text), f"Took {time.monotonic() - began:.0f} s.", sep="\n\n")
    if arguments.markdown:
        listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        print("", listed, *in_order(shown, format_markdown), sep="\n\n")
    return 1 if faults else 0


def named(title: str, reasons: Mapping[str, str]) -> dict[str, str]:
    """One fact of several reasons; none of none."""
    return {title: "; ".join(f"{name}: {reason}" for name, reason in reasons.items())} if reasons else {}


if __name__ == "__main__":
    sys.exit(main())
