"""Slurm without a Slurm: the batch script, and what its words become."""

import subprocess
from pathlib import Path

import pytest

from coordinator.launchers import keeper, local, slurm
from coordinator.launchers.foreign import NoAnswer, Phase, Seen, SubmitRefused
from coordinator.launchers.options import OptionInvalid, read
from coordinator.launchers.slurm_states import PENDING, PENDING_KINDS, STATES, seen_of
from coordinator.recovery import RETRIED

GOLDEN = Path(__file__).parents[2] / "golden" / "sbatch"


def batch(ranks: int, folder: str = "/state/jobs/digits-1/logs", **options: str) -> slurm.Batch:
    launch = local.render(
        mpirun="/venv/bin/mpirun",
        worker="/venv/bin/paceline-worker",
        ranks=ranks,
        cores=ranks,
        arguments=["train", "job.yaml", "-o", "out folder"],
        forwarded={"PACELINE_JOB_TOKEN": "hidden-value"},
    )
    return slurm.render(
        name="paceline-digits-1-2",
        python="/venv/bin/python",
        launch=launch,
        ranks=ranks,
        record=Path(folder, "attempt-2"),
        log=Path(folder, "launcher.log"),
        grace_seconds=20.0,
        options=options,
    )


@pytest.mark.parametrize(
    ("golden", "rendered"),
    [
        ("two_ranks", batch(2)),
        ("options", batch(64, partition="cpu", time="2:00:00", account="vision")),
        ("odd_folder", batch(1, folder='/a b/100%/$HOME "x"')),
    ],
)
def test_a_batch_script_is_rendered_as_the_golden_file_says(golden: str, rendered: slurm.Batch) -> None:
    said = rendered.script.replace(str(Path(keeper.__file__)), "/venv/keeper.py")
    assert said == (GOLDEN / f"{golden}.sh").read_text()


def test_a_token_is_in_no_script_but_in_the_environment() -> None:
    rendered = batch(2)
    assert "hidden-value" not in rendered.script
    assert rendered.environment["PACELINE_JOB_TOKEN"] == "hidden-value"


def test_a_shell_reads_the_words_of_a_script_as_they_were_meant(tmp_path: Path) -> None:
    for word in ("plain", "two words", '$HOME "x" `id` \\', "100%", "it's"):
        script = tmp_path / "script"
        script.write_text(f"printf %s {slurm._quoted(word)}\n")
        assert subprocess.run(["sh", script], capture_output=True, text=True).stdout == word


# What squeue printed in Slurm 22.05: recorded.
@pytest.mark.parametrize(
    ("state", "why", "seen"),
    [
        ("PENDING", "Resources", (Phase.WAITS, "HeldForNodes", "is next, and waits for free nodes or cores")),
        ("PENDING", "PartitionDown", (Phase.WAITS, "HeldByPartition", "its partition is closed")),
        ("PENDING", "QOSMaxCpuPerUserLimit", (Phase.WAITS, "HeldByLimit", "quality of service")),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:vm", (Phase.WAITS, "HeldForNodes", "is down")),
        ("PENDING", "SomethingNew", (Phase.WAITS, "HeldBySlurm", "(SomethingNew)")),
        ("RUNNING", "None", (Phase.RUNS, "Launching", "runs on vm")),
        ("SOMETHING_NEW", "None", (Phase.STARTS, "SlurmState", "SOMETHING_NEW")),
        ("COMPLETED", "None", (Phase.ENDED, "", "")),
        ("FAILED", "NonZeroExitCode", (Phase.ENDED, "", "")),
        ("CANCELLED", "None", (Phase.ENDED, "CancelledElsewhere", "was cancelled in Slurm")),
        ("NODE_FAIL", "None", (Phase.ENDED, "NodeFailed", "lost a node of job 7 (vm)")),
    ],
)
def test_what_slurm_says_becomes_our_reason_and_a_line(state: str, why: str, seen: tuple[Phase, str, str]) -> None:
    phase, reason, words = seen
    said = seen_of("7", state, "vm", why)
    assert (said.phase, said.reason) == (phase, reason)
    assert words in said.message
    assert "\n" not in said.message
    assert "{" not in said.message


