"""`paceline-worker plan` with figures from a file: its table, its document, and bad input in one line each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from worker.__main__ import main
from worker.plan.machine import Machine, Ready
from worker.plan.measurement import runs_of, shares_to_measure

JOB = """\
name: digits
data: {train: {built_in: digits}, validation_fraction: 0.2, scale: 0.0625}
model: [dense: {units: 32}, relu, dense: {units: 10}]
loss: softmax_cross_entropy
optimizer: {adam: {learning_rate: 0.01}}
training: {epochs: 3, batch_size: 64}
workers: 4
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def plan(tmp_path, machine: Machine, monkeypatch, capsys):
    """plan(argument, ...): what `paceline-worker plan JOB ...` prints, with the figures of `machine`."""
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "measured.json").write_text(machine.to_json())
    monkeypatch.chdir(tmp_path)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def run(*arguments: str) -> Done:
        given = ["plan", "job.yaml", "--nodes", "2", "--bandwidth", "100Mbit", "--measured", "measured.json"]
        monkeypatch.setattr(sys, "argv", ["paceline-worker", *given, *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


def test_the_table_has_a_line_for_each_choice_and_ends_with_advice(plan) -> None:
    done = plan()
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == (
        "digits on 2 nodes of 2 ranks, links of 100 Mbit/s and 100 us: steps of 64 samples, 16 a rank; "
        "2,410 parameters, 9.64 kB"
    )
    assert lines[2].split() == [
        *("step", "compute", "exchange", "waiting", "samples/s", "speed-up"),
        *("sent", "a", "node", "memory", "a", "rank"),
    ]
    assert [line.partition("  ")[0] for line in lines[3:6]] == ["one node alone", "all-reduce *", "parameter server"]
    assert any(line.startswith("take ") for line in lines[-2:])


def test_the_document_says_the_same_in_seconds_and_bytes(plan, machine: Machine) -> None:
    document = json.loads(plan("--format", "json").out)
    assert (document["nodes"], document["ranks_per_node"], document["bytes_per_second"]) == (2, 2, 12.5e6)
    assert document["measured"]["grpc"] == list(machine.grpc)
    first, *_ = document["choices"]
    assert first["in_job_file"]
    assert first["sync"] == {"all_reduce": {}}
    parts = first["compute_seconds"] + first["exchange_seconds"] + first["waiting_seconds"]
    assert first["step_seconds"] == pytest.approx(parts)
    assert first["samples_per_second"] == pytest.approx(64 / first["step_seconds"])
    assert first["speed_up"] == pytest.approx(document["one_node"]["step_seconds"] / first["step_seconds"])
    assert document["recommendation"]["sentence"]


def test_the_choice_of_the_job_file_is_marked(plan) -> None:
    done = plan("--set", "sync={parameter_server: {}}")
    assert "parameter server *" in done.out
    assert "all-reduce *" not in done.out


def test_parameter_servers_are_offered_in_every_format_that_a_job_file_takes_for_them(plan) -> None:
    done = plan("--set", "sync={parameter_server: {wire_format: int8, servers: 2}}")
    assert "parameter server, 2 shards, int8 *" in done.out
    for name in ("float16", "bfloat16", "int8", "top_k", "sign"):
        assert f"parameter server, {name} " in done.out
    assert "parameter server, power_sgd" not in done.out


def test_every_format_is_offered_for_the_all_reduce(plan) -> None:
    done = plan("--set", "sync={all_reduce: {wire_format: power_sgd}}")
    assert "all-reduce, power_sgd *" in done.out
    for name in ("float16", "bfloat16", "int8", "top_k", "sign"):
        assert f"all-reduce, {name} " in done.out


def test_ranks_of_a_node_are_the_jobs_workers_over_the_nodes(plan) -> None:
    assert "on 3 nodes of 2 ranks" in plan("--nodes", "3").out
    assert "on 8 nodes of 1 rank," in plan("--nodes", "8").out
    assert "on 2 nodes of 5 ranks" in plan("--ranks-per-node", "5").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "0"), "--nodes: 0 is below 1"),
        (("--nodes", "two"), "argument --nodes: invalid int value: 'two'; see `paceline-worker plan --help`"),
        (("--nodes", "40"), "--nodes: 40 nodes have 40 ranks and a step 32 samples; take fewer"),
        (("--ranks-per-node", "-1"), "--ranks-per-node: -1 is below 1"),
        (("--bandwidth", "100"), "--bandwidth: '100' lacks its unit; say 100Mbit or 100MB/s"),
        (("--latency", "3"), "--latency: '3' is no time with a unit; say 0.1ms, 50us or the like"),
        (("--set", "training.batch_size=-1"), "training.batch_size: -1 is not at least 0"),
        (("--set", "data.train={npy: {features: a.npy, targets: b.npy}}"), "a.npy: no such file; check the path in"),
        (("--measured", "none.json"), "none.json: No such file or directory; write it with `paceline-worker"),
        (("--measured", "job.yaml"), "job.yaml: holds no measurements"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(plan, arguments: tuple[str, ...], said: str) -> None:
    settings = ("--set", "training.batch_size=32") if "40" in arguments else ()
    done = plan(*arguments, *settings)
    assert done.code in (1, 2)
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert said in line
    assert line.startswith("error: ")


def test_shares_between_all_nodes_and_one_are_measured() -> None:
    assert shares_to_measure(256, 4, 1) == [64, 128, 256]
    assert shares_to_measure(256, 1, 2) == [32, 64, 128]
    assert shares_to_measure(3, 16, 1) == [1, 3]


def test_what_backward_says_becomes_runs_from_the_end_of_the_vector() -> None:
    # As a residual layer says it, the same element may come twice.
    assert runs_of([(90, 0.25), (90, 0.3), (20, 0.5), (0, 1.0000001)], 100) == (
        Ready(10, 0.25),
        Ready(70, 0.5),
        Ready(20, 1.0),
    )


def test_the_file_of_a_faulty_job_is_named(plan, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x\nmodel: []\n")
    done = plan()
    assert done.code == 2
    assert all(line.startswith("error: ") for line in done.err.splitlines())