def test_every_row_has_a_place_in_the_coordinators_own_tables() -> None:
    for row in STATES.values():
        if row.phase is Phase.WAITS:
            assert row.reason.startswith("Held")
        if row.phase is Phase.ENDED and row.reason:
            assert row.reason in RETRIED
    assert all(reason.startswith("Held") for reason, _ in PENDING.values())
    assert all(reason.startswith("Held") for _, reason, _ in PENDING_KINDS)


def fake_programs(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """Commands of Slurm's that say what they are told."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", SubmitRefused),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", NoAnswer),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", NoAnswer),
    ],
)
def test_a_refusal_is_told_from_silence(monkeypatch, tmp_path: Path, said: str, fault: type[Exception]) -> None:
    fake_programs(monkeypatch, tmp_path, sbatch=f"echo '{said}' >&2; exit 1")
    with pytest.raises(fault, match=r"^Batch job submission failed: "):
        slurm.Slurm().submit(tmp_path / "script", {})


def test_a_job_that_slurmctld_has_forgotten_is_asked_of_the_accounting(monkeypatch, tmp_path: Path) -> None:
    sacct = "case $* in *--jobs=8*) echo '8|CANCELLED by 0|vm';; esac"
    fake_programs(monkeypatch, tmp_path, squeue="echo '7|RUNNING|vm|None'", sacct=sacct)
    found = slurm.Slurm().look(["7", "8"])
    assert found["7"].phase is Phase.RUNS
    assert found["8"] == Seen(Phase.ENDED, "CancelledElsewhere", "Slurm job 8 was cancelled in Slurm")


def test_without_accounting_a_forgotten_job_is_simply_not_known(monkeypatch, tmp_path: Path) -> None:
    sacct = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
    fake_programs(monkeypatch, tmp_path, squeue="true", sacct=sacct)
    assert slurm.Slurm().look(["8"]) == {}


def test_a_cluster_of_several_node_kinds_has_the_cores_of_all(monkeypatch, tmp_path: Path) -> None:
    fake_programs(
        monkeypatch, tmp_path, sinfo="echo 0/4/0/4; echo 8/8/0/16", sbatch="true", squeue="true", scancel="true"
    )
    assert slurm.check({}) == 20


@pytest.mark.parametrize(
    "said",
    [
        "sinfo: fatal: Could not establish a configuration source",
        "slurm_load_partitions: Unable to contact slurm controller (connect failure)",
    ],
)
def test_a_slurm_that_cannot_be_asked_is_refused_with_what_to_look_at(monkeypatch, tmp_path: Path, said: str) -> None:
    fake_programs(
        monkeypatch, tmp_path, sinfo=f"echo '{said}' >&2; exit 1", sbatch="true", squeue="true", scancel="true"
    )
    with pytest.raises(local.LauncherMissing, match=r"^--launcher slurm: .*: is slurmctld up"):
        slurm.check({})


def test_a_partition_that_is_closed_for_a_while_is_no_reason_not_to_serve(monkeypatch, tmp_path: Path) -> None:
    closed = "echo 'allocation failure: Required partition not available (inactive or drain)' >&2; exit 1"
    fake_programs(monkeypatch, tmp_path, sinfo="echo 0/4/0/4", sbatch=closed, squeue="true", scancel="true")
    assert slurm.check({"partition": "cpu"}) == 4


def test_a_missing_slurm_is_named_with_what_installs_it(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(local.LauncherMissing, match=r"sbatch, .* not on PATH: .*apt-get install slurm-client"):
        slurm.check({})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["partitions=x"], "partitions=x: --launcher slurm takes partition (where jobs run); "),
        (["partition"], "partition: write it partition=VALUE"),
        (["time=1", "time=2"], "time=2: time is given twice"),
    ],
)
def test_options_that_cannot_be_read_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(OptionInvalid) as refused:
        read("slurm", slurm.OPTIONS, texts)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("value", ["a b", "x\n#SBATCH --uid=0", "$(id)", "`id`", 'a"b', ""])
def test_no_value_of_an_option_reaches_a_shell_or_another_directive(value: str) -> None:
    with pytest.raises(OptionInvalid, match=r"^partition="):
        slurm.read_options({"partition": value})
